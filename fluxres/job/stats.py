"""Counts the jobs of one life of rank 0: a listener of the job manager (`Manager.listen`), for metrics and listings.

All of it begins at zero with each life of rank 0, but how many jobs are in which state: that counts those of the lives
before as well, as soon as they are taken up. Jobs that were INACTIVE already are in no count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxres.base.eventlog import Event
from fluxres.base.meter import OUTAGES, WAITS, Histogram
from fluxres.job.result import JobResult, result
from fluxres.job.value import Job, JobState


class JobStats:
    """What has become of jobs: give `changed` to `Manager.listen` before jobs are taken up."""

    def __init__(self) -> None:
        self.submitted = 0
        """Jobs taken in."""
        self.ended: dict[JobResult, int] = dict.fromkeys(JobResult, 0)
        """Jobs that have become INACTIVE, by result."""
        self.scheduling = Histogram(WAITS)
        """Seconds from a job's first SCHED to its resources."""
        self.launching = Histogram(OUTAGES)
        """Seconds from a job's resources to the start of all its shells."""
        self._counts = dict.fromkeys(JobState, 0)
        self._states: dict[int, JobState] = {}

    @property
    def active(self) -> Mapping[JobState, int]:
        """How many active jobs there are, by state."""
        inactive = (JobState.NEW, JobState.INACTIVE)
        return {state: count for state, count in self._counts.items() if state not in inactive}

    def changed(self, job: Job, events: Sequence[Event]) -> None:
        """A job is this now, by these events; none where it comes from a life before."""
        self._moved(job)
        for event in events:
            if event.name == "submit":
                self.submitted += 1
            elif event.name == "alloc" and job.t_sched is not None and job.t_run is not None:
                self.scheduling.observe(max(0.0, job.t_run - job.t_sched))  # a clock may be set back
            elif event.name == "start" and job.t_run is not None:
                self.launching.observe(max(0.0, event.timestamp - job.t_run))

    def _moved(self, job: Job) -> None:
        before = self._states.pop(job.id, None)
        if before is not None:
            self._counts[before] -= 1
        how = result(job)
        if how is None:
            self._states[job.id] = job.state
            self._counts[job.state] += 1
        elif before is not None:
            self.ended[how] += 1
