"""The broker's log: Python's logging into a ring that `log.dmesg` shows, and to stderr.

Entries have the shape that flux-dmesg(1) shows: time, facility (the room), severity (RFC 5424), rank, text.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from typing import Final

import trio

RING_SIZE: Final = 1024
"""Entries that are kept."""
SEVERITIES: Final = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "err",
    logging.CRITICAL: "crit",
}
MAX_TEXT: Final = 4096
"""Characters of an entry, a traceback included."""


class LogBuffer(logging.Handler):
    """Keeps the latest entries, numbered from 1, and wakes whoever follows them."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._entries: deque[str] = deque(maxlen=RING_SIZE)
        self._last = 0
        self._news = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one entry (logging calls this)."""
        self._entries.append(self._format(record))
        self._last += 1
        with contextlib.suppress(OSError):  # a full disk, or nobody reads: the ring has it, and nothing may fail of it
            print(self._entries[-1], file=sys.stderr, flush=True)
        self._news.set()

    def _format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.levelno >= logging.ERROR:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facility = record.name.removeprefix("fluxres.")
        severity = SEVERITIES.get(record.levelno, "notice")
        return f"{stamp}.{int(record.msecs):03d}Z {facility}.{severity}[{self._rank}]: {text[:MAX_TEXT]}"

    def after(self, number: int) -> tuple[list[str], int]:
        """The entries after entry `number` that are still kept, and the number of the last one."""
        missing = min(self._last - number, len(self._entries))
        return list(self._entries)[len(self._entries) - missing :], self._last

    @property
    def last(self) -> int:
        """The number of the last entry."""
        return self._last

    async def more(self) -> None:
        """Wait for another entry."""
        if self._news.is_set():  # else others wait for this very event
            self._news = trio.Event()
        await self._news.wait()


def install(rank: int) -> LogBuffer:
    """Send everything that the rooms log into a buffer. Warnings of libraries go there too."""
    buffer = LogBuffer(rank)
    root = logging.getLogger()
    root.handlers[:] = [buffer]
    root.setLevel(logging.WARNING)
    logging.getLogger("fluxres").setLevel(logging.INFO)
    return buffer
