"""Which job shells rank 0 hears of right now, and which run unread: attached and detached, by (job, rank). Pure.

    NONE ──start is sent──▶ STARTING ──┬──it answers──▶ ATTACHED ◀──a living one answers: rediscovered──┐
      ▲                                │                   │ its rank, or the way to it, is lost        │
      │                                '──────────────────▶ DETACHED ───────────────────────────────────┘
      '────the rank says that nothing was started there───────'
    any ──its end is durable──▶ gone: of a detached one *finished* (its exit record was read out), or *lost*

`exec.job_run` tells of each step, and whoever knows that a rank is gone says `left`; what makes no difference is not
told on. A life of rank 0 that finds a job from before begins with all its shells DETACHED, those included that may
never have been started. Where a shell's connection to its own broker breaks, and that dials again, nobody learns of it
here: the shell counts as attached as long as rank 0's request for it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final, Protocol

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.base.meter import OUTAGES, Histogram
from fluxres.exec.progress import RankState


class Reach(Enum):
    """Whether a shell can be heard."""

    NONE = "none"
    STARTING = "starting"
    ATTACHED = "attached"
    DETACHED = "detached"


class Fate(Enum):
    """What has become of a shell that runs unread, DETACHED being the news that it does."""

    DETACHED = "detached"
    ATTACHED = "attached"
    EXITED = "exited"
    LOST = "lost"
    NOTHING = "nothing"
    """There was none."""


class Follower(Protocol):
    """Who is told of shells that nobody reads."""

    def found(self, jobid: JobId, ranks: IdSet) -> None:
        """A job of the lives before is taken up; on these ranks its shells are to be found."""

    def shell(self, jobid: JobId, rank: int, fate: Fate) -> None:
        """The shell is DETACHED, or is so no longer."""

    def over(self, jobid: JobId) -> None:
        """The job's execution has ended."""


_DETACH: Final = {Reach.STARTING, Reach.ATTACHED}
_FATES: Final = {RankState.EXITED: Fate.EXITED, RankState.LOST: Fate.LOST, RankState.VOID: Fate.NOTHING}


class _Shell:
    __slots__ = ("reach", "since")

    def __init__(self, reach: Reach, since: float | None) -> None:
        self.reach = reach
        self.since = since
        """Since when; None for "since before this life of rank 0"."""


