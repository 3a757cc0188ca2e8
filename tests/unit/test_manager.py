"""The job manager on a real store, with a job-exec that the test plays: what is owed is paid, once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from kvskit import OWNER, running_kvs

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, decode
from fluxres.base.idset import IdSet
from fluxres.base.jobid import FluidClock, JobId
from fluxres.base.json import JsonObject
from fluxres.exec.progress import progress_key
from fluxres.job import keys
from fluxres.job.build import Facts, build_jobspec
from fluxres.job.ingest import Ingest
from fluxres.job.manager import Listener, Manager
from fluxres.job.queue import Queue
from fluxres.job.replay import replay
from fluxres.job.requests import JobRequests
from fluxres.job.value import Job, JobState
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Mkdir, Put, Unlink
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.sched.pool import Inventory, Pool, Share
from fluxres.wire.payload import WireMap

PATIENCE = 60
POLL = 0.002


BOTH = IdSet([0, 1])


class PlayedExec:
    """A job-exec whose responses the test gives; it keeps the requests of each job."""

    def __init__(self, router: Router) -> None:
        self.started: dict[int, Request] = {}
        self.cancelled: list[int] = []
        self._released: dict[int, trio.Event] = {}
        self.service = Service("job-exec", router)
        self.service.task("start", self._start)
        self.service.method("end", lambda request: self.cancelled.append(self._id(request)))
        self.releases: list[WireMap] = []
        self.service.method("released", self._release)

    def _id(self, request: Request) -> int:
        jobid = request.payload["id"]
        assert isinstance(jobid, int)
        return jobid

    def _release(self, request: Request) -> None:
        self.releases.append(request.payload)
        if request.payload["final"]:
            self._released[self._id(request)].set()

    async def _start(self, request: Request) -> None:
        jobid = self._id(request)
        self.started[jobid] = request
        await self._released.setdefault(jobid, trio.Event()).wait()

    def say(self, jobid: int, kind: str, data: WireMap | None = None) -> None:
        self.started[jobid].respond({"id": jobid, "type": kind, "data": data or {}})


class Life:
    """One incarnation of a manager, and what a test needs around it."""

    def __init__(self, kvs: Kvs, clock: FluidClock, cores: IdSet, ranks: int) -> None:
        router = Router(rank=0, size=1)
        pool = Pool([Inventory(rank=rank, host="here", cores=cores) for rank in range(ranks)])
        pool.set_up(IdSet(range(ranks)))
        self.kvs = kvs
        self.handle = Handle(router, "test", OWNER)
        self.manager = Manager(kvs=kvs, handle=self.handle, pool=pool, now=lambda: 1000.0, statedir_of=lambda _: "S")
        self.exec = PlayedExec(router)
        self.ingest = Ingest(router=router, kvs=kvs, manager=self.manager, clock=clock, now=lambda: 1000.0)
        self.requests = JobRequests(router=router, handle=self.handle, manager=self.manager)
        self.queue = Queue(kvs=kvs, service=self.requests.service, manager=self.manager, ingest=self.ingest)
        shells = Service("exec", router)
        shells.method("forget", lambda request: None)
        self.services = (self.exec.service, self.ingest.service, self.requests.service, shells)

    async def submit(self, key: str = "k", **facts: object) -> JobId:
        jobspec = build_jobspec(Facts(command=("true",), cwd="/", environment={}, **facts))  # type: ignore[arg-type]
        return await self.submit_object(jobspec, key)

    async def submit_object(self, jobspec: JsonObject, key: str) -> JobId:
        answer = await self.handle.call("job-ingest.submit", {"jobspec": jobspec, "key": key})
        jobid = answer["id"]
        assert isinstance(jobid, int)
        return JobId(jobid)

    def events(self, jobid: JobId) -> list[str]:
        data = self.kvs.get(PRIMARY, keys.eventlog_key(jobid))
        assert data is not None
        return [event.name for event in decode(data)]

    async def until(self, check: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not check():
                await trio.testing.wait_all_tasks_blocked(POLL)

    async def run_through(self, jobid: JobId) -> None:
        """Play a job's whole execution."""
        await self.until(lambda: jobid in self.exec.started)
        self.exec.say(jobid, "start")
        self.exec.say(jobid, "finish", {"status": 0})
        self.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await self.until(lambda: jobid not in self.manager.ledger)


@asynccontextmanager
async def life(
    path: Path, cores: IdSet = BOTH, ranks: int = 1, listener: Listener | None = None
) -> AsyncIterator[Life]:
    async with running_kvs(path / "kvs.sqlite") as kvs:
        replayed = await replay(kvs)
        made = Life(kvs, FluidClock(0, 1, replayed.last), cores, ranks)
        if listener is not None:
            made.manager.listen(listener)
        async with trio.open_nursery() as nursery:
            for service in made.services:
                await nursery.start(service.run)
            await nursery.start(made.manager.run)
            made.manager.take_up(replayed)
            yield made
            nursery.cancel_scope.cancel()


