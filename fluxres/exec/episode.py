"""One episode of a recovery (`exec.recovery`): what belongs to it, what is awaited, and how it is told. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Protocol

from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.exec.attachments import Fate

MAX_WHYS: Final = 16
"""Ranks whose reasons are kept: those nearest to the root, of which one is told."""


class Tree(Protocol):
    """Who is whose parent; an `overlay.topology.Topology`, say."""

    def parent(self, rank: int) -> int | None:
        """The parent of `rank`; None for the root."""

    def level(self, rank: int) -> int:
        """How many hops `rank` is from the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What is told of an episode: the context of a `recovery` event, and what the status feed shows of one under way.

    `ranks` are all that belong to it, `root` the one of them that is highest in the tree; `restarted` came back as new
    processes, `panicked` as new incarnations of the same. `began` is in the clock's seconds, `seconds` how long it took
    (None while it is under way). `running` jobs had shells there, of which so many were `rediscovered`, `finished` and
    `lost`; `pending` jobs waited for resources. `away` are ranks that are awaited still, `detached` is how many shells.
    """

    ranks: IdSet
    root: int
    restarted: IdSet
    panicked: IdSet
    began: float
    seconds: float | None
    why: str
    running: int
    rediscovered: int
    finished: int
    lost: int
    pending: int
    away: IdSet
    detached: int

    def context(self, wall: float) -> JsonObject:
        """As JSON; `wall` is added to the clock's `began` to make it seconds since 1970.

        What has ended says of `away` and `detached` only where there is anything: it was ended by its limit.
        """
        found: JsonObject = {
            "ranks": str(self.ranks),
            "root": self.root,
            "restarted": str(self.restarted),
            "panicked": str(self.panicked),
            "began": round(self.began + wall, 6),
        }
        if self.seconds is not None:
            found["seconds"] = round(self.seconds, 6)
        found |= {
            "why": self.why,
            "running": self.running,
            "rediscovered": self.rediscovered,
            "finished": self.finished,
            "lost": self.lost,
            "pending": self.pending,
        }
        if self.seconds is None or self.away:
            found["away"] = str(self.away)
        if self.seconds is None or self.detached:
            found["detached"] = self.detached
        return found


class _Job:
    """What has become of one job's shells in an episode. It is counted once, and the worst counts."""

    __slots__ = ("attached", "exited", "lost", "waiting")

    def __init__(self) -> None:
        self.waiting: set[int] = set()
        """The ranks on which its shells run unread."""
        self.attached = self.exited = self.lost = False


class Episode:
    """An episode under way; see `exec.recovery` for what belongs to it.

    `opened` is when this life of rank 0 began to count, `began` when what was lost was lost.
    """

    def __init__(self, *, opened: float, began: float, of_life: bool) -> None:
        self.opened = opened
        self.began = began
        self.of_life = of_life
        """Whether it began with a life of rank 0."""
        self.ranks: set[int] = set()
        self.missing: set[int] = set()
        """The ranks that are awaited."""
        self.untold: set[int] = set()
        """Jobs of the life before that have yet to be taken up."""
        self.pending = 0
        self.shut_down: set[int] = set()
        """Ranks of it that had said goodbye."""
        self._declared: set[int] = set()
        """Ranks that an administrator has given up meanwhile."""
        self._restarted: set[int] = set()
        self._panicked: set[int] = set()
        self._whys: dict[tuple[int, int], str] = {}
        """By (level, rank)."""
        self._jobs: dict[int, _Job] = {}
        self._waiting = 0

    # --- what happens

    def joined(self, rank: int, level: int, *, fresh: bool, why: str) -> None:
        """A rank is back: as a fresh process, or else as the next incarnation, because of `why`."""
        self.ranks.add(rank)
        self.missing.discard(rank)
        if fresh:
            self._restarted.add(rank)
            self._panicked.discard(rank)
            return
        if rank not in self._restarted:
            self._panicked.add(rank)
        self._whys.setdefault((level, rank), why)  # the first is the cause, the next may be its consequence
        if len(self._whys) > MAX_WHYS:
            del self._whys[max(self._whys)]

    def declared(self, rank: int) -> None:
        """An administrator has declared a rank lost: it is not awaited any more."""
        self.missing.discard(rank)
        self._declared.add(rank)

    def wait(self, job: int, rank: int) -> None:
        """The shell of `job` on `rank` runs unread."""
        waiting = self._jobs.setdefault(job, _Job()).waiting
        self._waiting += rank not in waiting
        waiting.add(rank)

    def told(self, job: int, rank: int, fate: Fate) -> None:
        """That shell is not detached any more; nothing where it was none of this episode."""
        found = self._jobs.get(job)
        if found is None or rank not in found.waiting:
            return
        found.waiting.discard(rank)
        self._waiting -= 1
        match fate:
            case Fate.ATTACHED:
                found.attached = True
            case Fate.EXITED:
                found.exited = True
            case Fate.LOST:
                found.lost = True
        if not (found.waiting or found.attached or found.exited or found.lost):
            del self._jobs[job]  # there was no shell

    # --- what there is to tell

    @property
    def is_complete(self) -> bool:
        """Whether nothing is awaited."""
        return not (self.missing or self.untold or self._waiting)

    @property
    def is_news(self) -> bool:
        """Whether anything came back, or a job was concerned."""
        return bool(self.of_life or self._restarted or self._panicked or self._jobs)

    def document(self, tree: Tree, away: Container[int], *, seconds: float | None = None) -> Document:
        """What there is to tell; `away` are all ranks that are not here, awaited or not."""
        jobs = self._jobs.values()
        awaited = self.missing.union(*(job.waiting for job in jobs))
        lost = sum(job.lost for job in jobs)
        attached = sum(job.attached and not job.lost for job in jobs)
        root = min(self.ranks, key=lambda rank: (tree.level(rank), rank), default=0)
        return Document(
            ranks=IdSet(self.ranks),
            root=root,
            restarted=IdSet(self._restarted),
            panicked=IdSet(self._panicked),
            began=self.began,
            seconds=seconds,
            why=self._why(root, tree),
            running=len(self._jobs.keys() | self.untold),
            rediscovered=attached,
            finished=sum(job.exited and not job.attached and not job.lost for job in jobs),
            lost=lost,
            pending=self.pending,
            away=IdSet(rank for rank in awaited if rank in away),
            detached=self._waiting,
        )

    def _why(self, root: int, tree: Tree) -> str:
        """What is known of the reason: the root's own, and what the first rank below it says of it."""
        own = self._whys.get((tree.level(root), root))
        if own is not None:
            return f"rank {root}: {own}"
        if root in self.shut_down:
            why = f"rank {root} was shut down"
        elif root in self._restarted:
            why = f"rank {root} was restarted"
        else:
            why = f"rank {root} was {'declared lost' if root in self._declared else 'lost'}"
        below = min((where for where in self._whys if tree.parent(where[1]) == root), default=None)
        return why if below is None else f"{why}; rank {below[1]}: {self._whys[below]}"
