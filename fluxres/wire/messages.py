"""The four message types of RFC 3 and their header fields.

A `Message` is an immutable value. The two auxiliary words of RFC 3's header are named here for what
they mean in each type: `nodeid` (request), `errnum` (response), `sequence` (event), `control` and
`status` (control). The payload is an opaque byte string: routers never look into it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

NODEID_ANY: Final = 0xFFFFFFFF
"""RFC 3 FLUX_NODEID_ANY: the first broker towards the root that has the service answers."""
NODEID_UPSTREAM: Final = 0xFFFFFFFE
"""RFC 3 FLUX_NODEID_UPSTREAM: like any, but the sending rank itself is passed over."""
MATCHTAG_NONE: Final = 0
"""RFC 6: the matchtag of a request that expects no response."""
USERID_UNKNOWN: Final = 0xFFFFFFFF
"""RFC 3: the sender leaves it to its connector to say who it is."""


class MessageType(IntEnum):
    """RFC 3 message types."""

    REQUEST = 1
    RESPONSE = 2
    EVENT = 4
    CONTROL = 8


class MessageFlag:
    """RFC 3 message flags that say how a message is to be treated: bits of `Message.flags`.

    The flags for "has a topic", "has a payload" and "has a route stack" are not kept: the fields
    themselves say it. Plain integers, because every hop of every RPC tests them, and an IntFlag takes ten
    times as long.
    """

    NONE: Final = 0
    NORESPONSE: Final = 0x04
    UPSTREAM: Final = 0x10
    PRIVATE: Final = 0x20
    STREAMING: Final = 0x40
    ALL: Final = NORESPONSE | UPSTREAM | PRIVATE | STREAMING


class Role:
    """RFC 12 roles of the user on whose behalf a message was sent: bits of `Message.rolemask`."""

    NONE: Final = 0
    OWNER: Final = 1
    USER: Final = 2
    LOCAL: Final = 4


class Message(NamedTuple):
    """One RFC 3 message. A named tuple because one is built for every hop of every RPC.

    `route` is the route stack, the sender nearest to the reader last. `aux` is `nodeid`, `errnum`,
    `sequence` or the control type, by message type; `matchtag` is the control status in a control.
    """

    type: MessageType
    topic: str = ""
    payload: bytes | None = None
    flags: int = MessageFlag.NONE
    userid: int = USERID_UNKNOWN
    rolemask: int = 0
    aux: int = 0
    matchtag: int = MATCHTAG_NONE
    route: tuple[str, ...] = ()

    @property
    def nodeid(self) -> int:
        """The rank that a request is for, `NODEID_ANY` or `NODEID_UPSTREAM`."""
        return self.aux

    @property
    def errnum(self) -> int:
        """The POSIX errno of a response, 0 for success."""
        return self.aux

    @property
    def sequence(self) -> int:
        """The number of an event, increasing by one for each event of an instance."""
        return self.aux

    @property
    def control(self) -> int:
        """The type of a control message; its status is in `matchtag`."""
        return self.aux

    @property
    def is_streaming(self) -> bool:
        """Whether a request may have several responses, the last of them an error (RFC 6)."""
        return bool(self.flags & MessageFlag.STREAMING)

    @property
    def wants_response(self) -> bool:
        """False for a request whose sender asked not to be answered."""
        return not self.flags & MessageFlag.NORESPONSE

    @property
    def service(self) -> str:
        """The service part of the topic: everything before the last dot (RFC 3)."""
        return self.topic.rpartition(".")[0]

    @property
    def method(self) -> str:
        """The method part of the topic: everything after the last dot."""
        return self.topic.rpartition(".")[2]


def request(
    topic: str,
    payload: bytes | None = None,
    *,
    matchtag: int = MATCHTAG_NONE,
    nodeid: int = NODEID_ANY,
    flags: int = MessageFlag.NONE,
    userid: int = USERID_UNKNOWN,
    rolemask: int = 0,
) -> Message:
    """Build a request; with `MATCHTAG_NONE` it is one that wants no response."""
    if matchtag == MATCHTAG_NONE:
        flags |= MessageFlag.NORESPONSE
    return Message(MessageType.REQUEST, topic, payload, flags, userid, rolemask, nodeid, matchtag)


def response_to(asked: Message, *, payload: bytes | None = None, errnum: int = 0) -> Message:
    """Build a response to `asked`, which retraces its route; an error's payload is its text."""
    return Message(
        MessageType.RESPONSE,
        asked.topic,
        payload,
        asked.flags & MessageFlag.STREAMING,
        asked.userid,
        asked.rolemask,
        errnum,
        asked.matchtag,
        asked.route,
    )


def event(topic: str, payload: bytes | None, *, sequence: int, userid: int, rolemask: int) -> Message:
    """Build an event, as rank 0 publishes it with its number."""
    return Message(MessageType.EVENT, topic, payload, userid=userid, rolemask=rolemask, aux=sequence, matchtag=0)


def control(kind: int, status: int = 0, payload: bytes | None = None) -> Message:
    """Build a control message, which never leaves the link it is sent on."""
    return Message(MessageType.CONTROL, payload=payload, aux=kind, matchtag=status)
