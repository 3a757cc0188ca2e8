"""Commits on the store's writing connection: transactions, namespaces, and what is left to delete later.

`begin`, then `apply` once a commit, then `commit` or `rollback`: many commits share one SQLite transaction,
each within a savepoint, so that one that fails leaves nothing behind and the others go on. One thread at a
time.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, assert_never

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import ROOT, check_namespace, shown
from fluxres.kvs.ops import (
    PRIMARY,
    Append,
    CreateNamespace,
    Link,
    Mkdir,
    Op,
    Put,
    RemoveNamespace,
    Require,
    Unlink,
)
from fluxres.kvs.tree import Namespace, Touch, Tree

MAX_CACHED_NAMESPACES: Final = 4096
"""Namespaces whose row is kept in memory from one commit to the next."""


@dataclass(slots=True)
class Applied:
    """What one commit did: new versions by namespace, and the places to look at again."""

    versions: dict[str, int] = field(default_factory=dict)
    touched: list[Touch] = field(default_factory=list)


class Store:
    """The writer's side of the store. Every method raises sqlite3.Error where SQLite does."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._namespaces: dict[str, Namespace] = {}
        self._changed: dict[str, Namespace] = {}
        self._tree = Tree(db, self._above("SELECT max(entry) FROM chunk", "SELECT max(entry) FROM garbage"))
        self._next_namespace = self._above("SELECT max(id) FROM namespace", "SELECT max(ns) FROM removed")

    # --- transactions

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open: SQLite ends one by itself after some errors."""
        return self._db.in_transaction

    @property
    def changes(self) -> int:
        """Rows changed since the store was opened."""
        return self._db.total_changes

    @property
    def garbage(self) -> bool:
        """Whether `collect` may have something to do."""
        return self._tree.garbage

    def begin(self) -> None:
        """Begin a transaction."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """End the transaction: when this returns it is durable. When it raises, it may be durable or not."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, where SQLite has not done so by itself."""
        self._namespaces.clear()
        self._tree.garbage = True
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def checkpoint(self) -> None:
        """Move what is in the log to the file, as far as readers allow: the log can then be reused."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    # --- commits

    def apply(self, ops: Iterable[Op]) -> Applied:
        """Apply one commit within the transaction. Raises RpcError: then nothing of it is applied."""
        self._changed = {}
        touched: list[Touch] = []
        self._tree.touched = touched
        self._db.execute("SAVEPOINT one")
        try:
            for op in ops:
                self._apply(op)
            for ns in self._changed.values():
                self._db.execute("UPDATE namespace SET version = ?, seq = ? WHERE id = ?", (ns.version, ns.seq, ns.id))
        except BaseException:
            for name in self._changed:
                self._namespaces.pop(name, None)  # its row has what holds
            if self._db.in_transaction:
                self._db.execute("ROLLBACK TO one")
                self._db.execute("RELEASE one")
            raise
        self._db.execute("RELEASE one")
        self._namespaces.update(self._changed)
        while len(self._namespaces) > MAX_CACHED_NAMESPACES:
            del self._namespaces[next(iter(self._namespaces))]
        return Applied({name: ns.version for name, ns in self._changed.items()}, touched)

    def collect(self, limit: int) -> None:
        """Delete about `limit` rows that belong to nothing any more, within the transaction."""
        db = self._db
        for (entry,) in db.execute("SELECT entry FROM garbage LIMIT ?", (limit,)).fetchall():
            limit -= db.execute(
                "DELETE FROM chunk WHERE entry = ?1 AND seq IN (SELECT seq FROM chunk WHERE entry = ?1 LIMIT ?2)",
                (entry, limit),
            ).rowcount
            if limit <= 0:
                return
            limit -= db.execute("DELETE FROM garbage WHERE entry = ?", (entry,)).rowcount
        for (ns,) in db.execute("SELECT ns FROM removed LIMIT ?", (max(limit, 0),)).fetchall():
            rows = db.execute("SELECT parent, name, id FROM entry WHERE ns = ? LIMIT ?", (ns, limit)).fetchall()
            db.executemany("INSERT INTO garbage VALUES (?)", [(entry,) for _, _, entry in rows if entry])
            db.executemany(
                "DELETE FROM entry WHERE ns = ? AND parent = ? AND name = ?", [(ns, *row[:2]) for row in rows]
            )
            limit -= len(rows)
            if limit <= 0:
                return
            db.execute("DELETE FROM removed WHERE ns = ?", (ns,))
        left = db.execute("SELECT EXISTS (SELECT 1 FROM garbage) OR EXISTS (SELECT 1 FROM removed)").fetchone()
        self._tree.garbage = bool(left[0])

    def _apply(self, op: Op) -> None:
        tree = self._tree
        match op:
            case Append():
                tree.append(self._change(op.namespace), op.key, op.data)
            case Put():
                tree.put(self._change(op.namespace), op.key, op.data)
            case Require():
                self._require(op)
            case Unlink():
                tree.unlink(self._change(op.namespace), op.key)
            case Mkdir():
                tree.mkdir(self._change(op.namespace), op.key)
            case Link():
                target = check_namespace(op.target_namespace)
                tree.link(self._change(op.namespace), op.key, target, op.target_key)
            case CreateNamespace():
                self._create(op)
            case RemoveNamespace():
                self._remove(op)
            case _:
                assert_never(op)

    def _require(self, op: Require) -> None:
        exists = self._tree.exists(self._namespace(op.namespace), op.key)
        if exists and op.absent:
            raise RpcError(errno.EEXIST, f"cannot commit: {shown(op.key)} exists in namespace {op.namespace}")
        if not exists and not op.absent:
            raise RpcError(errno.ENOENT, f"cannot commit: {shown(op.key)} is not in namespace {op.namespace}")

    # --- namespaces

    def _create(self, op: CreateNamespace) -> None:
        if self._find(check_namespace(op.name)) is not None:
            raise RpcError(errno.EEXIST, f"cannot create namespace {op.name}: it exists")
        created = Namespace(op.name, self._next_namespace, 0, 0)
        self._next_namespace += 1
        self._db.execute("INSERT INTO namespace VALUES (?, ?, ?, 0, 0)", (created.id, op.name, op.owner))
        self._changed[op.name] = created
        self._tree.touched.append(Touch(op.name, ROOT, below=True))

    def _remove(self, op: RemoveNamespace) -> None:
        if op.name == PRIMARY:
            raise RpcError(errno.ENOTSUP, f"cannot remove namespace {PRIMARY}: every instance has it")
        ns = self._namespace(op.name)
        self._db.execute("DELETE FROM namespace WHERE id = ?", (ns.id,))
        self._db.execute("INSERT INTO removed VALUES (?)", (ns.id,))
        self._namespaces.pop(op.name, None)
        self._changed.pop(op.name, None)
        self._tree.garbage = True
        self._tree.touched.append(Touch(op.name, ROOT, below=True))

    def _change(self, name: str) -> Namespace:
        """The namespace, noted as changed by this commit: its version grows once."""
        ns = self._changed.get(name)
        if ns is None:
            ns = self._changed[name] = self._namespace(name)
            ns.version += 1
        return ns

    def _namespace(self, name: str) -> Namespace:
        ns = self._find(check_namespace(name))
        if ns is None:
            raise RpcError(errno.ENOENT, f"cannot commit: there is no namespace {name}")
        return ns

    def _find(self, name: str) -> Namespace | None:
        known = self._changed.get(name) or self._namespaces.get(name)
        if known is not None:
            return known
        row = self._db.execute("SELECT id, version, seq FROM namespace WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        found = self._namespaces[name] = Namespace(name, *row)
        return found

    def _above(self, *queries: str) -> int:
        return 1 + max(int(self._db.execute(sql).fetchone()[0] or 0) for sql in queries)
