"""Group commit, full disks (SQLite's own page limit stands for one), and what ends a transaction otherwise."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
import trio
import trio.testing
from kvskit import OWNER, Results, running_kvs

from fluxres.base.errors import RpcError
from fluxres.kvs import kvs as kvs_module
from fluxres.kvs import schema
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CreateNamespace, Op, Put, RemoveNamespace, Require, StoreFailed
from fluxres.kvs.store import Store

BIG = 40_000
"""Bytes of a value that does not fit on the full disk of these tests, while small ones may."""


def failure(code: int, text: str) -> sqlite3.OperationalError:
    """An error as SQLite gives it."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class Disk:
    """Makes the disk full for the writer, or lets it fail; `store` is set once a Kvs has been opened."""

    store: Store

    def fill(self, spare_pages: int = 4) -> None:
        db = self.store._db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + spare_pages}")

    def free(self) -> None:
        self.store._db.execute("PRAGMA max_page_count = 1000000")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Watches over the store of the Kvs that the test opens."""
    found = Disk()

    class WatchedStore(Store):
        def __init__(self, db: sqlite3.Connection) -> None:
            super().__init__(db)
            found.store = self

    monkeypatch.setattr(kvs_module, "Store", WatchedStore)
    return found


class Gate:
    """Makes the next COMMIT wait in its thread, from `begun` until `go` (at most 30 s)."""

    def __init__(self, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = trio.Event()
        self.go = trio.Event()
        token = trio.lowlevel.current_trio_token()
        commit = disk.store.commit

        def waiting_commit() -> None:
            monkeypatch.setattr(disk.store, "commit", commit)
            trio.from_thread.run(self._wait, trio_token=token)
            commit()

        monkeypatch.setattr(disk.store, "commit", waiting_commit)

    async def _wait(self) -> None:
        self.begun.set()
        with trio.fail_after(30):
            await self.go.wait()


async def test_commits_that_arrive_during_a_transaction_go_into_the_next_one(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        results = Results(kvs)
        begun = 0
        begin = disk.store.begin

        def counted_begin() -> None:
            nonlocal begun
            begun += 1
            begin()

        monkeypatch.setattr(disk.store, "begin", counted_begin)
        gate = Gate(disk, monkeypatch)
        results.submit("first", Put(PRIMARY, "a", b"1"))
        await gate.begun.wait()
        names = [f"n{index}" for index in range(50)]
        for name in names:
            results.submit(name, Append(PRIMARY, "a", b"2"))
        await trio.testing.wait_all_tasks_blocked()
        assert results.order == []
        assert kvs.get(PRIMARY, "a") is None
        gate.go.set()
        await results.wait("first", *names)
        assert results.order == ["first", *names]
        assert begun == 2
        assert kvs.version(PRIMARY) == 51


async def test_a_commit_that_fails_leaves_the_others_of_its_group_alone(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        results = Results(kvs)
        results.submit("a", Put(PRIMARY, "a", b"1"))
        results.submit("guard", Put(PRIMARY, "b", b"1"), Require(PRIMARY, "a"))
        results.submit("none", Put("nosuch", "b", b"1"))
        results.submit("key", Put(PRIMARY, "c", b"1"), Put(PRIMARY, "", b"1"))
        results.submit("empty")
        results.submit("z", Append(PRIMARY, "a", b"2"))
        await results.wait("z")
        assert results.order == ["a", "guard", "none", "key", "empty", "z"]
        assert [results.errnum(name) for name in results.order] == [
            None,
            errno.EEXIST,
            errno.ENOENT,
            errno.EINVAL,
            None,
            None,
        ]
        assert kvs.get(PRIMARY, "a") == b"12"
        assert [entry.name for entry in kvs.list(PRIMARY, ".")] == ["a"]
        assert kvs.version(PRIMARY) == 2


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path: Path, disk: Disk) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        await kvs.commit(Put(PRIMARY, "a", b"1"))
        disk.fill()
        results = Results(kvs)
        results.submit("small", Append(PRIMARY, "a", b"2"))
        results.submit("big", Put(PRIMARY, "big", bytes(BIG)))
        results.submit("after", Append(PRIMARY, "a", b"3"))
        await results.wait("after")
        assert results.order == ["small", "big", "after"]
        assert [results.errnum(name) for name in results.order] == [None, errno.ENOSPC, None]
        assert kvs.get(PRIMARY, "a") == b"123"
        assert kvs.get(PRIMARY, "big") is None
        disk.free()
        await kvs.commit(Put(PRIMARY, "big", bytes(BIG)))


async def test_the_instances_own_commits_wait_for_room_in_their_order(tmp_path: Path, disk: Disk) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        await kvs.commit(Put(PRIMARY, "a", b"1"))
        disk.fill()
        results = Results(kvs)
        results.submit("held", Put(PRIMARY, "big", bytes(BIG)), hold=True)
        results.submit("guest", Append(PRIMARY, "a", b"x"))
        results.submit("held2", Append(PRIMARY, "a", b"2"), hold=True)
        await results.wait("guest")
        assert results.order == ["guest"]
        assert results.errnum("guest") == errno.ENOSPC
        results.submit("guest2", Append(PRIMARY, "a", b"x"))
        results.submit("held3", Append(PRIMARY, "a", b"3"), hold=True)
        await results.wait("guest2")
        assert results.errnum("guest2") == errno.ENOSPC
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert results.order == ["guest", "guest2"]
        disk.free()
        results.submit("guest3", Append(PRIMARY, "a", b"4"))  # its coming makes the held ones be tried again
        await results.wait("guest3")
        assert results.order == ["guest", "guest2", "held", "held2", "held3", "guest3"]
        assert kvs.get(PRIMARY, "a") == b"1234"
        assert kvs.queued_bytes == 0


async def test_held_commits_are_tried_again_by_themselves(
    tmp_path: Path, disk: Disk, autojump_clock: trio.testing.MockClock
) -> None:
    async with running_kvs(tmp_path / "kvs", threaded=False) as kvs:
        disk.fill(0)
        results = Results(kvs)
        results.submit("held", Put(PRIMARY, "big", bytes(BIG)), hold=True)
        with trio.move_on_after(60):  # of the virtual clock
            await results.wait("held")
        assert results.order == []
        disk.free()
        await results.wait("held")
        assert trio.current_time() < 62


async def test_garbage_is_deleted_while_nothing_else_is_to_be_done(tmp_path: Path, disk: Disk) -> None:
    async with running_kvs(tmp_path / "kvs", threaded=False) as kvs:
        await kvs.commit(CreateNamespace("n1", OWNER), *(Append("n1", "a", b"x") for _ in range(1500)))
        await kvs.commit(RemoveNamespace("n1"))
        await trio.testing.wait_all_tasks_blocked()
        assert not disk.store.garbage
        db = sqlite3.connect(tmp_path / "kvs")
        assert db.execute("SELECT count(*) FROM chunk").fetchone() == (0,)
        db.close()


async def test_a_statement_that_fails_is_a_definite_failure(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        results = Results(kvs)
        apply = disk.store._apply

        def failing(op: Op) -> None:
            apply(op)
            if isinstance(op, Put) and op.key == "bad":
                raise failure(sqlite3.SQLITE_IOERR_READ, "disk I/O error")

        monkeypatch.setattr(disk.store, "_apply", failing)
        results.submit("a", Put(PRIMARY, "a", b"1"))
        results.submit("bad", Put(PRIMARY, "c", b"1"), Put(PRIMARY, "bad", b"1"))
        results.submit("b", Put(PRIMARY, "b", b"1"))
        await results.wait("b")
        assert [results.errnum(name) for name in results.order] == [None, errno.EIO, None]
        assert [entry.name for entry in kvs.list(PRIMARY, ".")] == ["a", "b"]


async def test_a_store_locked_by_someone_else_is_a_definite_failure(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        other = sqlite3.connect(tmp_path / "kvs", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RpcError, match="locked") as caught:
            await kvs.commit(Put(PRIMARY, "a", b"1"))
        assert caught.value.errnum == errno.EBUSY
        other.close()
        await kvs.commit(Put(PRIMARY, "b", b"1"))
        assert [entry.name for entry in kvs.list(PRIMARY, ".")] == ["b"]


@pytest.mark.parametrize("locked", [True, False])
async def test_the_instance_does_not_go_on_without_a_commit_of_its_own(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    """Neither where the store is locked, nor where a statement fails; and nothing of the commit is there later."""
    async with Kvs.open(tmp_path / "kvs", owner=OWNER) as kvs:
        results = Results(kvs)
        other = sqlite3.connect(tmp_path / "kvs", isolation_level=None)
        if locked:
            other.execute("BEGIN IMMEDIATE")
        else:
            apply = disk.store._apply

            def failing(op: Op) -> None:
                apply(op)
                raise failure(sqlite3.SQLITE_IOERR_READ, "disk I/O error")

            monkeypatch.setattr(disk.store, "_apply", failing)
        results.submit("own", Put(PRIMARY, "a", b"1"), hold=True)
        with pytest.raises(StoreFailed, match="own records"):
            await kvs.run()
        assert results.order == []
        other.close()
    async with running_kvs(tmp_path / "kvs") as kvs:
        assert not kvs.exists(PRIMARY, "a")


@pytest.mark.parametrize("threaded", [True, False])
async def test_a_commit_of_unknown_outcome_ends_the_kvs_and_is_not_answered(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, threaded: bool
) -> None:
    async with Kvs.open(tmp_path / "kvs", owner=OWNER, threaded=threaded) as kvs:
        results = Results(kvs)

        def failing_commit() -> None:
            raise failure(sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error")

        awaited: list[BaseException] = []

        async def awaiting() -> None:
            try:
                await kvs.commit(Put(PRIMARY, "b", b"1"))
            except StoreFailed as error:
                awaited.append(error)

        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(disk.store, "commit", failing_commit)
            results.submit("a", Put(PRIMARY, "a", b"1"))
            nursery.start_soon(awaiting)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StoreFailed, match="cannot tell whether"):
                await kvs.run()
        assert results.order == []
        assert len(awaited) == 1
        results.submit("late", Put(PRIMARY, "c", b"1"))
        await results.wait("late")
        assert results.errnum("late") == errno.ECANCELED
    async with running_kvs(tmp_path / "kvs") as kvs:
        await kvs.commit(Put(PRIMARY, "again", b"1"))


async def test_commits_that_have_begun_are_answered_when_the_kvs_is_cancelled(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Kvs.open(tmp_path / "kvs", owner=OWNER) as kvs:
        results = Results(kvs)
        async with trio.open_nursery() as nursery:
            await nursery.start(kvs.run)
            gate = Gate(disk, monkeypatch)
            results.submit("begun", Put(PRIMARY, "a", b"1"))
            await gate.begun.wait()
            results.submit("waiting", Put(PRIMARY, "b", b"1"))
            nursery.cancel_scope.cancel()
            gate.go.set()
        assert results.order == ["begun", "waiting"]
        assert [results.errnum(name) for name in results.order] == [None, errno.ECANCELED]
        assert kvs.get(PRIMARY, "a") == b"1"
        assert kvs.get(PRIMARY, "b") is None


async def test_an_error_in_a_callback_ends_the_kvs(tmp_path: Path) -> None:
    async with Kvs.open(tmp_path / "kvs", owner=OWNER) as kvs:

        def broken(_: object) -> None:
            raise ValueError("a bug")

        kvs.submit([Put(PRIMARY, "a", b"1")], broken)
        with pytest.raises(ValueError, match="a bug"):
            await kvs.run()
        assert kvs.get(PRIMARY, "a") == b"1"


async def test_the_log_is_moved_to_the_file_before_it_grows_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxres.kvs.writer.CHECKPOINT_BYTES", 100_000)
    async with running_kvs(tmp_path / "kvs") as kvs:
        for _ in range(60):
            await kvs.commit(Put(PRIMARY, "a", bytes(20_000)))
        assert (tmp_path / "kvs-wal").stat().st_size < 400_000
        assert (tmp_path / "kvs").stat().st_size > 20_000


async def test_a_real_full_disk(tmp_path: Path) -> None:
    """On a small tmpfs, which takes root: everything stays as it was answered, and goes on when there is room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = await trio.run_process(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=False, capture_stderr=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small disk: {made.stderr.decode().strip()}")
    try:
        ballast = mount / "ballast"
        async with running_kvs(mount / "kvs") as kvs:
            written = 0
            await kvs.commit(Put(PRIMARY, "a", b""))
            with pytest.raises(RpcError, match="no space left") as caught:
                while True:
                    await kvs.commit(Append(PRIMARY, "a", bytes(50_000)))
                    written += 50_000
            assert caught.value.errnum == errno.ENOSPC
            assert written >= 200_000
            ballast.write_bytes(b"")
            with pytest.raises(OSError, match="No space"):
                ballast.write_bytes(bytes(4 << 20))
            results = Results(kvs)
            results.submit("held", Put(PRIMARY, "b", bytes(300_000)), hold=True)
            results.submit("guest", Put(PRIMARY, "c", bytes(300_000)))
            await results.wait("guest")
            assert results.order == ["guest"]
            assert results.errnum("guest") == errno.ENOSPC
            assert len(kvs.get(PRIMARY, "a") or b"") == written
            await trio.run_process(["mount", "-o", "remount,size=8m", str(mount)])
            await results.wait("held")
            assert results.errnum("held") is None
            await kvs.commit(Put(PRIMARY, "c", b"1"))
        async with running_kvs(mount / "kvs") as kvs:
            assert len(kvs.get(PRIMARY, "a") or b"") == written
            assert len(kvs.get(PRIMARY, "b") or b"") == 300_000
            assert kvs.get(PRIMARY, "c") == b"1"
    finally:
        await trio.run_process(["umount", str(mount)])


def test_the_codes_of_a_full_disk() -> None:
    assert schema.is_full(failure(sqlite3.SQLITE_FULL, "database or disk is full"))
    assert not schema.is_full(failure(sqlite3.SQLITE_IOERR_WRITE, "disk I/O error"))
    assert not schema.is_full(sqlite3.ProgrammingError("no code at all"))