WHOLE = ["submit", "validate", "depend", "priority", "alloc", "start", "finish", "release", "free", "clean"]


async def test_a_whole_life_logs_each_event_once(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        jobid = await now.submit()
        await now.run_through(jobid)
        assert now.events(jobid) == WHOLE
        assert now.kvs.get(PRIMARY, progress_key(jobid, 0)) is not None
        assert not now.kvs.exists(PRIMARY, keys.active_key(jobid))


async def test_the_same_key_is_the_same_job(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        first = await now.submit("same")
        assert await now.submit("same") == first
        assert await now.submit("other") != first
    async with life(tmp_path) as later:
        assert await later.submit("same") == first
        assert await later.submit("third") > first


async def test_two_submissions_of_one_key_at_once_are_one_job(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        got: list[JobId] = []

        async def submit() -> None:
            got.append(await now.submit("racing"))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(submit)
        assert len(set(got)) == 1
        assert len(now.manager.ledger) == 1


async def test_a_pending_job_that_is_cancelled_never_starts(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False})
        jobid = await now.submit()
        await now.handle.call("job-manager.raise", {"id": int(jobid), "type": "cancel", "note": "no"})
        assert "exception" in now.events(jobid)
        await now.until(lambda: jobid not in now.manager.ledger)
        assert now.events(jobid)[-2:] == ["exception", "clean"]
        assert jobid not in now.exec.started


async def test_a_stopped_queue_stays_stopped_over_a_restart(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False, "reason": "upgrade"})
        jobid = await now.submit()
    async with life(tmp_path) as later:
        status = await later.handle.call("job-manager.queue-status")
        assert (status["start"], status["stop_reason"]) == (False, "upgrade")
        assert jobid in later.manager.scheduler or jobid not in later.exec.started
        await later.handle.call("job-manager.queue-start", {"start": True})
        await later.run_through(jobid)


async def test_an_urgency_of_zero_holds_a_job(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False})
        jobid = await now.submit()
        answer = await now.handle.call("job-manager.urgency", {"id": int(jobid), "urgency": 0})
        assert answer == {"old_urgency": 16}
        await now.handle.call("job-manager.queue-start", {"start": True})
        other = await now.submit("other")
        await now.run_through(other)
        assert jobid not in now.exec.started
        await now.handle.call("job-manager.urgency", {"id": int(jobid), "urgency": 16})
        await now.run_through(jobid)


async def test_an_urgency_that_overtakes_a_priority_is_heeded(tmp_path: Path) -> None:
    """The second comes while the priority that the first made due is on its way to the disk."""
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False})
        jobid = await now.submit()
        entry = now.manager.ledger.get(jobid)
        assert entry is not None
        await now.handle.call("job-manager.urgency", {"id": int(jobid), "urgency": 1})
        assert (entry.durable.state, entry.posted.state) == (JobState.PRIORITY, JobState.SCHED)
        await now.handle.call("job-manager.urgency", {"id": int(jobid), "urgency": 2})
        await now.until(lambda: entry.durable.state is JobState.SCHED and not entry.under_way)
        assert entry.durable.priority == 2
        await now.handle.call("job-manager.queue-start", {"start": True})
        await now.run_through(jobid)


async def test_an_event_that_cannot_be_logged_ends_the_incarnation(tmp_path: Path) -> None:
    """Rather than that the job waits for it for ever: the next incarnation owes the same."""
    with pytest.RaisesGroup(FluxresError, flatten_subgroups=True, allow_unwrapped=True):
        async with life(tmp_path) as now:
            await now.handle.call("job-manager.queue-start", {"start": False})
            jobid = await now.submit()
            await now.kvs.commit(Unlink(PRIMARY, keys.eventlog_key(jobid)), Mkdir(PRIMARY, keys.eventlog_key(jobid)))
            now.handle.send("job-manager.raise", {"id": int(jobid), "type": "cancel"})
            await trio.sleep(PATIENCE)


