"""Makes durable what the ranks of one job say, and tells of it when it is.

Each batch of records is committed together with its rank's cursor (invariants I3, I4, I7). A rank has at most one
commit under way, and whoever wants to decide something about it waits for that first (`settled`): records, a void
claim, a loss and an administrator's word about one rank come one after the other, and each finds what the one before
it has made of the rank. What comes too late for a rank that has ended means nothing any more.

A commit that was submitted ends by itself, whether or not its submitter still waits: a child that is lost cancels the
tasks that wait on its subtree at any instant, and what was committed then must not be committed again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, encode
from fluxres.base.failpoint import hit
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject
from fluxres.exec.execution import Execution
from fluxres.exec.progress import Problem, Progress, RankState, guest_namespace, progress_key
from fluxres.exec.translate import EXEC_EVENTLOG_KEY, OUTPUT_KEY, Batch, problems_of
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CommitResult, Op, Put

LOST_STATUS: Final = 9
"""The wait status of a rank whose shell is gone without having said one: that of a process killed by SIGKILL."""

Durable = Callable[[int, Progress], None]
"""Told of a rank and its new record, when that is durable."""


class Recorder:
    """The records of one job's ranks. `durable` is called in the Trio thread, in the order of the commits."""

    def __init__(
        self, jobid: JobId, execution: Execution, *, kvs: Kvs, now: Callable[[], float], durable: Durable
    ) -> None:
        self._jobid = jobid
        self._execution = execution
        self._kvs = kvs
        self._now = now
        self._durable = durable
        self._guest = guest_namespace(jobid)
        self._leader = min(execution.ranks)
        self._under_way: dict[int, trio.Event] = {}
        self._active = set(execution.missing())
        """Ranks whose end is not even under way."""
        self._status = execution.status()
        """The largest wait status of all whose end is at least under way."""

    async def settled(self, rank: int) -> Progress:
        """The record of `rank` as soon as nothing of it is under way. What follows must not wait before it commits."""
        while (event := self._under_way.get(rank)) is not None:
            await event.wait()
        return self._execution.ranks[rank]

    # --- what a rank says

    def take(self, rank: int, progress: Progress, batch: Batch) -> None:
        """Commit a batch of records, read from where `progress`, the settled record of `rank`, ends."""
        ops: list[Op] = []
        if batch.events:
            ops.append(Append(self._guest, EXEC_EVENTLOG_KEY, "".join(batch.events).encode()))
        if batch.output:
            ops.append(Append(self._guest, OUTPUT_KEY, "".join(batch.output).encode()))
        problems = problems_of(batch, progress)
        if batch.exit is None:  # whoever has records has claimed its directory
            self._advance(rank, progress.moved(RankState.RUNNING, cursor=batch.last, problems=problems), ops)
            return
        status = batch.exit.status
        moved = progress.moved(RankState.EXITED, cursor=batch.last, status=status, problems=problems)
        hit("exit-commit.before")
        self._advance(rank, moved, ops, wait_status=status)

    async def missed(self, rank: int, first: int) -> None:
        """The shell of `rank` has no record before `first`."""
        progress = await self.settled(rank)
        if first > progress.cursor + 1 and not progress.ended:
            note = f"records {progress.cursor + 1} to {first - 1} of rank {rank} are gone: output may be missing"
            problem = Problem(type="exec", severity=1, note=note)
            self._advance(rank, progress.moved(RankState.RUNNING, cursor=first - 1, problems=(problem,)), [])

    async def lose(self, rank: int, note: str, *, wait_status: int | None = None) -> None:
        """The job's part on `rank` is lost, unless it has ended; `wait_status` is its shell's, where that was seen."""
        progress = await self.settled(rank)
        if not progress.ended:
            problem = Problem(type="exec", severity=0, note=note)
            status = LOST_STATUS if wait_status is None else wait_status
            moved = progress.moved(RankState.LOST, cursor=progress.cursor, status=status, problems=(problem,))
            self._advance(rank, moved, [], wait_status=wait_status)

    async def void(self, rank: int, problem: Callable[[], Problem | None]) -> None:
        """Nothing ran on `rank`, and nothing will. Where a shell had begun, its attendant finds it lost."""
        progress = await self.settled(rank)
        if progress.state is RankState.WAITING:
            why = problem()
            self._advance(rank, progress.moved(RankState.VOID, cursor=0, problems=() if why is None else (why,)), [])

    async def fail(self, rank: int, problem: Problem) -> None:
        """The job gets an exception for `rank`, whether that has ended or not."""
        progress = await self.settled(rank)
        worse = progress.with_problem(problem)
        if worse is not progress:
            self._advance(rank, worse, [])

    # --- committing

    def _advance(self, rank: int, progress: Progress, ops: list[Op], *, wait_status: int | None = None) -> None:
        """Commit `progress` of `rank` with `ops`, which are of the guest namespace."""
        if progress.ended and rank in self._active:
            lines = self._ending(rank, progress, wait_status)
            if lines:
                ops.append(Append(self._guest, EXEC_EVENTLOG_KEY, lines.encode()))
        self._under_way[rank] = trio.Event()
        self._submit(rank, progress, ops)

    def _submit(self, rank: int, progress: Progress, ops: list[Op]) -> None:
        record = Put(PRIMARY, progress_key(self._jobid, rank), progress.encode())
        self._kvs.submit([record, *ops], lambda result: self._ended(rank, progress, ops, result), hold=True)

    def _ended(self, rank: int, progress: Progress, ops: list[Op], result: CommitResult) -> None:
        """The commit has ended.

        The job's owner may have spoilt the guest namespace: then the job ends, with that as its reason. Where the
        store is closed nothing follows: this incarnation is over.
        """
        error = result.error
        if error is None:
            self._under_way.pop(rank).set()
            self._durable(rank, progress)
        elif error.errnum == errno.ECANCELED:
            return
        elif ops:
            note = f"cannot store what rank {rank} says: {error.text}"
            self._submit(rank, progress.with_problem(Problem(type="exec", severity=0, note=note)), [])
        else:
            raise FluxresError(f"cannot store how far job {f58(self._jobid)} has come on rank {rank}: {error.text}")

    def _ending(self, rank: int, progress: Progress, wait_status: int | None) -> str:
        """What RFC 50 has for the end of `rank`: `shell-exit` of the leader, `complete` and `done` with the last."""
        self._active.discard(rank)
        if progress.state is not RankState.VOID:
            self._status = max(self._status, progress.status)
        lines = []
        if rank == self._leader and wait_status is not None:
            left: JsonObject = {"active_ranks": str(IdSet(self._active))} if self._active else {}
            lines.append(self._line("shell-exit", {"rank": rank, "wait_status": wait_status, **left}))
        if not self._active:
            lines += [self._line("complete", {"status": self._status}), self._line("done", {})]
        return "".join(lines)

    def _line(self, name: str, context: JsonObject) -> str:
        return encode(Event(self._now(), name, context))
