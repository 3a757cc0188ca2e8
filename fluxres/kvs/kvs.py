"""The KVS as the services of rank 0's broker use it: commits, reads, watches. One `Kvs` an incarnation.

    async with Kvs.open(path, owner=uid) as kvs:
        await nursery.start(kvs.run)

Commits go to the writer (`fluxres.kvs.writer`), which answers when they are durable. Reads are done at
once, on a connection of their own, and see what is durable.

States: OPEN from `open`; RUNNING in `run`; CLOSED when that ends. `run` ends by cancellation: the
transaction at hand ends and its commits are answered; those that have not begun get ECANCELED. Or by
StoreFailed: commits whose outcome is unknown are not answered at all, and whoever awaits one gets
StoreFailed.
"""

from __future__ import annotations

import builtins
import errno
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import trio

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import ROOT
from fluxres.kvs.meters import StoreMeters, StoreSize
from fluxres.kvs.ops import Append, Chunk, CommitResult, DirEntry, NamespaceInfo, Op, Put, StoreFailed
from fluxres.kvs.reader import MAX_LISTED, READ_BYTES, Place, Reader
from fluxres.kvs.schema import close_store, open_store
from fluxres.kvs.store import Store
from fluxres.kvs.watch import Watch, Watcher, WatchIndex
from fluxres.kvs.writer import Pending, Writer

MAX_QUEUED_BYTES: Final = 64 << 20
"""Bytes of commits that may be under way before others than the instance's own are refused."""
MAX_QUEUED_COMMITS: Final = 16_384
"""Commits that may be under way before others than the instance's own are refused."""
MAX_COMMIT_OPS: Final = 65_536
"""Operations of one commit."""
OP_BYTES: Final = 256
"""What an operation counts for in the queue beside its data."""


T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class State(Enum):
    """The states of a Kvs."""

    OPEN = "open"
    RUNNING = "running"
    CLOSED = "closed"


