"""The stream of one connection: what was read ahead is read again, and a peer that does not read is not waited for.

A send that makes no progress for `STUCK` seconds ends the connection. What waits for such a peer is one message and the
kernel's buffer, which is bounded here as well.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

STUCK: Final = 20.0
"""Seconds in which `CHUNK` bytes have to go out: more than a message has, most of the time."""
CHUNK: Final = 128 * 1024
SEND_BUFFER: Final = 128 * 1024
"""Bytes that the kernel keeps for a peer; it counts its own overhead, and doubles them."""
LINGER_READ: Final = 64 * 1024
"""Bytes that are read, and dropped, of a peer that was answered already."""
TEXT_FRAME: Final = b"\x81"
CLOSE_FRAME: Final = b"\x88"
"""The first byte of a whole WebSocket text message, and of a close frame (RFC 6455 §5.2)."""


class ConnectionStream(trio.abc.Stream):
    """Reads and writes `inner`, which stays its maker's to close: `aclose` ends only what is done through this."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self._ahead: list[bytes] = []
        self._rest = b""
        self._open = trio.Event()
        self._open.set()
        self._closed = False
        self._sending = trio.Lock()
        self.has_sent = False
        self.said_goodbye = False
        """Whether the latest that was sent is a WebSocket close frame: nothing may follow."""

    def again(self, head: bytes, rest: bytes) -> None:
        """Read `head` before what comes, and nothing more until `go_on`; then `rest`, and what comes.

        trio-websocket reads on as soon as it has a head, and wsproto drops what it is given before it has accepted.
        """
        self._ahead = [head]
        self._rest = rest
        self._open = trio.Event()

    def go_on(self) -> None:
        """Read what follows the head."""
        if self._rest:
            self._ahead.append(self._rest)
        self._open.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, b"" at the end. Raises BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError
        if not self._ahead:
            await self._open.wait()
        if self._ahead:
            piece = self._ahead.pop(0)
            size = len(piece) if max_bytes is None else max_bytes
            if len(piece) > size:
                self._ahead.insert(0, piece[size:])
            await trio.lowlevel.cancel_shielded_checkpoint()
            return piece[:size]
        return bytes(await self._inner.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, nothing else in between. Raises BrokenResourceError, also where the peer does not read.

        One that is cancelled may have been cut off, and is the last.
        """
        async with self._sending:
            if self._closed or self.said_goodbye:
                raise trio.ClosedResourceError
            view = memoryview(data)
            self.has_sent = True
            self.said_goodbye = bytes(view[:1]) == CLOSE_FRAME
            is_whole = False
            try:
                for start in range(0, len(view), CHUNK):
                    with trio.move_on_after(STUCK) as patience:
                        await self._inner.send_all(view[start : start + CHUNK])
                    if patience.cancelled_caught:
                        raise trio.BrokenResourceError(f"the peer has not read for {STUCK:g} s")
                is_whole = True
            finally:
                self._closed = self._closed or not is_whole  # nothing that follows would be understood

    async def send_text(self, data: bytes) -> None:
        """Send UTF-8 as a WebSocket message of one frame: what is the same for many need not be checked for each."""
        await self.send_all(text_head(len(data)) + data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream that it wraps."""
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Nothing is read or sent through this any more."""
        self._closed = True
        await trio.lowlevel.checkpoint()

    async def say_last(self, data: bytes) -> None:
        """Send `data` in spite of `aclose`, where nothing was cut off before it."""
        with trio.move_on_after(STUCK):
            await self._inner.send_all(data)


def text_head(size: int) -> bytes:
    """What goes before `size` bytes of a WebSocket text message of a server (RFC 6455 §5.2)."""
    if size < 126:
        return TEXT_FRAME + bytes([size])
    if size < 1 << 16:
        return TEXT_FRAME + b"\x7e" + size.to_bytes(2, "big")
    return TEXT_FRAME + b"\x7f" + size.to_bytes(8, "big")


async def linger(sock: socket.socket) -> None:
    """Let the peer read what it was sent: say that no more comes, and wait for its end.

    Closing a socket with unread input resets the connection, and the peer might lose the answer. The caller bounds it.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
        left = LINGER_READ
        while left > 0:
            await trio.lowlevel.wait_readable(sock)
            data = sock.recv(left)
            if not data:
                return
            left -= len(data)
    except OSError:
        return  # it is gone, and needs nothing any more
