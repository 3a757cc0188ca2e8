"""The disk of rank 0: a store in memory that survives the broker's death, and not what it had not committed.

The tables and the code that reads and writes them are the real ones (`fluxres.kvs`), on SQLite without a file. One
connection serves for writing and reading: commits run in the Trio thread here, each in one step, so that nobody can see
a transaction that is open. A new life gets a copy of what was committed; what is left of the old one finds its
connection closed.

Tests can have something done right before and right after any commit, such as killing the broker there.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY
from fluxres.kvs.reader import Reader
from fluxres.kvs.schema import SCHEMA
from fluxres.kvs.store import Store


class MemoryStore:
    """The store of one instance, over all lives of its rank 0."""

    def __init__(self) -> None:
        self.commits = 0
        """How many transactions are durable."""
        self.before_commit: Callable[[int], None] = lambda number: None
        self.after_commit: Callable[[int], None] = lambda number: None
        """Called with the number of a transaction, from 1 on, before it is durable, and before anybody knows it is."""
        self._news = trio.Event()
        self._db = _connect()
        self._db.executescript(f"{SCHEMA} INSERT INTO namespace VALUES (1, '{PRIMARY}', {os.getuid():d}, 0, 0);")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Kvs]:
        """The store for one incarnation."""
        await trio.lowlevel.checkpoint()
        yield Kvs(_Store(self._db, self), Reader(self._db), threaded=False)

    def get(self, namespace: str, key: str) -> bytes | None:
        """What is committed under a key, whether a broker runs or not; None where there is nothing. Raises RpcError."""
        return Reader(self._db).get(namespace, key)

    async def committed(self) -> None:
        """Return after the next transaction."""
        await self._news.wait()

    def was_committed(self) -> None:
        """A transaction is durable."""
        self.commits += 1
        self._news.set()
        self._news = trio.Event()
        self.after_commit(self.commits)

    def crash(self) -> None:
        """The process that has it open is gone."""
        old, self._db = self._db, _connect()
        if old.in_transaction:
            old.rollback()
        old.backup(self._db)
        old.close()

    def close(self) -> None:
        """Nobody wants it any more."""
        self._db.close()


class _Store(Store):
    """The writer's side, which tells of commits."""

    def __init__(self, db: sqlite3.Connection, disk: MemoryStore) -> None:
        super().__init__(db)
        self._disk = disk

    def commit(self) -> None:
        """End the transaction."""
        self._disk.before_commit(self._disk.commits + 1)
        super().commit()
        self._disk.was_committed()


def _connect() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)
