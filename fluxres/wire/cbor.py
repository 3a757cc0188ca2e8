"""CBOR (RFC 8949) as a peer may send it: plain data only.

Tags are refused: what the library would make of them (dates, patterns, shared references that form a cycle, or a
few bytes that stand for gigabytes) is nothing that a message may carry. So are duplicate keys, keys that are no
text or byte strings, containers of unknown length, and bytes after the item.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final, NoReturn, cast

import cbor2

from fluxres.base.errors import ProtocolError


def _refuse(*_: object) -> NoReturn:
    raise ValueError("it holds a tag")


_TAGS: Final = dict.fromkeys(
    (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 43000, 55799), _refuse
)
"""The tags that the library knows; all others go to its hook."""


def load(data: bytes, *, what: str, max_depth: int) -> object:
    """Decode one CBOR item that is all of `data`. Raises ProtocolError, which calls it `what`, for anything else."""
    source = BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        tag_hook=_refuse,
        semantic_decoders=_TAGS,
        max_depth=max_depth,
        allow_indefinite=False,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        value = cast("object", decoder.decode())
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"cannot decode {what} of {len(data)} bytes: {error}") from error
    if source.tell() != len(data):
        raise ProtocolError(f"cannot decode {what} of {len(data)} bytes: it ends at byte {source.tell()}")
    return value
