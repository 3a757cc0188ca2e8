"""The pure parts of following a job: what is watched and printed, output bytes, the window of standard input."""

from __future__ import annotations

import base64
import errno

import pytest

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event
from fluxres.base.json import JsonValue
from fluxres.cli.exitcode import exit_code, status_text
from fluxres.cli.follow import (
    EVENTLOG,
    EXEC,
    OUTPUT,
    CloseStdin,
    Effect,
    Follow,
    FollowOptions,
    OpenStdin,
    Watch,
    Write,
)
from fluxres.cli.outcome import Outcome
from fluxres.cli.output import MAX_LINE, Output
from fluxres.cli.stdin import CHUNK, WINDOW, StdinFeed, StdinState

END = RpcError(errno.ENODATA)
NONE = RpcError(errno.ENOENT)


def event(name: str, at: float = 1.0, **context: JsonValue) -> Event:
    return Event(at, name, context)


# --- exit codes


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (0, 0, "task(s) exited with exit code 0"),
        (1 << 8, 1, "task(s) exited with exit code 1"),
        (127 << 8, 127, "task(s) exited with exit code 127"),
        (9, 137, "task(s) Killed"),
        (15 | 0x80, 143, "task(s) Terminated"),
        (143 << 8, 143, "task(s) Terminated"),
        (250 << 8, 250, "task(s) exited with exit code 250"),
    ],
)
def test_exit_codes(status: int, code: int, text: str) -> None:
    assert exit_code(status) == code
    assert status_text(status) == text


@pytest.mark.parametrize(
    ("events", "code", "success", "words"),
    [
        ([event("finish", status=0)], 0, True, "job completed successfully"),
        ([event("finish", status=512)], 2, False, "task(s) exited with exit code 2"),
        ([event("exception", severity=0, type="cancel", note="no")], 9, False, "fatal exception type=cancel no"),
        ([event("exception", severity=3, type="x"), event("finish", status=0)], 0, True, "job completed"),
        (
            [event("exception", severity=0, type="timeout"), event("finish", status=142 << 8)],
            142,
            False,
            "fatal exception type=timeout",
        ),
        ([], 1, False, "it ended without a status"),
    ],
)
def test_outcomes(events: list[Event], code: int, success: bool, words: str) -> None:
    outcome = Outcome()
    for each in events:
        outcome.take(each)
    assert outcome.exit_code(9) == code
    assert outcome.success is success
    assert outcome.words().startswith(words)


# --- following


def play(follow: Follow, *steps: tuple[str, Event | RpcError]) -> list[Effect]:
    effects: list[Effect] = []
    for path, step in steps:
        effects += follow.ended(path, step) if isinstance(step, RpcError) else follow.event(path, step)
    return effects


def done(follow: Follow) -> bool:
    """Whether it is over now: of the property, mypy believes that it stays what an assertion has found."""
    return follow.done


def log(*events: Event) -> list[tuple[str, Event | RpcError]]:
    return [(EVENTLOG, each) for each in events]


def test_a_job_is_over_when_it_has_finished_and_its_output_has_ended() -> None:
    follow = Follow(1, FollowOptions())
    assert follow.begin() == [Watch(EVENTLOG)]
    assert play(follow, *log(event("submit"), event("alloc"))) == []
    assert play(follow, *log(event("start"))) == [Watch(OUTPUT, True), OpenStdin()]
    assert play(follow, (OUTPUT, event("header")), (OUTPUT, event("data", stream="stdout", rank="0", data="x"))) == [
        Write(1, b"x")
    ]
    assert play(follow, *log(event("finish", status=0))) == [CloseStdin()]
    assert not done(follow)
    assert play(follow, (OUTPUT, END)) == []
    assert done(follow)
    assert follow.exit_code == 0


def test_output_that_ends_first_does_not_end_it() -> None:
    follow = Follow(1, FollowOptions())
    play(follow, *log(event("submit"), event("start")), (OUTPUT, event("header")), (OUTPUT, END))
    assert not done(follow)
    play(follow, *log(event("finish", status=256)))
    assert done(follow)
    assert follow.exit_code == 1


def test_a_failed_job_says_so_once() -> None:
    follow = Follow(1, FollowOptions(prog="fluxres-run"))
    words = Write(2, b"fluxres-run: task(s) exited with exit code 3\n")
    assert words not in play(follow, *log(event("start"), event("finish", status=3 << 8)))
    assert play(follow, (OUTPUT, END)) == [words]
    assert follow.exit_code == 3


