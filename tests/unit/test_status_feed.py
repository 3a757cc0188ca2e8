"""The status feed on a real manager and store: it works only while somebody looks, and what it shows of jobs."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from kvskit import OWNER, running_kvs
from rpckit import STREAMING, Peer
from trio.testing import MockClock

from fluxres.base.idset import IdSet
from fluxres.base.jobid import FluidClock, JobId
from fluxres.base.json import JsonObject
from fluxres.broker.logbuffer import LogBuffer
from fluxres.exec.ranks import Ranks
from fluxres.job import keys
from fluxres.job.build import Facts, build_jobspec
from fluxres.job.ingest import Ingest
from fluxres.job.manager import Manager
from fluxres.job.queue import Queue
from fluxres.job.replay import replay
from fluxres.job.requests import JobRequests
from fluxres.job.stats import JobStats
from fluxres.job.value import Job
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Put, Unlink
from fluxres.overlay.topology import Topology
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.sched.pool import Inventory, Pool
from fluxres.status import feed, jobs
from fluxres.status.board import LINGER, Board
from fluxres.status.feed import FLUSH, IDLE, MAX_RATE, Feed, Origins
from fluxres.wire.messages import Role
from fluxres.wire.payload import WireMap

PATIENCE = 10_000
POLL = 0.01


class Overlay:
    """The overlay of an instance of one."""

    class hello:  # noqa: N801 - an attribute of the overlay
        uuid = "life"

    def __init__(self) -> None:
        self.topology = Topology.kary(1, 2)
        self.changed = trio.Event()

    def report(self) -> WireMap:
        return {"rank": 0, "status": "full", "duration": trio.current_time(), "children": []}


class Life:
    """One incarnation of rank 0, as far as the feed sees it; jobs run through as soon as they have resources."""

    def __init__(self, kvs: Kvs, clock: FluidClock) -> None:
        self.kvs = kvs
        self.router = Router(rank=0, size=1)
        self.handle = Handle(self.router, "test", os.getuid())
        self.pool = Pool([Inventory(rank=0, host="here", cores=IdSet(range(4)))])
        self.pool.set_up(IdSet([0]))
        self.manager = Manager(
            kvs=kvs, handle=self.handle, pool=self.pool, now=self.now, statedir_of=lambda _: "statedir"
        )
        self.stats = JobStats()
        self.manager.listen(self.stats.changed)
        self.ingest = Ingest(router=self.router, kvs=kvs, manager=self.manager, clock=clock, now=self.now)
        requests = JobRequests(router=self.router, handle=self.handle, manager=self.manager)
        queue = Queue(kvs=kvs, service=requests.service, manager=self.manager, ingest=self.ingest)
        self.detached: dict[JobId, IdSet] = {}
        self.recovery: JsonObject | None = None
        self.lines = LogBuffer(0)
        self.feed = Feed(
            Origins(
                manager=self.manager,
                stats=self.stats,
                pool=self.pool,
                ranks=Ranks(),
                overlay=Overlay(),  # type: ignore[arg-type]
                kvs=kvs,
                handle=self.handle,
                log=self.lines,
                now=self.now,
                about=lambda: {"instance": "i", "size": 1, "version": "0"},
                queue=queue.document,
                drains=dict,
                detached=lambda jobid: self.detached.get(jobid, IdSet()),
                recovery=lambda: self.recovery,
            ),
            router=self.router,
        )
        shells = Service("exec", self.router)
        shells.method("forget", lambda request: None)
        execs = Service("job-exec", self.router)
        execs.task("start", self._start)
        execs.method("released", lambda request: None)
        self.services = (execs, shells, self.ingest.service, requests.service, self.feed.service)

    def now(self) -> float:
        return 1_000_000 + trio.current_time()

    async def _start(self, request: Request) -> None:
        """job-exec: everything succeeds at once."""
        said: tuple[tuple[str, WireMap], ...] = (
            ("start", {}),
            ("finish", {"status": 0}),
            ("release", {"ranks": "all", "final": True}),
        )
        for kind, data in said:
            await request.stream({"id": request.payload["id"], "type": kind, "data": data})

    async def submit(self, key: str, name: str = "true") -> JobId:
        jobspec = build_jobspec(Facts(command=(name,), cwd="/", environment={}))
        answer = await self.handle.call("job-ingest.submit", {"jobspec": jobspec, "key": key})
        jobid = answer["id"]
        assert isinstance(jobid, int)
        return JobId(jobid)

    async def run_through(self, key: str) -> JobId:
        jobid = await self.submit(key)
        await self.until(lambda: jobid not in self.manager.ledger)
        return jobid

    async def until(self, check: Callable[[], bool]) -> None:
        for _ in range(PATIENCE):
            if check():
                return
            await trio.sleep(POLL)
        raise AssertionError("it has not come to be")

    async def hold(self, *, start: bool) -> None:
        await self.handle.call("job-manager.queue-start", {"start": start})


@asynccontextmanager
async def life(path: Path) -> AsyncIterator[Life]:
    async with running_kvs(path / "kvs.sqlite", threaded=False) as kvs:
        replayed = await replay(kvs)
        made = Life(kvs, FluidClock(0, 1, replayed.last))
        async with trio.open_nursery() as nursery:
            for service in made.services:
                await nursery.start(service.run)
            await nursery.start(made.manager.run)
            made.manager.take_up(replayed)
            await nursery.start(made.feed.run)
            yield made
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def looking(now: Life) -> AsyncIterator[Board]:
    async with now.feed.open() as board:
        await board.begun()
        yield board


def shown(board: Board, jobid: JobId) -> Mapping[str, object]:
    return board.view.documents("jobs").get(str(int(jobid)), {})


async def test_nothing_is_listened_to_unless_somebody_looks(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        listeners, ranks = now.manager._listeners, now.pool._listeners
        await now.run_through("one")
        assert (len(listeners), len(ranks), now.feed.collecting) == (1, 0, False)
        async with looking(now) as board:
            assert (len(listeners), len(ranks), now.feed.collecting) == (2, 1, True)
            first = board.view.position
            assert first.epoch == "life"
        await trio.sleep(LINGER / 2)
        async with looking(now) as board:
            assert board.view.position == first
        await trio.sleep(LINGER + 1)
        assert (len(listeners), len(ranks), now.feed.collecting) == (1, 0, False)
        assert not board.view.begun
        assert not board.view.documents("jobs")
        async with looking(now) as board:
            assert board.view.position.epoch == "life"
            assert board.view.position.seq > first.seq
            assert len(board.view.documents("jobs")) == 1


async def test_changes_are_flushed_together_and_nothing_is_done_without(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with life(tmp_path) as now, looking(now) as board:
        flushes: list[float] = []
        flush = feed._Collection._flush

        async def counted(collection: feed._Collection) -> object:
            flushes.append(trio.current_time())
            return await flush(collection)

        monkeypatch.setattr(feed._Collection, "_flush", counted)
        await trio.sleep(60)
        flushes.clear()
        await trio.sleep(600)
        assert not flushes
        before = board.view.position.seq
        for number in range(20):
            await now.run_through(f"k{number}")
        await trio.sleep(10)
        assert len(flushes) <= 2 + (flushes[-1] - flushes[0]) / FLUSH
        assert 0 < board.view.position.seq - before <= len(flushes)
        assert len(board.view.documents("jobs")) == 20
        counts = board.view.documents("instance")["jobs"]
        assert counts == {
            **dict.fromkeys(("depend", "priority", "sched", "run", "cleanup"), 0),
            "inactive": 20,
            "submitted": 20,
            "completed": 20,
            "failed": 0,
            "canceled": 0,
            "timeout": 0,
        }


async def test_a_job_is_shown_from_its_submission_to_its_end(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now, looking(now) as board:
        await now.hold(start=False)
        await now.until(lambda: board.view.documents("instance")["queue"] == {"enabled": True, "started": False})
        jobid = await now.submit("one", "sleeper")
        await now.until(lambda: bool(shown(board, jobid)))
        pending = shown(board, jobid)
        assert (pending["state"], pending["dec"], pending["name"]) == ("SCHED", str(int(jobid)), "sleeper")
        assert (pending["userid"], pending["restarts"]) == (os.getuid(), 0)
        assert not {"result", "returncode", "detached", "t_run"} & pending.keys()
        now.detached[jobid] = IdSet([0])
        now.feed.touch_job(jobid)
        await trio.sleep(1)
        assert "detached" not in shown(board, jobid), "it does not run"
        await now.hold(start=True)
        await now.until(lambda: shown(board, jobid)["state"] == "INACTIVE")
        ended = shown(board, jobid)
        assert (ended["result"], ended["returncode"], ended["waitstatus"], ended["ranks"]) == ("COMPLETED", 0, 0, "0")
        assert (ended["success"], ended["nodelist"], ended["ncores"]) == (True, "here", 1)


async def test_detached_ranks_and_a_recovery_are_shown_when_the_feed_is_told(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with life(tmp_path) as now:
        never = trio.Event()

        async def stuck(request: Request) -> None:
            await request.stream({"id": request.payload["id"], "type": "start", "data": {}})
            await never.wait()

        now.services[0].task("start", stuck)
        jobid = await now.submit("one")
        now.feed.touch_job(jobid)
        now.feed.touch_recovery()
        async with looking(now) as board:
            await now.until(lambda: shown(board, jobid).get("state") == "RUN")
            now.detached[jobid], now.recovery = IdSet([0]), {"ranks": "0"}
            now.feed.touch_job(jobid)
            await now.until(lambda: shown(board, jobid).get("detached") == "0")
            assert board.view.documents("instance")["recovery"] == {"ranks": "0"}
            now.recovery = None
            now.feed.touch_recovery()
            await now.until(lambda: "recovery" not in board.view.documents("instance"))


async def test_only_the_newest_ended_jobs_are_shown(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RECENT", 4)
    monkeypatch.setattr(jobs, "PAGE", 3)
    async with life(tmp_path) as now:
        old = [await now.run_through(f"old{number}") for number in range(10)]
        async with looking(now) as board:
            assert board.view.documents("jobs").keys() == {str(int(jobid)) for jobid in old[-4:]}
            await now.until(lambda: board.view.documents("instance")["jobs"].get("inactive") == 10)
            new = [await now.run_through(f"new{number}") for number in range(3)]
            await now.until(lambda: board.view.documents("instance")["jobs"].get("inactive") == 13)
            assert board.view.documents("jobs").keys() == {str(int(jobid)) for jobid in (old[-1], *new)}
    async with life(tmp_path) as now, looking(now) as board:
        assert board.view.documents("jobs").keys() == {str(int(jobid)) for jobid in (old[-1], *new)}
        await now.until(lambda: board.view.documents("instance")["jobs"].get("inactive") == 13)
        assert board.view.documents("instance")["jobs"]["submitted"] == 0


async def test_of_a_job_that_cannot_be_read_is_shown_what_is_known(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        good, spoilt, bad = [await now.run_through(key) for key in ("good", "spoilt", "bad")]
        await now.kvs.commit(Unlink(PRIMARY, keys.jobspec_key(spoilt)))
        await now.kvs.commit(Put(PRIMARY, keys.eventlog_key(bad), b"nonsense"))
        async with looking(now) as board:
            assert shown(board, good)["name"] == "true"
            assert str(shown(board, spoilt)["name"]).startswith("(unreadable: ")
            assert shown(board, spoilt)["result"] == "COMPLETED"
            assert not shown(board, bad)


async def test_what_a_user_can_make_large_is_cut(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now, looking(now) as board:
        await now.hold(start=False)
        jobid = await now.submit("one", "x" * 5000)
        await now.until(lambda: bool(shown(board, jobid)))
        assert len(str(shown(board, jobid)["name"])) == jobs.MAX_TEXT + 1
        document: JsonObject = {
            "annotations": {"user": {"note": "y" * 10_000}},
            "dependencies": ["after:z"] * 1000,
            "name": "a",
        }
        assert jobs._bounded(document) == {"name": "a"}
        small: JsonObject = {"annotations": {"user": {"note": "y"}}, "dependencies": ["after:z"]}
        assert jobs._bounded(dict(small)) == small


async def test_a_bug_in_a_source_is_logged_and_ends_nothing(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with life(tmp_path) as now, now.feed.open() as board:
        with monkeypatch.context() as broken:
            broken.setattr(jobs, "_bounded", lambda document: document["nothing"])
            await now.run_through("one")
            await now.until(lambda: "cannot show the instance" in caplog.text)
            await now.run_through("two")
            assert not board.view.begun
        await now.until(lambda: board.view.begun)
        assert len(board.view.documents("jobs")) == 2


async def test_jobs_that_end_while_others_are_read_are_the_newest(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RECENT", 4)
    read = jobs.JobsSource._ended_job

    def ended_job(source: jobs.JobsSource, jobid: JobId) -> Job | None:
        if jobid == old[-1]:
            source._changed(now.manager.records.job(jobid), [])
        return read(source, jobid)

    monkeypatch.setattr(jobs.JobsSource, "_ended_job", ended_job)
    async with life(tmp_path) as now:
        old = [await now.run_through(f"old{number}") for number in range(6)]
        async with looking(now) as board:
            assert board.view.documents("jobs").keys() == {str(int(jobid)) for jobid in old[-4:]}


# --- the service


async def test_guests_may_watch_all_but_the_log(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        guest = Peer(now.router, "guest")
        for tag, topics in enumerate((["jobs", "log"], ["jobs"]), start=1):
            guest.send("status.watch", {"topics": topics}, tag=tag, flags=STREAMING, role=Role.USER, userid=OWNER + 1)
        await now.until(lambda: len(guest.got) == 2)
        assert guest.got[0].errnum == errno.EPERM
        (_, _, body) = guest.answers()[1]
        assert isinstance(body, dict)
        assert (body["type"], body["more"], body["position"]) == ("snapshot", False, ["life", 1])


async def test_one_watcher_too_many_is_refused_and_each_waits_its_turn(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_WATCHERS", 3)
    async with life(tmp_path) as now:
        peer = Peer(now.router, "peer")
        for tag in range(1, 5):
            peer.send("status.watch", {"topics": ["jobs"]}, tag=tag, flags=STREAMING)
        await now.until(lambda: len(peer.got) == 4)
        (refused,) = [message for message in peer.got if message.errnum]
        assert refused.errnum == errno.EAGAIN
        first = next(message for message in peer.got if not message.errnum)
        peer.send("status.cancel", {"matchtag": first.matchtag}, tag=first.matchtag)
        await now.until(lambda: peer.got[-1].errnum == errno.ENODATA)
        peer.send("status.watch", {"topics": ["jobs"]}, tag=5, flags=STREAMING)
        await now.until(lambda: peer.got[-1].matchtag == 5)
        assert now.feed._watchers == 3
        assert MAX_RATE >= 1


async def test_a_watcher_for_whom_nothing_is_new_learns_the_position(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        peer = Peer(now.router, "peer")
        ask: WireMap = {"topics": ["jobs"], "jobs": {"states": ["active"]}, "position": ["life", 0]}
        peer.send("status.watch", ask, flags=STREAMING)
        await now.until(lambda: bool(peer.got))
        await now.run_through("one")
        await trio.sleep(3 * IDLE)
        bodies = [body for _, _, body in peer.answers() if isinstance(body, dict)]
        assert bodies[0]["type"] == "snapshot"
        assert bodies[0]["why"] == "behind"
        last = bodies[-1]
        assert (last["type"], last["set"], last["delete"]) == ("delta", {}, {})
        assert len(bodies) < 8
