"""From a shell's records to the guest namespace: each byte once, in order, whatever the cursor and the batches."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.base.eventlog import Event, decode
from fluxres.exec.progress import Problem, Progress
from fluxres.exec.translate import Batch, output_header, problems_of, translate
from fluxres_shell import records
from fluxres_shell.records import DATA, EOF, EVENT, EXIT, STDERR, STDOUT


def data(seq: int, text: bytes, *, stream: str = STDOUT, task: int = 0) -> bytes:
    return records.encode(seq, 10.0 + seq, DATA, stream, task, text)


def only(lines: list[str]) -> Event:
    (event,) = decode("".join(lines))
    return event


def test_events_go_to_the_exec_eventlog() -> None:
    batch = translate([records.encode(1, 11.5, EVENT, "shell.init", {"leader-rank": 0})], cursor=0, leader=True)
    assert only(batch.events) == Event(11.5, "shell.init", {"leader-rank": 0})
    assert (batch.last, batch.timed_out, batch.exit, batch.output) == (1, False, None, [])


@pytest.mark.parametrize(("name", "timed_out"), [("shell.init", False), ("shell.timeout", True)])
def test_the_event_that_means_more(name: str, timed_out: bool) -> None:
    assert translate([records.encode(1, 1.0, EVENT, name, {})], cursor=0, leader=True).timed_out is timed_out


def test_only_the_leader_tells_of_the_beginning() -> None:
    names = ("shell.init", "shell.start", "shell.task-exit")
    payloads = [records.encode(seq, 1.0, EVENT, name, {}) for seq, name in enumerate(names, 1)]
    batch = translate(payloads, cursor=0, leader=False)
    assert only(batch.events).name == "shell.task-exit"
    assert batch.last == 3


def test_text_stays_text() -> None:
    event = only(translate([data(1, "grüß\n".encode(), stream=STDERR, task=3)], cursor=0, leader=True).output)
    assert event == Event(11.0, "data", {"stream": "stderr", "rank": "3", "data": "grüß\n"})


def test_other_bytes_are_base64() -> None:
    event = only(translate([data(1, b"\xff\x00")], cursor=0, leader=True).output)
    assert event.context == {"stream": "stdout", "rank": "0", "data": "/wA=", "encoding": "base64"}


def test_the_end_of_a_stream() -> None:
    event = only(translate([records.encode(1, 2.0, EOF, STDOUT, 4)], cursor=0, leader=True).output)
    assert event == Event(2.0, "data", {"stream": "stdout", "rank": "4", "eof": True})


def test_the_exit_record_is_last() -> None:
    batch = translate([data(1, b"x"), records.encode(2, 2.0, EXIT, 256, {"timeout": True})], cursor=0, leader=True)
    assert batch.exit is not None
    assert (batch.exit.status, batch.exit.info) == (256, {"timeout": True})
    assert (batch.last, len(batch.output)) == (2, 1)


def test_what_is_committed_is_dropped() -> None:
    payloads = [data(seq, bytes([48 + seq])) for seq in range(1, 6)]
    batch = translate(payloads, cursor=3, leader=True)
    assert batch.last == 5
    assert [event.context["data"] for event in decode("".join(batch.output))] == ["4", "5"]
    assert translate(payloads, cursor=9, leader=True) == Batch(last=9)
    assert translate([], cursor=9, leader=True) == Batch(last=9)


@pytest.mark.parametrize(
    ("payloads", "why"),
    [
        ([data(2, b"x")], "record 2: 1 was to come"),
        ([data(1, b"x"), data(3, b"x")], "record 3: 2 was to come"),
        ([records.encode(1, 1.0, EXIT, 0, {}), data(2, b"x")], "nothing after the exit record"),
        ([b"\xff"], "cannot decode"),
        ([records.encode(1, 1.0, "song")], "not a known kind"),
        ([records.encode(0, 1.0, EOF, STDOUT, 0)], "not a known kind"),
        ([records.encode(1, 1.0, EOF, "stdin", 0)], "not a known kind"),
    ],
)
def test_bad_records_are_refused(payloads: list[bytes], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        translate(payloads, cursor=0, leader=True)


def written(lines: list[str]) -> bytes:
    """The bytes that a reader of the output sees."""
    parts = []
    for event in decode("".join(lines)):
        text = str(event.context["data"])
        parts.append(base64.b64decode(text) if event.context.get("encoding") == "base64" else text.encode())
    return b"".join(parts)


@given(st.lists(st.binary(max_size=12), max_size=12), st.data())
def test_every_byte_once_whatever_is_sent_again(chunks: list[bytes], choice: st.DataObject) -> None:
    """Batches may overlap, as they do after a reattach from an older cursor."""
    payloads = [data(seq, chunk) for seq, chunk in enumerate(chunks, 1)]
    cursor, output = 0, list[str]()
    while cursor < len(payloads):
        begin = choice.draw(st.integers(0, cursor))
        end = choice.draw(st.integers(begin, len(payloads)))
        batch = translate(payloads[begin:end], cursor=cursor, leader=True)
        assert batch.last == max(cursor, end)
        cursor = batch.last
        output += batch.output
    assert written(output) == b"".join(chunks)


def test_the_header_of_an_output() -> None:
    event = only([output_header(time=3.0, tasks=2)])
    assert (event.timestamp, event.name) == (3.0, "header")
    assert event.context["version"] == 1
    assert event.context["count"] == {"stdout": 2, "stderr": 2}


TIMEOUT = Problem(type="timeout", severity=0, note="resource allocation expired")


def ended(**info: object) -> bytes:
    return records.encode(2, 2.0, EXIT, 0, info)  # type: ignore[arg-type]


def raised(severity: int) -> dict[str, object]:
    return {"type": "exec", "severity": severity, "note": "n"}


@pytest.mark.parametrize(
    ("last", "known", "expected"),
    [
        (ended(), (), (TIMEOUT,)),
        (ended(exception={"type": "timeout", "severity": 0, "note": TIMEOUT.note}), (), (TIMEOUT,)),
        (ended(exception=raised(1)), (TIMEOUT,), (Problem(type="exec", severity=1, note="n"),)),
        (ended(exception=raised(99)), (TIMEOUT,), (Problem(type="exec", severity=7, note="n"),)),
        (ended(exception=raised(-1)), (TIMEOUT,), (Problem(type="exec", severity=0, note="n"),)),
        (ended(exception="why"), (TIMEOUT,), ()),
    ],
)
def test_each_problem_is_told_once_and_can_be_logged(
    last: bytes, known: tuple[Problem, ...], expected: tuple[Problem, ...]
) -> None:
    batch = translate([records.encode(1, 1.0, EVENT, "shell.timeout", {}), last], cursor=0, leader=True)
    assert problems_of(batch, Progress(statedir="S", problems=known)) == expected
