"""The feed on rank 0: builds the view of the instance, as long as somebody looks, and serves it as `status.watch`.

    IDLE ── a board is opened ──▶ COLLECTING ── nobody has had it open for LINGER seconds ──▶ IDLE
                                             ── it fails, which is a bug: logged ──▶ IDLE, for PAUSE seconds at least

In IDLE nothing is listened to, and nothing kept. Collecting, each source notes what has changed (`status.source`), and
a flush, one every `FLUSH` seconds at most and none where nothing has changed, makes one numbered change of the view.
While documents are built the others of the broker get their turn after every few.

The epoch of all positions is the UUID of rank 0's incarnation: a reader from another life gets a new snapshot.

| topic        | payload                     | answers                                                             |
|--------------|-----------------------------|---------------------------------------------------------------------|
| status.watch | topics, jobs?, position?    | streaming: a snapshot, in parts, then deltas (`status.messages`)    |

`jobs` is a constraint as job-list has them, `position` [epoch, seq] the last one that counts. Errors: EINVAL for
topics or constraints that make no sense, EPERM for the log to others than the instance owner, EAGAIN for the one
watcher too many.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.exec.ranks import Ranks
from fluxres.job.manager import Manager
from fluxres.job.stats import JobStats
from fluxres.kvs.kvs import Kvs
from fluxres.overlay.overlay import Overlay
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.sched.pool import Pool
from fluxres.status.asks import Watch, WatchRequest
from fluxres.status.board import Audience, Board
from fluxres.status.instance import InstanceSource
from fluxres.status.jobs import Detached, JobsSource
from fluxres.status.lines import EventsSource, LogLines, LogSource
from fluxres.status.messages import bodies
from fluxres.status.nodes import Drains, NodesSource
from fluxres.status.source import Source
from fluxres.status.tree import TreeSource
from fluxres.status.view import OWNER_TOPICS, Cursor, Position, View

log = logging.getLogger("fluxres.status")

FLUSH: Final = 0.1
"""Seconds between two changes of the view, at least."""
BATCH: Final = 32
"""Documents built before other tasks get their turn."""
MAX_WATCHERS: Final = 1024
"""Streams of `status.watch` that may be open; the next one gets EAGAIN."""
MAX_RATE: Final = 500
"""Deltas a second that all watchers get together: the more there are, the longer each waits for its next."""
IDLE: Final = 15.0
"""Seconds after which a watcher learns the position where nothing that has changed is for it."""
PAUSE: Final = 10.0
"""Seconds without a view after one that could not be built."""

_Put = dict[str, dict[str, JsonObject]]
_Delete = dict[str, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where the documents come from.

    `now` is in seconds since 1970; `about`, `queue` and `recovery` make documents of the topic `instance`. `drains` is
    asked when the record of the drains has changed. Of changes of what `detached` and `recovery` tell the feed has to
    be told (`Feed.touch_job`, `Feed.touch_recovery`).
    """

    manager: Manager
    stats: JobStats
    pool: Pool
    ranks: Ranks
    overlay: Overlay
    kvs: Kvs
    handle: Handle
    log: LogLines
    now: Callable[[], float]
    about: Callable[[], JsonObject]
    queue: Callable[[], JsonObject]
    drains: Drains
    detached: Detached
    recovery: Callable[[], JsonObject | None]


