"""A link: the connection to a neighbour in the tree as an endpoint of the router.

The overlay reads the connection: it gives each body to `decode`, CREDITs to `credit`, and what is no control to the
router, which tells `received_response` of each of those. Streams over a link are bounded by `overlay.window`: a
producer waits in `drained` while its stream's window is full, or too much waits for the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fluxres.overlay.control import CREDIT, Credit
from fluxres.overlay.transport import Connection
from fluxres.overlay.window import Credits, Key, Window, cost
from fluxres.rpc.gate import Gate
from fluxres.rpc.router import Endpoint
from fluxres.rpc.tracker import is_terminal
from fluxres.wire.codec import decode, encode
from fluxres.wire.messages import Message, MessageType, control


class Link:
    """The link to the broker of `rank`, whose incarnation is `id`."""

    def __init__(self, connection: Connection, *, id: str, rank: int) -> None:  # noqa: A002 - as of every endpoint
        self.id = id
        self.rank = rank
        self.connection = connection
        self.sent = 0
        """Messages sent; `bytes_sent` is what they came to, without the framing."""
        self.bytes_sent = 0
        self.received = 0
        """Messages received, `bytes_received` as above."""
        self.bytes_received = 0
        self._closed = False
        self._window = Window()
        self._credits = Credits()
        self._full: dict[Key, Gate] = {}
        """Where the producers of streams wait whose window is full."""

    @property
    def hop(self) -> Link:
        """The link itself: it leads to another broker."""
        return self

    def streams(self) -> tuple[int, int]:
        """How many streams have been sent over the link, and received, that have not ended."""
        return len(self._window), len(self._credits)

    # --- sending

    def deliver(self, message: Message) -> None:
        """Send `message`."""
        if message.type is MessageType.RESPONSE:
            key = (message.route, message.matchtag)
            if is_terminal(message):
                self._window.ended(key)
                self._wake(key)
            else:
                self._window.sent(key, cost(message))
        self._send(message)

    def control(self, kind: int, status: int = 0, payload: bytes | None = None) -> None:
        """Send a control message (`overlay.control`)."""
        self._send(control(kind, status, payload))

    async def drained(self, asked: Message) -> None:
        """Return as soon as there is room for another response to `asked`, or the link is closed."""
        gate = self._gate(asked)
        if gate is not None:
            await gate.wait()
        await self.connection.room()

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        """Call `callback` once: now where the window of the stream that answers `asked` is not full, else when it is
        no more, or has ended. (The connection's own backlog is not asked: all the windows together bound it.)
        """
        gate = self._gate(asked)
        if gate is None:
            callback()
        else:
            gate.on_open(callback)

    def close(self) -> None:
        """Close the connection; nobody waits for room on it any more."""
        self._closed = True
        self.connection.close()
        for key in list(self._full):
            self._wake(key)

    def _send(self, message: Message) -> None:
        body = encode(message)
        self.sent += 1
        self.bytes_sent += len(body)
        self.connection.send(body)

    def _gate(self, asked: Message) -> Gate | None:
        """The gate at which the stream that answers `asked` has to wait; None where it need not."""
        key = (asked.route[:-1], asked.matchtag)
        if self._closed or self._window.has_room(key):
            return None
        gate = self._full.get(key)
        if gate is None:
            gate = self._full[key] = Gate()
            gate.shut()
        return gate

    def _wake(self, key: Key) -> None:
        gate = self._full.pop(key, None)
        if gate is not None:
            gate.open()

    # --- receiving

    def decode(self, body: bytes) -> Message:
        """The message in a frame that has come, which is counted. Raises ProtocolError."""
        self.received += 1
        self.bytes_received += len(body)
        return decode(body)

    def credit(self, message: Message) -> None:
        """Take a CREDIT. Raises ProtocolError for a malformed one."""
        given = Credit.decode(message.payload)
        key = (given.route, given.matchtag)
        self._window.credited(key, given.size)
        if self._window.has_room(key):
            self._wake(key)

    def received_response(self, response: Message, onward: Endpoint | None) -> None:
        """The router has passed `response`, which came over this link, to `onward`; None where it was late."""
        key = (response.route, response.matchtag)
        if is_terminal(response):
            self._credits.ended(key)
        elif onward is not None and self._credits.took(key, cost(response)):
            onward.on_room(response, partial(self._grant, key))

    def _grant(self, key: Key) -> None:
        size = self._credits.grant(key)
        if size and not self._closed:
            route, matchtag = key
            self.control(CREDIT, payload=Credit(route=route, matchtag=matchtag, size=size).encode())
