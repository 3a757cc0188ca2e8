"""Kvs: its bounds, its file, and what a SIGKILL leaves of it."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from kvskit import OWNER, Results, running_kvs

from fluxres.base.errors import RpcError
from fluxres.kvs import schema
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CreateNamespace, NamespaceInfo, Put, StoreRefused

PATIENCE = 60.0
"""Seconds to wait for a subprocess."""


@pytest.mark.parametrize("threaded", [True, False])
async def test_what_was_committed_is_there_after_reopening(tmp_path: Path, threaded: bool) -> None:
    path = tmp_path / "kvs"
    async with running_kvs(path, threaded=threaded) as kvs:
        versions = await kvs.commit(CreateNamespace("n1", 7), Put("n1", "a", b"1"), Put(PRIMARY, "b.c", b"2"))
        assert versions == {"n1": 0, PRIMARY: 1}
        assert await kvs.commit(Append("n1", "a", b"2")) == {"n1": 1}
        assert kvs.exists(PRIMARY, "b")
        assert not kvs.exists(PRIMARY, "b.d")
    assert not path.with_name("kvs-wal").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with running_kvs(path, threaded=threaded) as kvs:
        assert kvs.get("n1", "a") == b"12"
        assert kvs.get(PRIMARY, "b.c") == b"2"
        assert [(info.name, info.owner, info.version) for info in kvs.namespaces()] == [
            ("n1", 7, 1),
            (PRIMARY, OWNER, 1),
        ]
        assert kvs.namespaces("n1", 1) == [NamespaceInfo(PRIMARY, OWNER, 1, 1)]
        with pytest.raises(RpcError, match="no namespace n2"):
            kvs.version("n2")


def test_every_commit_is_synced(tmp_path: Path) -> None:
    writer, reader = schema.open_store(tmp_path / "kvs", OWNER)
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("DELETE FROM chunk")
    schema.close_store(writer, reader)


async def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.kvs.kvs.MAX_QUEUED_BYTES", 10_000)
    monkeypatch.setattr("fluxres.kvs.kvs.MAX_QUEUED_COMMITS", 3)
    async with running_kvs(tmp_path / "kvs") as kvs:
        results = Results(kvs)
        results.submit("a", Put(PRIMARY, "a", bytes(6000)))
        results.submit("more", Put(PRIMARY, "b", bytes(6000)))
        results.submit("own", Put(PRIMARY, "c", bytes(6000)), hold=True)
        results.submit("huge", Put(PRIMARY, "d", bytes(10_000)), hold=True)
        assert kvs.queued_bytes > 12_000
        await results.wait("a", "more", "own", "huge")
        assert results.errnum("more") == errno.EAGAIN
        assert results.errnum("huge") == errno.E2BIG
        assert results.errnum("a") is results.errnum("own") is None
        assert kvs.queued_bytes == 0
        for number in range(5):
            results.submit(f"n{number}", Put(PRIMARY, "a", b"x"))
        await results.wait(*(f"n{number}" for number in range(5)))
        refused = [number for number in range(5) if results.errnum(f"n{number}") == errno.EAGAIN]
        assert refused == [3, 4]


async def test_a_cancelled_commit_may_still_happen(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        with trio.CancelScope() as scope:
            scope.cancel()
            await kvs.commit(Put(PRIMARY, "a", b"1"))
        assert scope.cancelled_caught
        await kvs.commit(Put(PRIMARY, "b", b"1"))
        assert kvs.get(PRIMARY, "a") == b"1"


# --- SIGKILL

LOAD = """
import sys, trio
from pathlib import Path
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import Append, Put

async def writer(kvs, name):
    number = 0
    while True:
        number += 1
        line = b"%d %d\\n" % (name, number)
        versions = await kvs.commit(
            Append("primary", f"w{name}.log", line),
            Append("primary", "all", line),
            Put("primary", f"w{name}.last", line),
        )
        print(name, number, versions["primary"], flush=True)

async def main():
    async with Kvs.open(Path(sys.argv[1]), owner=1) as kvs, trio.open_nursery() as nursery:
        await nursery.start(kvs.run)
        for name in range(8):
            nursery.start_soon(writer, kvs, name)

