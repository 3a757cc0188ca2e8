"""Watches miss nothing, wake only when they have to, and end when what they watch is gone for good."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kvskit import OWNER, running_kvs

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import join
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import (
    PRIMARY,
    Append,
    Chunk,
    CreateNamespace,
    Link,
    Mkdir,
    Put,
    RemoveNamespace,
    Unlink,
)
from fluxres.kvs.tree import Touch
from fluxres.kvs.watch import Watcher, WatchIndex


class Tail:
    """Reads a watch in a task of its own."""

    def __init__(self, kvs: Kvs, namespace: str, key: str, after: int = 0) -> None:
        self._watch = kvs.watch(namespace, key, after)
        self._event = trio.Event()
        self.chunks: list[Chunk] = []
        self.error: RpcError | None = None

    async def run(self) -> None:
        try:
            async with self._watch as watch:
                async for chunk in watch:
                    self.chunks.append(chunk)
                    self._event.set()
        except RpcError as error:
            self.error = error
            self._event.set()

    async def until(self, data: bytes) -> None:
        """Wait until what was read, since the last put, is `data`."""
        with trio.fail_after(30):
            while self.data != data:
                self._event = trio.Event()
                await self._event.wait()

    async def ended(self) -> int:
        """Wait for the watch to end with an error; returns its errnum."""
        with trio.fail_after(30):
            while self.error is None:
                self._event = trio.Event()
                await self._event.wait()
        return self.error.errnum

    @property
    def data(self) -> bytes:
        data = b""
        for chunk in self.chunks:
            data = chunk.data if chunk.first else data + chunk.data
        return data


async def test_a_watch_misses_nothing_under_concurrent_commits(tmp_path: Path) -> None:
    writers, rounds = 4, 60
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        tails = [Tail(kvs, PRIMARY, "log") for _ in range(3)]
        for tail in tails:
            nursery.start_soon(tail.run)

        async def write(name: int) -> None:
            for number in range(rounds):
                line = f"{name}.{number}\n".encode()
                await kvs.commit(Append(PRIMARY, "log", line), Put(PRIMARY, f"other{name}", line))

        async with trio.open_nursery() as writing:
            for name in range(writers):
                writing.start_soon(write, name)
            late = Tail(kvs, PRIMARY, "log", after=7)
            nursery.start_soon(late.run)
        expected = kvs.get(PRIMARY, "log")
        assert expected is not None
        assert expected.count(b"\n") == writers * rounds
        for tail in tails:
            await tail.until(expected)
            seqs = [chunk.seq for chunk in tail.chunks]
            assert len(seqs) == writers * rounds
            assert seqs == sorted(set(seqs))
            assert [chunk.first for chunk in tail.chunks].count(True) == 1
        await late.until(b"".join(chunk.data for chunk in kvs.chunks(PRIMARY, "log", 7)))
        nursery.cancel_scope.cancel()


async def test_a_watch_follows_puts_unlinks_and_directories(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        tail = Tail(kvs, PRIMARY, "d.a")
        nursery.start_soon(tail.run)
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(Put(PRIMARY, "d.a", b"1"))
        await tail.until(b"1")
        await kvs.commit(Append(PRIMARY, "d.a", b"2"))
        await tail.until(b"12")
        await kvs.commit(Put(PRIMARY, "d.a", b"3"))
        await tail.until(b"3")
        await kvs.commit(Unlink(PRIMARY, "d"))
        await kvs.commit(Put(PRIMARY, "d", b"a value"))
        await kvs.commit(Append(PRIMARY, "d.a", b"4"), Append(PRIMARY, "d.a", b"5"))
        await tail.until(b"45")
        await kvs.commit(Mkdir(PRIMARY, "d.a"))
        assert await tail.ended() == errno.EISDIR


async def test_a_watch_follows_a_link_that_is_made_later(tmp_path: Path) -> None:
    """As the watch of job.<id>.guest.output, begun before the job's guest namespace exists."""
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        tail = Tail(kvs, PRIMARY, "job.1.guest.output")
        nursery.start_soon(tail.run)
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(Link(PRIMARY, "job.1.guest", "job-1", "."))
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(CreateNamespace("job-1", OWNER))
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(Append("job-1", "output", b"1"))
        await tail.until(b"1")
        await kvs.commit(Append("job-1", "output", b"2"))
        await tail.until(b"12")
        await kvs.commit(RemoveNamespace("job-1"))
        assert await tail.ended() == errno.ENOENT


@pytest.mark.parametrize("target", ["job-1", PRIMARY])
async def test_a_watch_sees_a_link_to_what_exists_already(tmp_path: Path, target: str) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        tail = Tail(kvs, PRIMARY, "a.b")
        nursery.start_soon(tail.run)
        await kvs.commit(CreateNamespace("job-1", OWNER), Put(target, "x.b", b"1"))
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(Link(PRIMARY, "a", target, "x"))
        await tail.until(b"1")
        nursery.cancel_scope.cancel()


