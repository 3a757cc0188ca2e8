"""Where the shells of one job meet: carries out what `exec.barriers` says. Thin.

A barrier's completion is committed to the guest namespace before the first shell is told of it: after any restart a
shell that asks again is told at once, and none is let through while others can still be kept out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.exec.barriers import Barrier, Barriers, Entered, barrier_of
from fluxres.exec.progress import Problem, guest_namespace
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import CommitResult, Put
from fluxres.rpc.handle import Handle
from fluxres.wire.payload import WireMap

Fail = Callable[[int, Problem], None]
"""Gives the job an exception for a rank."""


class Rendezvous:
    """The barriers of one job. `fail` is called where one can never be complete."""

    def __init__(
        self,
        jobid: JobId,
        ranks: Collection[int],
        *,
        ended: Collection[int],
        kvs: Kvs,
        handle: Handle,
        fail: Fail,
    ) -> None:
        self._jobid = jobid
        self._kvs = kvs
        self._handle = handle
        self._fail = fail
        self._guest = guest_namespace(jobid)
        self._barriers = Barriers(ranks, ended=ended, is_complete=lambda barrier: kvs.exists(self._guest, barrier.key))

    def enter(self, rank: int, name: str, seq: int) -> None:
        """`rank` waits in a barrier. Raises ProtocolError for what is none."""
        barrier = barrier_of(name, seq)
        try:
            entered = self._barriers.enter(rank, barrier)
        except RpcError as error:
            self._spoilt(rank, barrier, error)
            return
        match entered:
            case Entered.PASSES:
                self._tell(rank, barrier)
            case Entered.COMPLETES:
                put = Put(self._guest, barrier.key, b"")
                self._kvs.submit([put], lambda result: self._completed(rank, barrier, result), hold=True)
            case Entered.BROKEN:
                gone = IdSet(self._barriers.gone)
                self._fail(rank, _broken(f"rank {rank} waits in barrier {barrier}, but rank {gone} has ended"))

    def left(self, rank: int) -> None:
        """`rank` has ended: those that wait for it would wait for ever."""
        for barrier in self._barriers.left(rank):
            self._fail(rank, _broken(f"rank {rank} has ended while others wait in barrier {barrier}"))

    def _completed(self, rank: int, barrier: Barrier, result: CommitResult) -> None:
        if result.error is None:
            for each in self._barriers.completed(barrier):
                self._tell(each, barrier)
        elif result.error.errnum != errno.ECANCELED:  # the store is closed, with this incarnation
            self._spoilt(rank, barrier, result.error)

    def _tell(self, rank: int, barrier: Barrier) -> None:
        done: WireMap = {"id": int(self._jobid), "name": barrier.name, "seq": barrier.seq}
        self._handle.send("exec.barrier", done, nodeid=rank)

    def _spoilt(self, rank: int, barrier: Barrier, error: RpcError) -> None:
        """The job's owner may write to its namespace."""
        self._fail(rank, _broken(f"cannot store that barrier {barrier} is complete: {error.text}"))


def _broken(note: str) -> Problem:
    return Problem(type="exec", severity=0, note=note)
