"""The `exec` service of every rank: starts job shells here and finds them again, for job_exec on rank 0.

| topic         | payload                            | what it does                                                 |
|---------------|------------------------------------|--------------------------------------------------------------|
| exec.start    | as reattach, and spec              | streaming: write the spec if there is none; then as reattach |
| exec.reattach | id, nonce, statedir, cursor, start | streaming: attend what is there (`exec.attendant`); `start`: |
|               |                                    | a start that nobody has claimed may go on                    |
| exec.ack      | id, seq                            | records up to `seq` are durable at rank 0                    |
| exec.stdin    | id, offset, data, eof, task        | standard input for the job's tasks here                      |
| exec.kill     | id, signum, force                  | signal the tasks; `force` kills the shell itself             |
| exec.void     | id, nonce, note                    | nothing may start; answers {void}: whether nothing ran       |
| exec.release  | id, seq                            | all up to `seq`, the exit record, is durable: it may go      |
| exec.forget   | ids                                | `clean` is durable: the directories may go                   |

At most one attendant attends a job here: a newer request ends an older one, as a newer incarnation of rank 0 does.
"""

from __future__ import annotations

import errno
import logging
from typing import Annotated

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.exec import jobdir
from fluxres.exec.attendant import Attendant
from fluxres.exec.forget import Forgetting
from fluxres.exec.launcher import Launcher
from fluxres.rpc.fields import AnyJobId, Signum
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.exec")


_Nonce = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,256}$")]
_Note = Annotated[str, msgspec.Meta(max_length=256)]
"""Both go into a claim, which has a bound."""


