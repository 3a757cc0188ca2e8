"""Links: what they send and count, and streams across several of them, of readers that are slow or gone."""

from __future__ import annotations

import errno

import pytest
import trio
from linkkit import Chain, MemoryConnection, connected, controls
from rpckit import OWNER, STREAMING, settled

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.overlay.control import CREDIT, HEARTBEAT, Credit
from fluxres.overlay.link import Link
from fluxres.overlay.window import STEP, WINDOW
from fluxres.rpc.handle import STREAM_BUFFER, Handle
from fluxres.rpc.server import Request, Service
from fluxres.wire.codec import decode, encode
from fluxres.wire.messages import Message, control, request, response_to

CHUNK = bytes(8 * 1024)
MANY = 400
"""Chunks of a long stream: many windows."""


@pytest.fixture
def ends() -> tuple[Link, MemoryConnection]:
    """A link, and the other end of its connection."""
    mine, theirs = connected()
    return Link(mine, id="uuid", rank=3), theirs


def stream(tag: int = 1) -> Message:
    """A streaming request as it is at the broker that answers it over the link."""
    return request("toy.flood", matchtag=tag, flags=STREAMING)._replace(route=("client", "uuid"))


def part(asked: Message, size: int = WINDOW + 1, errnum: int = 0) -> Message:
    """A response to `asked`, as the router hands it to the link."""
    return response_to(asked, payload=bytes(size), errnum=errnum)._replace(route=asked.route[:-1])


def test_what_is_sent_arrives_and_is_counted(ends: tuple[Link, MemoryConnection]) -> None:
    link, theirs = ends
    asked = stream()
    link.deliver(asked)
    link.control(HEARTBEAT)
    assert [decode(body) for body in theirs.inbox] == [asked, control(HEARTBEAT)]
    assert (link.sent, link.bytes_sent) == (2, sum(map(len, theirs.inbox)))
    assert link.hop is link
    body = encode(asked)
    assert link.decode(body) == asked
    with pytest.raises(ProtocolError):
        link.decode(b"x")
    assert (link.received, link.bytes_received) == (2, len(body) + 1)


async def test_a_producer_waits_for_credit(ends: tuple[Link, MemoryConnection]) -> None:
    link, _ = ends
    one, two = stream(1), stream(2)
    passed: list[int] = []

    async def wait(asked: Message) -> None:
        await link.drained(asked)
        passed.append(asked.matchtag)

    async with trio.open_nursery() as nursery:
        link.deliver(part(one))
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, two)
        link.on_room(one, lambda: passed.append(-1))
        await settled()
        assert passed == [2]
        link.credit(credit(one, STEP))
        await settled()
        assert sorted(passed) == [-1, 1, 2]


def credit(asked: Message, size: int) -> Message:
    return control(CREDIT, payload=Credit(route=asked.route[:-1], matchtag=asked.matchtag, size=size).encode())


@pytest.mark.parametrize("how", ["ended", "closed"])
async def test_nobody_waits_for_a_stream_or_a_link_that_has_ended(
    ends: tuple[Link, MemoryConnection], how: str
) -> None:
    link, theirs = ends
    asked = stream()
    link.deliver(part(asked))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.drained, asked)
        await settled()
        if how == "ended":
            link.deliver(part(asked, errnum=errno.ENODATA))
            assert link.streams() == (0, 0)
        else:
            link.close()
            assert theirs.closed
    link.on_room(asked, link.close)
    await link.drained(asked)


async def test_a_producer_waits_for_the_connection_as_well(ends: tuple[Link, MemoryConnection]) -> None:
    link, _ = ends
    connection = link.connection
    assert isinstance(connection, MemoryConnection)
    connection.open_for_more = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.drained, stream())
        await settled()
        assert len(nursery.child_tasks) == 1
        connection.open_for_more.set()


def test_a_malformed_credit_is_an_error_of_the_peer(ends: tuple[Link, MemoryConnection]) -> None:
    with pytest.raises(ProtocolError):
        ends[0].credit(control(CREDIT, payload=b"\xff"))


