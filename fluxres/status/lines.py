"""The topics `events` and `log`: the newest lines of `resource.eventlog` in the store, and of rank 0's log."""

from __future__ import annotations

import logging
from collections import deque
from typing import Final, Protocol

import trio

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import decode
from fluxres.base.json import JsonObject
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Chunk
from fluxres.status.source import RETRY, Built, Wake

log = logging.getLogger("fluxres.status")

EVENTLOG_KEY: Final = "resource.eventlog"
TAIL: Final = 256
"""Lines that are shown of either."""


class LogLines(Protocol):
    """The log buffer of a broker: lines with numbers from 1 on, of which it keeps the newest."""

    @property
    def last(self) -> int:
        """The number of the last line."""

    def after(self, number: int) -> tuple[list[str], int]:
        """The lines after line `number` that are still kept, and the number of the last one."""

    async def more(self) -> None:
        """Wait for another line."""


class _Tail:
    """The keys of a list of bounded length that are shown, oldest first."""

    def __init__(self) -> None:
        self._keys: deque[str] = deque()

    def add(self, key: str, document: JsonObject) -> Built:
        """What is to be shown, and what no longer."""
        self._keys.append(key)
        yield key, document
        if len(self._keys) > TAIL:
            yield self._keys.popleft(), None


class EventsSource:
    """The newest events of the ranks, as they are committed. A key is `SEQ.INDEX`: the append, and the line in it."""

    topic = "events"

    def __init__(self, *, kvs: Kvs, wake: Wake) -> None:
        self._kvs = kvs
        self._wake = wake
        self._new: deque[tuple[str, str]] = deque(maxlen=TAIL)
        self._tail = _Tail()
        self._seq = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the eventlog until cancelled."""
        started = False
        while True:
            try:
                async with self._kvs.watch(PRIMARY, EVENTLOG_KEY, after=self._seq) as watch:
                    while chunks := watch.ready():
                        self._take(chunks)
                        await trio.lowlevel.checkpoint()
                    if not started:
                        started = True
                        task_status.started()
                    while True:
                        self._take(await watch.batch())
            except RpcError as error:
                log.warning("cannot follow %s: %s; it is tried again", EVENTLOG_KEY, error.text)
            if not started:
                started = True
                task_status.started()
            await trio.sleep(RETRY)

    def _take(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            lines = chunk.data.decode(errors="replace").splitlines(keepends=True)
            for index in range(max(0, len(lines) - TAIL), len(lines)):
                self._new.append((f"{chunk.seq}.{index}", lines[index]))
            self._seq = chunk.seq
        self._wake()

    def documents(self) -> Built:
        """The events since the last call."""
        new, self._new = self._new, deque(maxlen=TAIL)
        for key, line in new:
            try:
                events = decode(line)
            except ValueError as error:
                log.warning("cannot show an event of %s: %s", EVENTLOG_KEY, error)
                continue
            for event in events:
                document: JsonObject = {"t": event.timestamp, "name": event.name, "context": dict(event.context)}
                yield from self._tail.add(key, document)


class LogSource:
    """The newest lines of a log buffer. A key is the number of the line."""

    topic = "log"

    def __init__(self, *, lines: LogLines, wake: Wake) -> None:
        self._lines = lines
        self._wake = wake
        self._shown = max(0, lines.last - TAIL)
        self._tail = _Tail()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for more until cancelled."""
        task_status.started()
        told = self._lines.last
        while True:
            if self._lines.last == told:
                await self._lines.more()
            told = self._lines.last
            self._wake()

    def documents(self) -> Built:
        """The lines since the last call."""
        lines, last = self._lines.after(self._shown)
        self._shown = last
        for number, line in enumerate(lines[-TAIL:], start=last - len(lines[-TAIL:]) + 1):
            yield from self._tail.add(str(number), {"line": line})