async def test_a_running_job_that_is_cancelled_is_killed_and_ends(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        jobid = await now.submit()
        await now.until(lambda: jobid in now.exec.started)
        now.exec.say(jobid, "start")
        await now.until(lambda: "start" in now.events(jobid))
        await now.handle.call("job-manager.raise", {"id": int(jobid), "type": "cancel"})
        await now.until(lambda: now.exec.cancelled == [jobid])
        now.exec.say(jobid, "finish", {"status": 15})
        now.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await now.until(lambda: jobid not in now.manager.ledger)
        assert now.events(jobid)[-5:] == ["exception", "finish", "release", "free", "clean"]


@pytest.mark.parametrize("said", ["nothing", "start", "finish", "exception"])
async def test_a_restart_goes_on_wherever_it_stopped(tmp_path: Path, said: str) -> None:
    async with life(tmp_path) as now:
        jobid = await now.submit()
        await now.until(lambda: jobid in now.exec.started)
        if said in ("start", "finish", "exception"):
            now.exec.say(jobid, "start")
        if said == "finish":
            now.exec.say(jobid, "finish", {"status": 0})
        if said == "exception":
            await now.handle.call("job-manager.raise", {"id": int(jobid), "type": "cancel"})
        await now.until(lambda: said == "nothing" or said in now.events(jobid))
    async with life(tmp_path) as later:
        await later.until(lambda: jobid in later.exec.started)
        request = later.exec.started[jobid].payload
        assert request["reattach"] is True
        assert request["killed"] is (said == "exception")
        later.exec.say(jobid, "reattached")
        later.exec.say(jobid, "finish", {"status": 0})
        later.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await later.until(lambda: jobid not in later.manager.ledger)
        events = later.events(jobid)
        assert [name for name in events if name not in ("flux-restart", "exception")] == WHOLE
        assert events.count("flux-restart") == 1


async def test_pending_jobs_run_in_order_of_priority_as_cores_come_free(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False})
        jobs = [await now.submit(str(n), ntasks=2) for n in range(3)]
        await now.handle.call("job-manager.urgency", {"id": int(jobs[2]), "urgency": 20})
        await now.handle.call("job-manager.queue-start", {"start": True})
        for jobid in (jobs[2], jobs[0], jobs[1]):
            await now.until(lambda jobid=jobid: jobid in now.exec.started)  # type: ignore[misc]
            assert len(now.exec.started) == 1
            await now.run_through(jobid)
            del now.exec.started[jobid]


