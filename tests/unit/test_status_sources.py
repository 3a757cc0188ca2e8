"""The sources of the status feed, each with what it listens to: what they show, and what they say is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.lowlevel
import trio.testing
from kvskit import running_kvs

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, encode
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.broker.changes import EVENTLOG_KEY as RESOURCE_EVENTLOG
from fluxres.broker.drain import DRAIN_KEY as RESOURCE_DRAIN
from fluxres.broker.logbuffer import LogBuffer
from fluxres.exec.ranks import Presence, Ranks
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, Put
from fluxres.overlay.report import Failed, Report, assemble
from fluxres.overlay.topology import Topology
from fluxres.sched.pool import Allocation, Inventory, Pool, Share
from fluxres.status import lines, names, nodes
from fluxres.status.lines import EVENTLOG_KEY, TAIL, EventsSource, LogSource
from fluxres.status.names import Usernames
from fluxres.status.nodes import DRAIN_KEY, NodesSource
from fluxres.status.source import Source, follow
from fluxres.status.tree import TreeSource

PATIENCE = 60


class Shown:
    """What a feed would show of one source."""

    def __init__(self) -> None:
        self.documents: dict[str, JsonObject] = {}
        self.changes = 0
        self.woken = trio.Event()

    def wake(self) -> None:
        self.woken.set()

    def take(self, source: Source) -> dict[str, JsonObject | None]:
        """Flush; returns what the source gave."""
        self.woken = trio.Event()
        given = dict(source.documents())
        for key, document in given.items():
            if document is None:
                self.documents.pop(key, None)
            else:
                self.changes += self.documents.get(key) != document
                self.documents[key] = document
        return given

    async def until(self, source: Source, check: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not check():
                await self.woken.wait()
                self.take(source)


@asynccontextmanager
async def collecting(source: Source, shown: Shown) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        shown.take(source)
        yield
        nursery.cancel_scope.cancel()


def presence(rank: int) -> Presence:
    return Presence(rank=rank, uuid=f"u{rank}", host=f"n{rank}", statedir="s", incarnation=1, boot_id="b", cores="0-3")


# --- resources


def test_the_keys_are_those_of_the_resource_service() -> None:
    assert (EVENTLOG_KEY, DRAIN_KEY) == (RESOURCE_EVENTLOG, RESOURCE_DRAIN)


async def test_nodes_show_use_and_drains_and_add_up(tmp_path: Path) -> None:
    pool = Pool([Inventory(rank=r, host=f"n{r}", cores=IdSet(range(4)), gpus=IdSet([0])) for r in range(3)], size=4)
    ranks, shown = Ranks(), Shown()
    drained: dict[int, str] = {}
    async with running_kvs(tmp_path / "kvs.sqlite") as kvs:
        source = NodesSource(pool=pool, ranks=ranks, kvs=kvs, drains=lambda: drained, wake=shown.wake)
        async with collecting(source, shown):
            assert shown.documents.keys() == {"0", "1", "2"}
            assert (shown.documents["1"]["online"], shown.documents["1"]["cores_used"]) == (False, 0)
            ranks.joined(presence(1))
            pool.set_up(IdSet([1]))
            pool.claim(Allocation(shares=(Share(rank=1, cores=IdSet([0, 1]), gpus=IdSet([0])),), nslots=1))
            assert shown.take(source).keys() == {"1"}
            assert shown.documents["1"] == {
                "rank": 1,
                "host": "n1",
                "cores": 4,
                "cores_used": 2,
                "gpus": 1,
                "gpus_used": 1,
                "online": True,
                "torpid": False,
                "properties": [],
            }
            drained.update({1: "", 2: "bad disk"})
            ranks.declare(2, "stolen")
            await kvs.commit(Put(PRIMARY, DRAIN_KEY, b"{}"))
            await shown.until(source, lambda: "drained" in shown.documents["2"])
            assert (shown.documents["1"]["drained"], shown.documents["2"]["drained"]) == ("", "bad disk")
            assert shown.documents["2"]["lost"] == "stolen"
            assert source.totals() == {
                "nodes": 3,
                "online": 1,
                "torpid": 0,
                "drained": 2,
                "lost": 1,
                "cores": 12,
                "cores_used": 2,
                "cores_down": 8,
                "gpus": 3,
                "gpus_used": 1,
            }
            drained.clear()
            drained[1] = "another reason"
            ranks.confirm(2)
            await kvs.commit(Put(PRIMARY, DRAIN_KEY, b"{} "))
            await shown.until(source, lambda: "drained" not in shown.documents["2"])
            assert "lost" not in shown.documents["2"]
            assert shown.documents["1"]["drained"] == "another reason"
        pool.set_down(IdSet([1]))
        assert not dict(source.documents()), "it does not listen any more"


async def test_a_watch_that_is_refused_is_tried_again(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("fluxres.status.source.RETRY", 0.0)
    calls: list[int] = []
    async with running_kvs(tmp_path / "kvs.sqlite") as kvs, trio.open_nursery() as nursery:
        resolve = kvs.resolve
        refused = iter([True, True])

        def sometimes(namespace: str, key: str, *, follow: bool = True) -> object:
            if next(refused, False):
                raise RpcError(11, "too many")
            return resolve(namespace, key, follow=follow)

        monkeypatch.setattr(kvs, "resolve", sometimes)
        nursery.start_soon(follow, kvs, "some.key", lambda: calls.append(1))
        with trio.fail_after(PATIENCE):
            while not calls:
                await trio.testing.wait_all_tasks_blocked(0.001)
        await kvs.commit(Put(PRIMARY, "some.key", b"x"))
        with trio.fail_after(PATIENCE):
            while len(calls) < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()


# --- events and log


async def append(kvs: Kvs, *numbers: int) -> None:
    events = [Event(float(number), "online", {"idset": str(number)}) for number in numbers]
    await kvs.commit(Append(PRIMARY, EVENTLOG_KEY, "".join(map(encode, events)).encode()))


async def test_events_are_the_tail_and_what_falls_off_is_said(tmp_path: Path) -> None:
    shown = Shown()
    async with running_kvs(tmp_path / "kvs.sqlite") as kvs:
        source = EventsSource(kvs=kvs, wake=shown.wake)
        await append(kvs, *range(1, 2 * TAIL))
        await append(kvs, 2 * TAIL)
        async with collecting(source, shown):
            assert [document["t"] for document in shown.documents.values()] == [*range(TAIL + 1, 2 * TAIL + 1)]
            assert [*shown.documents][-1].endswith(".0")
            first = next(iter(shown.documents))
            await append(kvs, 7, 8)
            await shown.until(source, lambda: [*shown.documents.values()][-1]["t"] == 8)
            assert len(shown.documents) == TAIL
            assert first not in shown.documents
            assert [*shown.documents.values()][-1] == {"t": 8.0, "name": "online", "context": {"idset": "8"}}
            await kvs.commit(Append(PRIMARY, EVENTLOG_KEY, b"spoilt\n"))
            await append(kvs, 9)
            await shown.until(source, lambda: [*shown.documents.values()][-1]["t"] == 9)


async def test_events_are_shown_as_soon_as_there_is_an_eventlog(tmp_path: Path) -> None:
    shown = Shown()
    async with running_kvs(tmp_path / "kvs.sqlite") as kvs:
        source = EventsSource(kvs=kvs, wake=shown.wake)
        async with collecting(source, shown):
            assert not shown.documents
            await append(kvs, 1)
            await shown.until(source, lambda: bool(shown.documents))


async def test_the_log_shows_its_newest_lines() -> None:
    shown, buffer = Shown(), Lines()
    for _ in range(TAIL + 10):
        buffer.say()
    source = LogSource(lines=buffer, wake=shown.wake)
    async with collecting(source, shown):
        assert [*shown.documents] == [str(number) for number in range(11, TAIL + 11)]
        buffer.say()
        await shown.until(source, lambda: str(TAIL + 11) in shown.documents)
        assert "11" not in shown.documents
        assert len(shown.documents) == TAIL
        for _ in range(2 * TAIL):
            buffer.say()
        shown.take(source)
        assert [*shown.documents][-1] == str(3 * TAIL + 11)
        assert len(shown.documents) == TAIL


class Lines(LogBuffer):
    """A log buffer that nobody logs to."""

    def __init__(self) -> None:
        super().__init__(0)

    def say(self) -> None:
        self._last += 1
        self._entries.append(f"line {self._last}")
        self._news.set()


# --- the overlay


class Tree(TreeSource):
    """A tree that the test tells what brokers say; rank 0 is the root of 0 (1 (3 4) 2 (5 6))."""

    def __init__(self, shown: Shown) -> None:
        self.clock = 1000.0
        self.pool = Pool([Inventory(rank=rank, host=f"n{rank}", cores=IdSet([0])) for rank in range(4)], size=7)

        class Overlay:
            topology = Topology.kary(7, 2)

        super().__init__(
            overlay=Overlay(),  # type: ignore[arg-type]
            handle=None,  # type: ignore[arg-type]
            ranks=Ranks(),
            pool=self.pool,
            now=lambda: self.clock,
            wake=shown.wake,
        )

    def say(self, rank: int, status: str, duration: float, **children: tuple[str, float]) -> None:
        self._tell(rank, Report(status, duration, {int(key[1:]): value for key, value in children.items()}))

    def silent(self, rank: int) -> None:
        self._tell(rank, None)

    def failed(self, rank: int, why: str) -> None:
        self._tell(rank, Failed(why))


def test_the_tree_is_put_together_and_since_does_not_jitter() -> None:
    shown = Shown()
    tree = Tree(shown)
    tree.say(0, "full", 10, r1=("full", 10.0), r2=("full", 9.0))
    tree.say(1, "full", 20, r3=("full", 20.0), r4=("full", 19.0))
    tree.say(2, "full", 20, r5=("full", 20.0), r6=("full", 19.0))
    shown.take(tree)
    assert shown.documents["3"] == {
        "rank": 3,
        "parent": 1,
        "status": "full",
        "since": 980.0,
        "torpid": False,
        "host": "n3",
    }
    assert "host" not in shown.documents["5"]
    assert shown.documents["0"]["parent"] is None
    before, shown.changes = dict(shown.documents), 0
    tree.clock += 50
    tree.say(0, "full", 60.4, r1=("full", 60.3), r2=("full", 59.2))
    tree.say(1, "full", 70.2, r3=("full", 70.2), r4=("full", 69.9))
    assert len(shown.take(tree)) == 7
    assert (shown.documents, shown.changes) == (before, 0)
    tree.say(2, "full", 1, r5=("full", 1.0), r6=("full", 1.0))  # it has been away, and nobody has told
    assert shown.take(tree).keys() == {"2", "5", "6"}
    assert shown.documents["2"]["since"] == 1049.0


def test_below_a_lost_router_are_ghosts_until_it_is_back() -> None:
    shown = Shown()
    tree = Tree(shown)
    tree.say(0, "full", 10, r1=("full", 10.0), r2=("full", 10.0))
    tree.say(1, "full", 10, r3=("full", 10.0), r4=("full", 10.0))
    tree.say(2, "full", 10, r5=("full", 10.0), r6=("full", 10.0))
    shown.take(tree)
    tree.silent(1)
    tree.say(0, "degraded", 0, r1=("lost", 2.0), r2=("full", 10.0))
    shown.take(tree)
    assert (shown.documents["1"]["status"], shown.documents["1"]["since"]) == ("lost", 998.0)
    for rank in "34":
        assert shown.documents[rank]["ghost"] is True
        assert (shown.documents[rank]["status"], shown.documents[rank]["since"]) == ("lost", 998.0)
    assert "ghost" not in shown.documents["1"]
    tree.clock = 1010
    tree.say(0, "partial", 0, r1=("partial", 0.0), r2=("full", 20.0))
    tree.say(1, "partial", 1, r3=("full", 0.0), r4=("offline", 1.0))
    shown.take(tree)
    assert "ghost" not in shown.documents["3"]
    assert (shown.documents["3"]["status"], shown.documents["3"]["since"]) == ("full", 1010.0)
    assert shown.documents["4"]["status"] == "offline"
    tree.failed(2, "it does not want to")
    shown.take(tree)
    assert (shown.documents["2"]["status"], shown.documents["2"]["error"]) == ("full", "it does not want to")


def test_what_was_lost_before_its_router_was_stays_lost_since_then() -> None:
    shown = Shown()
    tree = Tree(shown)
    tree.say(0, "full", 10, r1=("degraded", 5.0), r2=("full", 10.0))
    tree.say(1, "degraded", 5, r3=("lost", 5.0), r4=("full", 10.0))
    shown.take(tree)
    tree.silent(1)
    tree.say(0, "degraded", 0, r1=("lost", 0.0), r2=("full", 10.0))
    shown.take(tree)
    assert (shown.documents["3"]["ghost"], shown.documents["3"]["since"]) == (True, 995.0)
    assert (shown.documents["4"]["ghost"], shown.documents["4"]["since"]) == (True, 1000.0)


def test_torpid_and_hosts_are_shown_as_they_become_known() -> None:
    shown = Shown()
    tree = Tree(shown)
    tree.say(0, "full", 10, r1=("full", 10.0), r2=("full", 10.0))
    shown.take(tree)
    tree.pool.set_torpid(IdSet([2, 5]))
    assert shown.take(tree).keys() == {"2", "5"}
    assert shown.documents["5"]["torpid"] is True
    tree.pool.set_lively(IdSet([2, 5]))
    tree.pool.add(Inventory(rank=6, host="n6", cores=IdSet([0])))
    tree.touch(6)
    assert shown.take(tree).keys() == {"2", "5", "6"}
    assert (shown.documents["5"]["torpid"], shown.documents["6"]["host"]) == (False, "n6")
    assert not shown.take(tree)


def test_looking_rank_by_rank_is_assembling() -> None:
    shown = Shown()
    tree = Tree(shown)
    answers = {
        0: Report("degraded", 1.0, {1: ("lost", 1.0), 2: ("full", 1.0)}),
        2: Report("full", 1.0, {5: ("full", 1.0), 6: ("full", 1.0)}),
    }
    for rank, answer in answers.items():
        tree._tell(rank, answer)
    shown.take(tree)
    assembled = assemble(0, Topology.kary(7, 2), answers)
    assert {rank: seen.status for rank, seen in assembled.items()} == {
        int(key): document["status"] for key, document in shown.documents.items()
    }


# --- names


async def test_names_of_others_are_found_out_in_the_background(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    known = {7: "seven", 8: None}
    monkeypatch.setattr(names, "lookup", known.get)
    monkeypatch.setattr("os.getuid", lambda: 7)
    learned: list[int] = []
    found = Usernames(learned.append)
    assert found.get(7) == "seven"
    assert found.get(8) is None
    known[9] = "nine"
    assert found.get(9) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        with trio.fail_after(PATIENCE):
            while learned != [9]:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert (found.get(9), found.get(8)) == ("nine", None)
    monkeypatch.setattr(names, "MAX_KNOWN", 3)
    assert found.get(10) is None
    assert not found._asked


def test_bounds_are_those_that_the_documentation_names() -> None:
    assert (lines.TAIL, len(nodes.TOTALS)) == (256, 10)
