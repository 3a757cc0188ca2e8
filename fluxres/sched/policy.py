"""Queue policy: who gets resources next. First come, first served: by priority, then jobid (RFC 27, RFC 30).

Pure. Each named queue has a line of its own and a head; a head that does not fit holds up those behind it
in its queue only. Where heads of several queues fit, the higher priority, then the lower jobid, goes first.

Held jobs (urgency 0) are not inserted at all. Inserting costs O(log n). A round ends at heads that do not
fit, and a blocked head is not tried again until the pool's generation says that something came free:
submitting behind it costs nothing more. A request that no state of the pool could satisfy is denied instead
of blocking.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from fluxres.sched.pool import Allocation, Pool
    from fluxres.sched.request import Request

MAX_DECISIONS_PER_ROUND: Final = 256
"""How many jobs one `schedule` call decides on at most: the event loop gets its turn between rounds."""

MIN_STALE_ENTRIES: Final = 64
"""A line is rebuilt once it holds this many entries of jobs that have left, and more of them than of jobs."""

_Key: TypeAlias = "tuple[int, int]"
"""(-priority, jobid): the lowest goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The job has these resources now."""

    id: int
    allocation: Allocation


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The job can never have what it wants; `note` says why. It has left the queue."""

    id: int
    note: str


Decision: TypeAlias = "Granted | Denied"


@dataclass(frozen=True, slots=True)
class _Pending:
    key: _Key
    queue: str
    request: Request


class _Line:
    """One named queue: a heap of keys, where jobs that left are skipped when they come up."""

    __slots__ = ("blocked_at", "heap", "stale", "stopped")

    def __init__(self) -> None:
        self.heap: list[_Key] = []
        self.stale = 0
        self.stopped = False
        self.blocked_at: tuple[_Key, int] | None = None
        """The head that did not fit, and the generation of the pool at which it did not."""


class Policy:
    """The pending jobs of the instance in the order they are served."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._jobs: dict[int, _Pending] = {}
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        """How many jobs wait for resources."""
        return len(self._jobs)

    def __contains__(self, jobid: int) -> bool:
        return jobid in self._jobs

    def insert(self, jobid: int, request: Request, *, priority: int, queue: str = "") -> None:
        """Add a job; one that is there is moved to its new priority, queue and request."""
        self.remove(jobid)
        pending = _Pending((-priority, jobid), queue, request)
        self._jobs[jobid] = pending
        heapq.heappush(self._line(queue).heap, pending.key)

    def remove(self, jobid: int) -> bool:
        """Take a job out, cancelled or reprioritized; False when it was not there (any more)."""
        pending = self._jobs.pop(jobid, None)
        if pending is None:
            return False
        line = self._lines[pending.queue]
        if line.blocked_at is not None and line.blocked_at[0] == pending.key:
            line.blocked_at = None  # it may come back with the same key and a smaller request
        line.stale += 1
        if line.stale >= MIN_STALE_ENTRIES and line.stale * 2 > len(line.heap):
            line.heap = [key for key in set(line.heap) if self._is_current(key, pending.queue)]
            heapq.heapify(line.heap)
            line.stale = 0
        return True

    def stop(self, queue: str = "") -> None:
        """Give no resources to jobs of this queue until it is started."""
        self._line(queue).stopped = True

    def start(self, queue: str = "") -> None:
        """Give resources to jobs of this queue again."""
        self._line(queue).stopped = False

    def schedule(self, limit: int = MAX_DECISIONS_PER_ROUND) -> list[Decision]:
        """Decide what can be decided now, `limit` jobs at most, taking what it grants from the pool.

        As many decisions as `limit` mean that there may be more: call again.
        """
        decisions: list[Decision] = []
        while len(decisions) < limit:
            heads = ((self._ready_head(queue, line), queue) for queue, line in self._lines.items())
            ready = [(key, queue) for key, queue in heads if key is not None]
            if not ready:
                break
            key, queue = min(ready)
            decision = self._decide(key[1])
            if decision is None:
                self._lines[queue].blocked_at = (key, self._pool.generation)
                continue
            heapq.heappop(self._lines[queue].heap)
            del self._jobs[key[1]]
            decisions.append(decision)
        return decisions

    def _line(self, queue: str) -> _Line:
        return self._lines.setdefault(queue, _Line())

    def _is_current(self, key: _Key, queue: str) -> bool:
        pending = self._jobs.get(key[1])
        return pending is not None and pending.key == key and pending.queue == queue

    def _ready_head(self, queue: str, line: _Line) -> _Key | None:
        """The head of a line; None when it is empty, stopped, or blocked and nothing came free since."""
        while line.heap and not self._is_current(line.heap[0], queue):
            heapq.heappop(line.heap)
            line.stale = max(0, line.stale - 1)
        if not line.heap or line.stopped or line.blocked_at == (line.heap[0], self._pool.generation):
            return None
        return line.heap[0]

    def _decide(self, jobid: int) -> Decision | None:
        """Grant or deny one job; None when it has to wait."""
        request = self._jobs[jobid].request
        allocation = self._pool.allocate(request)
        if allocation is not None:
            return Granted(id=jobid, allocation=allocation)
        note = self._pool.why_unsatisfiable(request)
        return None if note is None else Denied(id=jobid, note=note)
