"""The messages of the feed: as the schema says, in bounded parts, encoded once; and those of clients, strictly read."""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest import mock

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viewkit import NOW, job, messages_of, validator

from fluxres.base.errors import ProtocolError
from fluxres.base.json import JsonObject
from fluxres.job.result import JobResult, result
from fluxres.job.value import JobState
from fluxres.status import asks, messages
from fluxres.status.asks import BadMessage, Follow, Subscribe, Unsubscribe, WatchRequest, parse
from fluxres.status.messages import ENTRY, PART, Encoder, SnapshotPart, bodies, parse_body, whole
from fluxres.status.picture import Picture
from fluxres.status.select import Filter, as_job
from fluxres.status.view import TOPICS, Cursor, Delta, Position, Snapshot, View

SERVER = validator("serverMessage")
CLIENT = validator("clientMessage")
RPC = validator("watchResponse")

DOCUMENTS: dict[str, dict[str, JsonObject]] = {
    "instance": {
        "about": {"instance": "test", "size": 2, "version": "0.1", "host": "a", "uuid": "u", "started": 1.5},
        "jobs": {"depend": 0, "priority": 0, "sched": 1, "run": 2, "cleanup": 0, "inactive": 3, "submitted": 6},
        "queue": {"enabled": True, "started": False, "reason": "maintenance"},
    },
    "overlay": {
        "0": {"rank": 0, "parent": None, "status": "partial", "since": 2.5, "torpid": False, "host": "a"},
        "1": {"rank": 1, "parent": 0, "status": "lost", "torpid": False, "error": "it was killed", "since": 3.0},
        "3": {"rank": 3, "parent": 1, "status": "lost", "torpid": False, "ghost": True},
    },
    "resources": {
        "0": {
            "rank": 0,
            "host": "a",
            "cores": 4,
            "cores_used": 1,
            "gpus": 0,
            "gpus_used": 0,
            "online": True,
            "torpid": False,
            "properties": ["big"],
            "drained": "",
        },
    },
    "jobs": {"1": job(1, detached="0-1", restarts=2), "2": job(2, "INACTIVE", result="COMPLETED", waitstatus=0)},
    "events": {"5.0": {"t": 4.5, "name": "drain", "context": {"idset": "0", "reason": "x"}}},
    "log": {"17": {"line": "2026 info: started"}},
}
NODES = validator("documents")


def feed(jobs: int = 0, size: int = 0) -> View:
    """A view of `DOCUMENTS`, or of so many jobs with names of that many characters."""
    view = View("e")
    view.change({"jobs": {str(n): job(n, name="x" * size) for n in range(jobs)}} if jobs else DOCUMENTS)
    return view


def first(view: View, select: Filter | None = None) -> Snapshot:
    body = Cursor(view, TOPICS, select).next()
    assert isinstance(body, Snapshot)
    return body


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SERVER.schema)


def test_documents_are_as_the_schema_says() -> None:
    NODES.validate(DOCUMENTS)
    assert not NODES.is_valid({"jobs": {"1": {"id": "ƒ2"}}})


@pytest.mark.parametrize(
    "data",
    [
        messages.hello(software="fluxres 0.1", instance="test", rank=0, size=2, now=NOW),
        messages.job(3, "eventlog", [{"timestamp": 1.5, "name": "submit", "context": {}}], (4, 1)),
        messages.ended(3, "the job is done"),
        messages.error(None, "cannot take this message: why"),
        messages.error(3, "cannot watch 'x'"),
    ],
)
def test_small_messages(data: bytes) -> None:
    SERVER.validate(json.loads(data))


def test_snapshots_and_deltas_are_as_the_schema_says() -> None:
    view = feed()
    reader = Cursor(view, TOPICS)
    picture, mirrored = Picture(), Picture()
    for change in ({}, {"jobs": {"1": job(1, "CLEANUP")}}):
        view.change(change, {"overlay": ["3"]} if change else {})
        body = reader.next()
        assert body is not None
        for message in messages_of(body):
            SERVER.validate(message)
            picture.apply(message)
        for payload in bodies(body, NOW):
            RPC.validate(json.loads(json.dumps(payload)))
            mirrored.apply(payload)
    assert picture.documents == mirrored.documents == {topic: dict(view.documents(topic)) for topic in TOPICS}
    assert picture.now == NOW


def test_parts_are_bounded_and_make_the_whole() -> None:
    view = feed(jobs=1000, size=500)
    parts = list(Encoder().parts(first(view), 1, NOW))
    assert len(parts) > 5
    assert all(len(part) < PART + 1000 for part in parts)
    read = [json.loads(part) for part in parts]
    assert [each["part"] for each in read] == list(range(len(parts)))
    assert [each["more"] for each in read] == [True] * (len(parts) - 1) + [False]
    assert {key for each in read for key in each["docs"]["jobs"]} == set(view.documents("jobs"))


