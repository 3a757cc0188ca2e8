"""What the overlay asks of a network: connections that carry frames, in order, to the parent and from the children.

The overlay knows no sockets. Its adapters are TCP with TLS and Unix sockets for real brokers, links in memory
for simulated ones.

    state of a connection    ended by                                  what holds then
    made                     `handshake` (ConnectError: ended)         nothing is sent or received yet
    open                     close, the peer's close, a reset, a       frames go both ways;
                             broken frame, too much in the outbox      `run` writes what `send` could not
    ended                    -                                         `send` does nothing, `receive` gives [],
                                                                       `run` returns
"""

from __future__ import annotations

from typing import Final, Protocol

OUTBOX_ROOM: Final = 1024 * 1024
"""Bytes waiting to be written below which `Connection.room` returns."""
OUTBOX_BOUND: Final = 64 * 1024 * 1024
"""Bytes waiting to be written above which a connection closes itself: its peer reads nothing."""


class Connection(Protocol):
    """A connection to one peer. `run` must be running in a nursery of its owner from the beginning."""

    @property
    def peer(self) -> str:
        """Who is at the other end, for people: `10.0.0.3:41234`, `unix:pid 12`."""

    @property
    def backlog(self) -> int:
        """Bytes that have been sent here and that the kernel has not taken yet."""

    async def handshake(self) -> None:
        """Prove who both ends are, where the transport does that. Raises ConnectError, within `connect_timeout` s."""

    def send(self, body: bytes) -> None:
        """Send `body` as one frame, after all sent before it. Never waits, and never raises for a peer that is lost.

        Above `OUTBOX_BOUND` the connection is closed, and the log says so.
        """

    async def room(self) -> None:
        """Return as soon as less than `OUTBOX_ROOM` bytes wait, or the connection has ended."""

    async def receive(self) -> list[bytes]:
        """The bodies of the next frames, in order; [] when the connection has ended, for whatever reason.

        Raises ProtocolError for a malformed frame.
        """

    def close(self) -> None:
        """End the connection; what was sent is still delivered as far as the kernel has it. May be called twice."""

    async def run(self) -> None:
        """Write what `send` could not write at once, until the connection has ended."""


class Listener(Protocol):
    """Where the children of one broker connect to."""

    async def accept(self) -> Connection:
        """The next connection of a child, before its handshake. Raises ConnectError where it could not be taken."""

    def close(self) -> None:
        """Take no more connections; those taken stay."""


class Transport(Protocol):
    """One broker's way to its neighbours."""

    async def connect(self, rank: int) -> Connection:
        """A connection to the broker of `rank`, before its handshake. Raises ConnectError where nobody answers."""

    async def listen(self) -> Listener:
        """Begin to accept children. Raises ConnectError where the address cannot be had."""
