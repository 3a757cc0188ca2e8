"""Frames: a 4-byte big-endian length, then that many bytes.

The decoder is sans-IO and takes its input in pieces of any size. A length over the bound is an error
as soon as the length itself is read, before any of its bytes are waited for or stored.
"""

from __future__ import annotations

import struct
from typing import Final

from fluxres.base.errors import ProtocolError

MAX_FRAME: Final = 8 * 1024 * 1024
"""Bytes that one frame may hold, unless its reader sets another bound."""
LENGTH: Final = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """Return `body` as a frame. Raises ProtocolError where it is longer than `MAX_FRAME`."""
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"cannot send a frame of {len(body)} bytes: the bound is {MAX_FRAME}")
    return LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Collects bytes and gives out whole frames.

    After a ProtocolError the decoder is of no more use: its stream has no next frame.
    """

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max_frame = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take `data` and return the frames that are now complete, in order.

        Raises ProtocolError for a frame longer than the bound.
        """
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            if length > self._max_frame:
                raise ProtocolError(f"cannot read a frame of {length} bytes: the bound is {self._max_frame}")
            end = start + LENGTH.size + length
            if len(buffer) < end:
                break
            frames.append(bytes(memoryview(buffer)[start + LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]
        return frames

    @property
    def pending(self) -> int:
        """Bytes held of a frame that is not complete; 0 exactly where the stream may end cleanly."""
        return len(self._buffer)
