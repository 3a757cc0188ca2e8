"""The writer: takes commits from a queue and puts them into the store, many in one transaction (group
commit).

Everything that is queued while a transaction ends goes into the next one, up to `GROUP_MAX_COMMITS` and
`GROUP_MAX_BYTES`. The statements run in the Trio thread and only COMMIT, which waits for the disk, in
another: so a group costs two changes of thread, however many statements it has, and a busy Trio thread
cannot starve it (with all of it in a thread, each statement would wait for the interpreter lock).

How a transaction can end:

- its COMMIT returns: all of it is durable, and answered;
- a statement fails: SQLite undoes the commit at hand or the whole transaction, which is a definite failure, but of a
  commit of the instance itself (`hold`) StoreFailed: whoever posted it has nothing else to do than to begin again;
- no room on the disk, in a statement or in COMMIT: nothing of it is in the store. The log is moved to the
  file, which makes its room free, and the commits are tried again one at a time. What still finds no room
  is answered ENOSPC, but a commit of the instance itself (`hold`) stays at the head of the queue, in order,
  and is tried again with each new commit and every `RETRY_FULL_DISK` seconds. While one is held, others are
  answered ENOSPC;
- COMMIT fails otherwise: nobody can tell whether it is durable. StoreFailed; none of it is answered.

Cancellation is taken between transactions only: one that has begun ends, however long its disk takes.
"""

from __future__ import annotations

import errno
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres.kvs.meters import StoreMeters
from fluxres.kvs.ops import CommitResult, Op, StoreFailed
from fluxres.kvs.schema import is_full, primary_code
from fluxres.kvs.store import Applied, Store
from fluxres.kvs.tree import Touch
from fluxres.kvs.worker import Worker

GROUP_MAX_COMMITS: Final = 256
"""Commits in one transaction: the Trio thread is busy with them for a few milliseconds."""
GROUP_MAX_BYTES: Final = 4 << 20
"""Bytes in one transaction, a single larger commit apart."""
RETRY_FULL_DISK: Final = 1.0
"""Seconds until what is held on a full disk is tried again when no other commit comes."""
COLLECT_ROWS: Final = 200
"""Rows of garbage deleted along with one transaction."""
CHECKPOINT_ROWS: Final = 10_000
"""Changed rows after which the log is moved to the file."""
CHECKPOINT_BYTES: Final = 16 << 20
"""Bytes of commits after which the log is moved to the file."""
NO_ROOM: Final = "cannot commit: no space left on the disk of the store"


@dataclass(slots=True, eq=False)
class Pending:
    """A commit on its way: `size` is what it counts for in the queue, `since` when it was put there (Trio's clock)."""

    ops: Sequence[Op]
    size: int
    hold: bool
    done: Callable[[CommitResult], None]
    since: float
    result: CommitResult | None = None
    touched: list[Touch] = field(default_factory=list)


class _NoRoom(Exception):
    """The disk is full, and nothing of the transaction is in the store."""


