"""Reads on the store's second connection, in the Trio thread: they see what is committed and never wait for
it.

Everything that one call reads is of one moment. Links are followed, at the end of a key as on its way, also
into other namespaces, `MAX_LINKS` of them. A failed read is RpcError EIO: it concerns that key, not the
store.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import ROOT, check_namespace, join, normalise, shown, split
from fluxres.kvs.meters import StoreSize
from fluxres.kvs.ops import Chunk, DirEntry, Kind, NamespaceInfo
from fluxres.kvs.tree import MAX_LINKS

MAX_VALUE: Final = 64 << 20
"""Bytes that `get` returns; a longer value is read with `chunks` or a watch."""
MAX_LISTED: Final = 100_000
"""Names that `list` and `namespaces` return; more are read in parts."""
READ_BYTES: Final = 1 << 20
"""Bytes of chunks that one read returns when nothing else is said."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key led, and what is there.

    `way` has the namespace and key that were asked for and those that links led on to; `namespaces` has the
    id of the namespace of each, None for one that does not exist. `kind` is None where the last key does
    not exist.
    """

    way: tuple[tuple[str, str], ...]
    namespaces: tuple[int | None, ...]
    kind: Kind | None
    id: int = 0
    first: int = 0
    last: int = 0
    size: int = 0
    target: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """The key at the end of the way."""
        return self.way[-1][1]

    @property
    def namespace_id(self) -> int | None:
        """The namespace at the end of the way."""
        return self.namespaces[-1]


class Reader:
    """The reading side of the store."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._depth = 0

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read in the block is of one moment. It must not contain an `await`. May be nested."""
        try:
            if self._depth == 0:
                self._db.execute("BEGIN")
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise RpcError(errno.EIO, f"cannot read the store: {error}") from error

    def size(self) -> StoreSize:
        """What the store takes on the disk."""
        with self.snapshot():
            words = ("page_size", "page_count", "freelist_count")
            page, pages, free = (int(self._db.execute(f"PRAGMA {word}").fetchone()[0]) for word in words)
            path = str(self._db.execute("PRAGMA database_list").fetchone()[2])
        try:
            log = os.stat(f"{path}-wal").st_size
        except OSError:
            log = 0  # there is none: the last one to close has just moved it, or the store is in memory
        return StoreSize(used=(pages - free) * page, free=free * page, log=log)

    def namespace(self, name: str) -> NamespaceInfo | None:
        """The namespace `name`, None where there is none."""
        with self.snapshot():
            row = self._db.execute(
                "SELECT name, owner, version, id FROM namespace WHERE name = ?", (check_namespace(name),)
            ).fetchone()
        return None if row is None else NamespaceInfo(*row)

    def namespaces(self, after: str = "", limit: int = MAX_LISTED) -> list[NamespaceInfo]:
        """The namespaces in order of their names, `limit` at most, beginning after the name `after`."""
        with self.snapshot():
            rows = self._db.execute(
                "SELECT name, owner, version, id FROM namespace WHERE name > ? ORDER BY name LIMIT ?",
                (after, limit),
            ).fetchall()
        return [NamespaceInfo(*row) for row in rows]

    def resolve(self, namespace: str, key: str, *, follow: bool = True) -> Place:
        """Find `key`; with `follow=False` a link at its end is the result itself.

        Raises RpcError EINVAL, ELOOP; a missing namespace or key is told by the result.
        """
        way: tuple[tuple[str, str], ...] = ((check_namespace(namespace), normalise(key)),)
        namespaces: tuple[int | None, ...] = ()
        with self.snapshot():
            while True:
                place, onward = self._step(way, namespaces, follow=follow)
                if onward is None:
                    return place
                if len(way) > MAX_LINKS:
                    raise RpcError(errno.ELOOP, f"cannot read {shown(key)}: more than {MAX_LINKS} links on its way")
                way, namespaces = (*way, onward), place.namespaces

    def get(self, namespace: str, key: str) -> bytes | None:
        """The value of `key`, None where there is none.

        Raises RpcError ENOENT (no such namespace), EISDIR, EFBIG (more than `MAX_VALUE` bytes), EINVAL,
        ELOOP, EIO.
        """
        with self.snapshot():
            place = self._value(namespace, key)
            if place.kind is None:
                return None
            if place.size > MAX_VALUE:
                raise RpcError(
                    errno.EFBIG,
                    f"cannot get {shown(key)}: its {place.size} bytes are more than {MAX_VALUE}; watch it",
                )
            rows = self._db.execute("SELECT data FROM chunk WHERE entry = ? ORDER BY seq", (place.id,)).fetchall()
        return bytes(rows[0][0]) if len(rows) == 1 else b"".join([row[0] for row in rows])

    def chunks(self, namespace: str, key: str, after: int = 0, limit_bytes: int = READ_BYTES) -> list[Chunk]:
        """The chunks of a value with a `seq` above `after`, in order: `limit_bytes`, but always one where
        there is one.

        Raises what `get` raises, EFBIG apart.
        """
        with self.snapshot():
            return self.chunks_at(self._value(namespace, key), after, limit_bytes)

    def chunks_at(self, place: Place, after: int, limit_bytes: int = READ_BYTES) -> list[Chunk]:
        """The same for a key that was found in this snapshot."""
        found: list[Chunk] = []
        if place.last <= after:
            return found
        rows = self._db.execute(
            "SELECT seq, data FROM chunk WHERE entry = ? AND seq > ? ORDER BY seq", (place.id, after)
        )
        for seq, data in rows:
            found.append(Chunk(seq, data, seq == place.first))
            limit_bytes -= len(data)
            if limit_bytes <= 0:
                break
        rows.close()
        return found

    def entries(self, namespace: str, key: str) -> list[DirEntry]:
        """What is in the directory `key`, by name. Raises RpcError ENOENT, ENOTDIR, EFBIG (`MAX_LISTED`)."""
        with self.snapshot():
            place = self._directory(namespace, key)
            rows = self._db.execute(
                "SELECT name, kind, last FROM entry WHERE ns = ? AND parent = ? ORDER BY name LIMIT ?",
                (place.namespace_id, place.key, MAX_LISTED + 1),
            ).fetchall()
        if len(rows) > MAX_LISTED:
            raise RpcError(errno.EFBIG, f"cannot list {shown(key)}: it has more than {MAX_LISTED} names")
        return [DirEntry(name, Kind(kind), last) for name, kind, last in rows]

    def list_range(
        self, namespace: str, key: str, *, before: str | None = None, limit: int, depth: int = 1
    ) -> list[str]:
        """Names below the directory `key`, `depth` components each, in descending order, `limit` at most.

        `before` is the last name of the part before; with `depth=4`, the names below `job` are job ids as
        dothex, newest first. A directory that does not exist is empty.
        """
        with self.snapshot():
            place = self.resolve(namespace, key)
            if place.kind is not Kind.DIR or place.namespace_id is None:
                return []
            bound = normalise(before).split(".") if before else []
            found: list[str] = []
            for name in self._descending(place.namespace_id, place.key, depth, bound):
                if len(found) == limit:
                    break
                found.append(name)
        return found

    def _descending(self, ns: int, directory: str, depth: int, bound: list[str]) -> Iterator[str]:
        """Relative names of `depth` components below `directory`, below `bound`, in descending order."""
        compare = "<" if depth == 1 else "<="
        where = f"ns = ? AND parent = ?{f' AND name {compare} ?' if bound else ''}"
        rows = self._db.execute(f"SELECT name FROM entry WHERE {where} ORDER BY name DESC", (ns, directory, *bound[:1]))
        for (name,) in rows:
            if depth == 1:
                yield name
            else:
                inner = bound[1:] if bound and name == bound[0] else []
                if bound and name == bound[0] and not inner:
                    continue
                for rest in self._descending(ns, join(directory, name), depth - 1, inner):
                    yield f"{name}.{rest}"

    def _step(
        self, way: tuple[tuple[str, str], ...], before: tuple[int | None, ...], *, follow: bool
    ) -> tuple[Place, tuple[str, str] | None]:
        """Look up the last of `way`; the second result is where a link leads on from there."""
        namespace, key = way[-1]
        parent, name = split(key)
        row = self._db.execute(
            "SELECT n.id, e.kind, e.id, e.first, e.last, e.size, e.target_namespace, e.target_key"
            " FROM namespace n"
            " LEFT JOIN entry e ON e.ns = n.id AND e.parent = ? AND e.name = ? WHERE n.name = ?",
            (parent, name, namespace),
        ).fetchone()
        if row is None:
            return Place(way, (*before, None), None), None
        ns, kind, entry, first, last, size, target_namespace, target_key = row
        namespaces = (*before, ns)
        if key == ROOT:
            return Place(way, namespaces, Kind.DIR), None
        if kind is None:
            return Place(way, namespaces, None), self._link_above(ns, key)
        if kind != Kind.LINK:
            return Place(way, namespaces, Kind(kind), entry, first, last, size), None
        target = (target_namespace, target_key)
        return Place(way, namespaces, Kind.LINK, target=target), target if follow else None

    def _link_above(self, ns: int, key: str) -> tuple[str, str] | None:
        """Where `key`, which has no row, is to be looked for when a link is on its way.

        Everything above an entry is a directory, so the nearest one that exists decides.
        """
        rest: list[str] = []
        parent, name = split(key)
        while parent:
            rest.append(name)
            parent, name = split(parent)
            row = self._db.execute(
                "SELECT kind, target_namespace, target_key FROM entry WHERE ns = ? AND parent = ? AND name = ?",
                (ns, parent, name),
            ).fetchone()
            if row is not None:
                kind, target_namespace, target_key = row
                return (target_namespace, join(target_key, ".".join(reversed(rest)))) if kind == Kind.LINK else None
        return None

    def _found(self, namespace: str, key: str) -> Place:
        place = self.resolve(namespace, key)
        if place.namespace_id is None and len(place.way) == 1:
            raise RpcError(errno.ENOENT, f"cannot read {shown(key)}: there is no namespace {namespace}")
        return place

    def _value(self, namespace: str, key: str) -> Place:
        place = self._found(namespace, key)
        if place.kind is Kind.DIR:
            raise RpcError(errno.EISDIR, f"cannot read {shown(key)}: it is a directory")
        return place

    def _directory(self, namespace: str, key: str) -> Place:
        place = self._found(namespace, key)
        if place.kind is None:
            raise RpcError(errno.ENOENT, f"cannot list {shown(key)}: it does not exist in namespace {namespace}")
        if place.kind is not Kind.DIR:
            raise RpcError(errno.ENOTDIR, f"cannot list {shown(key)}: it is a value")
        return place
