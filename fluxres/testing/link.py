"""A connection between a broker and a simulated shell: frames of the real protocol, in memory and without delay.

The broker's side is a `fluxres.exec.host.ShellLink`. Either side, and the death of either process, ends it: the shell
sees it at once, the broker after what the shell had sent before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from typing import Protocol

import trio

from fluxres.base.errors import ProtocolError
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.payload import WireMap, pack, unpack_map
from fluxres_shell.protocol import MAX_REQUEST, WINDOW_BYTES, Request, parse_request, records_frame


class ShellSide(Protocol):
    """Who is at the shell's end."""

    def received(self, link: MemoryLink, requests: list[Request]) -> None:
        """The broker has sent these. Raises ProtocolError for what must not come now."""

    def refused(self, link: MemoryLink, error: ProtocolError) -> None:
        """The broker has sent what nobody understands."""

    def lost(self, link: MemoryLink) -> None:
        """The broker has closed it, or is gone."""


class MemoryLink:
    """One connection, both ends of it; `ident` is its number for the shell."""

    def __init__(self, shell: ShellSide, ident: int) -> None:
        self.ident = ident
        self.sent = 0
        """The last record sent."""
        self.barrier: tuple[int, bytes] | None = None
        """The frame of a barrier, and the record that has to be sent before it."""
        self._shell = shell
        self._acked = 0
        self._flight: deque[tuple[int, int]] = deque()
        self._flight_bytes = 0
        self._to_broker: deque[bytes] = deque()
        self._from_broker = FrameDecoder(MAX_REQUEST)
        self._closed_by_broker = False
        self._closed_by_shell = False
        self._wake = trio.Event()

    # --- the broker's end

    async def send(self, *messages: WireMap) -> None:
        """Send messages. Raises BrokenResourceError where the shell is gone, ClosedResourceError after `aclose`."""
        await trio.lowlevel.checkpoint()
        if self._closed_by_broker:
            raise trio.ClosedResourceError
        if self._closed_by_shell:
            raise trio.BrokenResourceError
        data = b"".join(frame(pack(message)) for message in messages)
        try:
            self._shell.received(self, [parse_request(body) for body in self._from_broker.feed(data)])
        except ProtocolError as error:
            self._shell.refused(self, error)

    async def __aiter__(self) -> AsyncGenerator[WireMap, None]:
        """What the shell sends, until it closes."""
        decoder = FrameDecoder()
        while True:
            await trio.lowlevel.checkpoint()
            while not self._to_broker and not self._closed_by_shell:
                self._wake = trio.Event()
                await self._wake.wait()
            if not self._to_broker:
                return
            for body in decoder.feed(self._to_broker.popleft()):
                yield unpack_map(body)

    async def aclose(self) -> None:
        """Close it."""
        self.sever()
        await trio.lowlevel.checkpoint()

    def sever(self) -> None:
        """The broker's process has closed it, or is gone."""
        if not self._closed_by_broker:
            self._closed_by_broker = True
            self._to_broker.clear()
            self._shell.lost(self)

    # --- the shell's end

    @property
    def room(self) -> int:
        """Bytes of records that may be sent before the next ack."""
        return max(0, WINDOW_BYTES - self._flight_bytes)

    def serve_from(self, first: int) -> None:
        """Records are sent from `first` on."""
        self.sent = self._acked = first - 1

    def put(self, framed: bytes) -> None:
        """Send a frame."""
        self._to_broker.append(framed)
        self._wake.set()

    def put_records(self, payloads: list[bytes]) -> None:
        """Send the records that follow the last one sent."""
        for payload in payloads:
            self.sent += 1
            self._flight.append((self.sent, len(payload)))
            self._flight_bytes += len(payload)
        self.put(records_frame(payloads))

    def ack(self, seq: int) -> None:
        """Take an acknowledgement. Raises ProtocolError where it is of records never sent."""
        if seq > max(self.sent, self._acked):
            raise ProtocolError(f"cannot take an ack of record {seq}: {self.sent} was the last one sent")
        while self._flight and self._flight[0][0] <= seq:
            self._flight_bytes -= self._flight.popleft()[1]
        self._acked = max(self._acked, seq)

    def end(self) -> None:
        """The shell has closed it, or is gone."""
        self._closed_by_shell = True
        self._wake.set()
