"""Histograms that rooms keep of what they do: fixed bounds, numbers only, no clock, nothing imported for them.

What is counted is an `int` of its owner; what takes time is a `Histogram`. `fluxres.status.metrics` reads both when
somebody asks, so that what is measured pays for a bisect and two additions.

The bounds are a metric's for good: whoever changes them breaks the rules and dashboards that were written for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

QUICK: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds, for what the broker does by itself: a commit to the disk, a stall of its event loop."""
WAITS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 604_800.0)
"""Seconds, for what waits for something outside: a job for its resources, up to a week."""
OUTAGES: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""Seconds, for what is away until it is back: a shell that no broker reads, a subtree, up to a day."""


class Histogram:
    """How often values were found, by size. `bounds` are the upper, inclusive bounds, ascending; above is one more."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"cannot make a histogram with the bounds {tuple(bounds)}: they have to ascend")
        self.bounds = tuple(bounds)
        self.sum = 0.0
        """The sum of all values."""
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def cumulative(self) -> tuple[int, ...]:
        """How many values were at most each of the bounds, then how many there were at all."""
        return tuple(accumulate(self._counts))