def test_small_streams_cost_no_credit(ends: tuple[Link, MemoryConnection]) -> None:
    link, theirs = ends
    reader = Link(connected()[0], id="reader", rank=9)
    response = response_to(stream(), payload=bytes(STEP // 2))
    link.received_response(response, reader)
    assert (controls(theirs), link.streams()) == (0, (0, 1))
    link.received_response(response, None)  # late: its reader is gone
    link.received_response(response, reader)
    assert controls(theirs) == 1
    link.received_response(response._replace(aux=errno.ENODATA), reader)
    assert link.streams() == (0, 0)


# -- several hops


class Flood:
    """A service at rank 0 of a chain that sends long streams; `produced` counts the chunks of each."""

    def __init__(self, chain: Chain) -> None:
        self.service = Service("toy", chain.routers[0])
        self.service.task("flood", self._flood)
        self.produced: dict[str, int] = {}

    async def _flood(self, request: Request) -> None:
        name = str(request.payload["name"])
        for number in range(MANY):
            self.produced[name] = number + 1
            await request.stream({"n": number, "data": CHUNK})


async def test_a_slow_reader_holds_up_its_stream_over_all_hops_and_no_other() -> None:
    chain = Chain(4)
    flood = Flood(chain)
    reader = Handle(chain.routers[3], "reader", OWNER)
    async with trio.open_nursery() as nursery, chain.running():
        await nursery.start(flood.service.run)
        async with (
            reader.stream("toy.flood", {"name": "slow"}) as slow,
            reader.stream("toy.flood", {"name": "fast"}) as fast,
        ):
            assert [reply["n"] async for reply in fast] == list(range(MANY))
            await settled()
            bound = STREAM_BUFFER + 3 * (WINDOW + STEP) // len(CHUNK) + 3
            assert flood.produced["slow"] < bound < MANY
            assert [reply["n"] async for reply in slow] == list(range(MANY))
        assert set(chain.left_over()) == {0}
        nursery.cancel_scope.cancel()


async def test_a_reader_that_goes_ends_its_stream_at_every_hop() -> None:
    chain = Chain(4)
    flood = Flood(chain)
    reader = Handle(chain.routers[3], "reader", OWNER)
    async with trio.open_nursery() as nursery, chain.running():
        await nursery.start(flood.service.run)
        async with reader.stream("toy.flood", {"name": "slow"}):
            await settled()
            assert sum(chain.left_over()) > 0
            reader.close()
            await settled()
            assert flood.produced["slow"] < MANY
            assert set(chain.left_over()) == {0}
        assert flood.service.queue()[0] == 0
        nursery.cancel_scope.cancel()


async def test_a_thousand_pending_requests_end_once_each_when_a_hop_is_lost() -> None:
    """At rank 2, two hops down; rank 1 on the way there is killed."""
    chain = Chain(3)
    service = Service("toy", chain.routers[2])
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    handle = Handle(chain.routers[0], "handle", OWNER)
    ended: list[tuple[int, str]] = []

    async def ask() -> None:
        try:
            await handle.call("toy.keep", nodeid=2)
        except RpcError as error:
            ended.append((error.errnum, error.text))

    async with trio.open_nursery() as nursery, chain.running():
        await nursery.start(service.run)
        async with trio.open_nursery() as callers:
            for _ in range(1000):
                callers.start_soon(ask)
            await settled()
            assert len(kept) == 1000
            assert [len(router.tracker) for router in chain.routers] == [1000, 1000, 0]
            for link in (chain.up[1], chain.down[1]):
                link.close()
        await settled()
        assert ended == [(errno.EHOSTUNREACH, "rank 1 is lost")] * 1000
        assert set(chain.left_over()) == {0}
        assert service.queue()[0] == 0
        for request_ in kept:
            request_.respond({})  # late
        assert len(ended) == 1000
        nursery.cancel_scope.cancel()
