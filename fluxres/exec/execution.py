"""One job's execution as rank 0 sees it (RFC 32), over all its ranks. Pure: events in, responses out.

It is told what has become durable about each rank, and says which RFC 32 responses are due, each once for one `start`
request: `start` (or `reattached`) when every rank has come up, `exception` when a rank was lost or says so (the same
one of several ranks once), `release` of ranks that have ended while others have not (`release_early`), `finish` when
every rank has ended, and last `release` with `final`. A restart builds it again from the durable progress records, and
it then says all over again what the manager may not have logged; the manager drops what it has.

What is asked for with every batch of records is counted, never summed up over the ranks: a job may have thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.exec.progress import Problem, Progress, RankState


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One RFC 32 response: `type` and `data`."""

    type: str
    data: JsonObject


class Execution:
    """The ranks of one job, and what has been said about them. `released` are those whose release is durable."""

    def __init__(self, ranks: Mapping[int, Progress], *, reattach: bool, released: Iterable[int] = ()) -> None:
        self.ranks = dict(ranks)
        self._begin = "reattached" if reattach else "start"
        self._begun = False
        self._finished = False
        self._said: set[Problem] = set()
        self.failed = False
        """Whether a fatal exception was said."""
        self._released = set(released)
        self._left = set(self.ranks)
        """Ranks that have not ended."""
        self._waiting = set(self.ranks)
        """Ranks that have not come up."""
        self._void = 0
        self._status = 0
        self._early: set[int] = set()
        """Ranks that have ended, and whose release has not been said."""
        for rank, progress in self.ranks.items():
            self._count(rank, progress)

    def _count(self, rank: int, progress: Progress) -> None:
        """`progress` is what there is to know of `rank` now."""
        if progress.state is not RankState.WAITING:
            self._waiting.discard(rank)
        if progress.ended and rank in self._left:
            self._left.discard(rank)
            if rank not in self._released:
                self._early.add(rank)
            if progress.state is RankState.VOID:
                self._void += 1
            else:
                self._status = max(self._status, progress.status)

    def missing(self) -> list[int]:
        """The ranks that have not ended, in order."""
        return sorted(self._left)

    @property
    def ended(self) -> bool:
        """Whether every rank has ended."""
        return not self._left

    def status(self) -> int:
        """The largest wait status of all ranks that have ended; a VOID rank ran nothing and has none."""
        return self._status

    def begin(self) -> list[Response]:
        """What is due at once, from what was durable before."""
        problems = [problem for progress in self.ranks.values() for problem in progress.problems]
        return self._exceptions(problems) + self._due()

    def advanced(self, rank: int, progress: Progress) -> list[Response]:
        """`progress` of `rank` is durable: the responses that are now due, in order."""
        was, self.ranks[rank] = self.ranks[rank], progress
        self._count(rank, progress)
        return self._exceptions(progress.problems[len(was.problems) :]) + self._due()

    @property
    def can_release(self) -> bool:
        """Whether some ranks have ended, unreleased, and others have not."""
        return bool(self._early and self._left)

    def release_early(self) -> list[Response]:
        """The release of the ranks that have ended while others have not."""
        if not self.can_release:
            return []
        ranks, self._early = IdSet(self._early), set()
        self._released.update(ranks)
        return [Response(type="release", data={"ranks": str(ranks), "final": False})]

    def _exceptions(self, problems: Iterable[Problem]) -> list[Response]:
        new = [problem for problem in dict.fromkeys(problems) if problem not in self._said]
        self._said.update(new)
        self.failed = self.failed or any(problem.severity == 0 for problem in new)
        return [_exception(problem) for problem in new]

    def _due(self) -> list[Response]:
        due = []
        ran = self._void < len(self.ranks)
        if not self._begun and ran and not self._waiting:
            self._begun = True
            due.append(Response(type=self._begin, data={}))
        if not self._finished and self.ended:
            self._finished = True
            if ran:
                due.append(Response(type="finish", data={"status": self._status}))
            ranks = IdSet(self.ranks.keys() - self._released)
            due.append(Response(type="release", data={"ranks": str(ranks), "final": True}))
        return due


def _exception(problem: Problem) -> Response:
    return Response(
        type="exception",
        data={"type": problem.type, "severity": problem.severity, "note": problem.note},
    )
