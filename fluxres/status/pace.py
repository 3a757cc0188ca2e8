"""When a reader of the status endpoint is told something again. Pure.

However many readers there are, they are sent about `MAX_RATE` messages and `MAX_BYTES` bytes a second together: each
waits `interval` after what it was told, and their turns are spread evenly over that. What happens meanwhile is merged
into one delta, so that a reader misses nothing by waiting.
"""

from __future__ import annotations

import math
from typing import Final

MIN_INTERVAL: Final = 0.1
MAX_INTERVAL: Final = 5.0
"""Seconds between two messages to one reader."""
MAX_RATE: Final = 500
"""Messages a second to all readers together."""
MAX_BYTES: Final = 16 * 1024 * 1024
"""Bytes a second to all readers together, where `MAX_INTERVAL` allows it."""
WEIGHT: Final = 1 / 16
"""How much the latest message counts in the usual size of one."""
_SPREAD: Final = (math.sqrt(5) - 1) / 2
"""Multiples of the golden ratio, modulo 1, lie evenly however many there are."""


def interval(readers: int, size: float = 0.0) -> float:
    """Seconds between two messages to one of so many readers, messages having so many bytes."""
    return max(MIN_INTERVAL, readers / MAX_RATE, min(MAX_INTERVAL, readers * size / MAX_BYTES))


def turn(now: float, last: float, number: int, every: float) -> float:
    """When reader `number` may be told something that it was told last at `last`: `now` or later.

    Few readers only keep the interval `every`; of many, each has a slot of its own in it.
    """
    if every <= MIN_INTERVAL:
        return max(now, last + every)
    phase = number * _SPREAD % 1
    after = max(now, last + every / 2)
    return (math.ceil(after / every - phase) + phase) * every


class Readers:
    """Counts the readers, numbers them, and knows how much they are told."""

    def __init__(self) -> None:
        self.count = 0
        self._next = 0
        self._size = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two messages to one of them."""
        return interval(self.count, self._size)

    def join(self) -> int:
        """One more; its number."""
        self.count += 1
        self._next += 1
        return self._next

    def leave(self) -> None:
        """One less."""
        self.count -= 1

    def told(self, size: int) -> None:
        """One of them was told so many bytes of what is new."""
        self._size += (size - self._size) * WEIGHT
