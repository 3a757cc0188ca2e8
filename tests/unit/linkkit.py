"""A pair of connections in memory, and a chain of brokers' routers joined by links over them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from fluxres.overlay.control import CREDIT
from fluxres.overlay.link import Link
from fluxres.rpc.router import Endpoint, Router
from fluxres.wire.codec import decode
from fluxres.wire.messages import MessageType


class MemoryConnection:
    """One end of a connection that loses nothing; what it sends is at once at the other end, in `inbox`."""

    def __init__(self) -> None:
        self.peer = "memory"
        self.backlog = 0
        self.other: MemoryConnection | None = None
        self.inbox: deque[bytes] = deque()
        self.most = 0
        """The most bytes that ever waited in `inbox`."""
        self.closed = False
        self.open_for_more = trio.Event()
        self.open_for_more.set()
        self._arrived = trio.Event()

    async def handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    def send(self, body: bytes) -> None:
        if self.other is not None and not self.closed:
            self.other.inbox.append(body)
            self.other.most = max(self.other.most, sum(map(len, self.other.inbox)))
            self.other._arrived.set()

    async def room(self) -> None:
        await trio.lowlevel.checkpoint()
        await self.open_for_more.wait()

    async def receive(self) -> list[bytes]:
        while not self.inbox and not self.closed:
            self._arrived = trio.Event()
            await self._arrived.wait()
        await trio.lowlevel.checkpoint()
        return [self.inbox.popleft()] if self.inbox else []

    def close(self) -> None:
        for end in (self, self.other):
            if end is not None:
                end.closed = True
                end._arrived.set()

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()


def connected() -> tuple[MemoryConnection, MemoryConnection]:
    """The two ends of a new connection."""
    one, two = MemoryConnection(), MemoryConnection()
    one.other, two.other = two, one
    return one, two


class Chain:
    """Brokers in a row, rank 0 at its top: rank N's parent is rank N - 1."""

    def __init__(self, size: int) -> None:
        self.routers = [Router(rank=rank, size=size) for rank in range(size)]
        self.up: dict[int, Link] = {}
        """Each rank's link to its parent."""
        self.down: dict[int, Link] = {}
        for rank in range(1, size):
            above, below = connected()
            self.down[rank - 1] = Link(above, id=f"uuid{rank}", rank=rank)
            self.up[rank] = Link(below, id=f"uuid{rank - 1}", rank=rank - 1)
        for rank, router in enumerate(self.routers):
            for link in self._links(rank):
                router.add_endpoint(link)
            router.use_overlay(self.up.get(rank), self._next_hop(rank))

    def _links(self, rank: int) -> list[Link]:
        return [links[rank] for links in (self.up, self.down) if rank in links]

    def _next_hop(self, rank: int) -> NextHop:
        return NextHop(rank, self.down.get(rank))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve the links."""
        async with trio.open_nursery() as nursery:
            for rank, router in enumerate(self.routers):
                for link in self._links(rank):
                    nursery.start_soon(serve, link, router)
            yield
            nursery.cancel_scope.cancel()

    def left_over(self) -> list[int]:
        """What is under way at each hop, streams and their credit included."""
        links = (*self.up.values(), *self.down.values())
        return [len(r.tracker) for r in self.routers] + [n for link in links for n in link.streams()]


class NextHop:
    """The way down from one rank of a chain."""

    def __init__(self, rank: int, child: Link | None) -> None:
        self._rank = rank
        self._child = child

    def __call__(self, rank: int) -> Endpoint | None:
        return self._child if rank > self._rank else None


async def serve(link: Link, router: Router) -> None:
    """What the overlay does with a link, until its connection ends."""
    while frames := await link.connection.receive():
        for body in frames:
            message = link.decode(body)
            if message.type is MessageType.CONTROL:
                assert message.control == CREDIT
                link.credit(message)
            else:
                router.receive(link, message)
    router.remove_endpoint(link, f"rank {link.rank} is lost")


def controls(connection: MemoryConnection) -> int:
    """How many of the messages that wait at an end are controls."""
    return sum(decode(body).type is MessageType.CONTROL for body in connection.inbox)
