"""When a reader of the status endpoint is told something again. Pure.

However many readers there are, they are sent about `MAX_RATE` messages and `MAX_BYTES` bytes a second together: each
waits an interval after what it was told. What happens meanwhile is merged into one delta, so that a reader misses
nothing by waiting.

Many readers take turns: the interval has up to `MAX_SLOTS` slots, and those that share one are told the same at the
same moment, from the same position to the same. So that is merged and encoded once for all of them; with more slots
that is done more often, with fewer the broker sends for longer without a break. For that, intervals have few lengths:
0.1, 0.2, 0.5, 1, 2, 5, … seconds.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Final

MIN_INTERVAL: Final = 0.1
MAX_INTERVAL: Final = 5.0
"""Seconds between two messages to one reader."""
MAX_RATE: Final = 200
"""Messages a second to all readers together."""
MAX_BYTES: Final = 32 * 1024 * 1024
"""Bytes a second to all readers together, where `MAX_INTERVAL` allows it."""
MAX_SLOTS: Final = 4
WEIGHT: Final = 1 / 16
"""How much the latest message counts in the usual size of one."""
_STEPS: Final = (1, 2, 5)


def interval(readers: int, size: float = 0.0) -> float:
    """Seconds between two messages to one of so many readers, messages having so many bytes."""
    least = max(readers / MAX_RATE, min(MAX_INTERVAL, readers * size / MAX_BYTES))
    lengths = (MIN_INTERVAL * step * 10.0**power for power in count() for step in _STEPS)
    return next(length for length in lengths if length >= least)


def slots_of(every: float) -> int:
    """How many slots an interval has."""
    return min(MAX_SLOTS, round(every / MIN_INTERVAL))


def turn(now: float, last: float, number: int, every: float) -> float:
    """When reader `number` may be told something that it was told last at `last`: `now` or later.

    Few readers only keep the interval `every`; of many, each waits for the slot that it shares with others.
    """
    slots = slots_of(every)
    if slots <= 1:
        return max(now, last + every)
    phase = number % slots / slots
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
