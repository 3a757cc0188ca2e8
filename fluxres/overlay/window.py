"""Flow control of streams over one link, hop by hop, so that no hop has to keep what its reader does not read. Pure.

A stream is the responses to one request, known by the route and the matchtag that its responses have on that link. The
sending side counts what it has sent and what the receiving side has credited; its producer waits while more than the
window is out. The receiving side credits what it has passed on, as soon as its own onward endpoint has room for that
stream again, in steps: a stream smaller than a step never costs a credit.

    sender   Window   sent, sent, ... (full: wait) ... credited (has room: go on) ... ended
    receiver Credits  took, took, ... (a step is due: wait for onward room) grant ... ended

A stream ends at both sides with its terminal response, or with the link. Credit for a stream that has ended is nothing.
The window is never smaller than a step: a sender that is full has sent more than a step, so a credit is due.
"""

from __future__ import annotations

from typing import Final

from fluxres.wire.messages import Message

Key = tuple[tuple[str, ...], int]
"""The route and the matchtag of a stream's responses as they are on the link."""

WINDOW: Final = 256 * 1024
"""Bytes of one stream that may be out without credit."""
LINK_WINDOW: Final = 16 * 1024 * 1024
"""Bytes that the windows of all streams over a link come to, before each gets a smaller one than `WINDOW`."""
STEP: Final = 64 * 1024
"""Bytes of a stream that are credited at a time, and the smallest window."""
OVERHEAD: Final = 64
"""Bytes that a response counts for beside its payload, so that empty ones are bounded too."""


def cost(response: Message) -> int:
    """The bytes that `response` counts for at both ends."""
    return OVERHEAD + len(response.payload or b"")


class Window:
    """What has been sent of each stream and is not yet credited."""

    __slots__ = ("_out",)

    def __init__(self) -> None:
        self._out: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._out)

    def sent(self, key: Key, size: int) -> None:
        """`size` more bytes of a stream have been sent."""
        self._out[key] = self._out.get(key, 0) + size

    def has_room(self, key: Key) -> bool:
        """Whether the producer of a stream may go on."""
        out = self._out.get(key, 0)
        return out <= STEP or out <= min(WINDOW, LINK_WINDOW // len(self._out))

    def credited(self, key: Key, size: int) -> None:
        """The receiver has passed on `size` bytes of a stream."""
        out = self._out.get(key)
        if out is not None:  # else it has ended, and this is late
            self._out[key] = max(0, out - size)  # a late credit may be for an ended stream of the same matchtag

    def ended(self, key: Key) -> None:
        """A stream's terminal response has been sent."""
        self._out.pop(key, None)


class Credits:
    """What has been received of each stream and is not yet credited."""

    __slots__ = ("_due", "_taken")

    def __init__(self) -> None:
        self._taken: dict[Key, int] = {}
        self._due: set[Key] = set()

    def __len__(self) -> int:
        return len(self._taken)

    def took(self, key: Key, size: int) -> bool:
        """`size` more bytes of a stream have been passed on.

        Returns True where a credit is due now: `grant` is then to be called once, when there is onward room.
        """
        taken = self._taken[key] = self._taken.get(key, 0) + size
        if taken < STEP or key in self._due:
            return False
        self._due.add(key)
        return True

    def grant(self, key: Key) -> int:
        """The bytes to credit a stream with now; 0 where it has ended meanwhile."""
        self._due.discard(key)
        if key not in self._taken:
            return 0
        taken, self._taken[key] = self._taken[key], 0
        return taken

    def ended(self, key: Key) -> None:
        """A stream's terminal response has come."""
        self._taken.pop(key, None)
        self._due.discard(key)