async def test_a_job_that_can_never_run_gets_an_alloc_exception(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        jobid = await now.submit(ntasks=99)
        await now.until(lambda: jobid not in now.manager.ledger)
        assert now.events(jobid)[-2:] == ["exception", "clean"]


async def test_a_record_that_cannot_be_read_is_quarantined_and_the_rest_load(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        await now.handle.call("job-manager.queue-start", {"start": False})
        bad, good = await now.submit("bad"), await now.submit("good")
        await now.kvs.commit(Put(PRIMARY, keys.eventlog_key(bad), b'{"timestamp":1,"na'))
    async with life(tmp_path) as later:
        assert bad not in later.manager.ledger
        assert later.manager.ledger.get(good) is not None
        assert later.kvs.get(PRIMARY, keys.quarantine_key(bad)) is not None
        replayed = await replay(later.kvs)
        assert replayed.quarantined == frozenset({bad})
        assert [job.state for job in replayed.jobs] == [JobState.SCHED]


@pytest.mark.parametrize("record", ["progress", "nonce"])
async def test_what_a_running_job_is_found_again_by_is_checked_too(tmp_path: Path, record: str) -> None:
    """Without it job-exec could not go on with the job, and what runs of it must not be thrown away."""
    async with life(tmp_path) as now:
        jobid = await now.submit()
        await now.until(lambda: jobid in now.exec.started)
        key = progress_key(jobid, 0) if record == "progress" else keys.nonce_key(jobid)
        await now.kvs.commit(Put(PRIMARY, key, b"\xff"))
    async with life(tmp_path) as later:
        assert jobid not in later.manager.ledger
        assert later.kvs.get(PRIMARY, keys.quarantine_key(jobid)) is not None


async def test_what_a_job_in_quarantine_may_hold_is_not_given_to_others(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        bad = await now.submit("bad")
        await now.until(lambda: bad in now.exec.started)
        await now.kvs.commit(Put(PRIMARY, keys.eventlog_key(bad), b"{}"))
    async with life(tmp_path) as later:
        one, two = await later.submit("one"), await later.submit("two")
        await later.until(lambda: one in later.exec.started)
        await later.run_through(one)
        await later.run_through(two)
        assert {share.cores for share in later.manager.scheduler.pool.allocated()} == {IdSet([0])}


async def test_a_job_goes_on_where_its_cores_are_gone(tmp_path: Path) -> None:
    async with life(tmp_path) as now:
        jobid = await now.submit(ntasks=2)
        await now.until(lambda: jobid in now.exec.started)
    async with life(tmp_path, IdSet([0])) as later:
        other = await later.submit("other")
        await later.run_through(jobid)
        await later.run_through(other)
        assert not later.manager.scheduler.pool.allocated()


async def test_a_part_that_is_released_goes_to_others_and_stays_theirs(tmp_path: Path) -> None:
    async with life(tmp_path, IdSet([0]), ranks=3) as now:
        jobid = await now.submit(nodes=3, ntasks=3)
        await now.until(lambda: jobid in now.exec.started)
        assert now.exec.started[jobid].payload["released"] == ""
        now.exec.say(jobid, "start")
        other = await now.submit("other")
        now.exec.say(jobid, "release", {"ranks": "1", "final": False})
        await now.until(lambda: other in now.exec.started)
        assert now.exec.releases == [{"id": jobid, "ranks": "1", "final": False}]
        now.exec.say(jobid, "release", {"ranks": "2", "final": False})
        await now.until(lambda: len(now.exec.releases) == 2)
        assert now.manager.scheduler.pool.allocated() == (share(0), share(1))
        assert now.events(jobid)[-2:] == ["release", "release"]
    async with life(tmp_path, IdSet([0]), ranks=3) as later:
        await later.until(lambda: {jobid, other} <= later.exec.started.keys())
        assert later.manager.scheduler.pool.allocated() == (share(0), share(1))
        assert later.exec.started[jobid].payload["released"] == "1-2"
        later.exec.say(jobid, "finish", {"status": 0})
        later.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await later.until(lambda: jobid not in later.manager.ledger)
        assert later.manager.scheduler.pool.allocated() == (share(1),)
        await later.run_through(other)
        assert later.manager.scheduler.pool.allocated() == ()


async def test_all_that_is_said_at_once_is_released_and_freed(tmp_path: Path) -> None:
    async with life(tmp_path, IdSet([0]), ranks=2) as now:
        jobid = await now.submit(nodes=2, ntasks=2)
        await now.until(lambda: jobid in now.exec.started)
        now.exec.say(jobid, "start")
        now.exec.say(jobid, "release", {"ranks": "1", "final": False})
        now.exec.say(jobid, "finish", {"status": 0})
        now.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await now.until(lambda: jobid not in now.manager.ledger)
        assert now.manager.scheduler.pool.allocated() == ()
        assert [release["ranks"] for release in now.exec.releases] == ["1", "0"]


async def test_many_exceptions_are_logged_once_over_a_restart(tmp_path: Path) -> None:
    def problem(rank: int) -> WireMap:
        return {"type": "exec", "severity": 0, "note": f"rank {rank} is lost"}

    async with life(tmp_path) as now:
        jobid = await now.submit()
        await now.until(lambda: jobid in now.exec.started)
        for rank in range(5):
            now.exec.say(jobid, "exception", problem(rank))
        await now.until(lambda: now.events(jobid).count("exception") == 5)
    async with life(tmp_path) as later:
        await later.until(lambda: jobid in later.exec.started)
        for rank in range(7):
            later.exec.say(jobid, "exception", problem(rank))
        await later.until(lambda: later.events(jobid).count("exception") == 7)
        later.exec.say(jobid, "release", {"ranks": "0", "final": True})
        await later.until(lambda: jobid not in later.manager.ledger)


def share(rank: int) -> Share:
    return Share(rank=rank, cores=IdSet([0]))


async def test_a_bad_jobspec_is_refused_by_its_path(tmp_path: Path) -> None:
    from fluxres.base.errors import RpcError

    async with life(tmp_path) as now:
        with pytest.raises(RpcError, match="cannot accept jobspec: "):
            await now.submit_object({"version": 1, "tasks": "ls"}, "k")
        assert len(now.manager.ledger) == 0


async def test_a_listener_with_a_bug_harms_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def listen(job: Job, events: Sequence[Event]) -> None:
        raise KeyError(job.id)

    async with life(tmp_path) as now:
        now.manager.listen(listen)
        await now.run_through(await now.submit())
    assert "could not be told: submit" in caplog.text


async def test_a_listener_is_told_of_every_durable_event_and_of_jobs_taken_up(tmp_path: Path) -> None:
    told: list[tuple[JobState, list[str]]] = []

    def listen(job: Job, events: Sequence[Event]) -> None:
        told.append((job.state, [event.name for event in events]))

    async with life(tmp_path) as now:
        now.manager.listen(listen)
        jobid = await now.submit()
        await now.until(lambda: jobid in now.exec.started)
        now.exec.say(jobid, "start")
        await now.until(lambda: "start" in now.events(jobid))
        first = list(told)
    assert first == [(JobState.SCHED, WHOLE[:4]), (JobState.RUN, ["alloc"]), (JobState.RUN, ["start"])]
    told.clear()
    async with life(tmp_path, listener=listen) as later:
        await later.run_through(jobid)
        assert told[0] == (JobState.RUN, [])
        assert [name for _, names in told for name in names] == ["flux-restart", *WHOLE[6:]]
        assert told[-1][0] is JobState.INACTIVE
        later.manager.unlisten(listen)
        count = len(told)
        await later.run_through(await later.submit("other"))
        assert len(told) == count