def test_a_large_delta_counts_with_its_last_part() -> None:
    view = View("e")
    reader = Cursor(view, TOPICS, position=view.position)
    view.change({"jobs": {str(n): job(n, name="x" * 500) for n in range(300)}})
    body = reader.next()
    assert isinstance(body, Delta)
    parts = list(messages_of(body))
    assert [part["position"] for part in parts[:-1]] == [["e", 0]] * (len(parts) - 1)
    assert len(parts) > 1
    assert parts[-1]["position"] == ["e", 1]
    picture = Picture()
    picture.apply(next(messages_of(first(View("e")))))
    for part in parts[:-1]:
        assert not picture.apply(part)
        assert picture.documents == {}
    assert picture.apply(parts[-1])
    assert len(picture.topic("jobs")) == 300


def test_a_document_larger_than_a_part_has_one_of_its_own() -> None:
    parts = [json.loads(part) for part in Encoder().parts(first(feed(jobs=3, size=PART)), 1, NOW)]
    assert [len(part["docs"]["jobs"]) for part in parts] == [1, 1, 1]


def test_no_part_examines_many_documents() -> None:
    with mock.patch.object(messages, "EXAMINED", 10):
        parts = list(messages_of(first(feed(jobs=95), Filter.parse({"ids": [94]}))))
    assert len(parts) == 10
    assert [part["docs"] for part in parts if part["docs"]] == [{"jobs": {"94": job(94, name="")}}]


def test_many_readers_cost_one_encoding() -> None:
    view, encoder = feed(jobs=200, size=500), Encoder()
    with mock.patch.object(messages, "_cut", side_effect=messages._cut) as cut:
        told = [[*encoder.parts(first(view), number, NOW)] for number in range(20)]
        encodings = cut.call_count
        assert encodings == len(told[0]) > 1
        readers = [Cursor(view, TOPICS, position=view.position) for _ in range(20)]
        view.change({"jobs": {"1": job(1)}})
        deltas = [b"".join(encoder.parts(body, 9, NOW)) for reader in readers if (body := reader.next()) is not None]
        assert cut.call_count == encodings + 1
    assert len(set(deltas)) == 1
    assert json.loads(told[19][0])["id"] == 19


def test_the_cache_is_bounded() -> None:
    view, encoder = feed(jobs=500, size=500), Encoder(cache=2 * PART)
    parts = [json.loads(part) for _ in range(2) for part in encoder.parts(first(view), 1, NOW)]
    assert sum(len(part["docs"]["jobs"]) for part in parts) == 1000
    assert 0 < encoder._size == sum(len(part.tail) + ENTRY for part in encoder._parts.values()) <= 2 * PART


def test_everything_as_one_object() -> None:
    view = feed()
    pieces = list(whole(view, [topic for topic in TOPICS if topic != "log"], NOW))
    status = json.loads(b"".join(pieces))
    validator("status").validate(status)
    assert status["docs"] == {topic: docs for topic, docs in DOCUMENTS.items() if topic != "log"}
    pieces = list(whole(feed(jobs=500, size=500), ["jobs", "overlay"], NOW))
    assert max(map(len, pieces)) < PART + 3000
    assert len(json.loads(b"".join(pieces))["docs"]["jobs"]) == 500


def test_a_part_of_a_snapshot_over_rpc_has_no_position() -> None:
    """A session resumes with the last position it has seen."""
    payloads = list(bodies(first(feed(jobs=300, size=500)), NOW))
    assert ["position" in payload for payload in payloads] == [False] * (len(payloads) - 1) + [True]
    assert len(payloads) > 1
    assert isinstance(parse_body(payloads[0]), SnapshotPart)


@pytest.mark.parametrize("payload", [{}, {"type": "snapshot"}, {"type": "delta", "prev": "x"}, {"type": "other"}])
def test_bodies_that_make_no_sense(payload: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"status\.watch"):
        parse_body(payload)  # type: ignore[arg-type]


def snapshot(part: int = 0, more: bool = False) -> JsonObject:
    return {"type": "snapshot", "part": part, "more": more, "position": ["e", 4], "docs": {}, "why": "first"}


def delta(prev: int, part: int = 0) -> JsonObject:
    return {"type": "delta", "part": part, "more": False, "prev": prev, "position": ["e", 9], "set": {}, "delete": {}}


@pytest.mark.parametrize("wrong", [delta(3), delta(4, part=1), snapshot(part=1), {"type": "hello"}])
def test_a_picture_refuses_what_does_not_go_on_from_it(wrong: JsonObject) -> None:
    picture = Picture()
    picture.apply(snapshot())
    with pytest.raises(ValueError, match="cannot apply"):
        picture.apply(wrong)
    assert picture.position == ("e", 4)
    assert not picture.apply(delta(4))
    assert picture.position == ("e", 9)


def test_half_a_snapshot_is_forgotten() -> None:
    picture = Picture()
    picture.apply({**snapshot(more=True), "docs": {"jobs": {"1": job(1)}}})
    assert picture.position is None
    assert picture.apply({**snapshot(), "docs": {"jobs": {"2": job(2)}}})
    assert list(picture.topic("jobs")) == ["2"]


