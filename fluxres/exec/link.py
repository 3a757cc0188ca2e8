"""The connection to one real job shell, a `host.ShellLink`: frames of CBOR maps over its socket (DESIGN §9).

Thin: what arrives is handed out as maps, what is sent goes out at once or waits for room. The broker never buffers
records: it reads the next ones when rank 0's path has taken the last.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator

import trio

from fluxres.base.errors import ProtocolError
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.payload import WireMap, pack, unpack_map

READ_SIZE = 256 * 1024
"""Bytes read from a shell at a time."""


class SocketLink:
    """A connection to a shell; use as an async iterator of the maps it sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._decoder = FrameDecoder()
        self._lock = trio.Lock()

    async def send(self, *messages: WireMap) -> None:
        """Send messages, all at once. Raises trio.BrokenResourceError where the shell is gone."""
        async with self._lock:
            await self._stream.send_all(b"".join(frame(pack(message)) for message in messages))

    async def __aiter__(self) -> AsyncGenerator[WireMap, None]:
        """Messages until the shell closes. Raises ProtocolError, trio.BrokenResourceError."""
        while data := await self._stream.receive_some(READ_SIZE):
            for body in self._decoder.feed(bytes(data)):
                yield unpack_map(body)
        if self._decoder.pending:
            raise ProtocolError("cannot read on from the shell: it closed inside a frame")

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()
