"""The log of a simulated instance: what all its brokers say, in one ring, on the virtual clock.

A line with a traceback is a bug in the product, and kept apart. What a killed process still says while its tasks
unwind, nobody hears.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fluxres.broker.logbuffer import LogBuffer
from fluxres.testing.process import current

LINES: Final = 20_000
"""Lines that are kept."""
LOGGER: Final = "fluxres"


class SimulatedLog(LogBuffer):
    """The log buffer of every broker of an instance; `now` is seconds since 1970."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(0)
        self.bugs: list[str] = []
        self._now = now
        self._entries: deque[str] = deque(maxlen=LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        process = current.get()
        if process is not None and not process.alive:
            return
        self._rank = -1 if process is None else process.rank
        record.created = self._now()
        record.msecs = record.created % 1 * 1000
        line = self._format(record)
        self._entries.append(line)
        self._last += 1
        if record.exc_info and record.levelno >= logging.ERROR:
            self.bugs.append(line)
        self._news.set()

    @property
    def lines(self) -> list[str]:
        """The lines that are kept, oldest first."""
        return list(self._entries)

    @contextmanager
    def listening(self, level: int) -> Iterator[None]:
        """Have all that the rooms log in this block."""
        logger = logging.getLogger(LOGGER)
        before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(level)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.level, logger.propagate = before
