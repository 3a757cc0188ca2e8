"""Parts for tests of services and routers: an endpoint that keeps what it is given, and services to call."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from fluxres.base.errors import RpcError
from fluxres.rpc.router import Endpoint, Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag, Role, request
from fluxres.wire.payload import WireMap, pack, unpack_map

OWNER = 1000
STREAMING = MessageFlag.STREAMING
settled = trio.testing.wait_all_tasks_blocked


class Peer:
    """An endpoint that keeps what it is given: a client, or another broker."""

    def __init__(self, router: Router, name: str) -> None:
        self.id = name
        self.got: list[Message] = []
        self._router = router
        router.add_endpoint(self)

    @property
    def hop(self) -> NextBroker | None:
        return None

    def deliver(self, message: Message) -> None:
        self.got.append(message)

    async def drained(self, asked: Message) -> None:
        await trio.lowlevel.checkpoint()

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        callback()

    def send(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        tag: int = 1,
        flags: int = MessageFlag.NONE,
        nodeid: int = NODEID_ANY,
        role: int = Role.OWNER,
        userid: int = OWNER,
        route: tuple[str, ...] = (),
    ) -> Message:
        asked = request(
            topic,
            None if payload is None else pack(payload),
            matchtag=tag,
            flags=flags,
            nodeid=nodeid,
            userid=userid,
            rolemask=role,
        )._replace(route=route)
        self._router.receive(self, asked)
        return asked

    def answers(self) -> list[tuple[int, int, WireMap | str]]:
        """The responses so far: matchtag, errnum, payload or text."""
        return [
            (m.matchtag, m.errnum, (m.payload or b"").decode() if m.errnum else unpack_map(m.payload)) for m in self.got
        ]

    def errnums(self) -> list[int]:
        return [message.errnum for message in self.got]


class NextBroker(Peer):
    """A neighbour in the tree."""

    def __init__(self, router: Router, name: str) -> None:
        self.passed: list[tuple[Message, Endpoint | None]] = []
        super().__init__(router, name)

    @property
    def hop(self) -> NextBroker:
        return self

    def received_response(self, response: Message, onward: Endpoint | None) -> None:
        self.passed.append((response, onward))


class Net:
    """A router of rank 1 with a parent and one child, of ranks 2 and 3; rank 4 is below a child that is lost."""

    def __init__(self) -> None:
        self.router = Router(rank=1, size=6)
        self.parent = NextBroker(self.router, "parent")
        self.child = NextBroker(self.router, "child")
        self.client = Peer(self.router, "client")
        self.router.use_overlay(self.parent, self._next_hop)

    def _next_hop(self, rank: int) -> Endpoint | None:
        if rank == 4:
            raise RpcError(errno.EHOSTUNREACH, "rank 4 is not reachable: it is lost")
        return self.child if rank in (2, 3) else None


@asynccontextmanager
async def running(*services: Service) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for service in services:
            await nursery.start(service.run)
        yield
        nursery.cancel_scope.cancel()


class Slow:
    """A task that waits, and tells how it ended."""

    def __init__(self, service: Service) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        service.task("wait", self._wait)

    async def _wait(self, request: Request) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


def counting(service: Service, upto: int) -> list[int]:
    """A stream of numbers; the list has those that were produced."""
    produced: list[int] = []

    async def count(request: Request) -> None:
        for number in range(upto):
            produced.append(number)
            await request.stream({"n": number})

    service.task("count", count)
    return produced