class Writer:
    """The queue of commits and the work on it.

    `deliver` is called with the commits that have ended, in order. With `threaded=False` COMMIT runs in the
    Trio thread too.
    """

    def __init__(self, store: Store, deliver: Callable[[Sequence[Pending]], None], *, threaded: bool) -> None:
        self._store = store
        self._deliver = deliver
        self._threaded = threaded
        self._queue: deque[Pending] = deque()
        self._arrived = trio.Event()
        self._held = 0
        """Commits at the head of the queue that found no room and have not been tried since."""
        self._no_room = False
        """Whether the last transaction found no room."""
        self._worker = Worker()
        self.meters = StoreMeters()
        self._rows = store.changes
        self._bytes = 0

    @property
    def held(self) -> int:
        """Commits that wait for room on the disk."""
        return self._held

    def put(self, pending: Pending) -> None:
        """Queue a commit."""
        self._queue.append(pending)
        self._arrived.set()

    def abandon(self) -> list[Pending]:
        """Empty the queue, after the end of `run`; returns what was in it and has not begun."""
        left = list(self._queue)
        self._queue.clear()
        return left

    async def run(self) -> None:
        """Do the commits, until cancelled. Raises StoreFailed."""
        with self._worker.running() if self._threaded else nullcontext():
            await self._run()

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            await self._work_to_do()
            with trio.CancelScope(shield=True):  # bounded: one group, or one commit at a time of it
                self._deliver(await self._work(self._take()))
                if self._store.changes - self._rows > CHECKPOINT_ROWS or self._bytes > CHECKPOINT_BYTES:
                    await self._checkpoint()

    # --- the queue

    async def _work_to_do(self) -> None:
        """Wait for a commit, or until those held are to be tried again; not while garbage can be deleted."""
        while len(self._queue) == self._held and (self._no_room or not self._store.garbage):
            self._arrived = trio.Event()
            with trio.move_on_after(RETRY_FULL_DISK if self._held else inf):
                await self._arrived.wait()
            if self._held:
                return

    def _take(self) -> list[Pending]:
        group: list[Pending] = []
        size = 0
        while self._queue and len(group) < GROUP_MAX_COMMITS:
            size += self._queue[0].size
            if group and size > GROUP_MAX_BYTES:
                break
            group.append(self._queue.popleft())
        self._held = 0
        return group

    # --- the work

    async def _work(self, group: list[Pending]) -> list[Pending]:
        """Put a group into the store; returns the commits that have a result now, in order."""
        try:
            await self._transaction(group)
            self._no_room = False
        except _NoRoom:
            self._no_room = True
            await self._checkpoint()
            group = await self._one_by_one(group)
        return [pending for pending in group if pending.result is not None]

    async def _one_by_one(self, group: list[Pending]) -> list[Pending]:
        """Try each commit of a group in a transaction of its own; returns all that were judged.

        Behind a commit that has to be held nothing is tried, lest it overtakes.
        """
        held: list[Pending] = []
        for pending in group:
            if not held and await self._fits(pending):
                continue
            if pending.hold:
                held.append(pending)
            else:
                pending.result = _failure(errno.ENOSPC, NO_ROOM)
        if not held:
            return group
        refused = [pending for pending in self._queue if not pending.hold]
        self._queue = deque([*held, *(pending for pending in self._queue if pending.hold)])
        self._held = len(self._queue)
        for pending in refused:
            pending.result = _failure(errno.ENOSPC, NO_ROOM)
        return group + refused

    async def _fits(self, pending: Pending) -> bool:
        try:
            await self._transaction([pending])
        except _NoRoom:
            return False
        return True

    async def _checkpoint(self) -> None:
        """Move the log to the file. On a full disk the log keeps what does not fit, for a later time."""
        self._rows, self._bytes = self._store.changes, 0
        try:
            await self._blocking(self._store.checkpoint)
        except sqlite3.Error as error:
            if not is_full(error):
                raise StoreFailed(f"cannot move the store's log to its file: {error}") from error

    async def _transaction(self, group: Sequence[Pending]) -> None:
        """One transaction; afterwards every commit of it has a result. Raises _NoRoom, StoreFailed."""
        store, begun = self._store, trio.current_time()
        try:
            store.begin()
            results = [self._apply(pending) for pending in group]
            if store.garbage and not self._no_room:
                store.collect(COLLECT_ROWS)
        except sqlite3.Error as error:
            self._undo(error)
            if is_full(error):
                raise _NoRoom from error
            for pending in group:
                pending.result = _broken(pending, error)
            return
        await self._commit()
        self.meters.transactions.observe(trio.current_time() - begun)
        for pending, result in zip(group, results, strict=True):
            if isinstance(result, Applied):
                pending.result = CommitResult(result.versions)
                pending.touched = result.touched
            else:
                pending.result = result
            self._bytes += pending.size

    def _apply(self, pending: Pending) -> Applied | CommitResult:
        try:
            return self._store.apply(pending.ops)
        except RpcError as error:
            return CommitResult({}, error)
        except sqlite3.Error as error:
            if is_full(error) or not self._store.in_transaction:
                raise
            return _broken(pending, error)

    async def _commit(self) -> None:
        try:
            await self._blocking(self._store.commit)
        except sqlite3.Error as error:
            if not is_full(error):
                raise StoreFailed(
                    f"cannot tell whether a transaction is durable: {error}; the store has to be opened anew"
                ) from error
            self._undo(error)
            raise _NoRoom from error

    async def _blocking(self, call: Callable[[], None]) -> None:
        """Make a call that waits for the disk."""
        if self._threaded:
            await self._worker.call(call)
        else:
            call()

    def _undo(self, cause: sqlite3.Error) -> None:
        try:
            self._store.rollback()
        except sqlite3.Error as error:
            raise StoreFailed(f"cannot undo a transaction that failed ({cause}): {error}") from error


def _broken(pending: Pending, error: sqlite3.Error) -> CommitResult:
    """Nothing of the commit is in the store. The instance cannot go on without its own. Raises StoreFailed."""
    if pending.hold:
        why = f"cannot commit the instance's own records: {error}"
        raise StoreFailed(f"{why}; the store has to be opened anew") from error
    busy = primary_code(error) == sqlite3.SQLITE_BUSY
    return _failure(errno.EBUSY if busy else errno.EIO, f"cannot commit: {error}")


def _failure(errnum: int, text: str) -> CommitResult:
    return CommitResult({}, RpcError(errnum, text))
