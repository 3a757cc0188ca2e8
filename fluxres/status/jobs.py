"""The topic `jobs`: every active job, and the newest of those that have ended.

The manager tells of each durable event (`Manager.listen`); a document is built from what job-list would show. What is
read of a job's records is kept for as long as the job is shown: when it ends, the manager forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec
import trio

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job import keys
from fluxres.job.manager import Manager
from fluxres.job.result import result, returncode
from fluxres.job.value import RUNNING, Job, JobState
from fluxres.job.view import Summary, entry, summarize
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY
from fluxres.status.names import Usernames
from fluxres.status.source import Built, Wake

RECENT: Final = 256
"""Inactive jobs that are shown: those that have ended last."""
PAGE: Final = 512
"""Ids read from the index at a time."""
BATCH: Final = 16
"""Records read before other tasks get their turn."""
MAX_TEXT: Final = 1024
"""Characters of a job's name, directory or note that are shown."""
MAX_PART: Final = 4096
"""Bytes of a job's annotations, or dependencies, as JSON; larger ones are not shown."""

Detached = Callable[[JobId], IdSet]
"""The ranks of a job whose shells no broker reads right now."""


class JobsSource:
    """The jobs that `manager` looks after, and the newest that the store has of those that have ended."""

    topic = "jobs"

    def __init__(self, *, manager: Manager, kvs: Kvs, detached: Detached, wake: Wake) -> None:
        self._manager = manager
        self._records = manager.records
        self._kvs = kvs
        self._detached = detached
        self._wake = wake
        self._names = Usernames(self._learned)
        self._jobs: dict[JobId, Job] = {}
        """All that are shown."""
        self._summaries: dict[JobId, Summary] = {}
        self._ended: dict[JobId, None] = {}
        """Those of them that are inactive, in the order in which they ended."""
        self._dirty: dict[JobId, None] = {}
        self._gone: list[JobId] = []
        self._newest: frozenset[JobId] = frozenset()
        """The ids in the first page of the index: what is there may be submitted only a moment later."""
        self._later = 0
        """Jobs submitted since that page was read, and not in it."""
        self._counted: int | None = None

    @property
    def inactive(self) -> int | None:
        """How many jobs have ended since the instance began; None while they are being counted."""
        return None if self._counted is None else self._counted + self._later - len(self._manager.ledger)

    def touch(self, jobid: JobId) -> None:
        """Something of a job has changed that is in no eventlog: who reads its shells."""
        if jobid in self._jobs:
            self._dirty[jobid] = None
            self._wake()

    # --- collecting

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen to the manager until cancelled; the number of inactive jobs comes later."""
        self._manager.listen(self._changed)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._names.run)
                self._jobs = {JobId(each.durable.id): each.durable for each in self._manager.ledger.entries()}
                self._dirty = dict.fromkeys(self._jobs)
                before, count = await self._load()
                task_status.started()
                while names := self._page(before):
                    before = names[-1]
                    count += len(names)
                    await trio.lowlevel.checkpoint()
                self._counted = count
                self._wake()
        finally:
            self._manager.unlisten(self._changed)

    def _page(self, before: str | None) -> list[str]:
        return self._kvs.list_range(PRIMARY, keys.ALL_INDEX, before=before, limit=PAGE)

    async def _load(self) -> tuple[str | None, int]:
        """Read the newest inactive jobs; returns the oldest name in the index so far, and how many there were."""
        found: list[Job] = []
        before: str | None = None
        count = 0
        while len(found) < RECENT and (names := self._page(before)):
            ids = [keys.from_index_name(name) for name in names]
            if before is None:
                self._newest = frozenset(ids)
            for number, jobid in enumerate(ids):
                if len(found) < RECENT and (job := self._ended_job(jobid)) is not None:
                    found.append(job)
                if number % BATCH == BATCH - 1:
                    await trio.lowlevel.checkpoint()
            before = names[-1]
            count += len(names)
        meanwhile, self._ended = self._ended, {}
        for job in sorted(found, key=lambda job: job.t_inactive or 0.0):
            if job.id not in self._jobs:  # else it has been here, and has ended, meanwhile
                self._jobs[JobId(job.id)] = job
                self._dirty[JobId(job.id)] = None
                self._end(JobId(job.id))
        for jobid in meanwhile:  # they are the newest, and the last to go
            self._end(jobid)
        return before, count

    def _ended_job(self, jobid: JobId) -> Job | None:
        """An inactive job from the store; None for one that is shown already, or in quarantine."""
        if jobid in self._jobs:
            return None
        try:
            job = self._records.job(jobid)
        except FluxresError:
            return None  # reported when it was put into quarantine
        return job if job.state is JobState.INACTIVE else None

    def _changed(self, job: Job, events: Sequence[Event]) -> None:
        """The manager tells: a job is this now."""
        jobid = JobId(job.id)
        self._jobs[jobid] = job
        self._dirty[jobid] = None
        if job.state is JobState.INACTIVE:
            self._summary(job)  # while the manager still has its records
            self._end(jobid)
        elif events and events[0].name == "submit" and jobid not in self._newest:
            self._later += 1
        self._wake()

    def _end(self, jobid: JobId) -> None:
        self._ended[jobid] = None
        if len(self._ended) > RECENT:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self._jobs[oldest]
            self._summaries.pop(oldest, None)
            self._dirty.pop(oldest, None)
            self._gone.append(oldest)

    def _learned(self, userid: int) -> None:
        self._dirty.update((jobid, None) for jobid, job in self._jobs.items() if job.userid == userid)
        self._wake()

    # --- documents

    def documents(self) -> Built:
        """The jobs that have changed."""
        dirty, self._dirty = self._dirty, {}
        gone, self._gone = self._gone, []
        for jobid in gone:
            yield str(int(jobid)), None
        for jobid in dirty:
            if (job := self._jobs.get(jobid)) is not None:
                yield str(int(jobid)), self._document(job)

    def _document(self, job: Job) -> JsonObject:
        jobid = JobId(job.id)
        how = result(job)
        document: JsonObject = {
            **entry(job, self._summary(job)),
            "id": f58(jobid),
            "dec": str(job.id),
            "state": job.state.name,
            "restarts": job.restarts,
        }
        added: dict[str, JsonValue] = {
            "username": self._names.get(job.userid),
            "result": how and how.name,
            "returncode": returncode(how, job.status),
            "detached": str(self._detached(jobid)) if job.state & RUNNING else None,
        }
        document.update((key, value) for key, value in added.items() if value not in (None, ""))
        return _bounded(document)

    def _summary(self, job: Job) -> Summary:
        jobid = JobId(job.id)
        known = self._summaries.get(jobid)
        if known is None or (job.t_run is not None and known.ranks is None):
            try:
                resources = self._records.resources(jobid) if job.t_run is not None else None
                known = summarize(self._records.jobspec(jobid), resources)
            except (FluxresError, ValueError) as error:
                known = Summary(name=f"(unreadable: {error})", duration=0)
            self._summaries[jobid] = known
        return known


def _bounded(document: JsonObject) -> JsonObject:
    """A document without what a user could make it large by."""
    for key in ("name", "cwd", "queue", "project", "bank", "exception_type", "exception_note"):
        text = document.get(key)
        if isinstance(text, str) and len(text) > MAX_TEXT:
            document[key] = text[:MAX_TEXT] + "…"
    for key in ("annotations", "dependencies"):
        if key in document and len(msgspec.json.encode(cast("object", document[key]))) > MAX_PART:
            del document[key]
    return document