trio.run(main)
"""


def load_until_killed(path: Path, answers: int) -> tuple[dict[int, int], int]:
    """Load a store in a process that is killed after so many answers.

    Returns the number of commits answered for each writer, and the highest version answered.
    """
    answered: dict[int, int] = {}
    version = 0
    command = [sys.executable, "-c", LOAD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stdout is not None
        for count, line in enumerate(process.stdout):
            if not line.endswith("\n"):
                break  # killed while it wrote
            name, number, version_then = map(int, line.split())
            assert number == answered.get(name, 0) + 1
            answered[name] = number
            version = max(version, version_then)
            if count == answers:
                process.send_signal(signal.SIGKILL)
        watchdog.cancel()
    assert process.returncode == -signal.SIGKILL
    assert sum(answered.values()) > answers
    return answered, version


@pytest.mark.parametrize("answers", [1, 57, 400])
async def test_every_answered_commit_survives_a_sigkill(tmp_path: Path, answers: int) -> None:
    path = tmp_path / "kvs"
    answered, version = load_until_killed(path, answers)
    async with running_kvs(path) as kvs:
        everything = (kvs.get(PRIMARY, "all") or b"").splitlines()
        assert kvs.version(PRIMARY) == len(everything) >= version
        for name in range(8):
            log = kvs.get(PRIMARY, f"w{name}.log") or b""
            lines = log.splitlines()
            assert lines == [b"%d %d" % (name, number + 1) for number in range(len(lines))]
            assert len(lines) >= answered.get(name, 0)
            assert [line for line in everything if line.startswith(b"%d " % name)] == lines
            assert (kvs.get(PRIMARY, f"w{name}.last") or b"").splitlines() == lines[-1:]
        await kvs.commit(Append(PRIMARY, "all", b"and on"))
    assert check(path) == ["ok"]


def check(path: Path) -> list[str]:
    """SQLite's own judgement of a store."""
    db = sqlite3.connect(path)
    found = [row[0] for row in db.execute("PRAGMA integrity_check")]
    db.close()
    return found


# --- refusals


async def refusal(path: Path) -> str:
    with pytest.raises(StoreRefused) as caught:
        async with Kvs.open(path, owner=1):
            pass
    return str(caught.value)


async def make_store(path: Path, *, values: int = 1) -> None:
    async with running_kvs(path) as kvs:
        await kvs.commit(*(Put(PRIMARY, f"a{number}", os.urandom(3000)) for number in range(values)))


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvs").write_bytes(b"not a database at all" * 100)
    text = await refusal(tmp_path / "kvs")
    assert f"cannot open the store {tmp_path / 'kvs'}: it is damaged" in text
    assert "restore a copy" in text


async def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "kvs")
    db.execute("CREATE TABLE t (x)")
    db.close()
    assert "the file is not a fluxres store" in await refusal(tmp_path / "kvs")


async def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    await make_store(tmp_path / "kvs")
    db = sqlite3.connect(tmp_path / "kvs")
    db.execute("PRAGMA user_version = 99")
    db.close()
    text = await refusal(tmp_path / "kvs")
    assert "its format is 99" in text
    assert "use the newer fluxres" in text


async def test_a_locked_store_and_a_missing_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "OPEN_TIMEOUT", 0.0)
    await make_store(tmp_path / "kvs")
    db = sqlite3.connect(tmp_path / "kvs", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    assert "another process has it locked" in await refusal(tmp_path / "kvs")
    db.close()
    assert "No such file or directory" in await refusal(tmp_path / "nosuch" / "kvs")


async def test_the_pages_are_checked_after_a_crash_of_the_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kvs"
    await make_store(path, values=200)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = os.urandom(4096)
    path.write_bytes(data)
    assert check(path) != ["ok"]
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another boot\n")

    async with Kvs.open(path, owner=1):
        pass  # the same boot: nothing can have happened to the pages, so nobody looks
    monkeypatch.setattr(schema, "BOOT_ID", other_boot)
    path.with_name("kvs-wal").write_bytes(b"left behind")
    text = await refusal(path)
    assert "it is damaged" in text
    assert "restore a copy" in text


async def test_one_damaged_record_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """A page of one value is lost: its reads and commits fail, all else goes on."""
    path = tmp_path / "kvs"
    async with running_kvs(path) as kvs:
        for number in range(200):
            await kvs.commit(Put(PRIMARY, f"a{number}", b"%03d!" % number * 200))
    data = path.read_bytes()
    where = data.index(b"100!" * 20) // 4096 * 4096
    path.write_bytes(data[:where] + os.urandom(4096) + data[where + 4096 :])
    async with running_kvs(path) as kvs:
        lost = [number for number in range(200) if is_lost(kvs, f"a{number}", b"%03d!" % number * 200)]
        assert 100 in lost
        assert len(lost) < 10
        await kvs.commit(Put(PRIMARY, "a0", b"x"))


def is_lost(kvs: Kvs, key: str, expected: bytes) -> bool:
    """Whether reading `key` fails; anything but `expected` is never given."""
    try:
        data = kvs.get(PRIMARY, key)
    except RpcError:
        return True
    assert data == expected
    return False
