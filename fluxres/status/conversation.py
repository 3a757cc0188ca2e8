"""What a WebSocket client and the status endpoint say to each other, once they do.

    client               broker
    (nothing)            hello
    subscribe            snapshot or delta, and deltas from then on, one at least every IDLE seconds; or an error
    follow               job, as often as there is something; ended; or an error
    unsubscribe          (nothing: the number is free at once, and nothing more comes under it)

What is wrong in a message is answered by an error; a client that goes on so is closed (1008). One task sends, so that
ending a subscription never cuts a message in two, and whoever has something to say waits for it: a reader that is slow
holds one part of a message for each of its subscriptions, and what it misses is merged.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from fluxres import __version__
from fluxres.base.errors import RpcError
from fluxres.status import messages
from fluxres.status.asks import BadMessage, Follow, Subscribe, parse
from fluxres.status.follow import follow
from fluxres.status.pace import turn
from fluxres.status.view import Cursor, Delta

if TYPE_CHECKING:
    from fluxres.status.asks import Watch
    from fluxres.status.endpoint import Attached, Endpoint

MAX_SUBSCRIPTIONS: Final = 8
"""Subscriptions of one client."""
MAX_FOLLOWS: Final = 4
"""Jobs that one client follows."""
MAX_ALL_FOLLOWS: Final = 256
"""Jobs that all clients together follow."""
MAX_ERRORS: Final = 16
"""Messages of one client that are answered by an error; at the next it is closed."""
ASK_PAUSE: Final = 0.02
"""Seconds between two messages of a client that are looked at."""
ENDED_WITH_US: Final = frozenset({errno.EHOSTUNREACH, errno.ECONNRESET})
"""Errors that tell nothing of a job: the incarnation ends, and 1012 says so."""
IDLE: Final = 15.0
"""Seconds after which a reader is told the position, where there is nothing else to tell."""


class Goodbye(Exception):
    """The conversation ends, with this close code (RFC 6455 §7.4) and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(slots=True, eq=False)
class _Running:
    """A subscription, or a job that is followed."""

    scope: trio.CancelScope
    follows: bool


class Conversation:
    """The broker's side of one. `send` sends a text message; `receive` returns the next one of the client."""

    def __init__(
        self,
        endpoint: Endpoint,
        it: Attached,
        *,
        receive: Callable[[], Awaitable[str | bytes]],
        send: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._endpoint = endpoint
        self._it = it
        self._receive = receive
        self._send = send
        self._to_sender, self._to_send = trio.open_memory_channel[bytes](0)
        self._running: dict[int, _Running] = {}
        self._errors = 0

    async def run(self) -> None:
        """Talk until cancelled. Raises Goodbye, and what `receive` and `send` raise, each in an exception group."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all)
            await self._say(
                messages.hello(
                    software=__version__,
                    instance=self._it.instance,
                    rank=self._it.rank,
                    size=self._it.size,
                    now=time.time(),
                )
            )
            while True:
                await self._take(await self._receive(), nursery)
                await trio.sleep(ASK_PAUSE)

    async def _send_all(self) -> None:
        async for data in self._to_send:
            await self._send(data)

    async def _say(self, data: bytes) -> None:
        await self._to_sender.send(data)

    # --- what the client says

    async def _take(self, data: str | bytes, nursery: trio.Nursery) -> None:
        if isinstance(data, bytes):
            raise Goodbye(1003, "messages are text")
        try:
            ask = parse(data)
            if isinstance(ask, Subscribe | Follow):
                self._begin(ask, nursery)
            else:
                self._end(ask.id)
        except BadMessage as error:
            self._errors += 1
            if self._errors > MAX_ERRORS:
                raise Goodbye(1008, f"more than {MAX_ERRORS} messages that make no sense") from error
            await self._say(messages.error(error.subscription, str(error)))

    def _begin(self, ask: Subscribe | Follow, nursery: trio.Nursery) -> None:
        """Start what is asked for. Raises BadMessage."""
        follows = isinstance(ask, Follow)
        if ask.id in self._running:
            raise BadMessage(f"cannot subscribe: number {ask.id} is in use", ask.id)
        most = MAX_FOLLOWS if follows else MAX_SUBSCRIPTIONS
        if sum(running.follows is follows for running in self._running.values()) >= most:
            what = "follow more jobs" if follows else "subscribe to more"
            raise BadMessage(f"cannot {what}: {most} at a time are allowed", ask.id)
        if follows and self._endpoint.follows >= MAX_ALL_FOLLOWS:
            raise BadMessage(f"cannot follow this job: {MAX_ALL_FOLLOWS} are followed already", ask.id)
        running = self._running[ask.id] = _Running(scope=trio.CancelScope(), follows=follows)
        if isinstance(ask, Follow):
            self._endpoint.follows += 1
            nursery.start_soon(self._follow, ask, running)
        else:
            nursery.start_soon(self._subscription, ask, running)

    def _end(self, number: int) -> None:
        """End what has this number; it may have ended already."""
        running = self._running.pop(number, None)
        if running is not None:
            running.scope.cancel()

    def _ended(self, number: int, running: _Running) -> None:
        if self._running.get(number) is running:
            del self._running[number]

    # --- what it gets

    async def _subscription(self, ask: Subscribe, running: _Running) -> None:
        readers = self._endpoint.pace
        place = readers.join()
        try:
            with running.scope:
                await self._watch(ask.id, ask.watch, place)
        finally:
            readers.leave()
            self._ended(ask.id, running)

    async def _watch(self, number: int, watch: Watch, place: int) -> None:
        """Tell a reader of documents what is new, each time that it is its turn."""
        encoder, readers = self._endpoint.encoder, self._endpoint.pace
        async with self._it.boards.open() as board:
            cursor = Cursor(board.view, watch.topics, watch.select, watch.position)
            idle_at = math.inf
            while True:
                idle = trio.current_time() >= idle_at
                body = cursor.next(idle=idle)
                if body is None:
                    with trio.CancelScope(deadline=idle_at):
                        await board.news(cursor.seen)
                else:
                    size = 0
                    for part in encoder.parts(body, number, time.time()):
                        await self._say(part)
                        size += len(part)
                    if isinstance(body, Delta):
                        readers.told(size)
                    told = trio.current_time()
                    idle_at = told + IDLE
                    await trio.sleep_until(turn(told, told, place, readers.interval))

    async def _follow(self, ask: Follow, running: _Running) -> None:
        try:
            with running.scope:
                await follow(self._it.handle, ask, self._say)
                await self._say(messages.ended(ask.id, "nothing more can be added to it"))
        except* RpcError as group:
            error = _first(group)
            if not running.scope.cancel_called and error.errnum not in ENDED_WITH_US:
                await self._say(messages.error(ask.id, f"cannot follow the job: {error}"))
        finally:
            self._endpoint.follows -= 1
            self._ended(ask.id, running)


def _first(error: RpcError | BaseExceptionGroup[RpcError]) -> RpcError:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
