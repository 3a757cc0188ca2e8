"""How far rank 0 has come with one rank of one job: the durable record, and the states it stands for. Pure.

The record lies in the primary namespace under `job.<id>.exec.<rank>`, and is committed in one transaction with what it
speaks of: the statedir of the rank before anything is sent there, the cursor together with the journal records up to
it, the exit status together with the exit record. It is what a restart of rank 0 goes on from.

    WAITING --started--> RUNNING --exited--> EXITED
       |                    '------lost-----> LOST
       '--void--> VOID      (and WAITING may be lost or exited directly)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import msgspec

from fluxres.base.errors import IllegalTransition
from fluxres.base.jobid import JobId, dothex, kvs_path


class RankState(Enum):
    """Where one rank of a job stands, as far as rank 0 knows durably."""

    WAITING = "waiting"
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"
    VOID = "void"


ENDED: Final = frozenset({RankState.EXITED, RankState.LOST, RankState.VOID})
_ALLOWED: Final = {
    RankState.WAITING: frozenset({RankState.RUNNING, *ENDED}),
    RankState.RUNNING: frozenset({RankState.RUNNING, RankState.EXITED, RankState.LOST}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An exception (RFC 21) that a rank has for its job."""

    type: str
    severity: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The durable record of one (job, rank).

    `statedir` names the statedir that the start is bound to; `cursor` is the last journal record that is committed;
    `status` is the wait status of an EXITED or LOST rank; `problems` are the exceptions that the job gets from it.
    """

    statedir: str
    state: RankState = RankState.WAITING
    cursor: int = 0
    status: int = 0
    problems: tuple[Problem, ...] = ()

    def moved(self, state: RankState, *, cursor: int, status: int = 0, problems: tuple[Problem, ...] = ()) -> Progress:
        """The record after an advance, `problems` added. Raises IllegalTransition, so that no rank ends twice."""
        if state not in _ALLOWED.get(self.state, ()) or cursor < self.cursor:
            raise IllegalTransition("rank progress", f"{self.state.value}@{self.cursor}", f"{state.value}@{cursor}", [])
        return replace(self, state=state, cursor=cursor, status=status, problems=self.problems + problems)

    def with_problem(self, problem: Problem) -> Progress:
        """The record with one more problem, unless it has it already."""
        return self if problem in self.problems else replace(self, problems=(*self.problems, problem))

    @property
    def ended(self) -> bool:
        """Whether nothing more can come from this rank."""
        return self.state in ENDED

    def encode(self) -> bytes:
        """The record's bytes, JSON."""
        return msgspec.json.encode(self)


def decode(data: bytes) -> Progress:
    """Read a record. Raises ValueError."""
    return msgspec.json.decode(data, type=Progress)


def progress_key(jobid: JobId, rank: int | None = None) -> str:
    """The key of one rank's record, or of the directory of all of them, in the primary namespace."""
    return kvs_path(jobid, "exec") if rank is None else kvs_path(jobid, "exec", str(rank))


GUEST_PREFIX: Final = "job-"
"""What the names of guest namespaces begin with."""


def guest_namespace(jobid: JobId) -> str:
    """The name of a job's guest namespace (RFC 16)."""
    return f"{GUEST_PREFIX}{dothex(jobid)}"
