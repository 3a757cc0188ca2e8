"""Payloads: maps that JSON could carry, encoded as CBOR (RFC 8949).

Byte strings are allowed besides, where both ends are ours (journal records). Depth is bounded on
reading, so that no peer can make us recurse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias, cast

import cbor2

from fluxres.base.errors import ProtocolError
from fluxres.wire.cbor import load

MAX_DEPTH: Final = 128
"""Nesting depth of a payload: two for each level of the deepest tree of brokers (`overlay.topology`)."""

Wire: TypeAlias = "bool | int | float | str | bytes | Sequence[Wire] | Mapping[str, Wire] | None"
"""What a payload is made of."""
WireMap: TypeAlias = dict[str, Wire]

pack = cbor2.dumps
"""Encode a payload: `pack(map) -> bytes`."""


def unpack(data: bytes) -> Wire:
    """Decode one CBOR item that is all of `data`. Raises ProtocolError where it is anything else."""
    return cast("Wire", load(data, what="a payload", max_depth=MAX_DEPTH))


def unpack_map(data: bytes | None) -> WireMap:
    """Decode a payload that must be a map with text keys; None is the empty map."""
    if data is None:
        return {}
    value = unpack(data)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError("cannot decode a payload: it is not a map with text keys")
    return value
