"""What the feed's sources have in common: each owns a topic, and builds its documents when the feed asks for them.

A source is told of changes by whatever it listens to, as cheaply as can be: it notes what is no longer as it was shown,
and wakes the feed. The documents are built when the feed flushes, once for however many changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias

import trio

from fluxres.base.errors import RpcError
from fluxres.base.json import JsonObject
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY

log = logging.getLogger("fluxres.status")

RETRY: Final = 1.0
"""Seconds after which a watch that was refused, or has failed, is tried again."""

Wake = Callable[[], None]
"""Tells the feed that there is something to flush."""
Built: TypeAlias = "Iterator[tuple[str, JsonObject | None]]"
"""Keys with their documents; None: there is no such document any more."""


class Source(Protocol):
    """The documents of one topic, for one stretch of collecting."""

    @property
    def topic(self) -> str:
        """The topic that it owns."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect until cancelled. Started: `documents` has all that there is."""

    def documents(self) -> Built:
        """What may have changed since the last call, built one by one. All of it is to be taken.

        Others may run between two documents: what they change is for the next call.
        """


async def follow(kvs: Kvs, key: str, changed: Callable[[], None]) -> None:
    """Call `changed` now, and each time that `key` in the primary namespace was committed. Until cancelled."""
    watcher = kvs.watcher()
    try:
        while True:
            watcher.arm()
            try:
                watcher.follow(kvs.resolve(PRIMARY, key).way)
            except RpcError as error:
                log.warning("cannot watch %s: %s; it is tried again", key, error.text)
                with trio.move_on_after(RETRY):
                    await watcher.changed()
                continue
            changed()
            await watcher.changed()
    finally:
        watcher.close()
