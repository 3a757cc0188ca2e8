"""The `job-manager` service: what users ask of active jobs: exceptions, signals, urgency."""

from __future__ import annotations

import errno
import signal
from typing import Annotated

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.job.ledger import Entry
from fluxres.job.manager import Manager
from fluxres.job.value import ACTIVE, URGENCY_DEFAULT, URGENCY_EXPEDITE, JobState
from fluxres.rpc.fields import AnyJobId, Signum
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

USERID_ANY = 0xFFFFFFFF
"""Every user's jobs (flux-core FLUX_USERID_UNKNOWN)."""


class _Raise(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^\S+$")]
    severity: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    note: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class _RaiseAll(msgspec.Struct, frozen=True, kw_only=True):
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^\S+$")]
    severity: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    note: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    userid: int = USERID_ANY
    states: int = int(ACTIVE)
    dry_run: bool = False


class _Kill(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    signum: Signum = signal.SIGTERM.value


class _KillAll(msgspec.Struct, frozen=True, kw_only=True):
    signum: Signum = signal.SIGTERM.value
    userid: int = USERID_ANY
    dry_run: bool = False


class _Urgency(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    urgency: Annotated[int, msgspec.Meta(ge=0, le=URGENCY_EXPEDITE)]


class JobRequests:
    """Serves `job-manager.*` for one manager."""

    def __init__(self, *, router: Router, handle: Handle, manager: Manager) -> None:
        self._manager = manager
        self._handle = handle
        self.service = Service("job-manager", router)
        self.service.deferred("raise", self._raise)
        self.service.task("raiseall", self._raise_all)
        self.service.task("kill", self._kill)
        self.service.task("killall", self._kill_all)
        self.service.deferred("urgency", self._urgency)
        self.service.method("stats-get", self._stats)

    def _entry(self, request: Request, jobid: int) -> Entry:
        """The active job that `request` may act on. Raises RpcError ENOENT, EINVAL, EPERM."""
        entry = self._manager.ledger.get(JobId(jobid))
        if entry is None or entry.posted.state is JobState.INACTIVE:
            self._manager.records.check_quarantine(JobId(jobid))
            self._manager.records.job(JobId(jobid))  # ENOENT where there never was one
            raise RpcError(errno.EINVAL, f"job {f58(jobid)} is inactive")
        if not request.is_owner and request.userid != entry.posted.userid:
            raise RpcError(errno.EPERM, f"job {f58(jobid)} is another user's")
        return entry

    def _raise(self, request: Request) -> None:
        ask = request.parse(_Raise)
        entry = self._entry(request, ask.id)
        self._manager.raise_exception(
            entry,
            kind=ask.type,
            severity=ask.severity,
            note=ask.note,
            userid=request.userid,
            then=request.respond,
        )

    def _chosen(self, request: Request, userid: int, states: int) -> list[Entry]:
        if not request.is_owner and userid != request.userid:
            if userid != USERID_ANY:
                raise RpcError(errno.EPERM, "these jobs are another user's")
            userid = request.userid
        return [
            entry
            for entry in self._manager.ledger.entries()
            if userid in (USERID_ANY, entry.posted.userid) and entry.posted.state & states
        ]

    async def _raise_all(self, request: Request) -> WireMap:
        ask = request.parse(_RaiseAll)
        chosen = self._chosen(request, ask.userid, ask.states)
        if chosen and not ask.dry_run:
            durable = trio.Event()
            for entry in chosen:
                self._manager.raise_exception(
                    entry,
                    kind=ask.type,
                    severity=ask.severity,
                    note=ask.note,
                    userid=request.userid,
                    then=durable.set if entry is chosen[-1] else None,
                )
            await durable.wait()  # commits end in the order in which they were posted
        return {"count": len(chosen), "errors": 0}

    async def _kill(self, request: Request) -> WireMap:
        ask = request.parse(_Kill)
        entry = self._entry(request, ask.id)
        if entry.durable.state is not JobState.RUN:
            raise RpcError(errno.EINVAL, f"job {f58(ask.id)} is not running")
        return await self._handle.call("job-exec.kill", {"id": ask.id, "signum": ask.signum})

    async def _kill_all(self, request: Request) -> WireMap:
        ask = request.parse(_KillAll)
        chosen = self._chosen(request, ask.userid, JobState.RUN)
        errors = 0
        for entry in [] if ask.dry_run else chosen:
            try:
                await self._handle.call("job-exec.kill", {"id": entry.durable.id, "signum": ask.signum})
            except RpcError:
                errors += 1
        return {"count": len(chosen), "errors": errors}

    def _urgency(self, request: Request) -> None:
        ask = request.parse(_Urgency)
        entry = self._entry(request, ask.id)
        if ask.urgency > URGENCY_DEFAULT and not request.is_owner:
            raise RpcError(errno.EPERM, f"urgency {ask.urgency} is for the instance owner")
        if entry.posted.allocated:
            raise RpcError(errno.EINVAL, f"job {f58(ask.id)} has its resources already")
        old = entry.posted.urgency
        event = self._manager.ledger.event("urgency", urgency=ask.urgency, userid=request.userid)
        self._manager.ledger.post(entry, event, then=lambda: request.respond({"old_urgency": old}))

    def _stats(self, request: Request) -> WireMap:
        return {"active_jobs": len(self._manager.ledger), "pending_jobs": len(self._manager.scheduler)}
