"""The job manager: pays what RFC 21 says is owed to each active job, and nothing twice.

Every event that becomes durable comes through `_changed`, which asks `job.state.next_action` what is owed now, and does
it: logs the next event, asks the scheduler, has job-exec start or kill. What came of it is logged in its turn. A
restart replays the active jobs, and owes the same (`job.replay`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Final, cast

import trio

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonValue
from fluxres.job.allocate import allocation_ops
from fluxres.job.ledger import Entry, Ledger
from fluxres.job.records import JobRecords
from fluxres.job.replay import Replayed
from fluxres.job.resources import ResourceSet, from_allocation
from fluxres.job.state import Action, apply, next_action, priority_for
from fluxres.job.value import Job, JobState
from fluxres.kvs.kvs import Kvs
from fluxres.rpc.handle import Handle
from fluxres.sched.policy import Decision, Denied
from fluxres.sched.pool import Pool, PoolError
from fluxres.sched.request import Request
from fluxres.sched.service import Scheduler
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.job-manager")

Told = tuple[object, object, object]
"""Type, severity and note of an exception."""
Listener = Callable[[Job, Sequence[Event]], None]
"""Told of a job as it is now, durably, and of the events that have just made it so."""

EXEC_GONE: Final = frozenset({errno.ENOSYS, errno.ENOTRECOVERABLE})
"""Errors that tell nothing of the job: job-exec itself has ended, or has a bug."""
NO_RANKS: Final = IdSet()


class Manager:
    """The active jobs of the instance. `statedir_of` names the statedir of a rank that a job is given."""

    def __init__(
        self,
        *,
        kvs: Kvs,
        handle: Handle,
        pool: Pool,
        now: Callable[[], float],
        statedir_of: Callable[[int], str],
    ) -> None:
        self.records = JobRecords(kvs)
        self.ledger = Ledger(kvs, now, self._changed)
        self.scheduler = Scheduler(pool, self._decided)
        self._handle = handle
        self._now = now
        self._statedir_of = statedir_of
        self._nursery: trio.Nursery | None = None
        self._listeners: list[Listener] = []
        self._executing: set[JobId] = set()
        self._found: set[JobId] = set()
        """Jobs that had resources already in the life before: their shells may be there."""
        self._logged: dict[JobId, set[Told]] = {}
        """Of those, and once it is asked for, the exceptions that were logged before job-exec took them up."""
        self._requests: dict[JobId, Request] = {}
        """Requests of replayed jobs that are not with the scheduler yet."""
        self._unclaimed: set[JobId] = set()
        """Jobs of the lives before whose resources the pool does not have, or not free."""
        self.ended = trio.Event()
        """Set and replaced whenever a job becomes INACTIVE."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after jobs until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await nursery.start(self.scheduler.run)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # --- who watches

    def listen(self, listener: Listener) -> None:
        """Call `listener` of each change of a job as soon as it is durable, until `unlisten`.

        It must not raise: an error is only logged, for no job is to suffer from being watched.
        A job that is submitted comes with the events of its submission; one of a life before, which is taken up, with
        none; one that ends with its last, for the last time, while the ledger does not have it any more.
        """
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Do not call `listener` any more. Raises ValueError where it does not listen."""
        self._listeners.remove(listener)

    def _tell(self, job: Job, events: Sequence[Event]) -> None:
        for listener in self._listeners:
            try:
                listener(job, events)
            except Exception:
                names = ", ".join(event.name for event in events) or "taken up"
                log.exception("job %s: one who watches it could not be told: %s", f58(JobId(job.id)), names)

    # --- what the services ask for

    def take_in(self, job: Job, events: Sequence[Event]) -> None:
        """A job's submission is durable: `events` are those that it began with."""
        entry = self.ledger.add(job)
        self._tell(job, events)
        self._pay(entry)

    def raise_exception(
        self,
        entry: Entry,
        *,
        kind: str,
        severity: int,
        note: str,
        userid: int | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Log an exception; a fatal one ends the job. `then` is called when it is durable."""
        context: dict[str, bool | int | str | None] = {"type": kind, "severity": severity, "note": note}
        if userid is not None:
            context["userid"] = userid
        self.ledger.post(entry, self.ledger.event("exception", **context), then=then)

    def take_up(self, replayed: Replayed) -> None:
        """Go on with replayed jobs: claim what they hold, log `flux-restart`, pay what is owed.

        What a job in quarantine may hold stays in use: its shells may live.
        """
        self._requests.update(replayed.requests)
        for jobid, resources in replayed.held.items():
            self._claim(jobid, resources)
        entries = [self.ledger.add(job) for job in replayed.jobs]
        for entry in entries:
            self._tell(entry.durable, ())
            if entry.durable.allocated:
                jobid = JobId(entry.durable.id)
                self.records.remember_resources(jobid, self.records.resources(jobid))
                self._claim(jobid, self.records.held(entry.durable))
                self._found.add(jobid)
        for entry in entries:
            self._log(entry, self._restart_events(entry.durable))

    def _claim(self, jobid: JobId, resources: ResourceSet) -> None:
        try:
            self.scheduler.pool.claim(resources.allocation())
        except PoolError as error:
            log.error("job %s goes on, but %s", f58(jobid), error)  # fewer cores than before, say
            self._unclaimed.add(jobid)

    def _restart_events(self, job: Job) -> list[Event]:
        events = [self.ledger.event("flux-restart")]
        return events + self.owed_events(apply(job, events[0]))

    def owed_events(self, job: Job) -> list[Event]:
        """The events that are owed at once, one after the other, by nothing but the job's own state."""
        events: list[Event] = []
        while (event := self._owed_event(job)) is not None:
            events.append(event)
            job = apply(job, event)
        return events

    def _owed_event(self, job: Job) -> Event | None:
        match next_action(job):
            case Action.LOG_VALIDATE:
                return self.ledger.event("validate")
            case Action.LOG_DEPEND:
                return self.ledger.event("depend")
            case Action.LOG_PRIORITY:
                return self.ledger.event("priority", priority=priority_for(job.urgency))
            case Action.FREE:
                return self.ledger.event("free")
            case Action.LOG_CLEAN:
                return self.ledger.event("clean")
        return None

    # --- what is owed

    def _changed(self, entry: Entry, events: Sequence[Event]) -> None:
        if self._nursery is None:
            return  # this incarnation is over: the next one owes the same
        job = entry.durable
        jobid = JobId(job.id)
        self._tell(job, events)
        if job.state is not JobState.SCHED and jobid in self.scheduler:
            self.scheduler.cancel(jobid)
        for event in events:
            if event.name == "release":
                ranks, final = event.context["ranks"], event.context["final"]
                self._tell_exec("job-exec.released", jobid, ranks=ranks, final=final)
        if job.state is JobState.INACTIVE:
            self._forget(job)
        else:
            self._pay(entry)

    def _pay(self, entry: Entry) -> None:
        """Do what is owed now, unless it, or an event that may change what is owed, is under way already."""
        if entry.under_way or self._nursery is None:
            return
        job = entry.durable
        jobid = JobId(job.id)
        action = next_action(job)
        if job.needs_exec and jobid not in self._executing and action in (Action.NONE, Action.KILL):
            self._execute(jobid, reattach=True)
        if action is entry.doing:
            return
        entry.doing = action
        match action:
            case Action.LOG_VALIDATE | Action.LOG_DEPEND | Action.LOG_PRIORITY | Action.FREE | Action.LOG_CLEAN:
                self._log(entry, self.owed_events(job))
            case Action.REQUEST_ALLOC:
                self._request(entry)
            case Action.START:
                self._execute(jobid, reattach=jobid in self._found)
            case Action.KILL:
                self._tell_exec("job-exec.end", jobid)

    def _request(self, entry: Entry) -> None:
        job = entry.durable
        request = self._requests.pop(JobId(job.id), None) or self.records.jobspec(JobId(job.id)).request()
        self.scheduler.request(job.id, request, priority=job.priority)

    def _decided(self, decision: Decision) -> None:
        entry = self.ledger.get(JobId(decision.id))
        if isinstance(decision, Denied):
            if entry is not None and entry.posted.state is JobState.SCHED:
                self.raise_exception(entry, kind="alloc", severity=0, note=decision.note)
            return
        if entry is None or entry.posted.state is not JobState.SCHED:
            self.scheduler.free(decision.allocation)  # it was cancelled, or moved, a moment ago
            return
        jobid = JobId(decision.id)
        jobspec = self.records.jobspec(jobid)
        pool = self.scheduler.pool
        resources = from_allocation(
            decision.allocation,
            {rank: inventory.host for rank in decision.allocation.ranks() if (inventory := pool.find(rank))},
            starttime=self._now(),
            duration=jobspec.system.duration,
        )
        self.records.remember_resources(jobid, resources)
        ops = allocation_ops(
            entry.posted,
            resources,
            ntasks=sum(jobspec.tasks_per_target(resources)),
            now=self._now(),
            statedir_of=self._statedir_of,
        )
        self.ledger.post(entry, self.ledger.event("alloc"), ops=ops)

    def _log(self, entry: Entry, events: Sequence[Event]) -> None:
        """Log `events`.

        With `free` the resources go to others, with a partial `release` those of its ranks; the others' `alloc` is
        committed after it, or with it.
        """
        before = entry.posted
        self.ledger.post(entry, *events)
        after = entry.posted
        if after.released is not before.released:
            self._free(after, self.records.held(before).only(after.released or NO_RANKS))
        if before.allocated and not after.allocated:
            self._free(after, self.records.held(after))
            self._unclaimed.discard(JobId(after.id))

    def _free(self, job: Job, resources: ResourceSet) -> None:
        if JobId(job.id) not in self._unclaimed:
            self.scheduler.free(resources.allocation())

    def _forget(self, job: Job) -> None:
        """`clean` is durable: the shells' directories may go."""
        jobid = JobId(job.id)
        if job.t_run is not None:
            for rank in self.records.resources(jobid).ranks():
                self._handle.send("exec.forget", {"ids": [int(jobid)]}, nodeid=rank)
        self.records.forget(jobid)
        self._requests.pop(jobid, None)
        self._found.discard(jobid)
        self._logged.pop(jobid, None)
        self.ended.set()
        self.ended = trio.Event()

    # --- execution (RFC 32)

    def _tell_exec(self, topic: str, jobid: JobId, **more: JsonValue) -> None:
        if jobid in self._executing:
            self._handle.send(topic, cast("WireMap", {"id": int(jobid), **more}))

    def _execute(self, jobid: JobId, *, reattach: bool) -> None:
        assert self._nursery is not None
        self._executing.add(jobid)
        self._nursery.start_soon(self._run_job, jobid, reattach, name=f"run {f58(jobid)}")

    async def _run_job(self, jobid: JobId, reattach: bool) -> None:
        entry = self.ledger.get(jobid)
        try:
            if entry is not None:
                start = self.records.start_request(entry.durable, reattach=reattach)
                async with self._handle.stream("job-exec.start", start) as responses:
                    async for response in responses:
                        self._exec_said(jobid, [response, *responses.ready()])
        except RpcError as error:
            if error.errnum in EXEC_GONE or reattach:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise  # and this incarnation ends with it: the next one finds what runs
            self._exec_failed(jobid, error)
        finally:
            self._executing.discard(jobid)

    def _exec_failed(self, jobid: JobId, error: RpcError) -> None:
        """job-exec cannot run the job at all: it ends with an exception, and nothing of it runs."""
        log.error("job %s: cannot execute it: %s", f58(jobid), error.text)
        entry = self.ledger.get(jobid)
        if entry is None or entry.posted.final_release:
            return
        self.raise_exception(entry, kind="exec", severity=0, note=error.text)
        self.ledger.post(entry, self.ledger.event("release", ranks="all", final=True))

    def _exec_said(self, jobid: JobId, responses: list[WireMap]) -> None:
        """Log what RFC 32 responses say, in one commit; not what a life before this one has logged already."""
        entry = self.ledger.get(jobid)
        if entry is None:
            return
        events: list[Event] = []
        job = entry.posted
        for response in responses:
            event = self._event_of(job, response)
            if event is not None:
                events.append(event)
                job = apply(job, event)
        if events:
            self._log(entry, events + self.owed_events(job))

    def _event_of(self, job: Job, response: WireMap) -> Event | None:
        match response:
            case {"type": "start" | "reattached"} if not job.started:
                return self.ledger.event("start")
            case {"type": "finish", "data": {"status": int(status)}} if job.status is None:
                return self.ledger.event("finish", status=status)
            case {"type": "release", "data": {"ranks": str(ranks), "final": bool(final)}} if not job.final_release:
                return self.ledger.event("release", ranks=ranks, final=final)
            case {"type": "exception", "data": {"type": str(kind), "severity": int(severity), "note": str(note)}}:
                if not self._is_logged(JobId(job.id), (kind, severity, note)):
                    return self.ledger.event("exception", type=kind, severity=severity, note=note)
        return None

    def _is_logged(self, jobid: JobId, told: Told) -> bool:
        """Whether a life before this one has logged that exception: job-exec says each once in a life."""
        if jobid not in self._found:
            return False
        logged = self._logged.get(jobid)
        if logged is None:
            exceptions = [event.context for event in self.records.events(jobid) if event.name == "exception"]
            logged = {(c.get("type"), c.get("severity"), c.get("note")) for c in exceptions}
            self._logged[jobid] = logged
        return told in logged
