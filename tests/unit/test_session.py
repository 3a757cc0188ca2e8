"""fluxres.session: what a client prints does not depend on how often its connection was lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakebroker import Answer, FakeBroker

from fluxres.base.errors import FluxresError, RpcError
from fluxres.session import Session
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap

WATCH = "job-info.eventlog-watch"
LINES = [f"event {n}" for n in range(6)]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    (tmp_path / "run").mkdir()
    with FakeBroker(tmp_path / "run" / "local-0") as made:
        yield made


class Eventlog:
    """A watch that goes on after `position`; its connection is cut after `cuts` responses."""

    def __init__(self, broker: FakeBroker, cuts: list[int]) -> None:
        self.broker = broker
        self.cuts = cuts
        broker.handlers[WATCH] = self.watch

    def watch(self, _message: Message, payload: WireMap) -> Iterator[Answer]:
        position = payload.get("position", [0, 0])
        assert isinstance(position, list)
        start = position[0]
        assert isinstance(start, int)
        for sent, line in enumerate(LINES[start:]):
            if self.cuts and sent == self.cuts[0]:
                del self.cuts[0]
                self.broker.cut()
                return
            yield {"event": line, "position": [start + sent + 1, 0]}
        yield errno.ENODATA


@pytest.mark.parametrize("cut", range(len(LINES)))
def test_a_stream_goes_on_where_it_was(broker: FakeBroker, cut: int) -> None:
    lost: list[str] = []
    Eventlog(broker, [cut, 0, 1])
    with Session(broker.uri, on_lost=lost.append) as session:
        got = [each["event"] for each in session.follow(WATCH, {"id": 1, "path": "eventlog", "flags": 0})]
    assert got == LINES
    assert len(lost) >= 2


def test_several_streams_at_once(broker: FakeBroker) -> None:
    Eventlog(broker, [2, 1, 3])
    with Session(broker.uri) as session:
        got: dict[int, list[str]] = {session.begin(WATCH, {"id": n}, streaming=True): [] for n in range(3)}
        ended = 0
        while ended < len(got):
            reply = session.receive(10)
            assert reply is not None
            if reply.last:
                assert reply.error is not None
                assert reply.error.errnum == errno.ENODATA
                ended += 1
            else:
                got[reply.matchtag].append(str(reply.payload["event"]))
    assert list(got.values()) == [LINES] * 3


def test_an_idempotent_call_is_sent_again(broker: FakeBroker) -> None:
    asked: list[WireMap] = []

    def submit(_message: Message, payload: WireMap) -> Iterator[Answer]:
        asked.append(payload)
        if len(asked) == 1:
            broker.cut()
        yield {"id": 7}

    broker.handlers["job-ingest.submit"] = submit
    with Session(broker.uri) as session:
        assert session.call("job-ingest.submit", {"key": "k"}, idempotent=True) == {"id": 7}
    assert asked == [{"key": "k"}] * 2


def test_another_call_is_not(broker: FakeBroker) -> None:
    def kill(_message: Message, _payload: WireMap) -> Iterator[Answer]:
        broker.cut()
        yield {}

    broker.handlers["job-manager.kill"] = kill
    with Session(broker.uri) as session:
        with pytest.raises(RpcError, match=r"the connection was lost before job-manager\.kill") as caught:
            session.call("job-manager.kill", {"id": 1})
        assert caught.value.errnum == errno.ECONNRESET
        broker.on("attr.get", {"value": "x"})
        assert session.call("attr.get") == {"value": "x"}


@pytest.mark.parametrize("errnum", [errno.EHOSTUNREACH, errno.ENOSYS, errno.EAGAIN])
def test_not_now_is_asked_again(broker: FakeBroker, errnum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.session.RETRY_EVERY", 0.01)
    answers: list[Answer] = [errnum, errnum, {"id": 7}]
    broker.handlers["job-ingest.submit"] = lambda _message, _payload: [answers.pop(0)]
    with Session(broker.uri) as session:
        assert session.call("job-ingest.submit", {}, idempotent=True) == {"id": 7}


def test_not_now_is_not_asked_for_ever(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.session.RETRY_EVERY", 0.01)
    monkeypatch.setattr("fluxres.session.NOT_NOW", {errno.ENOSYS: 0.05})
    with Session(broker.uri) as session, pytest.raises(RpcError) as caught:
        session.call("nothing.here", {}, idempotent=True)
    assert caught.value.errnum == errno.ENOSYS
    assert len(broker.seen) > 1


def test_other_errors_are_final(broker: FakeBroker) -> None:
    broker.on("job-info.lookup", (errno.ENOENT, "no job"))
    with Session(broker.uri) as session, pytest.raises(RpcError, match="no job"):
        session.call("job-info.lookup", {}, idempotent=True)


def test_a_broker_that_is_away_for_a_while(broker: FakeBroker) -> None:
    broker.on(WATCH, {"event": LINES[0], "position": [1, 0]})
    with Session(broker.uri) as session:
        session.begin(WATCH, {"id": 1}, streaming=True)
        assert session.receive(10) is not None
        broker.stop()
        assert session.receive(0.05) is None
        assert session.fileno() == -1
        assert session.poll_timeout() is not None
        Eventlog(broker, [])
        broker.start()
        got = []
        while (reply := session.receive(10)) is not None and not reply.last:
            got.append(reply.payload["event"])
        assert got == LINES[1:]


def test_end_forgets_a_call(broker: FakeBroker) -> None:
    broker.on("kvs-watch.lookup", {"val": 1})
    broker.on("attr.get", {"value": "x"})
    with Session(broker.uri) as session:
        handle = session.begin("kvs-watch.lookup", {}, streaming=True)
        assert session.receive(10) is not None
        session.end(handle)
        session.end(handle)
        assert session.call("attr.get") == {"value": "x"}
        assert session.receive(0) is None
    assert [topic for topic, _ in broker.seen][1] == "kvs-watch.cancel"


def test_gives_up_when_the_instance_took_its_directory_along(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxres.session.GONE_FOR", 0.05)
    monkeypatch.setattr("fluxres.session.RECONNECT_EVERY", 0.01)
    with Session(broker.uri) as session:
        broker.stop()
        shutil.rmtree(broker.path.parent)
        with pytest.raises(FluxresError, match=r"cannot reconnect to .*: its directory is gone"):
            session.call("attr.get", {}, idempotent=True)


def test_gives_up_in_the_end(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.session.RECONNECT_FOR", 0.05)
    monkeypatch.setattr("fluxres.session.RECONNECT_EVERY", 0.01)
    with Session(broker.uri) as session:
        broker.stop()
        with pytest.raises(FluxresError, match=r"cannot connect to .*given up after 0\.05s"):
            session.call("attr.get", {}, idempotent=True)
