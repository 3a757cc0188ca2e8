"""How long to wait before something that failed is tried again, and whether its reason is news. Pure.

Pauses double from `FIRST` to `MOST`; whatever works again begins anew. One reason is news once: a rank whose disk is
full for an hour is one line in the log.
"""

from __future__ import annotations

from typing import Final

FIRST: Final = 0.2
MOST: Final = 10.0
"""Seconds of the first and of the longest pause."""


class Backoff:
    """The pauses between tries of one thing."""

    __slots__ = ("_pause", "_reason")

    def __init__(self) -> None:
        self._pause = FIRST
        self._reason: str | None = None

    def succeeded(self) -> None:
        """It works (again)."""
        self._pause = FIRST
        self._reason = None

    def is_news(self, reason: str) -> bool:
        """It failed for `reason`: whether that is another one than the last time."""
        news, self._reason = reason != self._reason, reason
        return news

    def pause(self) -> float:
        """Seconds to wait now; the next pause is twice as long."""
        pause, self._pause = self._pause, min(2 * self._pause, MOST)
        return pause
