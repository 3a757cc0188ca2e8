"""The `job-list` service: what jobs there are, with flux-core's attributes; made from the records when asked.

Active jobs come from the manager; inactive ones are read, newest first, as far as the request reaches back.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Annotated, Final, cast

import msgspec
import trio

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.job import keys
from fluxres.job.manager import Manager
from fluxres.job.records import JobRecords
from fluxres.job.result import JobResult, result
from fluxres.job.select import Selection, parse_constraint
from fluxres.job.value import Job, JobState
from fluxres.job.view import Summary, entry, summarize
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY
from fluxres.rpc.fields import AnyJobId
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

BATCH: Final = 64
"""Jobs in one response."""
PAGE: Final = 256
"""Ids read from the index at a time."""
DEFAULT_MAX: Final = 1000
LIST_VERSION: Final = 1


class _List(msgspec.Struct, frozen=True, kw_only=True):
    max_entries: Annotated[int, msgspec.Meta(ge=0)] = DEFAULT_MAX
    attrs: tuple[str, ...] = ("all",)
    since: float = 0.0
    constraint: dict[str, object] = {}


class _ListId(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    attrs: tuple[str, ...] = ("all",)


class JobList:
    """Serves `job-list.*`."""

    def __init__(self, *, router: Router, kvs: Kvs, manager: Manager) -> None:
        self._kvs = kvs
        self._manager = manager
        self._records = JobRecords(kvs)
        self.service = Service("job-list", router)
        self.service.task("list", self._list)
        self.service.method("list-id", self._list_id)
        self.service.task("job-stats", self._stats)

    async def _list(self, request: Request) -> None:
        ask = request.parse(_List)
        try:
            selection = parse_constraint(cast("JsonObject", ask.constraint))
        except ValueError as error:
            raise RpcError(errno.EINVAL, str(error)) from error
        left = ask.max_entries or None
        first: WireMap = {"version": LIST_VERSION}
        jobs: list[WireMap] = []
        for job in self._jobs(selection, ask.since):
            jobs.append(self._entry(job, ask.attrs))
            if len(jobs) == BATCH or len(jobs) == left:
                await request.stream({"jobs": jobs, **first})
                left = None if left is None else left - len(jobs)
                first, jobs = {}, []
                if left == 0:
                    return
            await trio.lowlevel.checkpoint()
        if jobs or first:
            await request.stream({"jobs": jobs, **first})

    def _jobs(self, selection: Selection, since: float) -> Iterator[Job]:
        """The selected jobs: active ones first, then inactive ones, each newest first."""
        active = [entry.durable for entry in reversed(self._manager.ledger.entries())]
        seen = {job.id for job in active}  # some end while the listing goes on, and are not listed twice
        yield from filter(selection.matches, active)
        if not selection.states & JobState.INACTIVE:
            return
        for jobid in self._ids():
            if jobid in seen or jobid in self._manager.ledger:
                continue
            try:
                job = self._records.job(jobid)
            except (FluxresError, ValueError):
                continue  # in quarantine, and reported when it was put there
            if (job.t_inactive or 0) > since and selection.matches(job):
                yield job

    def _ids(self) -> Iterator[JobId]:
        before: str | None = None
        while names := self._kvs.list_range(PRIMARY, keys.ALL_INDEX, before=before, limit=PAGE):
            yield from map(keys.from_index_name, names)
            before = names[-1]

    def _list_id(self, request: Request) -> WireMap:
        ask = request.parse(_ListId)
        entry = self._manager.ledger.get(JobId(ask.id))
        job = self._records.job(JobId(ask.id)) if entry is None else entry.durable
        return {"job": self._entry(job, ask.attrs)}

    def _entry(self, job: Job, attrs: tuple[str, ...]) -> WireMap:
        jobid = JobId(job.id)
        try:
            resources = self._records.resources(jobid) if job.t_run is not None else None
            summary = summarize(self._records.jobspec(jobid), resources)
        except (FluxresError, ValueError) as error:
            summary = Summary(name=f"(unreadable: {error})", duration=0)
        try:
            return cast("WireMap", entry(job, summary, attrs))
        except ValueError as error:
            raise RpcError(errno.EINVAL, str(error)) from error

    async def _stats(self, request: Request) -> WireMap:
        states = {state.name.lower(): 0 for state in JobState if state is not JobState.NEW}
        results = dict.fromkeys(JobResult, 0)
        for job in self._jobs(Selection(), 0):
            states[job.state.name.lower()] += 1
            if (how := result(job)) is not None:
                results[how] += 1
            await trio.lowlevel.checkpoint()
        return {
            "job_states": {**states, "total": sum(states.values())},
            "successful": results[JobResult.COMPLETED],
            "failed": results[JobResult.FAILED],
            "canceled": results[JobResult.CANCELED],
            "timeout": results[JobResult.TIMEOUT],
            "inactive_purged": 0,
            "queues": [],
        }