def test_a_job_that_never_ran() -> None:
    follow = Follow(1, FollowOptions(prog="fluxres-run"))
    follow.begin()
    effects = play(
        follow,
        *log(
            event("submit", 10.0),
            event("exception", 12.5, type="alloc", severity=0, note="unsatisfiable"),
            event("clean", 12.6),
        ),
    )
    assert effects == [
        Write(2, "2.500s: job.exception ƒ2 type=alloc severity=0 unsatisfiable\n".encode()),
        CloseStdin(),
        Watch(OUTPUT),
        Write(2, "fluxres-run: job ƒ2 exception type=alloc unsatisfiable\n".encode()),
    ]
    assert play(follow, (EVENTLOG, END), (OUTPUT, NONE)) == [CloseStdin()]
    assert done(follow)
    assert follow.exit_code == 1


def test_notes_do_not_drive_the_terminal() -> None:
    follow = Follow(1, FollowOptions(show_events=True))
    fatal = event("exception", type="\33[1m", severity=0, note="a\nb\7")
    effects = play(follow, *log(event("submit"), fatal, event("memo", text="\33"), event("clean")))
    said = [effect.data for effect in effects if isinstance(effect, Write)]
    assert len(said) == 5, "submit, the exception, memo, clean, and how it ended"
    assert all(data.decode().removesuffix("\n").isprintable() for data in said)
    outcome = Outcome()
    outcome.take(event("exception", type="\33[1m", severity=0, note="a\nb"))
    assert outcome.words() == "fatal exception type=?[1m a?b"
    assert Output().take(event("redirect", stream="stdout", rank="0", path="/\33"), 0.0) == [
        (2, b"0: stdout redirected to /?\n")
    ]
    assert Output().take(event("data", stream="stdout", rank="0", data="\33[1m\7"), 0.0) == [(1, b"\33[1m\7")]


def test_a_fatal_exception_spoils_a_good_status() -> None:
    follow = Follow(1, FollowOptions())
    play(
        follow,
        *log(event("start"), event("exception", type="x", severity=0, note=""), event("finish", status=0)),
    )
    assert follow.exit_code == 1


def test_an_exception_after_the_end_changes_nothing() -> None:
    follow = Follow(1, FollowOptions(show_events=True))
    play(follow, *log(event("start"), event("finish", status=0)))
    assert play(follow, *log(event("exception", type="x", severity=0, note=""), event("release"))) == []
    assert follow.exit_code == 0


def test_output_that_was_never_begun_is_asked_for_at_the_end() -> None:
    follow = Follow(1, FollowOptions())
    follow.begin()
    play(follow, *log(event("start"), event("finish", status=0)))
    assert play(follow, *log(event("clean"))) == [Watch(OUTPUT)]
    play(follow, (EVENTLOG, END))
    assert not done(follow)
    play(follow, (OUTPUT, NONE))
    assert done(follow)


def test_events_are_shown_where_asked_for() -> None:
    follow = Follow(1, FollowOptions(show_events=True, show_exec=True))
    assert play(follow, *log(event("submit", 5.0, userid=1))) == [
        Write(2, b'0.000s: job.submit {"userid":1}\n'),
        Watch(EXEC, True),
    ]
    assert play(follow, (EXEC, event("init", 5.5))) == [Write(2, b"0.500s: exec.init\n")]
    play(follow, *log(event("start"), event("finish", status=0)), (OUTPUT, END))
    assert not done(follow)
    play(follow, (EXEC, END))
    assert done(follow)


def test_waiting_for_a_later_event() -> None:
    follow = Follow(1, FollowOptions(wait_event="clean"))
    play(follow, *log(event("start"), event("finish", status=0)), (OUTPUT, event("header")), (OUTPUT, END))
    assert not done(follow)
    play(follow, *log(event("clean")))
    assert done(follow)


def test_an_event_that_never_comes_does_not_keep_us() -> None:
    follow = Follow(1, FollowOptions(wait_event="nosuch"))
    play(follow, *log(event("start"), event("finish", status=0), event("clean")), (OUTPUT, END), (EVENTLOG, END))
    assert done(follow)


@pytest.mark.parametrize(("error", "text"), [(NONE, "no such job"), (RpcError(errno.EPERM, "not yours"), "not yours")])
def test_a_job_that_cannot_be_followed(error: RpcError, text: str) -> None:
    with pytest.raises(FluxresError, match=f"cannot attach to ƒ2: {text}"):
        Follow(1, FollowOptions()).ended(EVENTLOG, error)