class Attachments:
    """The shells of all jobs in execution. `now` is a clock that does not step, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.rediscovered = 0
        """Living shells that were attached again after a loss, or by a new life of rank 0."""
        self.finished = 0
        """Shells that ended while nobody read them, and whose exit records were read out."""
        self.lost = 0
        """Shells that were found dead without an exit record, or given up, while they were detached."""
        self.seconds = Histogram(OUTAGES)
        """How long shells were detached, of those that are so no longer."""
        self.before = now()
        """Since when shells have been detached that a life before has left: an estimate, to be corrected."""
        self._now = now
        self._jobs: dict[JobId, dict[int, _Shell]] = {}
        self._on: dict[int, set[JobId]] = {}
        """By rank, the jobs that have an entry for it."""
        self._detached = 0
        self._attached = 0
        self._listeners: list[Callable[[JobId], None]] = []
        self._followers: list[Follower] = []

    # --- questions

    def detached(self, jobid: JobId) -> IdSet:
        """The ranks on which a shell of the job runs, or may run, that no broker reads."""
        shells = self._jobs.get(jobid, {})
        return IdSet(rank for rank, shell in shells.items() if shell.reach is Reach.DETACHED)

    def since(self, jobid: JobId, rank: int) -> float | None:
        """Since when that shell has been attached, or detached, by the clock given; None where it is neither."""
        shell = self._jobs.get(jobid, {}).get(rank)
        if shell is None or shell.reach in (Reach.NONE, Reach.STARTING):
            return None
        return self.before if shell.since is None else shell.since

    @property
    def detached_count(self) -> int:
        """How many shells are detached."""
        return self._detached

    @property
    def attached_count(self) -> int:
        """How many shells are attached."""
        return self._attached

    def listen(self, callback: Callable[[JobId], None]) -> None:
        """Call `callback` whenever what `detached` says of a job has changed."""
        self._listeners.append(callback)

    def follow(self, follower: Follower) -> None:
        """Tell `follower` of everything that becomes of detached shells."""
        self._followers.append(follower)

    # --- what is told

    def begin(self, jobid: JobId, ranks: Iterable[int], *, found: bool) -> None:
        """A job's execution begins on `ranks`; `found`: it did so in a life before, and its shells are to be found."""
        reach = Reach.DETACHED if found else Reach.NONE
        shells = self._jobs[jobid] = {rank: _Shell(reach, None) for rank in ranks}
        for rank in shells:
            self._on.setdefault(rank, set()).add(jobid)
        if found:
            self._detached += len(shells)
            for follower in self._followers:
                follower.found(jobid, IdSet(shells))
            if shells:
                self._tell(jobid)

    def start(self, jobid: JobId, rank: int) -> None:
        """A start is on its way to `rank`: from here on a shell may be there."""
        shell = self._find(jobid, rank, Reach.NONE)
        if shell is not None:
            shell.reach = Reach.STARTING

    def attach(self, jobid: JobId, rank: int) -> None:
        """A living shell answers."""
        shell = self._find(jobid, rank, Reach.NONE, Reach.STARTING, Reach.DETACHED)
        if shell is None:
            return
        was, since = shell.reach, shell.since
        self._attached += 1
        shell.reach, shell.since = Reach.ATTACHED, self._now()
        if was is Reach.DETACHED:
            self.rediscovered += 1
            self._no_longer(jobid, rank, since, Fate.ATTACHED)

    def detach(self, jobid: JobId, rank: int) -> None:
        """The request that asked after the shell has ended, and the shell has not."""
        shell = self._find(jobid, rank, *_DETACH)
        if shell is None:
            return
        self._attached -= shell.reach is Reach.ATTACHED
        self._detached += 1
        shell.reach, shell.since = Reach.DETACHED, self._now()
        self._follow(jobid, rank, Fate.DETACHED)

    def absent(self, jobid: JobId, rank: int) -> None:
        """The rank says that nothing was started there."""
        shell = self._find(jobid, rank, Reach.DETACHED)
        if shell is not None:
            shell.reach = Reach.NONE
            self._no_longer(jobid, rank, shell.since, Fate.NOTHING)

    def left(self, rank: int) -> None:
        """A rank is gone: whatever was read there is no longer."""
        for jobid in sorted(self._on.get(rank, ())):
            self.detach(jobid, rank)

    def end(self, jobid: JobId, rank: int, state: RankState) -> None:
        """The end of the job's part on `rank` is durable: EXITED, LOST or VOID."""
        shell = self._jobs.get(jobid, {}).pop(rank, None)
        if shell is None:
            return
        self._leave(jobid, rank)
        self._attached -= shell.reach is Reach.ATTACHED
        if shell.reach is Reach.DETACHED:
            fate = _FATES[state]
            self.finished += fate is Fate.EXITED
            self.lost += fate is Fate.LOST
            self._no_longer(jobid, rank, shell.since, fate)

    def over(self, jobid: JobId) -> None:
        """The job's execution has ended; not because this life of rank 0 has."""
        for rank in list(self._jobs.get(jobid, {})):
            self.end(jobid, rank, RankState.VOID)
        self._jobs.pop(jobid, None)
        for follower in self._followers:
            follower.over(jobid)

    # --- inside

    def _find(self, jobid: JobId, rank: int, *reaches: Reach) -> _Shell | None:
        """The shell, where it is one of `reaches`: elsewhere what is told makes no difference."""
        shell = self._jobs.get(jobid, {}).get(rank)
        return shell if shell is not None and shell.reach in reaches else None

    def _leave(self, jobid: JobId, rank: int) -> None:
        jobs = self._on[rank]
        jobs.discard(jobid)
        if not jobs:
            del self._on[rank]

    def _no_longer(self, jobid: JobId, rank: int, since: float | None, fate: Fate) -> None:
        """A shell was detached since `since`, and is so no longer."""
        self._detached -= 1
        if fate is not Fate.NOTHING:
            self.seconds.observe(max(0.0, self._now() - (self.before if since is None else since)))
        self._follow(jobid, rank, fate)

    def _follow(self, jobid: JobId, rank: int, fate: Fate) -> None:
        for follower in self._followers:
            follower.shell(jobid, rank, fate)
        self._tell(jobid)

    def _tell(self, jobid: JobId) -> None:
        for listener in self._listeners:
            listener(jobid)
