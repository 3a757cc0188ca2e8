"""One job's execution as rank 0 sees it (RFC 32), over all its ranks. Pure: events in, responses out.

It is told what has become durable about each rank, and says which RFC 32 responses are due, each once for one `start`
request: `start` (or `reattached`) when every rank has come up, `exception` when a rank was lost or says so, `finish`
when every rank has ended, and last `release` with `final`. A restart builds it again from the durable progress
records, and it then says all over again what the manager may not have logged; the manager drops what it has.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """The ranks of one job, and what has been said about them."""

    def __init__(self, ranks: Mapping[int, Progress], *, reattach: bool) -> None:
        self.ranks = dict(ranks)
        self._begin = "reattached" if reattach else "start"
        self._begun = False
        self._finished = False

    def missing(self) -> list[int]:
        """The ranks that have not ended, in order."""
        return [rank for rank, progress in sorted(self.ranks.items()) if not progress.ended]

    @property
    def ended(self) -> bool:
        """Whether every rank has ended."""
        return all(progress.ended for progress in self.ranks.values())

    def status(self) -> int:
        """The largest wait status of all ranks; a VOID rank ran nothing and has none."""
        return max((p.status for p in self.ranks.values() if p.state is not RankState.VOID), default=0)

    def begin(self) -> list[Response]:
        """What is due at once, from what was durable before."""
        problems = [_exception(problem) for progress in self.ranks.values() for problem in progress.problems]
        return problems + self._due()

    def advanced(self, rank: int, progress: Progress) -> list[Response]:
        """`progress` of `rank` is durable: the responses that are now due, in order."""
        was, self.ranks[rank] = self.ranks[rank], progress
        new = progress.problems[len(was.problems) :]
        return [_exception(problem) for problem in new] + self._due()

    def _due(self) -> list[Response]:
        due = []
        ran = [p for p in self.ranks.values() if p.state is not RankState.VOID]
        if not self._begun and ran and all(p.state is not RankState.WAITING for p in self.ranks.values()):
            self._begun = True
            due.append(Response(type=self._begin, data={}))
        if not self._finished and self.ended:
            self._finished = True
            if ran:
                due.append(Response(type="finish", data={"status": self.status()}))
            due.append(Response(type="release", data={"ranks": str(IdSet(self.ranks)), "final": True}))
        return due


def _exception(problem: Problem) -> Response:
    return Response(
        type="exception",
        data={"type": problem.type, "severity": problem.severity, "note": problem.note},
    )