class _Attend(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    nonce: _Nonce
    statedir: str
    cursor: int
    start: bool = False
    spec: bytes | None = None


class _Ack(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    seq: int


class _Stdin(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    offset: int
    data: bytes
    eof: bool
    task: int = -1


class _Kill(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    signum: Signum
    force: bool = False


class _Void(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    nonce: _Nonce
    note: _Note


class _Ids(msgspec.Struct, frozen=True, kw_only=True):
    ids: list[AnyJobId]


class _Active:
    """An attendant, and the scope that it runs in."""

    def __init__(self, attendant: Attendant) -> None:
        self.attendant = attendant
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class Shells:
    """The shells of one rank."""

    def __init__(
        self,
        *,
        router: Router,
        handle: Handle,
        launcher: Launcher,
        statedir: str,
        statedir_id: str,
        instance: str,
    ) -> None:
        self._router = router
        self._handle = handle
        self._launcher = launcher
        self._statedir = statedir
        self._statedir_id = statedir_id
        self._instance = instance
        self._active: dict[JobId, _Active] = {}
        self._forgetting = Forgetting(statedir, router.rank)
        self.service = Service("exec", router, owner_only=True)
        self.service.task("start", self._attend)
        self.service.task("reattach", self._attend)
        self.service.method("void", self._void)
        self.service.method("ack", self._ack)
        self.service.method("stdin", self._stdin)
        self.service.method("kill", self._kill)
        self.service.method("release", self._release)
        self.service.method("forget", self._forget)
        self.service.method("stats-get", lambda _: {"attached": self.attached})

    @property
    def attached(self) -> int:
        """How many shells are attached here now."""
        return sum(active.attendant.attached for active in self._active.values())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; shells run on."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.service.run)
            nursery.start_soon(self._forgetting.run)
            task_status.started()

    async def report(self) -> None:
        """Tell rank 0 which jobs have a directory here; forget those that it no longer runs.

        A directory of another instance is left alone, and shown in the log.
        """
        jobs = []
        for jobid in jobdir.inventory(self._statedir, self._router.rank):
            try:
                identity = jobdir.spec_identity(jobdir.job_path(self._statedir, jobid, self._router.rank))
            except OSError as error:
                log.error("leaving job %s alone: cannot read its spec: %s", f58(jobid), error)
                continue
            if identity is not None and identity[1] != self._instance:
                log.warning("leaving job %s alone: it is of another instance, %s", f58(jobid), identity[1])
            else:
                jobs.append(int(jobid))
        answer = await self._handle.call("job-exec.inventory", {"rank": self._router.rank, "ids": list(jobs)})
        unknown = answer.get("unknown")
        for ended in unknown if isinstance(unknown, list) else []:
            if isinstance(ended, int):
                log.info("discarding job %s: it has ended", f58(ended))
                self._forgetting.add(JobId(ended))

    # --- attending

    async def _attend(self, request: Request) -> None:
        ask = request.parse(_Attend)
        if ask.statedir != self._statedir_id:
            raise RpcError(errno.ESTALE, f"this rank has another statedir, {self._statedir_id}, not {ask.statedir}")
        jobid = JobId(ask.id)
        path = jobdir.job_path(self._statedir, jobid, self._router.rank)
        fresh = ask.spec is not None and self._prepare(jobid, ask.spec)
        active = _Active(
            Attendant(
                path=path,
                jobid=jobid,
                rank=self._router.rank,
                nonce=ask.nonce,
                cursor=ask.cursor,
                may_start=ask.start,
                fresh=fresh,
                launcher=self._launcher,
            )
        )
        older = self._active.get(jobid)
        self._active[jobid] = active
        try:
            if older is not None:
                older.scope.cancel()
                await older.ended.wait()
            with active.scope:
                await active.attendant.run(request.stream)
            if active.scope.cancelled_caught:
                raise RpcError(errno.ECANCELED, f"another request attends job {f58(jobid)}")
        except OSError as error:
            raise RpcError(error.errno or errno.EIO, f"cannot attend job {f58(jobid)}: {error}") from error
        finally:
            active.ended.set()
            if self._active.get(jobid) is active:
                del self._active[jobid]

    def _prepare(self, jobid: JobId, spec: bytes) -> bool:
        try:
            return jobdir.prepare(self._statedir, jobid, self._router.rank, spec)
        except OSError as error:
            raise RpcError(error.errno or errno.EIO, f"cannot prepare job {f58(jobid)}: {error}") from error

    def _void(self, request: Request) -> WireMap:
        ask = request.parse(_Void)
        attendant = self._attendant(ask.id)
        if attendant is None:
            attendant = Attendant(
                path=jobdir.job_path(self._statedir, JobId(ask.id), self._router.rank),
                jobid=JobId(ask.id),
                rank=self._router.rank,
                nonce=ask.nonce,
                cursor=0,
                may_start=False,
                launcher=self._launcher,
            )
        try:
            return {"void": attendant.void(ask.note)}
        except OSError as error:  # a full disk, say: rank 0 asks again
            raise RpcError(error.errno or errno.EIO, f"cannot void job {f58(ask.id)}: {error}") from error

    def _attendant(self, jobid: int) -> Attendant | None:
        active = self._active.get(JobId(jobid))
        return None if active is None else active.attendant

    def _ack(self, request: Request) -> None:
        ask = request.parse(_Ack)
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.command({"type": "ack", "seq": ask.seq})

    def _stdin(self, request: Request) -> None:
        ask = request.parse(_Stdin)
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.feed(ask.offset, ask.data, eof=ask.eof, task=ask.task)

    def _kill(self, request: Request) -> None:
        ask = request.parse(_Kill)
        attendant = self._attendant(ask.id)
        if attendant is None:
            raise RpcError(errno.ESRCH, f"job {f58(ask.id)} is not attended on rank {self._router.rank}")
        if ask.force:
            attendant.force()
        elif not attendant.command({"type": "kill", "signum": ask.signum}):
            raise RpcError(errno.EAGAIN, f"the shell of job {f58(ask.id)} is not reading")

    def _release(self, request: Request) -> None:
        ask = request.parse(_Ack)
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.release(ask.seq)

    def _forget(self, request: Request) -> None:
        for jobid in request.parse(_Ids).ids:
            self._forgetting.add(JobId(jobid))
