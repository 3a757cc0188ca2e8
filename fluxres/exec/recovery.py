"""A recovery: what was lost of the instance, until it is back. Pure: events in, effects out.

    NEW ──Begun: nothing was here before──────▶ IDLE ◀── all is back, or LIMIT is over: Closed ──.
     │                                            │                                              │
     │                                            '── Left: a rank is lost, or one with shells ──▶│
     '──Begun: ranks or jobs of a life before──────────────────────────────────────────▶ UNDER_WAY

An episode begins with a life of rank 0 that finds ranks or jobs from before, or with the loss of a rank. What is lost
meanwhile belongs to it: however many ranks go and come, it is one event. It ends when nothing is awaited any more:

- no rank of it is away. A rank that said goodbye is not awaited, nor one below such a rank, nor one declared lost;
- no shell that was detached with its rank runs unread, wherever that is;
- no job of the life before has yet to be taken up.

An episode that has lasted for `LIMIT` seconds ends with what it has, and names what is still away: one node that does
not come back would else hide all that happens after it. When such a rank comes back to its shells, that is an episode
of its own. One of which nothing came back, and that concerned no job, leaves no event.

Jobs are counted once in an episode: *lost* where one of its shells was found dead or given up; else *rediscovered*
where a living one was attached again; else *finished*. When all is back, these add up to `running`.

Whatever is not in `TRANSITIONS` for the phase, and news of a shell or a rank that cannot be (it leaves twice), raise
IllegalTransition with the history. Times (`at`) are seconds of one clock that does not step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from fluxres.base.errors import IllegalTransition
from fluxres.base.idset import IdSet
from fluxres.exec.attachments import Fate
from fluxres.exec.episode import Document, Episode, Tree

LIMIT: Final = 600.0
"""Seconds after which an episode ends, whatever is still away."""
LAG: Final = 30.0
"""Seconds by which a rank may have noticed the end of rank 0 before the last that rank 0 has logged: more than silence
takes to be noticed."""
MAX_HISTORY: Final = 32
"""Events that are kept for the text of an IllegalTransition."""
ROOT: Final = 0


class Phase(Enum):
    """Where it stands."""

    NEW = "new"
    IDLE = "idle"
    UNDER_WAY = "under way"


# --- events


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A life of rank 0 begins.

    `known` are the ranks that there is a record of, `expected` those of them that were online at the end of the life
    before, or were awaited then: the others, rank 0 included, were shut down. `alive` is when that life last logged
    something. `jobs` have shells to be found, and `pending` is how many wait for resources.
    """

    at: float
    known: IdSet
    expected: IdSet
    alive: float
    jobs: frozenset[int]
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A rank says goodbye: it is being shut down."""

    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A rank is gone."""

    at: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A rank is here. `ago` and `why` tell how its process's last incarnation ended, None for a fresh process."""

    at: float
    rank: int
    ago: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """An administrator has declared a rank lost."""

    at: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A job of the life before is taken up; its shells on `ranks` are to be found."""

    at: float
    job: int
    ranks: IdSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """What has become of a shell: DETACHED, or no longer so."""

    at: float
    job: int
    rank: int
    fate: Fate


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A job's execution has ended."""

    at: float
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The answer to Opened: so many jobs wait for resources."""

    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    at: float


Event = Begun | Leaving | Left | Joined | Declared | Found | Shell | Over | Counted | Tick

# --- effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An episode has begun: wants `Counted`, and a `Tick` at `deadline`."""

    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The episode has ended; `document` is to be logged, None where it is not worth it."""

    document: Document | None


Effect = Opened | Closed

_ALWAYS: Final = frozenset({Phase.IDLE, Phase.UNDER_WAY})
TRANSITIONS: Final[Mapping[type[Event], frozenset[Phase]]] = {
    Begun: frozenset({Phase.NEW}),
    Leaving: _ALWAYS,
    Left: _ALWAYS,
    Joined: _ALWAYS,
    Declared: _ALWAYS,
    Found: _ALWAYS,
    Shell: _ALWAYS,
    Over: _ALWAYS,
    Counted: frozenset({Phase.UNDER_WAY}),
    Tick: _ALWAYS,
}
"""The phases in which each event may come."""


class Recovery:
    """The recoveries of one life of rank 0, one after the other."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.phase = Phase.NEW
        self._episode: Episode | None = None
        self._away: dict[int, float] = {}
        """The ranks that were here, in this life or in one before, and are not: each with since when."""
        self._online: set[int] = set()
        self._clean: set[int] = set()
        """Ranks that said goodbye and are away, or will be."""
        self._declared: set[int] = set()
        self._given_up: set[int] = set()
        """Ranks away that an episode has ended without."""
        self._detached: dict[int, set[int]] = {}
        """The jobs whose shells run unread, by rank."""
        self._alive = 0.0
        self._effects: list[Effect] = []
        self._history: deque[str] = deque(maxlen=MAX_HISTORY)

    # --- questions

    def current(self) -> Document | None:
        """The episode under way."""
        return None if self._episode is None else self._episode.document(self._tree, self._away)

    @property
    def began(self) -> float | None:
        """When the episode under way began: for a life of rank 0, when the one before it ended, where that is told."""
        return None if self._episode is None else self._episode.began

    # --- events

    def apply(self, event: Event) -> list[Effect]:
        """Take an event; returns what follows. Raises IllegalTransition."""
        if self.phase not in TRANSITIONS[type(event)]:
            self._refuse(event)
        self._effects = []
        match event:
            case Begun():
                self._begun(event)
            case Left():
                self._left(event)
            case Joined():
                self._joined(event)
            case Leaving(rank=rank):
                self._clean.add(rank)
                self._excuse_below(rank)
            case Declared(rank=rank):
                self._declared.add(rank)
                if self._episode is not None:
                    self._episode.declared(rank)
            case Shell():
                self._shell(event)
            case Found() | Over():
                self._job(event)
            case Counted(pending=pending):
                assert self._episode is not None
                self._episode.pending = pending
            case Tick(at=at):
                self._expire(at)
        if self._episode is not None and not isinstance(event, Leaving | Counted) and self._episode.is_complete:
            self._close(event.at)
        self._history.append(_shown(event))
        return self._effects

    def _refuse(self, event: Event) -> NoReturn:
        raise IllegalTransition("the recovery", self.phase.value, _shown(event), self._history)

    # --- ranks

    def _begun(self, event: Begun) -> None:
        self.phase = Phase.IDLE
        self._away = dict.fromkeys(event.known, event.at)
        self._clean = set(event.known - event.expected) - {ROOT}
        self._alive = min(event.alive, event.at)
        if not (event.expected or event.jobs or event.pending):
            return  # a new instance, or one that was shut down as a whole, and had nothing to do
        episode = self._open(event.at, event.at, of_life=True)
        if event.known and ROOT not in event.expected:
            episode.shut_down.add(ROOT)
        episode.pending = event.pending
        episode.untold |= event.jobs
        self._away[ROOT] = event.at
        for rank in {*event.expected, ROOT}:
            self._await(episode, rank)

    def _left(self, event: Left) -> None:
        rank = event.rank
        if rank not in self._online:
            self._refuse(event)
        self._online.discard(rank)
        self._away[rank] = event.at
        excused = self._is_excused(rank)
        shells = self._detached.get(rank)
        if not excused or shells:
            episode = self._episode or self._open(event.at, event.at)
            self._await(episode, rank)
            for job in shells or ():
                episode.wait(job, rank)

    def _joined(self, event: Joined) -> None:
        rank = event.rank
        if rank in self._online:
            self._refuse(event)
        self._online.add(rank)
        self._clean.discard(rank)
        self._declared.discard(rank)
        since = self._away.pop(rank, None)
        if rank in self._given_up:
            self._given_up.discard(rank)
            self._return(event, since)
        episode = self._episode
        if episode is None or since is None:
            return  # nothing was lost, or it was never here before
        if episode.of_life or rank in episode.ranks or any(above in episode.ranks for above in self._above(rank)):
            if episode.of_life and event.ago is not None and self._is_credible(event.at - event.ago, episode):
                episode.began = min(episode.began, event.at - event.ago)
            episode.joined(rank, self._tree.level(rank), fresh=event.ago is None, why=event.why)

    def _return(self, event: Joined, since: float | None) -> None:
        """A rank is back that was given up: to its shells, where it has any."""
        shells = self._detached.get(event.rank)
        if shells:
            episode = self._episode or self._open(event.at, event.at if since is None else since)
            episode.ranks.add(event.rank)
            for job in shells:
                episode.wait(job, event.rank)

    def _is_credible(self, told: float, episode: Episode) -> bool:
        """Whether a rank that panicked at `told` did so because rank 0 had died: neither before that logged something
        for the last time, nor when it was back already. Whatever else a rank may say is not believed."""
        return math.isfinite(told) and self._alive - LAG <= told <= episode.opened

    def _await(self, episode: Episode, rank: int) -> None:
        """A rank is of the episode, and awaited unless there is an excuse."""
        episode.ranks.add(rank)
        if rank in self._clean:
            episode.shut_down.add(rank)
        if rank not in self._declared and not self._is_excused(rank):
            episode.missing.add(rank)

    def _is_excused(self, rank: int) -> bool:
        """Whether the rank said goodbye, or cannot be here because one above it did."""
        return rank in self._clean or any(above in self._clean for above in self._above(rank))

    def _excuse_below(self, rank: int) -> None:
        if self._episode is not None:
            excused = [each for each in self._episode.missing if each == rank or rank in self._above(each)]
            self._episode.missing.difference_update(excused)

    def _above(self, rank: int) -> Iterable[int]:
        above = self._tree.parent(rank)
        while above is not None:
            yield above
            above = self._tree.parent(above)

    # --- shells

    def _job(self, event: Found | Over) -> None:
        episode = self._episode
        if episode is not None:
            episode.untold.discard(event.job)
        if isinstance(event, Found):
            for rank in event.ranks:
                self._detached.setdefault(rank, set()).add(event.job)
                if episode is not None and (episode.of_life or rank in episode.ranks):
                    episode.ranks.add(rank)
                    episode.wait(event.job, rank)

    def _shell(self, event: Shell) -> None:
        jobs = self._detached.setdefault(event.rank, set())
        if (event.job in jobs) is (event.fate is Fate.DETACHED):
            self._refuse(event)
        if event.fate is not Fate.DETACHED:
            jobs.discard(event.job)
            if not jobs:
                del self._detached[event.rank]
            if self._episode is not None:
                self._episode.told(event.job, event.rank, event.fate)
            return
        jobs.add(event.job)
        episode = self._episode
        if event.rank in self._away:
            episode = episode or self._open(event.at, event.at)
            self._await(episode, event.rank)
        if episode is not None and event.rank in episode.ranks:
            episode.wait(event.job, event.rank)

    # --- the episode

    def _open(self, at: float, began: float, *, of_life: bool = False) -> Episode:
        self.phase = Phase.UNDER_WAY
        self._episode = Episode(opened=at, began=began, of_life=of_life)
        self._effects.append(Opened(deadline=at + LIMIT))
        return self._episode

    def _expire(self, at: float) -> None:
        """Give up what is still away, where the time is over."""
        episode = self._episode
        if episode is None or at < episode.opened + LIMIT:
            return
        self._given_up |= {rank for rank in episode.ranks if rank in self._away}
        self._close(at)

    def _close(self, at: float) -> None:
        episode = self._episode
        assert episode is not None
        self.phase = Phase.IDLE
        self._episode = None
        document = episode.document(self._tree, self._away, seconds=max(0.0, at - episode.began))
        self._effects.append(Closed(document=document if episode.is_news else None))


def _shown(event: Event) -> str:
    match event:
        case Shell(job=job, rank=rank, fate=fate):
            return f"shell {fate.value} (job {job} on rank {rank})"
        case Leaving(rank=rank) | Left(rank=rank) | Joined(rank=rank) | Declared(rank=rank):
            return f"{type(event).__name__.lower()} (rank {rank})"
        case Found(job=job) | Over(job=job):
            return f"{type(event).__name__.lower()} (job {job})"
    return type(event).__name__.lower()
