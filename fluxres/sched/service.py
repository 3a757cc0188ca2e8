"""The scheduler as the job manager uses it: requests in, decisions out (RFC 27's alloc and free, in one process).

Thin around `sched.policy`: rounds run in a task of their own, one after each burst of changes, and at most so many
decisions at a time, so that a long queue does not hold up the event loop.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from fluxres.sched.policy import Decision, Policy
from fluxres.sched.pool import Allocation, Pool
from fluxres.sched.request import Request


class Scheduler:
    """Decides who runs where. `decided` is called in the Trio thread, in the order of the decisions."""

    def __init__(self, pool: Pool, decided: Callable[[Decision], None]) -> None:
        self.pool = pool
        self._policy = Policy(pool)
        self._decided = decided
        self._changed = trio.Event()

    def __len__(self) -> int:
        """How many jobs wait for resources."""
        return len(self._policy)

    def __contains__(self, jobid: int) -> bool:
        return jobid in self._policy

    def request(self, jobid: int, request: Request, *, priority: int) -> None:
        """Ask for resources; asked again, the newer request counts."""
        self._policy.insert(jobid, request, priority=priority)
        self._changed.set()

    def cancel(self, jobid: int) -> None:
        """Take back a request; nothing happens where there is none (any more)."""
        if self._policy.remove(jobid):
            self._changed.set()

    def free(self, allocation: Allocation) -> None:
        """Give resources back."""
        self.pool.release(allocation)
        self._changed.set()

    def wake(self) -> None:
        """The pool has changed otherwise: a rank has come online, say."""
        self._changed.set()

    def stop(self) -> None:
        """Give out nothing until started again."""
        self._policy.stop()

    def start(self) -> None:
        """Give out resources (again)."""
        self._policy.start()
        self._changed.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Decide, until cancelled."""
        task_status.started()
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while decisions := self._policy.schedule():
                for decision in decisions:
                    self._decided(decision)
                await trio.lowlevel.checkpoint()