class Feed:
    """The view of the instance that rank 0 builds (`status.board.Boards`), and the service `status`."""

    def __init__(self, origins: Origins, *, router: Router) -> None:
        self._origins = origins
        self._board = Board(View())
        self._audience = Audience()
        self._collection: _Collection | None = None
        self._seq = 0
        """The number of the last change of the collections before."""
        self._watchers = 0
        origins.ranks.on_change(self._rank_changed)
        self.service = Service("status", router)
        self.service.task("watch", self._watch)

    @property
    def collecting(self) -> bool:
        """Whether it does anything at all."""
        return self._collection is not None

    # --- what is told by those whom no source can listen to

    def touch_job(self, jobid: JobId) -> None:
        """Other ranks of a job are detached now."""
        if self._collection is not None:
            self._collection.jobs.touch(jobid)

    def touch_recovery(self) -> None:
        """The recovery under way has changed, begun or ended."""
        if self._collection is not None:
            self._collection.wake()

    def _rank_changed(self, rank: int, online: bool) -> None:
        if self._collection is not None:
            self._collection.nodes.touch(rank)
            self._collection.tree.touch(rank)

    # --- collecting

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Board]:
        """Have the board kept up to date inside the block. It may not have begun yet (`Board.begun`)."""
        with self._audience.attending():
            yield self._board

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect whenever somebody looks, until cancelled. A bug in it is logged: it must not end the incarnation, and
        the next ones again as long as somebody looks.
        """
        task_status.started()
        while True:
            await self._audience.wanted()
            try:
                await self._collect()
            except Exception:
                log.exception("cannot show the instance, trying again in %g s", PAUSE)
                await trio.sleep(PAUSE)

    async def _collect(self) -> None:
        """Collect until nobody has looked for a while."""
        collection = _Collection(self._origins)
        epoch = self._origins.overlay.hello.uuid
        try:
            async with trio.open_nursery() as nursery:
                self._collection = collection
                nursery.start_soon(collection.run, self._board, Position(epoch, self._seq + 1))
                await self._audience.gone()
                nursery.cancel_scope.cancel()
        finally:
            self._collection = None
            self._seq = max(self._seq, self._board.view.position.seq)
            self._board.begin("")

    # --- the service

    async def _watch(self, request: Request) -> None:
        ask = _asked(request)
        if self._watchers >= MAX_WATCHERS:
            raise RpcError(errno.EAGAIN, f"cannot watch the instance: {MAX_WATCHERS} others do; try again later")
        self._watchers += 1
        try:
            async with self.open() as board:
                cursor = Cursor(board.view, ask.topics, ask.select, ask.position)
                idle = False
                while True:
                    body = cursor.next(idle=idle)
                    if body is not None:
                        for part in bodies(body, self._origins.now()):
                            await request.stream(part)
                        await trio.sleep(self._watchers / MAX_RATE)
                    with trio.move_on_after(IDLE) as waiting:
                        await board.news(cursor.seen)
                    idle = waiting.cancelled_caught
        finally:
            self._watchers -= 1


class _Collection:
    """All sources, for one stretch of collecting."""

    def __init__(self, origins: Origins) -> None:
        self._dirty = trio.Event()
        wake = self.wake
        kvs, pool, ranks = origins.kvs, origins.pool, origins.ranks
        self.jobs = JobsSource(manager=origins.manager, kvs=kvs, detached=origins.detached, wake=wake)
        self.nodes = NodesSource(pool=pool, ranks=ranks, kvs=kvs, drains=origins.drains, wake=wake)
        self.tree = TreeSource(
            overlay=origins.overlay, handle=origins.handle, ranks=ranks, pool=pool, now=origins.now, wake=wake
        )
        instance = InstanceSource(
            kvs=kvs,
            jobs=self.jobs,
            nodes=self.nodes,
            stats=origins.stats,
            about=origins.about,
            queue=origins.queue,
            recovery=origins.recovery,
            wake=wake,
        )
        self._sources: Sequence[Source] = (
            self.jobs,
            self.nodes,
            self.tree,
            EventsSource(kvs=kvs, wake=wake),
            LogSource(lines=origins.log, wake=wake),
            instance,  # the last one: it sums up what the others have built
        )

    def wake(self) -> None:
        """There is something to flush."""
        self._dirty.set()

    async def run(self, board: Board, first: Position) -> None:
        """Begin the view at position `first`, and keep it up to date until cancelled."""
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for source in self._sources:
                    starting.start_soon(nursery.start, source.run, name=f"start {source.topic}")
            put, _ = await self._flush()
            board.begin(first.epoch, put, first.seq)
            while True:
                await trio.sleep(FLUSH)
                await self._dirty.wait()
                put, delete = await self._flush()
                board.change(put, delete)

    async def _flush(self) -> tuple[_Put, _Delete]:
        """What has changed: documents to set, keys to delete."""
        self._dirty = trio.Event()
        put: _Put = {}
        delete: _Delete = {}
        built = 0
        for source in self._sources:
            shown: dict[str, JsonObject] = {}
            gone: dict[str, None] = {}
            for key, document in source.documents():
                if document is None:
                    shown.pop(key, None)
                    gone[key] = None
                else:
                    shown[key] = document
                    gone.pop(key, None)
                built += 1
                if built % BATCH == 0:
                    await trio.lowlevel.checkpoint()
            if shown:
                put[source.topic] = shown
            if gone:
                delete[source.topic] = [*gone]
        return put, delete


def _asked(request: Request) -> Watch:
    """Read a request of `status.watch`. Raises RpcError."""
    try:
        ask = request.parse(WatchRequest).read()
    except ValueError as error:
        raise RpcError(errno.EINVAL, str(error)) from error
    owned = OWNER_TOPICS.intersection(ask.topics)
    if owned and not request.is_owner:
        raise RpcError(errno.EPERM, f"cannot watch {', '.join(sorted(owned))}: it is for the instance owner")
    return ask
