"""Attached and detached shells: each step from each state, what is counted, and who is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.exec.attachments import Attachments, Fate
from fluxres.exec.progress import RankState

JOB, OTHER = JobId(1), JobId(2)


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A follower that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def found(self, jobid: JobId, ranks: IdSet) -> None:
        self.said.append(("found", int(jobid), str(ranks)))

    def shell(self, jobid: JobId, rank: int, fate: Fate) -> None:
        self.said.append((fate, int(jobid), rank))

    def over(self, jobid: JobId) -> None:
        self.said.append(("over", int(jobid)))


Step = Callable[[Attachments], None]


def start(it: Attachments) -> None:
    it.start(JOB, 3)


def attach(it: Attachments) -> None:
    it.attach(JOB, 3)


def detach(it: Attachments) -> None:
    it.detach(JOB, 3)


def absent(it: Attachments) -> None:
    it.absent(JOB, 3)


def left(it: Attachments) -> None:
    it.left(3)


def exited(it: Attachments) -> None:
    it.end(JOB, 3, RankState.EXITED)


def lost(it: Attachments) -> None:
    it.end(JOB, 3, RankState.LOST)


def void(it: Attachments) -> None:
    it.end(JOB, 3, RankState.VOID)


def over(it: Attachments) -> None:
    it.over(JOB)


def made(*steps: Step, found: bool = False) -> tuple[Attachments, Log]:
    it, log = Attachments(Clock()), Log()
    it.begin(JOB, [3], found=found)
    it.follow(log)
    for step in steps:
        step(it)
    return it, log


ATTACHED: tuple[Step, ...] = (start, attach)
DETACHED: tuple[Step, ...] = (*ATTACHED, left)


@pytest.mark.parametrize(
    ("steps", "fates", "attached", "detached"),
    [
        ((), [], 0, 0),
        ((attach,), [], 1, 0),
        ((detach, left, absent), [], 0, 0),  # nothing was sent
        ((start,), [], 0, 0),
        ((start, absent), [], 0, 0),
        ((start, exited), [], 0, 0),
        (ATTACHED, [], 1, 0),
        ((*ATTACHED, attach, start, absent), [], 1, 0),  # its own broker has dialled again
        ((*ATTACHED, exited), [], 0, 0),
        ((*ATTACHED, lost), [], 0, 0),
        ((start, detach), [Fate.DETACHED], 0, 1),
        (DETACHED, [Fate.DETACHED], 0, 1),
        ((*DETACHED, detach, left, start), [Fate.DETACHED], 0, 1),
        ((*DETACHED, attach), [Fate.DETACHED, Fate.ATTACHED], 1, 0),
        ((*DETACHED, attach, detach), [Fate.DETACHED, Fate.ATTACHED, Fate.DETACHED], 0, 1),
        ((*DETACHED, absent), [Fate.DETACHED, Fate.NOTHING], 0, 0),
        ((*DETACHED, absent, start, attach), [Fate.DETACHED, Fate.NOTHING], 1, 0),
        ((*DETACHED, exited), [Fate.DETACHED, Fate.EXITED], 0, 0),
        ((*DETACHED, lost), [Fate.DETACHED, Fate.LOST], 0, 0),
        ((*DETACHED, void), [Fate.DETACHED, Fate.NOTHING], 0, 0),
        ((*DETACHED, exited, attach, detach, lost), [Fate.DETACHED, Fate.EXITED], 0, 0),
        ((*DETACHED, over), [Fate.DETACHED, Fate.NOTHING], 0, 0),
    ],
)
def test_each_step(steps: tuple[Step, ...], fates: list[Fate], attached: int, detached: int) -> None:
    it, log = made(*steps)
    assert [each[0] for each in log.said if isinstance(each[0], Fate)] == fates
    assert (it.attached_count, it.detached_count) == (attached, detached)
    assert it.detached(JOB) == IdSet([3] * detached)
    assert (it.since(JOB, 3) is None) is (attached + detached == 0)
    assert (it.rediscovered, it.finished, it.lost) == tuple(
        fates.count(fate) for fate in (Fate.ATTACHED, Fate.EXITED, Fate.LOST)
    )
    assert it.seconds.count == it.rediscovered + it.finished + it.lost


def test_a_job_of_the_life_before_is_detached_until_it_is_found() -> None:
    it, log = Attachments(Clock()), Log()
    told: list[JobId] = []
    it.follow(log)
    it.listen(told.append)
    it.begin(JOB, [0, 2, 4], found=True)
    it.begin(OTHER, [2], found=False)
    assert log.said == [("found", 1, "0,2,4")]
    assert (it.detached(JOB), it.detached(OTHER)) == (IdSet([0, 2, 4]), IdSet())
    it.start(OTHER, 2)
    it.attach(OTHER, 2)
    it.attach(JOB, 2)
    assert it.detached(JOB) == IdSet([0, 4])
    it.left(2)
    assert (it.detached(JOB), it.detached(OTHER)) == (IdSet([0, 2, 4]), IdSet([2]))
    assert log.said[1:] == [(Fate.ATTACHED, 1, 2), (Fate.DETACHED, 1, 2), (Fate.DETACHED, 2, 2)]
    assert told == [JOB, JOB, JOB, OTHER]
    it.over(JOB)
    assert log.said[-1] == ("over", 1)
    assert it.detached_count == 1


def test_a_job_whose_ranks_have_all_ended_is_found_all_the_same() -> None:
    it, log = Attachments(Clock()), Log()
    it.follow(log)
    it.begin(JOB, [], found=True)
    assert log.said == [("found", 1, "")]


def test_how_long_a_shell_was_detached() -> None:
    clock = Clock()
    it = Attachments(clock)
    it.begin(JOB, [3], found=True)
    assert it.since(JOB, 3) == 100.0
    it.before = 90.0  # rank 0 learns later when the life before had ended
    assert it.since(JOB, 3) == 90.0
    clock.now = 102.0
    it.attach(JOB, 3)
    assert (it.seconds.count, it.seconds.sum) == (1, 12.0)
    clock.now = 103.0
    it.detach(JOB, 3)
    clock.now = 103.5
    assert it.since(JOB, 3) == 103.0
    it.end(JOB, 3, RankState.EXITED)
    assert (it.seconds.count, it.seconds.sum) == (2, 12.5)
