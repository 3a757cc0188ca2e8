"""What is going to happen in a simulated world, and when: plain calls, each due at a moment of Trio's clock.

One task makes all of them, so that a frame on its way or a timer of a shell costs no task. Calls that are due at the
same moment are made in the order in which they were asked for. An error in one of them ends `run`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import trio

Act = Callable[[], None]


class Timeline:
    """Calls to be made. `run` must be running for any of them to be."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Act]] = []
        self._order = itertools.count()
        self._sooner = trio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def at(self, time: float, act: Act) -> None:
        """Call `act` at `time`, or as soon as possible after it."""
        entry = (time, next(self._order), act)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._sooner.set()

    def after(self, seconds: float, act: Act) -> None:
        """Call `act` in so many seconds; not before the caller has given up control, 0 included."""
        self.at(trio.current_time() + seconds, act)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make the calls, until cancelled."""
        task_status.started()
        while True:
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            self._sooner = trio.Event()
            with trio.move_on_at(self._due[0][0] if self._due else math.inf):
                await self._sooner.wait()
