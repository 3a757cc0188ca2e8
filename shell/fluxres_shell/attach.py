"""Connections to a shell: the listening socket, and one `Connection` for each broker that dialled.

A connection that is not attached yet may only attach. Whatever goes wrong on one (garbage, a frame too large,
a peer that is somebody else, a reset) ends that one and nothing else. There are at most MAX_CONNECTIONS: a
new one beyond that ends the oldest that has not attached, so that idle strangers cannot keep the broker out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.wire.framing import FrameDecoder
from fluxres_shell import protocol
from fluxres_shell.protocol import MAX_REQUEST, WINDOW_BYTES, Request, parse_request
from fluxres_shell.segments import SegmentReader, Stored

MAX_CONNECTIONS: Final = 8
MAX_OUT: Final = 2 * WINDOW_BYTES
"""Unsent bytes at which a peer that does not read is given up."""
_RECEIVE: Final = 64 * 1024
_UCRED: Final = struct.Struct("iII")


class ConnectionEnded(FluxresError):  # it is not always an error
    """The peer is gone."""


def peer_allowed(sock: socket.socket) -> bool:
    """Whether the peer is this process's own user, or root."""
    _pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid in (0, os.geteuid())


class Connection:
    """One accepted connection, and what it has been sent.

    Once it is attached, `sent` is the last record sent; `closing` means that it ends when its last bytes are
    out.
    """

    def __init__(self, sock: socket.socket, ident: int) -> None:
        self.sock = sock
        self.ident = ident
        self.attached = False
        self.closing = False
        self.sent = 0
        self.acked = 0
        self.reader: SegmentReader | None = None
        self.barrier: tuple[int, bytes] | None = None
        """The frame of a barrier, and the record that has to be sent before it."""
        self._decoder = FrameDecoder(MAX_REQUEST)
        self._out = bytearray()
        self._flight: deque[tuple[int, int]] = deque()
        self._flight_bytes = 0

    @property
    def unsent(self) -> int:
        """Bytes that wait for the socket to take them."""
        return len(self._out)

    @property
    def room(self) -> int:
        """Bytes of records that may be sent before the next ack."""
        return max(0, WINDOW_BYTES - self._flight_bytes)

    def receive(self) -> list[Request]:
        """Read what there is; the whole requests in it. Raises ConnectionEnded, ProtocolError."""
        try:
            data = self.sock.recv(_RECEIVE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionEnded(str(error)) from error
        if not data:
            raise ConnectionEnded("closed by the peer")
        return [parse_request(body) for body in self._decoder.feed(data)]

    def send(self, framed: bytes) -> None:
        """Queue a frame and write what the socket takes. Raises ConnectionEnded."""
        self._out += framed
        self.flush()

    def send_records(self, batch: list[Stored]) -> None:
        """Send records, which count against the window until they are acked. Raises ConnectionEnded."""
        for stored in batch:
            self._flight.append((stored.seq, len(stored.payload)))
            self._flight_bytes += len(stored.payload)
        self.sent = batch[-1].seq
        self.send(protocol.records_frame([stored.payload for stored in batch]))

    def ack(self, seq: int) -> bool:
        """Take an acknowledgement; False where it is of records never sent."""
        if seq > max(self.sent, self.acked):
            return False
        while self._flight and self._flight[0][0] <= seq:
            self._flight_bytes -= self._flight.popleft()[1]
        self.acked = max(self.acked, seq)
        return True

    def flush(self) -> None:
        """Write what the socket takes. Raises ConnectionEnded."""
        try:
            while self._out:
                count = self.sock.send(self._out)
                del self._out[:count]
        except BlockingIOError:
            if len(self._out) > MAX_OUT:
                raise ConnectionEnded(f"{len(self._out)} bytes unread") from None
        except OSError as error:
            raise ConnectionEnded(str(error)) from error

    def close(self) -> None:
        """Close the socket and the journal's cursor."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None
        with contextlib.suppress(OSError):  # the peer may have reset it
            self.sock.close()
