"""Control messages: what two neighbours in the tree say to each other and never pass on (RFC 3). Pure.

    kind             sent by            status         payload
    HEARTBEAT   0    both               -              -                         "I am here", on a link that is idle
    STATUS      1    child              `Health`       -                         its subtree's, when it changes
    DISCONNECT  2    parent             -              {reason}                  kiss of death: the child must panic
    GOODBYE     3    child              -              -                         it leaves in order: offline, not lost
    SHUTDOWN    4    parent             -              -                         the whole instance ends: shut down
    HELLO      16    child, first       -              `hello.Hello`
    WELCOME    17    parent, first      -              `hello.Welcome`
    REFUSED    18    parent, instead    errnum         {reason}
    CREDIT     19    receiver           -              {route, matchtag, bytes}  room for so much more of that stream

The first three are flux-core's. Every reader raises ProtocolError for a payload that is not as above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fluxres.base.errors import ProtocolError
from fluxres.overlay.health import Health
from fluxres.wire.messages import Message
from fluxres.wire.payload import pack, unpack_map

HEARTBEAT: Final = 0
STATUS: Final = 1
DISCONNECT: Final = 2
GOODBYE: Final = 3
SHUTDOWN: Final = 4
HELLO: Final = 16
WELCOME: Final = 17
REFUSED: Final = 18
CREDIT: Final = 19

MAX_REASON: Final = 4096
"""Characters of a reason that are kept."""


def reason(text: str) -> bytes:
    """The payload of DISCONNECT and REFUSED."""
    return pack({"reason": text[:MAX_REASON]})


def reason_of(message: Message) -> str:
    """The reason that a DISCONNECT or REFUSED gives."""
    text = unpack_map(message.payload).get("reason")
    if not isinstance(text, str):
        raise ProtocolError("cannot read a control message: it has no reason")
    return text[:MAX_REASON]


def health_of(message: Message) -> Health:
    """The status that a STATUS tells."""
    try:
        return Health(message.matchtag)
    except ValueError:
        raise ProtocolError(f"cannot read a status: {message.matchtag} is none") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """`size` bytes of the stream that answers (`route`, `matchtag`) have been passed on; so many more may come."""

    route: tuple[str, ...]
    matchtag: int
    size: int

    def encode(self) -> bytes:
        """The payload of a CREDIT."""
        return pack({"route": self.route, "matchtag": self.matchtag, "bytes": self.size})

    @classmethod
    def decode(cls, payload: bytes | None) -> Credit:
        """Read the payload of a CREDIT."""
        message = unpack_map(payload)
        route, matchtag, size = message.get("route"), message.get("matchtag"), message.get("bytes")
        if not isinstance(route, list) or type(matchtag) is not int or type(size) is not int or size < 0:
            raise ProtocolError("cannot read a credit: it is not {route, matchtag, bytes}")
        hops = tuple(hop for hop in route if isinstance(hop, str))
        if len(hops) != len(route):
            raise ProtocolError("cannot read a credit: its route is not a list of texts")
        return cls(route=hops, matchtag=matchtag, size=size)