# --- what clients say


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"type": "subscribe", "id": 1, "topics": ["log", "jobs"]}, Subscribe),
        (
            {"type": "subscribe", "id": 0, "topics": ["jobs"], "jobs": {"userid": [5]}, "position": ["e", 3]},
            Subscribe,
        ),
        ({"type": "follow", "id": 2, "job": "ƒ2x"}, Follow),
        ({"type": "follow", "id": 2, "job": "123", "position": {"eventlog": [3, 1]}}, Follow),
        ({"type": "unsubscribe", "id": 2**53 - 1}, Unsubscribe),
    ],
)
def test_messages_of_clients(message: JsonObject, kind: type[object]) -> None:
    CLIENT.validate(message)
    assert isinstance(parse(json.dumps(message)), kind)


def test_what_a_subscription_says() -> None:
    ask = parse(b'{"type":"subscribe","id":7,"topics":["jobs","overlay"],"jobs":{"ids":[1]},"position":["e",3]}')
    assert isinstance(ask, Subscribe)
    assert (ask.id, ask.watch.topics, ask.watch.position) == (7, ("overlay", "jobs"), Position("e", 3))
    assert ask.watch.select is not None
    assert ask.watch.select.text == '{"ids":[1]}'
    assert WatchRequest(topics=("jobs",), jobs={}).read().select is None


WRONG: list[tuple[str, str, int | None]] = [
    ("", "JSON|truncated", None),
    ("[]", "object", None),
    ('{"id":1}', "type", 1),
    ('{"type":"submit","id":1}', "submit", 1),
    ('{"type":"subscribe","topics":["jobs"]}', "id", None),
    ('{"type":"subscribe","id":-1,"topics":["jobs"]}', "id", None),
    ('{"type":"subscribe","id":9007199254740992,"topics":["jobs"]}', "id", None),
    ('{"type":"subscribe","id":"1","topics":["jobs"]}', "id", None),
    ('{"type":"subscribe","id":1,"topics":[]}', "name some of", 1),
    ('{"type":"subscribe","id":1,"topics":["everything"]}', "everything", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"extra":1}', "extra", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"jobs":{"color":["red"]}}', "color", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"position":["",1]}', "position", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"position":["e",-1]}', "position", 1),
    ('{"type":"follow","id":1,"job":"what?"}', "jobid", 1),
    ('{"type":"follow","id":1,"job":"1","position":{"guest.input":[0,0]}}', "guest.input", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"jobs":' + '{"not":[' * 20 + "]}" * 20 + "}", "select jobs", 1),
    ('{"type":"subscribe","id":1,"topics":["jobs"],"jobs":{"ids":[' + "[" * 900 + "]" * 900 + "]}}", "jobid|nested", 1),
    (
        '{"type":"subscribe","id":1,"topics":["jobs"],"jobs":{"ids":[' + "[" * 5000 + "]" * 5000 + "]}}",
        "recursion",
        None,
    ),
    ('{"type":"unsubscribe","id":1,"x":"' + "x" * asks.MAX_MESSAGE + '"}', "longer than", None),
]


@pytest.mark.parametrize(("data", "why", "subscription"), WRONG)
def test_messages_that_are_refused(data: str, why: str, subscription: int | None) -> None:
    with pytest.raises(BadMessage, match=why) as caught:
        parse(data)
    assert str(caught.value).startswith("cannot ")
    assert caught.value.subscription == subscription


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(BadMessage):
        parse(b'{"type":"follow","id":1,"job":"\xff\xfe"}')


@given(st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_nothing_but_bad_message_is_raised(data: str | bytes) -> None:
    with pytest.raises(BadMessage):
        parse(data)


# --- filters


@pytest.mark.parametrize("how", JobResult)
def test_a_document_is_seen_as_its_job(how: JobResult) -> None:
    seen = as_job(job(5, "INACTIVE", 7, result=how.name))
    assert (seen.id, seen.state, seen.userid, result(seen)) == (5, JobState.INACTIVE, 7, how)


def test_what_is_no_job_is_not_filtered() -> None:
    select = Filter.parse({"states": ["run"]})
    assert select is not None
    assert select.matches("overlay", {"rank": 1})
    assert not select.matches("jobs", {})
    assert select == Filter.parse({"states": ["run"]})


@pytest.mark.parametrize(
    ("constraint", "matching"),
    [
        ({"states": ["active"]}, "12"),
        ({"results": ["failed"]}, "3"),
        ({"userid": [2]}, "23"),
        ({"ids": ["1", "ƒ4"]}, "13"),
        ({"and": [{"userid": [2]}, {"not": [{"states": ["inactive"]}]}]}, "2"),
    ],
)
def test_filters(constraint: JsonObject, matching: str) -> None:
    jobs = [job(1), job(2, "SCHED", 2), job(3, "INACTIVE", 2, result="FAILED")]
    select = Filter.parse(constraint)
    assert select is not None
    matches: Callable[[str, JsonObject], bool] = select.matches
    assert "".join(str(each["dec"]) for each in jobs if matches("jobs", each)) == matching


def test_a_constraint_is_bounded() -> None:
    with pytest.raises(ValueError, match="characters"):
        Filter.parse({"ids": [*range(10_000)]})
