"""The hello with which a child joins its parent, and the parent's verdict (DESIGN §6). Pure.

    child                                     parent
    HELLO {protocol, rank, uuid, …}  -------> judge
                                     <------- WELCOME {rank, uuid, instance, software}    joined
                                     <------- REFUSED errnum, reason                      the connection ends

    refused because                                              errnum        may it try again?
    another version of the overlay protocol                      EPROTO        no
    it belongs to another instance                               EPERM         no
    its owner is another user                                    EPERM         no
    another size or topology, or the rank is not our child       EINVAL        no
    the parent has not joined the instance itself                EAGAIN        yes
    the rank is online from another statedir                     EADDRINUSE    yes: the other may go
    the uuid has joined before, or the statedir's incarnation    ESTALE        no: a new incarnation is needed,
    count is not above the one that has joined                                 or the statedir is an old copy

Incarnations of one statedir are ordered by its durable count: the higher one supersedes an incarnation that still
counts as online. An offline rank may come back from another statedir: what that means for its jobs is rank 0's affair.
Another *software* version is no reason to refuse.
"""

from __future__ import annotations

import errno
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Final

from fluxres.base.errors import ProtocolError
from fluxres.wire.payload import WireMap, pack, unpack_map

PROTOCOL: Final = 1
"""The version of what brokers say to each other, beginning with the hello. Not that of the software."""
MAX_TEXT: Final = 4096
"""Characters in one text of a hello or a welcome."""
MAX_NUMBER: Final = 2**63 - 1
"""The greatest number in a hello or a welcome."""
RETRYABLE: Final = frozenset({errno.EAGAIN, errno.EADDRINUSE})
"""The errnums of refusals after which a child may go on trying; the others need a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a broker is. `instance` is empty before the first join from this statedir.

    `owner` is the uid of the instance owner, the same at every rank. `uuid` names the incarnation, `statedir` the state
    directory (by its own id, not its path), `incarnation` is its durable count of incarnations, `boot_id` the kernel's,
    `topo` is `Topology.digest`.
    """

    rank: int
    uuid: str
    protocol: int
    software: str
    instance: str
    statedir: str
    incarnation: int
    boot_id: str
    host: str
    size: int
    topo: str
    owner: int

    def encode(self) -> bytes:
        """The payload of the HELLO control."""
        return pack({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def decode(cls, payload: bytes | None) -> Hello:
        """Read the payload of a HELLO control. Raises ProtocolError.

        Of another protocol version no more is asked than that it says so, for it to be refused by its version.
        """
        message = unpack_map(payload)
        protocol = _number(message, "protocol")
        if protocol != PROTOCOL:
            message = {**_NOTHING_SAID, **{key: message[key] for key in ("rank", "software") if key in message}}
        return cls(
            rank=_number(message, "rank"),
            uuid=_text(message, "uuid", empty=protocol != PROTOCOL),
            protocol=protocol,
            software=_text(message, "software", empty=True),
            instance=_text(message, "instance", empty=True),
            statedir=_text(message, "statedir", empty=protocol != PROTOCOL),
            incarnation=_number(message, "incarnation"),
            boot_id=_text(message, "boot_id", empty=True),
            host=_text(message, "host", empty=True),
            size=_number(message, "size"),
            topo=_text(message, "topo", empty=True),
            owner=_number(message, "owner"),
        )


_NOTHING_SAID: Final[WireMap] = {
    field.name: 0 if field.name in ("rank", "incarnation", "size", "owner") else "" for field in fields(Hello)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Who the parent is, and the instance that the child has joined."""

    rank: int
    uuid: str
    instance: str
    software: str

    def encode(self) -> bytes:
        """The payload of the WELCOME control."""
        return pack({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def decode(cls, payload: bytes | None) -> Welcome:
        """Read the payload of a WELCOME control. Raises ProtocolError."""
        message = unpack_map(payload)
        return cls(
            rank=_number(message, "rank"),
            uuid=_text(message, "uuid"),
            instance=_text(message, "instance"),
            software=_text(message, "software", empty=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a parent remembers of a child rank: its latest incarnation, and whether it still counts as online."""

    uuid: str
    statedir: str
    incarnation: int
    online: bool


@dataclass(frozen=True, slots=True)
class Accept:
    """The child may join, once the incarnation that it supersedes, if any, has been declared lost and undone."""

    supersedes: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """The child may not join: `errnum` for the program, `text` for people at both ends."""

    errnum: int
    text: str


def judge(hello: Hello, *, parent: Hello, children: Container[int], known: Known | None) -> Accept | Refuse:
    """Whether the child that says `hello` may join `parent`, whose children are `children`.

    `known` is what the parent remembers of that rank.
    """
    return _stranger(hello, parent, children) or _rival(hello, known) or Accept(known is not None and known.online)


def _stranger(hello: Hello, parent: Hello, children: Container[int]) -> Refuse | None:
    """Why the child is none of ours."""
    if hello.protocol != parent.protocol:
        return Refuse(
            errno.EPROTO,
            f"rank {hello.rank} speaks version {hello.protocol} of the overlay protocol (software {hello.software!r}), "
            f"its parent version {parent.protocol} (software {parent.software!r}): run the same release on both",
        )
    if not parent.instance:
        return Refuse(errno.EAGAIN, f"rank {parent.rank} has not joined the instance itself yet")
    if hello.instance not in ("", parent.instance):
        return Refuse(
            errno.EPERM,
            f"rank {hello.rank} belongs to the instance {hello.instance}, this one is {parent.instance}: "
            "correct its configuration, or give it an empty statedir",
        )
    if hello.owner != parent.owner:
        return Refuse(
            errno.EPERM,
            f"rank {hello.rank} runs as uid {hello.owner}, its parent as {parent.owner}: run all brokers as one user",
        )
    if hello.size != parent.size:
        return _differs(hello, "size", str(hello.size), str(parent.size))
    if hello.topo != parent.topo:
        return _differs(hello, "topology", hello.topo, parent.topo)
    if hello.rank not in children:
        return Refuse(
            errno.EINVAL,
            f"rank {hello.rank} is not a child of rank {parent.rank} in {parent.topo} of size {parent.size}: "
            "check the hosts in its configuration",
        )
    return None


def _differs(hello: Hello, what: str, theirs: str, ours: str) -> Refuse:
    text = f"rank {hello.rank} has the {what} {theirs}, its parent {ours}: give both the same [bootstrap] configuration"
    return Refuse(errno.EINVAL, text)


def _rival(hello: Hello, known: Known | None) -> Refuse | None:
    """Why the child cannot take the place of the incarnation that the parent knows."""
    if known is None:
        return None
    if hello.statedir != known.statedir and known.online:
        return Refuse(
            errno.EADDRINUSE,
            f"rank {hello.rank} is online already, from the statedir {known.statedir}, not {hello.statedir}: "
            "stop one of the two brokers",
        )
    if hello.uuid == known.uuid:
        return Refuse(errno.ESTALE, f"the incarnation {hello.uuid} of rank {hello.rank} has joined before")
    if hello.statedir == known.statedir and hello.incarnation <= known.incarnation:
        return Refuse(
            errno.ESTALE,
            f"incarnation {hello.incarnation} of rank {hello.rank} comes after incarnation {known.incarnation} of the "
            "same statedir: if that is an old copy, give the broker an empty one",
        )
    return None


def check_welcome(welcome: Welcome, *, parent_rank: int, instance: str) -> str | None:
    """Why a child of `parent_rank` that belongs to `instance` (or to none yet: empty) must not take `welcome`."""
    if welcome.rank != parent_rank:
        return f"rank {welcome.rank} answered in place of rank {parent_rank}: check the hosts in the configuration"
    if instance not in ("", welcome.instance):
        return (
            f"the parent belongs to the instance {welcome.instance}, this broker to {instance}: "
            "correct the configuration, or use an empty statedir"
        )
    return None


def _text(message: WireMap, key: str, *, empty: bool = False) -> str:
    value = message.get(key)
    if not isinstance(value, str) or len(value) > MAX_TEXT or not (value or empty):
        raise ProtocolError(f"cannot read a hello: {key} is not a text of {int(not empty)} to {MAX_TEXT} characters")
    return value


def _number(message: WireMap, key: str) -> int:
    value = message.get(key)
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ProtocolError(f"cannot read a hello: {key} is not a number of 0 to {MAX_NUMBER}")
    return value
