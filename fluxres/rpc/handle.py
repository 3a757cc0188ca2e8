"""How code inside a broker calls services: an endpoint of the router with `call` and `stream`.

Cancelling the scope that awaits sends `<service>.cancel`; no call needs a timeout to be safe from a dead broker,
because the tracker answers for it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres.rpc.calls import Calls, Reply
from fluxres.rpc.gate import Gate
from fluxres.rpc.router import Router
from fluxres.wire.messages import NODEID_ANY, Message, Role, request
from fluxres.wire.payload import WireMap, pack

STREAM_BUFFER: Final = 64
"""Responses of one stream that may wait to be read before its producer has to wait."""


class ResponseStream:
    """The responses of one streaming call, in order; iterate over it.

    Iteration ends at ENODATA (the normal end) and raises RpcError for any other error.
    """

    def __init__(self) -> None:
        self._replies: deque[Reply] = deque()
        self._wake = trio.Event()
        self.room = Gate()
        """Open while fewer than `STREAM_BUFFER` replies wait, or nobody reads any more."""

    def __aiter__(self) -> AsyncIterator[WireMap]:
        return self

    async def __anext__(self) -> WireMap:
        while not self._replies:
            self._wake = trio.Event()
            await self._wake.wait()
        reply = self._replies[0]
        if reply.error is None:
            self._replies.popleft()
            self._taken()
            return reply.payload
        if reply.error.errnum == errno.ENODATA:
            raise StopAsyncIteration
        raise reply.error

    def ready(self) -> list[WireMap]:
        """The responses that are there already, without waiting; the end of the stream stays for the iteration."""
        payloads = []
        while self._replies and self._replies[0].error is None:
            payloads.append(self._replies.popleft().payload)
        self._taken()
        return payloads

    def put(self, reply: Reply) -> None:
        """Take the next reply (the handle calls this)."""
        self._replies.append(reply)
        self._wake.set()
        if len(self._replies) >= STREAM_BUFFER:
            self.room.shut()

    def _taken(self) -> None:
        if len(self._replies) < STREAM_BUFFER:
            self.room.open()


class Handle:
    """Calls services on behalf of this broker, as the instance owner."""

    def __init__(self, router: Router, name: str, userid: int) -> None:
        self._router = router
        self._id = f"{name}@{router.rank}"
        self._userid = userid
        self._closed = False
        self._calls = Calls()
        self._streams: dict[int, ResponseStream] = {}
        router.add_endpoint(self)

    @property
    def id(self) -> str:
        """The handle's name in route stacks."""
        return self._id

    @property
    def hop(self) -> None:
        """A handle is at home: it leads to no other broker."""

    @property
    def under_way(self) -> int:
        """How many of its calls have not ended, those that nobody waits for any more included."""
        return len(self._calls)

    def close(self) -> None:
        """Withdraw the handle: its requests are cancelled, and whoever still waits gets RpcError ECONNRESET."""
        self._closed = True
        self._router.remove_endpoint(self, "the requester has closed")
        for reply in self._calls.lost(_closed()):
            self._streams[reply.matchtag].put(reply)

    def deliver(self, message: Message) -> None:
        """Take a response (the router calls this)."""
        reply = self._calls.receive(message)
        if reply is None:
            return
        stream = self._streams.get(reply.matchtag)
        if stream is not None:
            stream.put(reply)

    async def drained(self, asked: Message) -> None:
        """Return as soon as the stream of `asked` has room, or has no reader any more."""
        stream = self._streams.get(asked.matchtag)
        if stream is None:
            await trio.lowlevel.checkpoint()  # the producer learns of its cancellation here
        else:
            await stream.room.wait()

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        """Call `callback` once: as soon as the stream of `asked` has room, or has no reader any more."""
        stream = self._streams.get(asked.matchtag)
        if stream is None:
            callback()
        else:
            stream.room.on_open(callback)

    def send(self, topic: str, payload: WireMap, *, nodeid: int = NODEID_ANY) -> None:
        """Send a request that wants no response."""
        self._send(request(topic, pack(payload), nodeid=nodeid))

    async def call(self, topic: str, payload: WireMap | None = None, *, nodeid: int = NODEID_ANY) -> WireMap:
        """Call `topic` and return the response's payload. Raises RpcError."""
        async with self._open(topic, payload, nodeid=nodeid, streaming=False) as replies:
            return await replies.__anext__()

    @asynccontextmanager
    async def stream(
        self, topic: str, payload: WireMap | None = None, *, nodeid: int = NODEID_ANY
    ) -> AsyncIterator[ResponseStream]:
        """Open a streaming call; leaving the block before the stream's end cancels it."""
        async with self._open(topic, payload, nodeid=nodeid, streaming=True) as replies:
            yield replies

    @asynccontextmanager
    async def _open(
        self, topic: str, payload: WireMap | None, *, nodeid: int, streaming: bool
    ) -> AsyncIterator[ResponseStream]:
        if self._closed:
            raise _closed()
        asked = self._calls.open(topic, payload, nodeid=nodeid, streaming=streaming)
        replies = self._streams[asked.matchtag] = ResponseStream()
        try:
            self._send(asked)
            yield replies
        finally:
            del self._streams[asked.matchtag]
            replies.room.open()  # the producer learns of its cancellation there
            cancel = self._calls.abandon(asked.matchtag)
            if cancel is not None:
                self._send(cancel)

    def _send(self, message: Message) -> None:
        self._router.request(message._replace(route=(self._id,), userid=self._userid, rolemask=Role.OWNER | Role.LOCAL))


def _closed() -> RpcError:
    return RpcError(errno.ECONNRESET, "cannot call: the handle is closed")
