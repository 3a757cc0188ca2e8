"""The requester's side: a call gets its replies in order and one end; a matchtag never means two calls at a time."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.rpc import calls as module
from fluxres.rpc.calls import Calls
from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag, MessageType, response_to
from fluxres.wire.payload import pack, unpack_map


def test_open_builds_the_request() -> None:
    calls = Calls()
    first = calls.open("kvs.lookup", {"key": "a"}, nodeid=3, streaming=True, upstream=True)
    second = calls.open("kvs.getroot")
    assert (first.type, first.topic, first.nodeid, first.matchtag) == (MessageType.REQUEST, "kvs.lookup", 3, 1)
    assert first.flags == MessageFlag.STREAMING | MessageFlag.UPSTREAM
    assert unpack_map(first.payload) == {"key": "a"}
    assert (second.matchtag, second.nodeid, second.payload, second.flags) == (2, NODEID_ANY, None, MessageFlag.NONE)
    assert len(calls) == 2


def test_a_plain_call_ends_with_its_response() -> None:
    calls = Calls()
    asked = calls.open("a.b")
    answer = response_to(asked, payload=pack({"x": 1}))
    reply = calls.receive(answer)
    assert reply is not None
    assert (reply.matchtag, reply.payload, reply.error, reply.last) == (asked.matchtag, {"x": 1}, None, True)
    assert calls.receive(answer) is None
    assert len(calls) == 0


def test_a_stream_ends_with_its_error() -> None:
    calls = Calls()
    asked = calls.open("a.b", streaming=True)
    for number in range(3):
        reply = calls.receive(response_to(asked, payload=pack({"n": number})))
        assert reply is not None
        assert (reply.payload, reply.last) == ({"n": number}, False)
    end = calls.receive(response_to(asked, errnum=errno.ENODATA))
    assert end is not None
    assert end.last
    assert end.error is not None
    assert end.error.errnum == errno.ENODATA
    assert end.error.text == "No data available"
    assert len(calls) == 0


def test_an_error_carries_its_text() -> None:
    calls = Calls()
    reply = calls.receive(
        response_to(calls.open("a.b"), errnum=errno.ENOENT, payload="kein Schlüssel ".encode() + b"\xff")
    )
    assert reply is not None
    assert reply.error is not None
    assert (reply.error.errnum, reply.error.text) == (errno.ENOENT, "kein Schlüssel \ufffd")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("payload", [b"\xff", pack([1]), pack({"a": 1}) + b"\x00"])
def test_a_payload_that_cannot_be_read_is_an_error_of_its_call(payload: bytes, streaming: bool) -> None:
    calls = Calls()
    other = calls.open("a.b")
    asked = calls.open("a.b", streaming=streaming)
    reply = calls.receive(response_to(asked, payload=payload))
    assert reply is not None
    assert reply.error is not None
    assert reply.error.errnum == errno.EPROTO
    assert reply.last is not streaming
    assert (calls.abandon(asked.matchtag) is not None) is streaming  # what goes on can be cancelled
    assert calls.receive(response_to(other)) is not None


@pytest.mark.parametrize("kind", [MessageType.REQUEST, MessageType.EVENT, MessageType.CONTROL])
def test_only_responses_are_taken(kind: MessageType) -> None:
    with pytest.raises(ProtocolError, match=f"cannot take a {kind.name.lower()} message"):
        Calls().receive(Message(kind))


def test_an_abandoned_call_keeps_its_matchtag_until_it_ends() -> None:
    calls = Calls()
    asked = calls.open("a.watch", streaming=True)
    cancel = calls.abandon(asked.matchtag)
    assert cancel is not None
    assert (cancel.topic, unpack_map(cancel.payload), cancel.wants_response) == ("a.cancel", {"matchtag": 1}, False)
    assert calls.abandon(asked.matchtag) is None
    assert calls.receive(response_to(asked, payload=pack({}))) is None
    assert len(calls) == 1
    assert calls.receive(response_to(asked, errnum=errno.ECANCELED)) is None
    assert len(calls) == 0
    assert calls.abandon(asked.matchtag) is None
    assert calls.abandon(99) is None


def test_a_lost_connection_ends_what_is_waited_for() -> None:
    calls = Calls()
    left, waited = calls.open("a.b"), calls.open("a.b", streaming=True)
    calls.abandon(left.matchtag)
    error = RpcError(errno.ECONNRESET)
    assert [(reply.matchtag, reply.error, reply.last) for reply in calls.lost(error)] == [
        (waited.matchtag, error, True)
    ]
    assert len(calls) == 0
    assert calls.lost(error) == []
    assert calls.receive(response_to(waited)) is None


def test_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 2)
    calls = Calls()
    first = calls.open("a.b")
    calls.abandon(calls.open("a.b").matchtag)
    with pytest.raises(RpcError, match="2 calls are out already") as caught:
        calls.open("a.b")
    assert caught.value.errnum == errno.EAGAIN
    calls.receive(response_to(first))
    calls.open("a.b")


def test_matchtags_wrap_around_and_skip_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MATCHTAG_BOUND", 4)
    calls = Calls()
    stays = calls.open("a.b")
    seen = []
    for _ in range(7):
        asked = calls.open("a.b")
        seen.append(asked.matchtag)
        calls.receive(response_to(asked))
    assert stays.matchtag == 1
    assert seen == [2, 3, 4, 2, 3, 4, 2]


@given(
    st.lists(st.tuples(st.sampled_from(["open", "answer", "end", "abandon", "lose"]), st.integers(0, 20)), max_size=50)
)
def test_every_call_that_is_waited_for_ends_once(operations: list[tuple[str, int]]) -> None:
    calls = Calls()
    asked: list[Message] = []
    ends: dict[int, int] = {}
    abandoned: set[int] = set()
    for what, which in operations:
        if what == "open":
            asked.append(calls.open("a.b", streaming=True))
        elif what == "lose":
            for reply in calls.lost(RpcError(errno.ECONNRESET)):
                ends[reply.matchtag] = ends.get(reply.matchtag, 0) + 1
        elif asked:
            message = asked[which % len(asked)]
            tag = message.matchtag
            if what == "abandon":
                if calls.abandon(tag) is not None:
                    assert tag not in ends
                    abandoned.add(tag)
            else:
                got = calls.receive(response_to(message, errnum=errno.ENODATA if what == "end" else 0))
                assert got is None or (tag not in abandoned and tag not in ends)
                if got is not None and got.last:
                    ends[tag] = 1
    for reply in calls.lost(RpcError(errno.ECONNRESET)):
        ends[reply.matchtag] = ends.get(reply.matchtag, 0) + 1
    assert ends == {message.matchtag: 1 for message in asked if message.matchtag not in abandoned}