def test_a_finish_without_status_is_an_error() -> None:
    with pytest.raises(FluxresError, match="no status"):
        Follow(1, FollowOptions()).event(EVENTLOG, event("finish"))


# --- output


def chunk(text: str, rank: str = "0", stream: str = "stdout", **more: JsonValue) -> Event:
    return Event(1.0, "data", {"stream": stream, "rank": rank, "data": text, **more})


def test_bytes_are_the_tasks_own() -> None:
    output = Output()
    raw = bytes(range(256))
    coded = chunk(base64.b64encode(raw).decode(), encoding="base64")
    assert output.take(coded, 0.0) == [(1, raw)]
    assert output.take(chunk("no newline", stream="stderr"), 0.0) == [(2, b"no newline")]
    assert output.take(chunk("", eof=True), 0.0) == []
    assert output.finish() == []


def test_data_that_is_not_as_it_should_be() -> None:
    with pytest.raises(FluxresError, match="not base64"):
        Output().take(chunk("!!", encoding="base64"), 0.0)
    with pytest.raises(FluxresError, match="not text"):
        Output().take(event("data", stream="stdout", rank="0", data=1), 0.0)


def test_labels_stand_before_whole_lines() -> None:
    output = Output(label=True)
    assert output.take(chunk("a\nb"), 0.0) == [(1, b"0: a\n")]
    assert output.take(chunk("x\n", rank="1"), 0.0) == [(1, b"1: x\n")]
    assert output.take(chunk("c\n\nd"), 0.0) == [(1, b"0: bc\n0: \n")]
    assert output.take(chunk("", eof=True), 0.0) == [(1, b"0: d")]
    assert output.take(chunk("\r50%\r", rank="2"), 0.0) == []
    assert output.finish() == [(1, b"2: \r50%\r")]


def test_labelled_lines_without_end_are_bounded() -> None:
    output = Output(label=True)
    assert output.take(chunk("y" * MAX_LINE), 0.0) == []
    ((_, shown),) = output.take(chunk("y"), 0.0)
    assert shown == b"0: " + b"y" * (MAX_LINE + 1)


def test_notices() -> None:
    told = event("redirect", stream="stdout", rank="0-3", path="/tmp/x")
    logged = event("log", 7.5, level=4, rank=0, component="pmi", message="odd")
    assert Output().take(told, 0.0) == [(2, b"0-3: stdout redirected to /tmp/x\n")]
    assert Output().take(logged, 5.0) == [(2, b"2.500s: fluxres-shell[0]: WARN: pmi: odd\n")]
    assert Output(quiet=True).take(told, 0.0) == []


# --- standard input


def test_offsets_count_bytes_and_the_window_bounds_them() -> None:
    feed = StdinFeed(7)
    sizes = []
    while feed.room > 0:
        request = feed.data(b"x" * feed.room)
        sizes.append((request["offset"], len(str(request["data"]))))
    assert sizes == [(at, CHUNK) for at in range(0, WINDOW, CHUNK)]
    assert feed.answered(CHUNK) == []
    assert feed.room == CHUNK
    assert feed.unanswered == WINDOW - CHUNK


def test_bytes_that_are_no_text_are_base64() -> None:
    request = StdinFeed(7).data(b"\xff\x00")
    assert request == {"id": 7, "offset": 0, "eof": False, "data": "/wA=", "encoding": "base64"}


def test_the_end_closes_the_feed() -> None:
    feed = StdinFeed(7)
    feed.data(b"ab")
    assert feed.data(b"") == {"id": 7, "offset": 2, "eof": True, "data": ""}
    assert feed.state is StdinState.ENDED
    assert feed.room == 0


def test_a_job_that_had_input_is_asked_where_it_stands() -> None:
    feed = StdinFeed(7)
    assert feed.resume() == {"id": 7, "offset": -1, "eof": False, "data": ""}
    assert feed.room == 0
    feed.answered(100)
    assert feed.data(b"x")["offset"] == 100


def test_a_request_refused_for_what_is_missing_before_it_is_sent_again() -> None:
    feed = StdinFeed(7)
    first, second = feed.data(b"aa"), feed.data(b"bb")
    assert feed.rejected(second)
    assert not feed.rejected(first)
    assert feed.answered(2) == [second]
    assert feed.answered(4) == []
