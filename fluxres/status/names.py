"""Names of users, for those who look: a name service may take long to answer, and the broker must not wait for it."""

from __future__ import annotations

import os
import pwd
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

MAX_KNOWN: Final = 4096
"""Users whose names are kept; of more than that nobody is told."""


def lookup(userid: int) -> str | None:
    """What the system calls a user."""
    with suppress(KeyError):
        return pwd.getpwuid(userid).pw_name
    return None


class Usernames:
    """The names of users. `learned` is called of each whose name has been found out later than it was asked for."""

    def __init__(self, learned: Callable[[int], None]) -> None:
        self._learned = learned
        self._known: dict[int, str | None] = {}
        self._asked: deque[int] = deque()
        self._news = trio.Event()

    def get(self, userid: int) -> str | None:
        """The name of a user, None where it is not known (yet). Our own is found out at once."""
        if userid not in self._known and len(self._known) < MAX_KNOWN:
            own = userid == os.getuid()
            self._known[userid] = lookup(userid) if own else None
            if not own:
                self._asked.append(userid)
                self._news.set()
        return self._known.get(userid)

    async def run(self) -> None:
        """Find out names until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._asked:
                userid = self._asked.popleft()
                self._known[userid] = await trio.to_thread.run_sync(lookup, userid, abandon_on_cancel=True)
                if self._known[userid] is not None:
                    self._learned(userid)
