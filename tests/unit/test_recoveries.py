"""What follows recoveries on rank 0: from ranks and shells to an event that is durable, on a virtual clock."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.broker.recovery import MAX_UNSAVED, RETRY, Recoveries
from fluxres.exec.attachments import Attachments, Fate
from fluxres.exec.progress import RankState
from fluxres.exec.ranks import LastLife, Presence, Ranks
from fluxres.exec.recall import Recalled
from fluxres.exec.recovery import LIMIT, Recovery
from fluxres.overlay.topology import Topology

JOB = JobId(7)
WALL = 1e9
"""The time of day at the beginning of the virtual clock."""


class Disk:
    """An eventlog that may be full, or broken."""

    def __init__(self, known: str, alive: float) -> None:
        self.known = IdSet.parse(known)
        self.recalled = Recalled(expected=self.known, alive=alive)
        self.events: list[JsonObject] = []
        self.refusals: list[int] = []

    async def log(self, name: str, context: JsonObject) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            raise RpcError(self.refusals.pop(0))
        assert name == "recovery"
        self.events.append(context)


class Life:
    """A life of rank 0 in an instance of seven ranks."""

    def __init__(self, known: str = "", alive: float = WALL) -> None:
        self.disk = Disk(known, alive)
        self.ranks = Ranks()
        self.attachments = Attachments(trio.current_time)
        self.recoveries = Recoveries(
            ranks=self.ranks,
            attachments=self.attachments,
            topology=Topology.kary(7, 2),
            resource=self.disk,
            pending=lambda: 4,
            now=lambda: WALL + trio.current_time(),
        )
        self.changes = 0
        self.recoveries.listen(self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def join(self, *ranks: int, last: LastLife | None = None) -> None:
        for rank in ranks:
            self.ranks.joined(
                Presence(
                    rank=rank,
                    uuid=f"u{rank}",
                    host="h",
                    statedir="s",
                    incarnation=1,
                    boot_id="b",
                    cores="0",
                    last=last,
                )
            )

    def lose(self, *ranks: int) -> None:
        for rank in ranks:
            self.ranks.left(rank, f"u{rank}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.recoveries.run)
            yield
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_a_life_that_finds_jobs(autojump_clock: MockClock) -> None:
    await trio.sleep(100)
    life = Life("0-2", alive=WALL + 80)
    life.recoveries.begin([JOB], pending=2)
    async with life.running():
        life.join(0)
        life.join(1, 2, last=LastLife(ago=10.0, why="the parent is lost"))
        await trio.sleep(1)
        life.attachments.begin(JOB, [1, 2], found=True)
        await trio.sleep(1)
        life.attachments.attach(JOB, 1)
        assert life.disk.events == []
        current = life.recoveries.current()
        assert current is not None
        assert (current["began"], current["detached"], current["pending"]) == (WALL + 90, 1, 2)
        life.attachments.end(JOB, 2, RankState.EXITED)
        assert life.recoveries.current() is None
    [event] = life.disk.events
    assert event == {
        "ranks": "0-2",
        "root": 0,
        "restarted": "0",
        "panicked": "1-2",
        "began": WALL + 90,
        "seconds": 12.0,
        "why": "rank 0 was restarted; rank 1: the parent is lost",
        "running": 1,
        "rediscovered": 1,
        "finished": 0,
        "lost": 0,
        "pending": 2,
    }
    assert (life.recoveries.count, life.recoveries.rediscovered) == (1, 1)
    assert (life.recoveries.finished, life.recoveries.lost) == (0, 0)
    assert life.recoveries.seconds.sum == 12.0
    assert (life.attachments.seconds.count, life.attachments.seconds.sum) == (2, 24.0)


async def test_a_loss_counts_who_waits_and_ends_at_its_limit(autojump_clock: MockClock) -> None:
    life = Life()
    life.recoveries.begin([], pending=0)
    async with life.running():
        life.join(*range(7))
        assert life.changes == 0
        life.attachments.begin(JOB, [5], found=False)
        life.attachments.start(JOB, 5)
        life.attachments.attach(JOB, 5)
        life.lose(5)
        assert life.changes > 0
        assert life.attachments.detached(JOB) == IdSet([5])
        current = life.recoveries.current()
        assert current is not None
        assert (current["pending"], current["away"], current["detached"]) == (4, "5", 1)
        await trio.sleep(LIMIT + 1)
        [event] = life.disk.events
        assert (event["away"], event["detached"], event["seconds"]) == ("5", 1, LIMIT)
        life.lose(6)
        life.join(6)
        await wait_all_tasks_blocked()
        assert len(life.disk.events) == 2


async def test_ranks_that_were_declared_lost_are_not_awaited(autojump_clock: MockClock) -> None:
    life = Life("0-2")
    life.ranks.declare(2, "gone")
    life.recoveries.begin([], pending=0)
    async with life.running():
        life.join(0, 1)
        await wait_all_tasks_blocked()
        assert [event["ranks"] for event in life.disk.events] == ["0-2"]
        life.lose(1)
        life.ranks.declare(1, "gone as well")
        await wait_all_tasks_blocked()
        assert life.recoveries.current() is None
        assert len(life.disk.events) == 1


async def test_a_full_disk_is_waited_for(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    life = Life("0")
    life.disk.refusals = [errno.ENOSPC, errno.EAGAIN]
    life.recoveries.begin([], pending=0)
    async with life.running():
        life.join(0)
        await trio.sleep(1.5 * RETRY)
        assert life.disk.events == []
        await trio.sleep(RETRY)
        assert len(life.disk.events) == 1
        life.disk.refusals = [errno.EIO]
        life.join(4)
        life.lose(4)
        life.join(4)
        await trio.sleep(RETRY)
        assert len(life.disk.events) == 1
        assert "cannot log a recovery: " in caplog.text


async def test_what_cannot_be_stored_has_a_bound(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    life = Life()
    life.recoveries.begin([], pending=0)
    life.join(4)
    for _ in range(MAX_UNSAVED + 2):
        life.lose(4)
        life.join(4)
    async with life.running():
        await trio.sleep(RETRY)
        assert len(life.disk.events) == MAX_UNSAVED
        assert caplog.text.count("dropping a recovery event") == 2


@pytest.mark.parametrize("bug", [False, True])
async def test_what_cannot_be_followed_stops_it_and_nothing_else(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, bug: bool
) -> None:
    life = Life("0-1")
    life.recoveries.begin([], pending=0)
    async with life.running():
        if bug:
            monkeypatch.setattr(Recovery, "_shell", lambda machine, event: machine.nothing)
        life.recoveries.shell(JOB, 3, Fate.ATTACHED)
        assert life.recoveries.current() is None
        life.join(0, 1)
        life.lose(1)
        assert life.ranks.online_ranks() == IdSet([0])
    assert life.disk.events == []
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
