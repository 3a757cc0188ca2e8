"""What is counted of jobs, from their events."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fluxres.base.eventlog import Event
from fluxres.job.result import JobResult
from fluxres.job.state import apply
from fluxres.job.stats import JobStats
from fluxres.job.value import Job, JobState

SUBMIT = {"userid": 1000, "urgency": 16, "flags": 0, "version": 1}


class Life:
    """One job whose events come second by second, told to `stats` in the commits that a manager makes."""

    def __init__(self, stats: JobStats, jobid: int = 1) -> None:
        self.stats = stats
        self.job = Job(id=jobid)
        self.now = 1000.0

    def log(self, *names: str, **context: bool | int | str) -> None:
        events = [Event(self.now + at, name, {**context}) for at, name in enumerate(names)]
        self.now += len(names)
        for event in events:
            self.job = apply(self.job, event)
        self.stats.changed(self.job, events)

    def submit(self) -> None:
        events = [Event(self.now, "submit", {**SUBMIT}), Event(self.now, "validate", {})]
        for event in events:
            self.job = apply(self.job, event)
        self.stats.changed(self.job, events)
        self.log("depend")
        self.log("priority", priority=16)  # SCHED at 1001

    def run(self) -> None:
        self.submit()
        self.now += 3
        self.log("alloc")  # at 1005
        self.now += 0.5
        self.log("start")


def active(stats: JobStats) -> dict[str, int]:
    return {state.name: count for state, count in stats.active.items() if count}


def test_a_whole_life() -> None:
    stats = JobStats()
    life = Life(stats)
    life.submit()
    assert (stats.submitted, active(stats)) == (1, {"SCHED": 1})
    life.now += 3
    life.log("alloc")
    assert active(stats) == {"RUN": 1}
    life.now += 0.5
    life.log("start")
    life.log("finish", status=0)
    assert active(stats) == {"CLEANUP": 1}
    life.log("release", ranks="all", final=True)
    life.log("free", "clean")
    assert active(stats) == {}
    assert stats.ended == {JobResult.COMPLETED: 1, JobResult.FAILED: 0, JobResult.CANCELED: 0, JobResult.TIMEOUT: 0}
    assert (stats.scheduling.count, stats.launching.count) == (1, 1)
    assert stats.scheduling.sum == 4.0
    assert stats.launching.sum == 1.5


@pytest.mark.parametrize(
    ("kind", "how"),
    [("cancel", JobResult.CANCELED), ("timeout", JobResult.TIMEOUT), ("alloc", JobResult.FAILED)],
)
def test_results(kind: str, how: JobResult) -> None:
    stats = JobStats()
    life = Life(stats)
    life.submit()
    life.log("exception", type=kind, severity=0, note="")
    life.log("clean")
    assert [result for result, count in stats.ended.items() if count] == [how]
    assert stats.scheduling.count == 0


def test_what_a_life_before_has_left_is_not_submitted_again() -> None:
    before = JobStats()
    life = Life(before)
    life.run()
    stats = life.stats = JobStats()
    no_events: Sequence[Event] = ()
    stats.changed(life.job, no_events)
    assert (stats.submitted, active(stats)) == (0, {"RUN": 1})
    life.log("flux-restart")
    life.log("finish", status=256)
    life.log("release", ranks="all", final=True)
    life.log("free", "clean")
    assert stats.ended[JobResult.FAILED] == 1
    assert (stats.scheduling.count, stats.launching.count) == (0, 0)
    stats.changed(life.job, [Event(life.now, "memo", {})])  # after its end nothing counts
    assert (stats.ended[JobResult.FAILED], active(stats)) == (1, {})


def test_a_clock_that_is_set_back() -> None:
    stats = JobStats()
    life = Life(stats)
    life.submit()
    life.now -= 500
    life.log("alloc")
    life.now -= 500
    life.log("start")
    assert (stats.scheduling.sum, stats.launching.sum) == (0.0, 0.0)


def test_all_active_states_are_counted() -> None:
    assert set(JobStats().active) == set(JobState) - {JobState.NEW, JobState.INACTIVE}
