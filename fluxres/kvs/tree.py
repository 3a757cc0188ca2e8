"""The keys of the store as the writer changes them: entries, directories, links, and the chunks of values.

The tree keeps this invariant: every directory on the way to an entry has a row of its own, of kind DIR. So an
entry that is found at once needs no look at its path. A missing one costs a walk from the root, which makes
the directories, replaces values that are in the way, as Flux does, and follows links within the namespace.

What is removed leaves the tree at once; the chunks of long values stay as garbage, for `Store.collect`.
"""

from __future__ import annotations

import errno
import sqlite3
from dataclasses import dataclass
from typing import Final, NamedTuple

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import ROOT, below, join, normalise, shown, split
from fluxres.kvs.ops import Kind

MAX_CHUNK: Final = 16 << 20
"""Bytes of one put or append."""
MAX_LINKS: Final = 10
"""Links followed for one key; Flux's bound too."""
INLINE_DELETE: Final = 64
"""Chunks that a put deletes by itself; a longer value that it replaces becomes garbage."""


@dataclass(frozen=True, slots=True)
class Touch:
    """A place whose readers may see something else now: `key`, and with `below` whatever is under it too."""

    namespace: str
    key: str
    below: bool = False


@dataclass(slots=True)
class Namespace:
    """A namespace's row as the writer keeps it: its version, and the last sequence number given in it."""

    name: str
    id: int
    version: int
    seq: int


class _Row(NamedTuple):
    kind: int
    id: int
    chunks: int


class _Spot(NamedTuple):
    """Where a key is kept, or would be: its directory, its name there, and its row where there is one."""

    parent: str
    name: str
    row: _Row | None

    @property
    def key(self) -> str:
        return join(self.parent, self.name)