class Kvs:
    """The store of the instance, with its writer."""

    def __init__(self, store: Store, reader: Reader, *, threaded: bool) -> None:
        self._reader = reader
        self._writer = Writer(store, self._deliver, threaded=threaded)
        self._state = State.OPEN
        self._index = WatchIndex()
        self._version_events: dict[str, trio.Event] = {}
        self._waiters: set[_Waiter] = set()
        self._queued_bytes = 0
        self._queued_commits = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, *, owner: int, threaded: bool = True) -> AsyncIterator[Kvs]:
        """Open the store at `path`, made where it is missing; closed when the block is left.

        `owner` is the uid of the instance owner. With `threaded=False` everything runs in the Trio
        thread, for simulations on a virtual clock. Raises StoreRefused, and RpcError ENOSPC.
        """
        connections = await _call(open_store, path, owner, threaded=threaded)
        kvs = cls(Store(connections[0]), Reader(connections[1]), threaded=threaded)
        try:
            yield kvs
        finally:
            kvs._state = State.CLOSED
            with trio.CancelScope(shield=True):  # bounded by the size of the log
                await _call(close_store, *connections, threaded=threaded)

    # --- running

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the commits, until cancelled. Raises StoreFailed."""
        if self._state is not State.OPEN:
            raise RuntimeError(f"cannot run a Kvs that is {self._state.value}")
        self._state = State.RUNNING
        task_status.started()
        try:
            await self._writer.run()
        finally:
            self._state = State.CLOSED
            for waiter in self._waiters:
                waiter.ended.set()
            for pending in self._writer.abandon():
                pending.done(_refusal(errno.ECANCELED, "the store was closed before the commit began"))

    def _deliver(self, finished: Sequence[Pending]) -> None:
        """Tell of commits that have ended: watches first, so that whoever is told finds everyone told."""
        for pending in finished:
            for touched in pending.touched:
                self._index.touch(touched)
                if touched.key == ROOT:
                    self._wake_version(touched.namespace)
            for namespace in pending.result.versions if pending.result else ():
                self._wake_version(namespace)
        meters, now = self._writer.meters, trio.current_time()
        for pending in finished:
            self._queued_bytes -= pending.size
            self._queued_commits -= 1
            if pending.result is not None:
                if pending.result.error is None:
                    meters.commits.observe(now - pending.since)
                else:
                    meters.failed += 1
                pending.done(pending.result)

    def _wake_version(self, namespace: str) -> None:
        event = self._version_events.pop(namespace, None)
        if event is not None:
            event.set()

    # --- commits

    @property
    def queued_bytes(self) -> int:
        """Bytes of commits under way: senders of the instance's own records bound themselves by it."""
        return self._queued_bytes

    @property
    def queued_commits(self) -> int:
        """Commits under way."""
        return self._queued_commits

    @property
    def held_commits(self) -> int:
        """Those of them that wait for room on the disk."""
        return self._writer.held

    @property
    def meters(self) -> StoreMeters:
        """What was measured of the commits."""
        return self._writer.meters

    def submit(self, ops: Sequence[Op], done: Callable[[CommitResult], None], *, hold: bool = False) -> None:
        """Queue a commit, without waiting; `done` is called in the Trio thread when it has ended.

        Commits are done, and answered, in the order in which they were submitted. With `hold`, for the
        instance's own records, a full disk does not fail the commit: it waits for room, keeping its place.
        Others are answered ENOSPC then, without waiting for held ones, and EAGAIN when `MAX_QUEUED_BYTES`
        or `MAX_QUEUED_COMMITS` are under way. A commit without operations ends after all before it. An
        exception from `done` ends `run`.
        """
        size = OP_BYTES
        for op in ops:
            size += OP_BYTES + (len(op.data) if isinstance(op, (Put, Append)) else 0)
        refusal = self._refuse(len(ops), size, hold=hold)
        if refusal is not None:
            self._writer.meters.failed += 1
            trio.lowlevel.current_trio_token().run_sync_soon(done, refusal)
            return
        self._queued_bytes += size
        self._queued_commits += 1
        self._writer.put(Pending(ops, size, hold, done, trio.current_time()))

    def _refuse(self, count: int, size: int, *, hold: bool) -> CommitResult | None:
        if self._state is State.CLOSED:
            return _refusal(errno.ECANCELED, "the store is closed")
        if count > MAX_COMMIT_OPS or size > MAX_QUEUED_BYTES:
            return _refusal(
                errno.E2BIG,
                f"{count} operations of {size} bytes are too much at once;"
                f" {MAX_COMMIT_OPS} operations, {MAX_QUEUED_BYTES} bytes are allowed",
            )
        if not hold and self._queued_bytes + size > MAX_QUEUED_BYTES:
            return _refusal(errno.EAGAIN, f"{self._queued_bytes} bytes are waiting to be written; try again later")
        if not hold and self._queued_commits >= MAX_QUEUED_COMMITS:
            return _refusal(errno.EAGAIN, f"{self._queued_commits} commits are waiting to be written; try again later")
        return None

    async def commit(self, *ops: Op, hold: bool = False) -> Mapping[str, int]:
        """Commit, and wait until it is durable; returns the new version of each namespace changed.

        Raises RpcError, and StoreFailed when nobody can tell. A commit whose wait is cancelled may still
        happen.
        """
        waiter = _Waiter()
        self.submit(ops, waiter.done, hold=hold)
        self._waiters.add(waiter)
        try:
            await waiter.ended.wait()
        finally:
            self._waiters.discard(waiter)
        if waiter.result is None:
            raise StoreFailed("cannot tell whether a commit is durable: the store failed under it")
        if waiter.result.error is not None:
            raise waiter.result.error
        return waiter.result.versions

    # --- reads

    def snapshot(self) -> AbstractContextManager[None]:
        """Everything read in the block is of one moment; there must be no `await` in it."""
        return self._reader.snapshot()

    def resolve(self, namespace: str, key: str, *, follow: bool = True) -> Place:
        """Find `key`, following links; see `Reader.resolve`."""
        return self._reader.resolve(namespace, key, follow=follow)

    def get(self, namespace: str, key: str) -> bytes | None:
        """The value of `key`, None where there is none; see `Reader.get` for the errors."""
        return self._reader.get(namespace, key)

    def chunks(self, namespace: str, key: str, after: int = 0, limit_bytes: int = READ_BYTES) -> list[Chunk]:
        """The chunks after the cursor `after`, `limit_bytes` but at least one; see `Reader.chunks`."""
        return self._reader.chunks(namespace, key, after, limit_bytes)

    def exists(self, namespace: str, key: str) -> bool:
        """Whether `key` leads to a value or a directory."""
        return self._reader.resolve(namespace, key).kind is not None

    def list(self, namespace: str, key: str) -> builtins.list[DirEntry]:
        """What is in the directory `key`, by name; see `Reader.entries`."""
        return self._reader.entries(namespace, key)

    def list_range(
        self, namespace: str, prefix: str, *, before: str | None = None, limit: int, depth: int = 1
    ) -> builtins.list[str]:
        """Names below `prefix`, `depth` components each, descending; see `Reader.list_range`."""
        return self._reader.list_range(namespace, prefix, before=before, limit=limit, depth=depth)

    def namespace(self, name: str) -> NamespaceInfo:
        """The namespace `name`. Raises RpcError ENOENT."""
        info = self._reader.namespace(name)
        if info is None:
            raise RpcError(errno.ENOENT, f"there is no namespace {name}")
        return info

    def namespaces(self, after: str = "", limit: int = MAX_LISTED) -> builtins.list[NamespaceInfo]:
        """The namespaces by name, `limit` at most, beginning after the name `after`."""
        return self._reader.namespaces(after, limit)

    def version(self, namespace: str) -> int:
        """The version of a namespace: how many commits have changed it. Raises RpcError ENOENT."""
        return self.namespace(namespace).version

    def size(self) -> StoreSize:
        """What the store takes on the disk. Raises RpcError EIO."""
        return self._reader.size()

    # --- waiting

    async def wait_version(self, namespace: str, version: int) -> int:
        """Wait until a namespace has this version; returns the one it has. Raises RpcError ENOENT."""
        await trio.lowlevel.checkpoint()
        while (current := self.version(namespace)) < version:
            await self._version_events.setdefault(namespace, trio.Event()).wait()
        return current

    def watch(self, namespace: str, key: str, after: int = 0) -> Watch:
        """Watch a value grow: `async with kvs.watch(…) as watch: async for chunk in watch: …`.

        It misses no chunk with a `seq` above `after`; see `Watch`.
        """
        return Watch(self._reader, self._index, namespace, key, after)

    def watcher(self) -> Watcher:
        """A bare watcher, for whoever reads by itself: `arm`, read, `follow`, await `changed`; `close`."""
        return Watcher(self._index)


class _Waiter:
    """Whoever awaits a commit."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: CommitResult | None = None

    def done(self, result: CommitResult) -> None:
        self.result = result
        self.ended.set()


async def _call(function: Callable[[*Arguments], T], *arguments: *Arguments, threaded: bool) -> T:
    """Call a function that may take long."""
    return await trio.to_thread.run_sync(function, *arguments) if threaded else function(*arguments)


def _refusal(errnum: int, why: str) -> CommitResult:
    return CommitResult({}, RpcError(errnum, f"cannot commit: {why}"))
