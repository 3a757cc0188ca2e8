"""The store's file: its tables, how it is opened, and when it is refused.

One SQLite database in WAL mode with `synchronous=FULL`: a transaction is durable when COMMIT returns, and is
visible to readers only then. Two connections are used, one that writes and one that reads; only one process
has the file open at a time (the broker's lock on its statedir sees to that).

Tables:
- `namespace`: `version` counts commits, `seq` is the last sequence number given to a chunk of the namespace.
- `entry`: one row a key: its directory and its last component, so that a key is found in one step and a
  directory is listed by one range scan. Directories have rows of their own. `entry.id` names a value's
  chunks, 0 for others. `first` and `last` are the sequence numbers of its first and last chunk.
- `chunk`: the values, in the pieces in which they were written: an append never touches what is there.
- `garbage`, `removed`: values and namespaces that are gone and whose rows are deleted later, a bounded
  number in each transaction. Their ids are not used again before that.

A store is refused (`StoreRefused`) when it is not ours, of a newer format, damaged, or where the file
system has no shared memory for WAL. The pages of the whole file are checked only where they may have been
damaged: after an unclean end in an earlier boot of the machine (`kill -9` cannot do it, a lost sector cache
can).
"""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Final

from fluxres.base.errors import RpcError
from fluxres.kvs.ops import PRIMARY, StoreRefused

APPLICATION_ID: Final = 0x464C5852
"""SQLite's application_id of our files: "FLXR"."""
FORMAT_VERSION: Final = 1
"""The format that this code reads and writes, kept as user_version."""
OPEN_TIMEOUT: Final = 5.0
"""Seconds to wait at the opening for a lock that someone else (an administrator's sqlite3, say) holds."""
BUSY_TIMEOUT_MS: Final = 50
"""Milliseconds to wait for such a lock later: the Trio thread waits meanwhile."""
PAGE_CACHE_KIB: Final = 16_384
"""KiB of pages that each of the two connections may keep in memory."""
STATEMENT_CACHE: Final = 128
"""Prepared statements kept by each connection: more than this package has."""
WAL_SIZE_KEPT: Final = 64 << 20
"""Bytes that the write-ahead log may keep on disk once it is empty."""
CHECKED_BYTES: Final = 1 << 30
"""Bytes up to which a store is checked; a larger one would hold up the start for longer than half a minute."""
FILE_MODE: Final = 0o600
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE namespace (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, owner INTEGER NOT NULL,
    version INTEGER NOT NULL, seq INTEGER NOT NULL);
CREATE TABLE entry (
    ns INTEGER NOT NULL, parent TEXT NOT NULL, name TEXT NOT NULL, kind INTEGER NOT NULL,
    id INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    chunks INTEGER NOT NULL, size INTEGER NOT NULL,
    target_namespace TEXT, target_key TEXT,
    PRIMARY KEY (ns, parent, name)) WITHOUT ROWID;
CREATE TABLE chunk (
    entry INTEGER NOT NULL, seq INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (entry, seq)) WITHOUT ROWID;
CREATE TABLE garbage (entry INTEGER PRIMARY KEY);
CREATE TABLE removed (ns INTEGER PRIMARY KEY);
"""

REMEDY: Final = "restore a copy of it, or, to go on without the jobs it knows of, move it away with its -wal file"


def open_store(path: Path, owner: int) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """Open the store at `path`, made where it is missing, for an instance of the user `owner`.

    Returns the connection that writes and the one that reads. Raises StoreRefused, and RpcError ENOSPC
    where the disk is too full to open it.
    """
    unclean = _size(path.with_name(path.name + "-wal")) > 0
    try:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, FILE_MODE))
        writer = _connect(path)
        try:
            _prepare(writer, path, owner)
            _check(writer, path, unclean=unclean)
            reader = _connect(path)
            reader.execute("PRAGMA query_only = ON")
            for db in (writer, reader):
                db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        except BaseException:
            writer.close()
            raise
    except OSError as error:
        raise StoreRefused(f"cannot open the store {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise _refusal(path, error) from error
    return writer, reader


def close_store(writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
    """Close both connections; what is in the log moves to the file, as far as the disk has room."""
    reader.close()
    writer.close()


def is_full(error: sqlite3.Error) -> bool:
    """Whether SQLite failed for lack of room on the disk."""
    return primary_code(error) == sqlite3.SQLITE_FULL


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, 0 where the error did not come from SQLite itself."""
    code = getattr(error, "sqlite_errorcode", 0)
    return int(code) & 0xFF


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        path,
        timeout=OPEN_TIMEOUT,
        isolation_level=None,  # transactions begin and end where this package says so
        check_same_thread=False,  # opened in one thread, then used by one other at a time
        cached_statements=STATEMENT_CACHE,
    )
    db.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA temp_store = MEMORY")
    return db


def _prepare(db: sqlite3.Connection, path: Path, owner: int) -> None:
    """Make the tables of an empty file, or see that the file is one of ours, and set up the writer."""
    application_id = _number(db, "PRAGMA application_id")
    version = _number(db, "PRAGMA user_version")
    tables = _number(db, "SELECT count(*) FROM sqlite_master")
    if tables and application_id != APPLICATION_ID:
        raise StoreRefused(f"cannot open the store {path}: the file is not a fluxres store; {REMEDY}")
    if version > FORMAT_VERSION:
        raise StoreRefused(
            f"cannot open the store {path}: its format is {version} and this fluxres knows formats up to "
            f"{FORMAT_VERSION}; use the newer fluxres that wrote it"
        )
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreRefused(
            f"cannot open the store {path}: its file system has no write-ahead log (mode {mode!r}); "
            "put the statedir on a local file system"
        )
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA wal_autocheckpoint = 0")  # the writer does it, after it has answered
    db.execute(f"PRAGMA journal_size_limit = {WAL_SIZE_KEPT}")
    if not tables:
        db.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID};"
            f"PRAGMA user_version = {FORMAT_VERSION};"
            f"{SCHEMA}"
            f"INSERT INTO namespace VALUES (1, '{PRIMARY}', {owner:d}, 0, 0); COMMIT;"
        )


def _check(db: sqlite3.Connection, path: Path, *, unclean: bool) -> None:
    """Check the pages of the file where the machine went down with the store open, and note this boot."""
    boot_id = BOOT_ID.read_text().strip()
    row = db.execute("SELECT value FROM meta WHERE name = 'boot_id'").fetchone()
    if row is not None and row[0] == boot_id:
        return
    if row is not None and unclean and _size(path) <= CHECKED_BYTES:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreRefused(f"cannot open the store {path}: it is damaged ({found}); {REMEDY}")
    db.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (boot_id,))


def _refusal(path: Path, error: sqlite3.Error) -> Exception:
    code = primary_code(error)
    if code == sqlite3.SQLITE_FULL:
        return RpcError(errno.ENOSPC, f"cannot open the store {path}: no space left on its disk")
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return StoreRefused(f"cannot open the store {path}: it is damaged ({error}); {REMEDY}")
    if code == sqlite3.SQLITE_BUSY:
        return StoreRefused(f"cannot open the store {path}: another process has it locked; end that process")
    return StoreRefused(f"cannot open the store {path}: {error}")


def _number(db: sqlite3.Connection, sql: str) -> int:
    return int(db.execute(sql).fetchone()[0])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
