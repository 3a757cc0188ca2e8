"""One message as one CBOR array, `[version, type, flags, userid, rolemask, aux, matchtag, topic, route,
payload]` (the fields of RFC 3). The payload is an opaque byte string in it.
"""

from __future__ import annotations

from typing import Final, cast

import cbor2

from fluxres.base.errors import ProtocolError
from fluxres.wire.cbor import load
from fluxres.wire.messages import Message, MessageFlag, MessageType

PROTOCOL_VERSION: Final = 1
MAX_ROUTE: Final = 64
"""Hops that a route stack may hold: twice the deepest tree that is sensible, and its two ends."""
MAX_TOPIC: Final = 255
"""Characters of a topic."""
MAX_DEPTH: Final = 3
WORD: Final = 0xFFFFFFFF
FIELDS: Final = 10
_TYPES: Final = {int(kind): kind for kind in MessageType}


def encode(message: Message) -> bytes:
    """Encode `message`. The result is the body of one frame."""
    kind, topic, payload, flags, userid, rolemask, aux, matchtag, route = message
    return cbor2.dumps((PROTOCOL_VERSION, int(kind), flags, userid, rolemask, aux, matchtag, topic, route, payload))


def decode(body: bytes) -> Message:
    """Decode the body of one frame. Raises ProtocolError, with what is wrong, for anything malformed."""
    fields = load(body, what="a message", max_depth=MAX_DEPTH)
    if not isinstance(fields, list) or len(fields) != FIELDS:
        raise ProtocolError(f"cannot decode a message: it is not an array of {FIELDS}")
    version, kind, flags, userid, rolemask, aux, matchtag, topic, route, payload = cast("list[object]", fields)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"cannot decode a message: version {version!r} is not {PROTOCOL_VERSION}")
    for name, word in (("userid", userid), ("rolemask", rolemask), ("aux", aux), ("matchtag", matchtag)):
        if type(word) is not int or not 0 <= word <= WORD:
            raise ProtocolError(f"cannot decode a message: {name} {word!r} is no 32-bit word")
    if type(kind) is not int or kind not in _TYPES:
        raise ProtocolError(f"cannot decode a message: unknown type {kind!r}")
    if type(flags) is not int or flags & ~MessageFlag.ALL:
        raise ProtocolError(f"cannot decode a message: unknown flags {flags!r}")
    if type(topic) is not str or len(topic) > MAX_TOPIC:
        raise ProtocolError("cannot decode a message: its topic is no text or too long")
    if payload is not None and type(payload) is not bytes:
        raise ProtocolError("cannot decode a message: its payload is no byte string")
    return Message(
        _TYPES[kind],
        topic,
        payload,
        flags,
        cast("int", userid),
        cast("int", rolemask),
        cast("int", aux),
        cast("int", matchtag),
        _route(route),
    )


def _route(route: object) -> tuple[str, ...]:
    if not isinstance(route, list) or len(route) > MAX_ROUTE:
        raise ProtocolError(f"cannot decode a message: its route is no array of up to {MAX_ROUTE}")
    for hop in cast("list[object]", route):
        if type(hop) is not str:
            raise ProtocolError(f"cannot decode a message: {hop!r} in its route is no text")
    return tuple(cast("list[str]", route))
