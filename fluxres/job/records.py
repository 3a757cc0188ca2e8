"""Reads what the store has of a job, parsed: jobspec, R, nonce, and the request that starts it."""

from __future__ import annotations

import errno
from typing import Final, cast

import msgspec

from fluxres.base.errors import IllegalTransition, RpcError
from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job import keys
from fluxres.job.changes import EventError
from fluxres.job.jobspec import Jobspec, apply_updates, parse_jobspec
from fluxres.job.resources import ResourceSet, blocks, parse_r, taskmap
from fluxres.job.state import fold
from fluxres.job.value import Job
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY
from fluxres.wire.payload import WireMap

MAX_CACHED: Final = 256
""" Jobspecs that are kept, oldest forgotten first: those of jobs on their way from submit to start."""


class JobRecords:
    """The records of jobs in the store."""

    def __init__(self, kvs: Kvs) -> None:
        self._kvs = kvs
        self._jobspecs: dict[JobId, tuple[Jobspec, JsonObject]] = {}
        self._resources: dict[JobId, ResourceSet] = {}

    def remember(self, jobid: JobId, jobspec: Jobspec, value: JsonObject) -> None:
        """Keep a jobspec, parsed and as JSON, for a while: it is asked for again soon."""
        self._jobspecs[jobid] = (jobspec, value)
        if len(self._jobspecs) > MAX_CACHED:
            del self._jobspecs[next(iter(self._jobspecs))]

    def forget(self, jobid: JobId) -> None:
        """The job has ended."""
        self._jobspecs.pop(jobid, None)
        self._resources.pop(jobid, None)

    def remember_resources(self, jobid: JobId, resources: ResourceSet) -> None:
        """Keep the R of a job until it has ended."""
        self._resources[jobid] = resources

    def read(self, key: str, what: str) -> bytes:
        """The value of `key`. Raises RpcError ENOENT, naming `what`."""
        data = self._kvs.get(PRIMARY, key)
        if data is None:
            raise RpcError(errno.ENOENT, f"there is no {what}")
        return data

    def events(self, jobid: JobId) -> list[Event]:
        """The job's eventlog. Raises RpcError ENOENT, ValueError."""
        return decode(self.read(keys.eventlog_key(jobid), f"job {f58(jobid)}"))

    def job(self, jobid: JobId) -> Job:
        """The job, folded from its eventlog. Raises RpcError: ENOENT, EIO where the eventlog makes no sense."""
        try:
            events = self.events(jobid)
            if not events:
                raise ValueError("its eventlog is empty")
            return fold(jobid, events)
        except (ValueError, EventError, IllegalTransition) as error:
            raise RpcError(errno.EIO, f"cannot read the record of job {f58(jobid)}: {error}") from error

    def check_quarantine(self, jobid: JobId) -> None:
        """Raise RpcError EIO for a job whose record could not be read when this incarnation began (`job.replay`)."""
        why = self._kvs.get(PRIMARY, keys.quarantine_key(jobid))
        if why is not None:
            raise RpcError(errno.EIO, f"job {f58(jobid)} is in quarantine: {why.decode(errors='replace')}")

    def jobspec_object(self, jobid: JobId, updates: object = None) -> JsonObject:
        """The jobspec as JSON, with the updates of the eventlog where they are given."""
        if jobid in self._jobspecs:
            value = self._jobspecs[jobid][1]
        else:
            data = self.read(keys.jobspec_key(jobid), f"jobspec of {f58(jobid)}")
            value = cast("JsonObject", msgspec.json.decode(data))
        return apply_updates(value, cast("JsonObject", updates)) if updates else value

    def jobspec(self, jobid: JobId) -> Jobspec:
        """The jobspec, parsed."""
        cached = self._jobspecs.get(jobid)
        return parse_jobspec(self.jobspec_object(jobid)) if cached is None else cached[0]

    def resources(self, jobid: JobId) -> ResourceSet:
        """R, parsed. Raises RpcError ENOENT where the job has none."""
        if (known := self._resources.get(jobid)) is not None:
            return known
        return parse_r(cast("JsonValue", msgspec.json.decode(self.read(keys.r_key(jobid), f"R of {f58(jobid)}"))))

    def held(self, job: Job) -> ResourceSet:
        """The part of R that the job has not released. Raises RpcError as `resources` does."""
        resources = self.resources(JobId(job.id))
        return resources if job.released is None else resources.only(resources.ranks() - job.released)

    def start_request(self, job: Job, *, reattach: bool) -> WireMap:
        """The payload of `job-exec.start` (RFC 32), with the layout of the tasks."""
        jobid = JobId(job.id)
        resources = self.resources(jobid)
        jobspec = self.jobspec(jobid)
        counts = jobspec.tasks_per_target(resources)
        return {
            "id": int(jobid),
            "userid": job.userid,
            "jobspec": cast("WireMap", self.jobspec_object(jobid, job.updates)),
            "R": cast("WireMap", resources.encode()),
            "tasks": [[r.rank, r.first, r.count] for r in blocks(resources, counts)],
            "taskmap": taskmap(counts),
            "nonce": self.read(keys.nonce_key(jobid), f"nonce of {f58(jobid)}").decode(),
            "t_submit": job.t_submit or 0.0,
            "reattach": reattach,
            "killed": job.fatal,
            "released": "" if job.released is None else str(job.released),
        }
