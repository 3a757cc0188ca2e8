"""The ledger of active jobs: posts events to eventlogs, and tells when they are durable.

Log durably, then act. A job has two values here: `durable`, the fold of what is in the store, on which alone anything
is done; and `posted`, which also counts events whose commit is under way, and against which new ones are checked, so
that nothing illegal is ever logged. Commits end in the order in which they were posted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, encode
from fluxres.base.failpoint import hit
from fluxres.base.jobid import JobId, f58
from fluxres.job.keys import active_key, eventlog_key
from fluxres.job.state import Action, apply, next_action
from fluxres.job.value import Job, JobState
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CommitResult, Op, Unlink

FAILPOINT_OF: Final = {
    "alloc": "alloc",
    "start": "start-durable",
    "finish": "finish",
    "release": "release",
    "clean": "clean",
}
"""The failpoint (`base.failpoint`) around the commit of an event."""


class Entry:
    """One active job."""

    __slots__ = ("doing", "durable", "posted", "under_way")

    def __init__(self, job: Job) -> None:
        self.durable = job
        self.posted = job
        self.under_way = 0
        """Commits of the job's events that are not durable yet."""
        self.doing = Action.NONE
        """The action that is under way for `durable`; cleared by the event after which it is not owed (any more)."""


class Ledger:
    """All active jobs of the instance. `changed` is told of every event, in order, when it is durable."""

    def __init__(self, kvs: Kvs, now: Callable[[], float], changed: Callable[[Entry, Sequence[Event]], None]) -> None:
        self._kvs = kvs
        self._now = now
        self._changed = changed
        self._entries: dict[JobId, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, jobid: JobId) -> bool:
        return jobid in self._entries

    def get(self, jobid: JobId) -> Entry | None:
        """The entry of an active job."""
        return self._entries.get(jobid)

    def entries(self) -> list[Entry]:
        """All active jobs, by jobid."""
        return [self._entries[jobid] for jobid in sorted(self._entries)]

    def add(self, job: Job) -> Entry:
        """Take in a job whose eventlog is durable."""
        entry = self._entries[JobId(job.id)] = Entry(job)
        return entry

    def event(self, name: str, **context: bool | int | str | None) -> Event:
        """An event of now."""
        return Event(self._now(), name, dict(context))

    def post(
        self, entry: Entry, *events: Event, ops: Sequence[Op] = (), then: Callable[[], None] | None = None
    ) -> None:
        """Log `events` for a job, `ops` in the same transaction; `then` is called when they are durable.

        Raises IllegalTransition where the job's state, with what is under way, does not allow them.
        """
        posted = entry.posted
        for event in events:
            posted = apply(posted, event)
        entry.posted = posted
        entry.under_way += 1
        jobid = JobId(posted.id)
        lines = "".join(map(encode, events)).encode()
        commit: list[Op] = [*ops, Append(PRIMARY, eventlog_key(jobid), lines)]
        if posted.state is JobState.INACTIVE:
            commit.append(Unlink(PRIMARY, active_key(jobid)))
        _hit(events, "before")
        self._kvs.submit(commit, lambda result: self._durable(entry, events, then, result), hold=True)

    def _durable(
        self, entry: Entry, events: Sequence[Event], then: Callable[[], None] | None, result: CommitResult
    ) -> None:
        if result.error is not None:
            if result.error.errnum != errno.ECANCELED:  # not because the store is closed, with this incarnation
                raise FluxresError(f"cannot log to job {f58(entry.durable.id)}: {result.error.text}")
            return
        _hit(events, "after")
        entry.under_way -= 1
        for event in events:
            entry.durable = apply(entry.durable, event)
            if next_action(entry.durable) is not entry.doing:
                entry.doing = Action.NONE
        if entry.durable.state is JobState.INACTIVE:
            self._entries.pop(JobId(entry.durable.id), None)
        if then is not None:
            then()
        self._changed(entry, events)


def _hit(events: Sequence[Event], side: str) -> None:
    for event in events:
        if (name := FAILPOINT_OF.get(event.name)) is not None:
            hit(f"{name}.{side}")
