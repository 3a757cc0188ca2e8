"""What waits to be sent over one non-blocking stream socket.

Bytes go out in the order in which they were put, at once as far as the socket takes them; `run` sends the rest as the
socket takes more. Nothing in here blocks, and a peer that is gone is no error: what is left for it is dropped, and the
reader of the connection sees its end. Whoever puts bounds the whole, by `len`.
"""

from __future__ import annotations

import contextlib
import socket

import trio

from fluxres.rpc.gate import Gate


class Outbox:
    """The bytes that wait for `sock`, which stays its owner's to close. `len()` is how many there are.

    `room` is open while less than `limit` bytes wait, or none ever will again.
    """

    __slots__ = ("_closed", "_corked", "_limit", "_sock", "_waiting", "_wake", "room")

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self.room = Gate()
        self._sock = sock
        self._limit = limit
        self._waiting = bytearray()
        self._corked = False
        self._closed = False
        self._wake = trio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, data: bytes) -> None:
        """Send `data` after all that waits already; at once where the socket takes it."""
        if not self._closed:
            self._waiting += data
            if not self._corked:
                self._flush()

    def cork(self) -> None:
        """Only collect from now on: more is about to come, and one write is cheaper than many."""
        self._corked = True

    def uncork(self) -> None:
        """Send what has been collected."""
        self._corked = False
        self._flush()

    def close(self) -> None:
        """Drop what waits, and all that is put from now on; `run` and who waits for room return."""
        self._closed = True
        self._drop()
        self._wake.set()

    async def run(self) -> None:
        """Send what the socket did not take at once, until the outbox or the socket is closed."""
        with contextlib.suppress(trio.ClosedResourceError):  # the socket, by its owner
            while not self._closed:
                await self._wake.wait()
                while self._waiting:
                    await trio.lowlevel.wait_writable(self._sock)
                    self._flush()
                if not self._closed:
                    self._wake = trio.Event()

    async def emptied(self) -> None:
        """Send what waits, `run` having ended; return when it is sent, or dropped."""
        while self._waiting:
            await trio.lowlevel.wait_writable(self._sock)
            self._flush()

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._waiting) if self._waiting else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._drop()
            return
        if sent:
            del self._waiting[:sent]
        if self._waiting:
            self._wake.set()
        if len(self._waiting) < self._limit:
            self.room.open()
        else:
            self.room.shut()

    def _drop(self) -> None:
        self._waiting.clear()
        self.room.open()
