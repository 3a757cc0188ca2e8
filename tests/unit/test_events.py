"""Events: numbered at rank 0, passed down a chain of brokers, seen by those who subscribe and may see them."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from linkkit import Chain
from rpckit import OWNER, STREAMING, Peer, settled

from fluxres.base.errors import RpcError
from fluxres.rpc import events as module
from fluxres.rpc.events import Events
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.wire.messages import Message, MessageFlag, Role, event
from fluxres.wire.payload import WireMap, unpack_map

GUEST = 2000


class Tree:
    """A chain of three brokers, each with its events and a handle."""

    def __init__(self) -> None:
        self.chain = Chain(3)
        self.events = [Events(router, self._forward(rank)) for rank, router in enumerate(self.chain.routers)]
        self.handles = [Handle(router, "handle", OWNER) for router in self.chain.routers]

    def _forward(self, rank: int) -> module.Subscriber:
        child = self.chain.down.get(rank)
        return child.deliver if child is not None else lambda _message: None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery, self.chain.running():
            for each in self.events:
                await nursery.start(each.service.run)
            yield
            nursery.cancel_scope.cancel()


def alone(rank: int = 0) -> tuple[Events, list[Message]]:
    """The events of one broker, and what it forwards."""
    forwarded: list[Message] = []
    return Events(Router(rank=rank, size=2), forwarded.append), forwarded


async def take(stream: AsyncIterator[WireMap], number: int) -> list[WireMap]:
    return [await anext(stream) for _ in range(number)]


def test_rank_0_numbers_events_and_hands_them_on() -> None:
    events, forwarded = alone()
    got: list[Message] = []
    unsubscribe = events.subscribe("job", got.append)
    assert [events.publish(topic, {}, userid=5, rolemask=2) for topic in ("job.one", "other", "job.two")] == [1, 2, 3]
    unsubscribe()
    unsubscribe()
    events.publish("job.three", {"n": 3}, userid=5, rolemask=2)
    assert [(m.topic, m.sequence, m.userid, m.rolemask) for m in got] == [("job.one", 1, 5, 2), ("job.two", 3, 5, 2)]
    assert [m.sequence for m in forwarded] == [1, 2, 3, 4]
    assert unpack_map(forwarded[3].payload) == {"n": 3}
    assert events.last == 4


def test_other_ranks_take_events_and_publish_none() -> None:
    events, forwarded = alone(rank=1)
    got: list[int] = []
    events.subscribe("", lambda message: got.append(message.sequence))
    for sequence in (7, 8, 8, 3, 9):
        events.receive(event("x", None, sequence=sequence, userid=1, rolemask=0))
    assert got == [message.sequence for message in forwarded] == [7, 8, 9]
    with pytest.raises(ValueError, match="rank 0 numbers the events"):
        events.publish("x", {}, userid=1, rolemask=0)


def test_who_unsubscribes_while_an_event_is_handed_out() -> None:
    events, _ = alone()
    unsubscribe = events.subscribe("", lambda _message: unsubscribe())
    got: list[Message] = []
    events.subscribe("", got.append)
    events.publish("x", {}, userid=1, rolemask=0)
    events.publish("y", {}, userid=1, rolemask=0)
    assert len(got) == 2


async def test_events_reach_subscribers_at_every_rank_whoever_publishes() -> None:
    tree = Tree()
    async with tree.running():
        async with (
            tree.handles[0].stream("event.subscribe", {"topic": "lab."}) as top,
            tree.handles[2].stream("event.subscribe", {"topic": "lab.b"}) as leaf,
        ):
            assert await take(top, 1) == await take(leaf, 1) == [{"seq": 0}]
            for number, (rank, topic) in enumerate([(2, "lab.a"), (0, "lab.b"), (1, "lab.bc"), (2, "other")], 1):
                payload: WireMap = {"topic": topic, "payload": {"n": number}}
                assert await tree.handles[rank].call("event.publish", payload) == {"seq": number}
            assert await take(top, 3) == [
                {"topic": "lab.a", "seq": 1, "payload": {"n": 1}},
                {"topic": "lab.b", "seq": 2, "payload": {"n": 2}},
                {"topic": "lab.bc", "seq": 3, "payload": {"n": 3}},
            ]
            assert [reply["seq"] for reply in await take(leaf, 2)] == [2, 3]
        async with tree.handles[1].stream("event.subscribe") as late:
            assert await take(late, 1) == [{"seq": 4}]
        await settled()
        assert set(tree.chain.left_over()) == {0}
        assert not any(each._subscribers for each in tree.events)
        assert all(each.service.queue()[0] == 0 for each in tree.events)


async def test_a_subscription_that_waits_for_its_first_event_is_no_unanswered_request() -> None:
    tree = Tree()
    async with tree.running(), tree.handles[0].stream("event.subscribe", {}) as stream:
        await anext(stream)
        assert tree.events[0].service.waiting() == []


@pytest.mark.parametrize(
    ("payload", "role", "errnum"),
    [
        ({"topic": "x"}, Role.USER, errno.EPERM),
        ({"topic": ""}, Role.OWNER, errno.EPROTO),
        ({"topic": "x" * 256}, Role.OWNER, errno.EPROTO),
        ({}, Role.OWNER, errno.EPROTO),
        ({"topic": "x", "flags": MessageFlag.STREAMING}, Role.OWNER, errno.EPROTO),
        ({"topic": "x", "payload": [1]}, Role.OWNER, errno.EPROTO),
        ({"topic": "x", "payload": {"big": bytes(module.MAX_EVENT)}}, Role.OWNER, errno.EMSGSIZE),
    ],
)
async def test_what_cannot_be_published(payload: WireMap, role: int, errnum: int) -> None:
    tree = Tree()
    client = Peer(tree.chain.routers[2], "client")
    async with tree.running():
        client.send("event.publish", payload, role=role)
        await settled()
        assert client.errnums() == [errnum]
        assert tree.events[0].last == 0


async def test_a_private_event_is_for_its_user_and_the_owner() -> None:
    tree = Tree()
    async with tree.running():
        owner, guest, other = (Peer(tree.chain.routers[2], name) for name in ("owner", "guest", "other"))
        owner.send("event.subscribe", {}, flags=STREAMING)
        for client, userid in ((guest, GUEST), (other, GUEST + 1)):
            client.send("event.subscribe", {}, flags=STREAMING, userid=userid, role=Role.USER)
        await settled()
        tree.events[0].publish("mine", {}, userid=GUEST, rolemask=Role.USER, private=True)
        flagged: WireMap = {"topic": "owners", "flags": MessageFlag.PRIVATE}
        await tree.handles[0].call("event.publish", flagged)
        tree.events[0].publish("all", {}, userid=OWNER, rolemask=Role.OWNER)
        await settled()
        seen = [[unpack_map(m.payload).get("topic") for m in client.got[1:]] for client in (owner, guest, other)]
        assert seen == [["mine", "owners", "all"], ["mine", "all"], ["all"]]


@pytest.mark.parametrize("settle", [False, True], ids=["while it is sending", "while it waits for events"])
async def test_a_subscriber_that_does_not_keep_up_is_ended(monkeypatch: pytest.MonkeyPatch, settle: bool) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 10)
    tree = Tree()
    async with tree.running(), tree.handles[0].stream("event.subscribe", {"topic": ""}) as stream:
        await anext(stream)
        if settle:
            await settled()
        for _ in range(1000):
            tree.events[0].publish("x", {}, userid=1, rolemask=0)
        seen: list[WireMap] = []
        with pytest.raises(RpcError, match="more than 10 events wait") as caught:
            seen.extend([reply async for reply in stream])
        assert caught.value.errnum == errno.ENOBUFS
        await settled()
        assert not tree.events[0]._subscribers


async def test_events_of_a_burst_are_seen_in_order() -> None:
    tree = Tree()
    async with tree.running(), tree.handles[2].stream("event.subscribe", {"topic": ""}) as stream:
        await anext(stream)
        for number in range(500):
            tree.events[0].publish("x", {"n": number}, userid=1, rolemask=0)
        seen = [reply["seq"] for reply in await take(stream, 500)]
        assert all(later == sooner + 1 for sooner, later in itertools.pairwise(map(int, map(str, seen))))
