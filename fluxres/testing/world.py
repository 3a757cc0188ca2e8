"""What all of a simulated instance shares: its time, its chance, its kernel's numbers, and what its tasks really did.

`Deeds` is written by the simulated tasks themselves, beside everything that brokers and shells do. It is what tests
compare the instance's own records with: I2 (no task runs twice), I3 (every byte once, in order), I4 (the exit status
is the one that the kernel gave).
"""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from random import Random
from typing import Final, NamedTuple

import trio

from fluxres.base.jobid import JobId
from fluxres.testing.timeline import Timeline

EPOCH: Final = 1_700_000_000.0
"""The wall clock, in seconds since 1970, when Trio's virtual clock shows 0."""
FIRST_PID: Final = 100


class TaskId(NamedTuple):
    """One task of a job: the broker rank that it runs on, and its rank among all the job's tasks."""

    jobid: JobId
    rank: int
    task: int


class Deeds:
    """What the tasks of all jobs really did."""

    def __init__(self) -> None:
        self.starts: Counter[TaskId] = Counter()
        self.pids: dict[TaskId, int] = {}
        self.statuses: dict[TaskId, int] = {}
        """The wait status of each task that has ended, and was not taken down with its shell."""
        self.signals: dict[TaskId, list[int]] = {}
        """The signals that each task got, ignored ones included."""
        self.output: dict[tuple[TaskId, str], bytearray] = {}
        """What each task wrote to each of its streams."""

    def started(self, task: TaskId, pid: int) -> None:
        """A task has begun."""
        self.starts[task] += 1
        self.pids[task] = pid

    def wrote(self, task: TaskId, stream: str, data: bytes) -> None:
        """A task's output is in its pipe."""
        self.output.setdefault((task, stream), bytearray()).extend(data)

    def twice(self) -> list[TaskId]:
        """The tasks that were started more than once: there must be none (I2)."""
        return [task for task, count in self.starts.items() if count > 1]

    def of(self, jobid: JobId) -> list[TaskId]:
        """The tasks of a job that were started, by rank and task."""
        return sorted(task for task in self.starts if task.jobid == jobid)


class World:
    """The parts that nodes, shells and brokers of one instance share. Tasks of jobs run in `nursery`."""

    def __init__(self, *, timeline: Timeline, nursery: trio.Nursery, random: Random) -> None:
        self.timeline = timeline
        self.nursery = nursery
        self.random = random
        self.deeds = Deeds()
        self._pids = itertools.count(FIRST_PID)

    def now(self) -> float:
        """The wall clock: seconds since 1970."""
        return EPOCH + trio.current_time()

    def pid(self) -> int:
        """A process id that nobody had before."""
        return next(self._pids)

    def uuid(self) -> str:
        """A fresh UUID."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))