async def test_a_watch_ends_when_its_cursor_would_mean_something_else(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        await kvs.commit(CreateNamespace("n1", OWNER), CreateNamespace("n2", OWNER), Link(PRIMARY, "a", "n1", "a"))
        await kvs.commit(Put("n1", "a", b"1"), Put("n2", "a", b"2"))
        through_link, inside = Tail(kvs, PRIMARY, "a"), Tail(kvs, "n2", "a")
        nursery.start_soon(through_link.run)
        nursery.start_soon(inside.run)
        await through_link.until(b"1")
        await inside.until(b"2")
        await kvs.commit(Link(PRIMARY, "a", "n2", "a"))
        assert await through_link.ended() == errno.ESTALE
        await kvs.commit(RemoveNamespace("n2"), CreateNamespace("n2", OWNER))
        assert await inside.ended() == errno.ESTALE
        missing = Tail(kvs, "nosuch", "a")
        nursery.start_soon(missing.run)
        assert await missing.ended() == errno.ENOENT


async def test_a_commit_wakes_only_the_watches_of_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        woken: list[Watcher] = []
        wake = Watcher.wake

        def counted(watcher: Watcher) -> None:
            woken.append(watcher)
            wake(watcher)

        monkeypatch.setattr(Watcher, "wake", counted)
        tails = [Tail(kvs, PRIMARY, f"job.{number}.eventlog") for number in range(100)]
        for tail in tails:
            nursery.start_soon(tail.run)
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(*(Append(PRIMARY, f"job.{number}.eventlog", b"x") for number in range(100)))
        for tail in tails:
            await tail.until(b"x")
        woken.clear()
        await kvs.commit(Append(PRIMARY, "job.7.eventlog", b"y"), Put(PRIMARY, "job.8.R", b"y"))
        await tails[7].until(b"xy")
        assert len(woken) == 1
        nursery.cancel_scope.cancel()


async def test_watches_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        await kvs.commit(Put(PRIMARY, "a.b", b"1"))
        async with kvs.watch(PRIMARY, "a.b") as watch:
            assert (await watch.batch())[0].data == b"1"
            assert watch.ready() == []
            assert len(kvs._index) == 1
        assert len(kvs._index) == 0
        assert kvs._index._at == kvs._index._below == {}
        monkeypatch.setattr("fluxres.kvs.watch.MAX_WATCHES", 1)
        async with kvs.watch(PRIMARY, "a.b") as first, kvs.watch(PRIMARY, "a.b") as second:
            await first.batch()
            with pytest.raises(RpcError, match="1 watches are open"):
                await second.batch()


async def test_a_slow_watch_reads_in_bounded_parts(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        for _ in range(20):
            await kvs.commit(Append(PRIMARY, "a", bytes(1000)))
        async with kvs.watch(PRIMARY, "a") as watch:
            sizes = [len(await watch.batch(limit_bytes=3000)) for _ in range(7)]
        assert sizes == [3, 3, 3, 3, 3, 3, 2]


async def test_waiting_for_a_version(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs, trio.open_nursery() as nursery:
        got: list[int] = []

        async def wait() -> None:
            got.append(await kvs.wait_version(PRIMARY, 2))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await kvs.commit(Put(PRIMARY, "a", b"1"))
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        assert await kvs.wait_version(PRIMARY, 1) == 1
        await kvs.commit(Put(PRIMARY, "a", b"1"))
        with trio.fail_after(30):
            while not got:
                await trio.lowlevel.checkpoint()
        assert got == [2]
        await kvs.commit(CreateNamespace("n1", OWNER))
        raised: list[int] = []

        async def wait_for_removed() -> None:
            try:
                await kvs.wait_version("n1", 9)
            except RpcError as error:
                raised.append(error.errnum)

        async with trio.open_nursery() as waiting:
            waiting.start_soon(wait_for_removed)
            await trio.testing.wait_all_tasks_blocked()
            await kvs.commit(RemoveNamespace("n1"))
        assert raised == [errno.ENOENT]


NAMES = st.sampled_from(["a", "b"])
KEYS = st.lists(NAMES, max_size=3).map(".".join)
PLACES = st.tuples(st.sampled_from(["n", "m"]), KEYS)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(PLACES, max_size=2)), max_size=8),
    st.lists(st.builds(Touch, st.sampled_from(["n", "m"]), KEYS, st.booleans()), max_size=6),
)
def test_the_index_wakes_exactly_who_watches(
    moves: list[tuple[int, list[tuple[str, str]]]], touches: list[Touch]
) -> None:
    index = WatchIndex()
    watchers = [Watcher(index) for _ in range(3)]
    for number, way in moves:
        watchers[number].follow(tuple(way))
    assert len(index) == sum(bool(watcher.way) for watcher in watchers)
    for touched in touches:
        for watcher in watchers:
            watcher.arm()
            hit = any(
                namespace == touched.namespace
                and (
                    key == touched.key
                    or (touched.below and join(key, "").startswith(touched.key and touched.key + "."))
                )
                for namespace, key in watcher.way
            )
            index.touch(touched)
            assert watcher._event.is_set() == hit
    for watcher in watchers:
        watcher.close()
    assert index._at == index._below == {}