class Tree:
    """The entries of all namespaces. `touched` collects what the commit at hand has changed."""

    def __init__(self, db: sqlite3.Connection, next_entry: int) -> None:
        self._db = db
        self._next_entry = next_entry
        self.touched: list[Touch] = []
        self.garbage = True
        """Whether there may be garbage."""

    # --- operations

    def put(self, ns: Namespace, key: str, data: bytes) -> None:
        """Set `key` to the value `data`. Raises RpcError EINVAL, EFBIG, ELOOP."""
        _check_size(key, data)
        spot = self._make_way(ns, key, "put")
        ns.seq += 1
        row = spot.row
        if row is not None and row.kind == Kind.VALUE and row.chunks <= INLINE_DELETE:
            self._db.execute("DELETE FROM chunk WHERE entry = ?", (row.id,))
            self._db.execute(
                "UPDATE entry SET first = ?1, last = ?1, chunks = 1, size = ?2"
                " WHERE ns = ?3 AND parent = ?4 AND name = ?5",
                (ns.seq, len(data), ns.id, spot.parent, spot.name),
            )
            self._db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (row.id, ns.seq, data))
        else:
            self._remove(ns, spot)
            self._insert_value(ns, spot, data)
        self.touched.append(Touch(ns.name, spot.key))

    def append(self, ns: Namespace, key: str, data: bytes) -> None:
        """Add `data` to the value `key`. Raises RpcError EISDIR, EOPNOTSUPP (a link), and as `put` does."""
        _check_size(key, data)
        ns.seq += 1
        spot = _Spot(*split(normalise(key)), None)
        if not self._extend(ns, spot, data):
            spot = self._make_way(ns, key, "append to")
            if spot.row is None:
                self._insert_value(ns, spot, data)
            elif spot.row.kind == Kind.DIR:
                raise RpcError(errno.EISDIR, f"cannot append to {shown(key)}: it is a directory")
            elif spot.row.kind == Kind.LINK:
                raise RpcError(errno.EOPNOTSUPP, f"cannot append to {shown(key)}: it is a link")
            else:
                self._extend(ns, spot, data)
        self.touched.append(Touch(ns.name, spot.key))

    def unlink(self, ns: Namespace, key: str) -> None:
        """Remove `key` where it exists, with all that is below it. Raises RpcError EINVAL, ELOOP."""
        spot = self._locate(ns, _not_root(key, "unlink"), make=False)
        if spot is not None:
            self._remove(ns, spot)

    def mkdir(self, ns: Namespace, key: str) -> None:
        """Set `key` to an empty directory. Raises RpcError EINVAL, ELOOP."""
        spot = self._make_way(ns, key, "make the directory")
        self._remove(ns, spot)
        self._insert(ns, spot.parent, spot.name, Kind.DIR)
        self.touched.append(Touch(ns.name, spot.key))

    def link(self, ns: Namespace, key: str, target_namespace: str, target_key: str) -> None:
        """Set `key` to a link. Raises RpcError EINVAL, ELOOP."""
        target = normalise(target_key)
        spot = self._make_way(ns, key, "link")
        self._remove(ns, spot)
        self._insert(ns, spot.parent, spot.name, Kind.LINK, target_namespace, target)
        self.touched.append(Touch(ns.name, spot.key, below=True))

    def exists(self, ns: Namespace, key: str) -> bool:
        """Whether there is an entry `key`, a link included. Raises RpcError EINVAL, ELOOP."""
        spot = self._locate(ns, _not_root(key, "guard"), make=False)
        return spot is not None and spot.row is not None

    # --- finding the place

    def _make_way(self, ns: Namespace, key: str, verb: str) -> _Spot:
        spot = self._locate(ns, _not_root(key, verb), make=True)
        assert spot is not None
        return spot

    def _locate(self, ns: Namespace, key: str, *, make: bool) -> _Spot | None:
        """Where `key` is kept: links on the way, not at its end, are followed.

        With `make`, directories are made on the way; otherwise the result is None where one is missing.
        Raises RpcError ELOOP, and EINVAL for a link to another namespace: a commit does not follow it, as
        in Flux.
        """
        for _ in range(MAX_LINKS + 1):
            parent, name = split(key)
            row = self._find(ns, parent, name)
            if row is not None or not parent or self._is_dir(ns, parent):
                return _Spot(parent, name, row)
            path, arrived = self._walk(ns, parent, make=make)
            if path is None:
                return None
            if arrived:
                return _Spot(parent, name, None)
            key = join(path, name)
        raise RpcError(errno.ELOOP, f"cannot use the key {shown(key)}: more than {MAX_LINKS} links on its way")

    def _walk(self, ns: Namespace, directory: str, *, make: bool) -> tuple[str | None, bool]:
        """Go down to `directory`. Returns it and True; where a link is met, where to go on instead and False.

        Without `make` the result is None and False where a directory is missing.
        """
        path = ROOT
        rest = directory
        while rest:
            part, _, rest = rest.partition(".")
            row = self._find(ns, path, part)
            here = join(path, part)
            if row is not None and row.kind == Kind.LINK:
                return join(self._target(ns, path, part), rest), False
            if row is None or row.kind != Kind.DIR:
                if not make:
                    return None, False
                self._remove(ns, _Spot(path, part, row))
                self._insert(ns, path, part, Kind.DIR)
                self.touched.append(Touch(ns.name, here))
            path = here
        return path, True

    def _is_dir(self, ns: Namespace, key: str) -> bool:
        row = self._find(ns, *split(key))
        return row is not None and row.kind == Kind.DIR

    def _find(self, ns: Namespace, parent: str, name: str) -> _Row | None:
        row = self._db.execute(
            "SELECT kind, id, chunks FROM entry WHERE ns = ? AND parent = ? AND name = ?",
            (ns.id, parent, name),
        ).fetchone()
        return None if row is None else _Row(*row)

    def _target(self, ns: Namespace, parent: str, name: str) -> str:
        namespace, key = self._db.execute(
            "SELECT target_namespace, target_key FROM entry WHERE ns = ? AND parent = ? AND name = ?",
            (ns.id, parent, name),
        ).fetchone()
        if namespace != ns.name:
            here = shown(join(parent, name))
            raise RpcError(
                errno.EINVAL, f"cannot write below {here}: it is a link to namespace {namespace}; write there"
            )
        return str(key)

    # --- rows

    def _extend(self, ns: Namespace, spot: _Spot, data: bytes) -> bool:
        """Add a chunk to a value; False where there is no value."""
        rows = self._db.execute(
            "UPDATE entry SET last = ?, chunks = chunks + 1, size = size + ?"
            " WHERE ns = ? AND parent = ? AND name = ? AND kind = 1 RETURNING id",
            (ns.seq, len(data), ns.id, spot.parent, spot.name),
        ).fetchall()
        if not rows:
            return False
        self._db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (rows[0][0], ns.seq, data))
        return True

    def _insert_value(self, ns: Namespace, spot: _Spot, data: bytes) -> None:
        entry = self._next_entry
        self._next_entry += 1
        self._db.execute(
            "INSERT INTO entry VALUES (?1, ?2, ?3, 1, ?4, ?5, ?5, 1, ?6, NULL, NULL)",
            (ns.id, spot.parent, spot.name, entry, ns.seq, len(data)),
        )
        self._db.execute("INSERT INTO chunk VALUES (?, ?, ?)", (entry, ns.seq, data))

    def _insert(
        self,
        ns: Namespace,
        parent: str,
        name: str,
        kind: Kind,
        target_namespace: str | None = None,
        target_key: str | None = None,
    ) -> None:
        self._db.execute(
            "INSERT INTO entry VALUES (?, ?, ?, ?, 0, 0, 0, 0, 0, ?, ?)",
            (ns.id, parent, name, int(kind), target_namespace, target_key),
        )

    def _remove(self, ns: Namespace, spot: _Spot) -> None:
        """Remove an entry, where there is one, with all that is below it."""
        if spot.row is None:
            return
        self._discard(ns, "parent = ? AND name = ?", (spot.parent, spot.name))
        if spot.row.kind == Kind.DIR:
            self._discard(ns, "parent = ?", (spot.key,))
            self._discard(ns, "parent >= ? AND parent < ?", below(spot.key))
        self.touched.append(Touch(ns.name, spot.key, below=spot.row.kind != Kind.VALUE))

    def _discard(self, ns: Namespace, where: str, parameters: tuple[str, ...]) -> None:
        """Delete entries; the chunks of values among them become garbage."""
        self._db.execute(
            f"INSERT INTO garbage SELECT id FROM entry WHERE ns = ? AND {where} AND id > 0",
            (ns.id, *parameters),
        )
        self._db.execute(f"DELETE FROM entry WHERE ns = ? AND {where}", (ns.id, *parameters))
        self.garbage = True


def _not_root(key: str, verb: str) -> str:
    found = normalise(key)
    if found == ROOT:
        raise RpcError(errno.EINVAL, f"cannot {verb} {shown(key)}: it is the root directory")
    return found


def _check_size(key: str, data: bytes) -> None:
    if len(data) > MAX_CHUNK:
        raise RpcError(errno.EFBIG, f"cannot write {len(data)} bytes to {shown(key)} at once: {MAX_CHUNK} are allowed")
