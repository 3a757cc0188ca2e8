"""What goes wrong with those who ask, said in the log, but not as often as they can make it go wrong."""

from __future__ import annotations

import logging
from typing import Final

import trio

log = logging.getLogger("fluxres.status")

PAUSE: Final = 10.0
"""Seconds in which a complaint of one kind is logged once."""


class Complaints:
    """Logs one complaint of each kind in `PAUSE` seconds, and with the next how many there were in between.

    Kinds are constants of the program: there are few.
    """

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._more: dict[str, int] = {}

    def say(self, kind: str, text: str, *, error: BaseException | None = None) -> None:
        """Log `text`, and the traceback of `error` if there is one."""
        now = trio.current_time()
        if now < self._next.get(kind, now):
            self._more[kind] = self._more.get(kind, 0) + 1
            return
        self._next[kind] = now + PAUSE
        more = self._more.pop(kind, 0)
        said = f"{text} (and {more} more like it before)" if more else text
        log.log(logging.WARNING if error is None else logging.ERROR, "%s", said, exc_info=error)
