"""The `exec` service of every rank: starts job shells here and finds them again, for job_exec on rank 0.

| topic         | payload                            | what it does                                                 |
|---------------|------------------------------------|--------------------------------------------------------------|
| exec.start    | as reattach, and spec              | streaming: write the spec if there is none; then as reattach |
| exec.reattach | id, nonce, statedir, cursor, start | streaming: attend what is there (`exec.attendant`); `start`: |
|               |                                    | a start that nobody has claimed may go on                    |
| exec.ack      | id, seq                            | records up to `seq` are durable at rank 0                    |
| exec.stdin    | id, offset, data, eof, task        | standard input for the job's tasks here                      |
| exec.kill     | id, signum, force                  | signal the tasks; `force` kills the shell itself             |
| exec.barrier  | id, name, seq                      | every rank of the job has entered the barrier                |
| exec.void     | id, nonce, statedir, note          | nothing may start; answers {void}: whether nothing ran       |
| exec.release  | id, seq                            | all up to `seq`, the exit record, is durable: it may go      |
| exec.forget   | ids                                | `clean` is durable: the directories may go                   |

A statedir that is not this rank's is refused with ESTALE: what rank 0 asks for was begun elsewhere. At most one
attendant attends a job here: a newer request ends an older one, as a newer incarnation of rank 0 does.

When the incarnation ends, so do the attendants: their shells go on, detached.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import Annotated

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.exec.attendant import Attendant, void_start
from fluxres.exec.backoff import Backoff
from fluxres.exec.forget import Forgetting
from fluxres.exec.host import ShellHost
from fluxres.exec.spec import LocalSettings, complete_spec
from fluxres.rpc.fields import AnyJobId, Signum
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import Wire, WireMap

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


class _Barrier(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    name: str
    seq: int


class _Void(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    nonce: _Nonce
    statedir: str
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
    """The shells of one rank, in `host`; `local` is what their specs lack until they are here.

    `statedir_id` and `instance` name this rank's statedir, and the instance that it belongs to.
    """

    def __init__(
        self,
        *,
        router: Router,
        handle: Handle,
        host: ShellHost,
        local: LocalSettings,
        statedir_id: str,
        instance: str,
    ) -> None:
        self._rank = router.rank
        self._handle = handle
        self._host = host
        self._local = local
        self._statedir_id = statedir_id
        self._instance = instance
        self._active: dict[JobId, _Active] = {}
        self._forgetting = Forgetting(host)
        self._nursery: trio.Nursery | None = None
        self.service = Service("exec", router, owner_only=True)
        self.service.task("start", self._attend)
        self.service.task("reattach", self._attend)
        self.service.method("void", self._void)
        self.service.method("ack", self._ack)
        self.service.method("stdin", self._stdin)
        self.service.method("kill", self._kill)
        self.service.method("barrier", self._barrier)
        self.service.method("release", self._release)
        self.service.method("forget", self._forget)
        self.service.method("stats-get", lambda _: {"attached": self.attached})

    @property
    def attached(self) -> int:
        """How many shells are attached here now."""
        return sum(active.attendant.attached for active in self._active.values())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; shells run on."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.service.run)
            self._nursery.start_soon(self._forgetting.run)
            task_status.started()

    # --- what was here before

    async def report(self) -> None:
        """Tell rank 0 which jobs have a directory here, once `run` serves; clean up what it does not want any more.

        Of what it answers, `unknown` jobs have ended: their directories are forgotten. Of the `lost` ones it has given
        up this rank's part: they are put down, and when that is done, `resource.confirm` says that nothing of what was
        given up lives here; also where there was nothing. A directory of another instance is left alone, and shown in
        the log, and so is one that cannot be read: then nothing is confirmed.
        """
        ids, certain = self._inventory()
        answer = await self._handle.call("job-exec.inventory", {"rank": self._rank, "ids": ids})
        for ended in _jobids(answer.get("unknown")):
            log.info("discarding job %s: it has ended", f58(ended))
            self._forgetting.add(ended)
        assert self._nursery is not None, "report before run"
        self._nursery.start_soon(self._put_down, _jobids(answer.get("lost")), certain, name="put down")

    def _inventory(self) -> tuple[list[int], bool]:
        """The jobs that have a directory here, and whether all could be read."""
        ids, certain = [], True
        for jobid in self._host.inventory():
            try:
                identity = self._host.identity(jobid)
            except OSError as error:
                log.error("leaving job %s alone: cannot read its spec: %s", f58(jobid), error)
                certain = False
                continue
            if identity is not None and identity.instance != self._instance:
                log.warning("leaving job %s alone: it is of another instance, %s", f58(jobid), identity.instance)
            else:
                ids.append(int(jobid))
        return ids, certain

    async def _put_down(self, lost: list[JobId], certain: bool) -> None:
        for jobid in lost:
            log.warning("killing what is left of job %s here: rank 0 has given it up", f58(jobid))
        await self._forgetting.put_down(lost)
        if certain:
            await self._confirm()

    async def _confirm(self) -> None:
        """Tell rank 0 that nothing of what it gave up lives here, until it has that durably."""
        backoff = Backoff()
        while True:
            try:
                await self._handle.call("resource.confirm", {"rank": self._rank}, nodeid=0)
                break
            except RpcError as error:
                if backoff.is_news(error.text):
                    log.warning("rank 0 does not take it that nothing is left of lost jobs here: %s", error.text)
            await trio.sleep(backoff.pause())

    # --- attending

    async def _attend(self, request: Request) -> None:
        ask = request.parse(_Attend)
        self._check_statedir(ask.statedir)
        jobid = JobId(ask.id)
        fresh = ask.spec is not None and self._prepare(jobid, ask.spec)
        active = _Active(
            Attendant(
                self._host.shell(jobid, ask.nonce),
                jobid=jobid,
                rank=self._rank,
                nonce=ask.nonce,
                cursor=ask.cursor,
                may_start=ask.start,
                fresh=fresh,
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

    def _check_statedir(self, statedir: str) -> None:
        if statedir != self._statedir_id:
            raise RpcError(errno.ESTALE, f"this rank has another statedir, {self._statedir_id}, not {statedir}")

    def _prepare(self, jobid: JobId, spec: bytes) -> bool:
        try:
            return self._host.prepare(jobid, complete_spec(spec, self._local))
        except OSError as error:
            raise RpcError(error.errno or errno.EIO, f"cannot prepare job {f58(jobid)}: {error}") from error
        except ValueError as error:
            raise RpcError(errno.EPROTO, f"cannot prepare job {f58(jobid)}: {error}") from error

    def _void(self, request: Request) -> WireMap:
        """In one step with all that an attendant sees and does: the one that there is starts nothing from here on, and
        one that comes later finds the claim."""
        ask = request.parse(_Void)
        self._check_statedir(ask.statedir)
        try:
            with contextlib.closing(self._host.shell(JobId(ask.id), ask.nonce)) as shell:
                voided = void_start(shell, ask.note)
        except OSError as error:  # a full disk, say: rank 0 asks again
            raise RpcError(error.errno or errno.EIO, f"cannot void job {f58(ask.id)}: {error}") from error
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.give_up_start()
        return {"void": voided}

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
            raise RpcError(errno.ESRCH, f"job {f58(ask.id)} is not attended on rank {self._rank}")
        if ask.force:
            attendant.force()
        elif not attendant.command({"type": "kill", "signum": ask.signum}):
            raise RpcError(errno.EAGAIN, f"the shell of job {f58(ask.id)} is not reading")

    def _barrier(self, request: Request) -> None:
        ask = request.parse(_Barrier)
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.barrier_done(ask.name, ask.seq)

    def _release(self, request: Request) -> None:
        ask = request.parse(_Ack)
        if (attendant := self._attendant(ask.id)) is not None:
            attendant.release(ask.seq)

    def _forget(self, request: Request) -> None:
        for jobid in request.parse(_Ids).ids:
            self._forgetting.add(JobId(jobid))


def _jobids(ids: Wire) -> list[JobId]:
    return [JobId(jobid) for jobid in ids if isinstance(jobid, int)] if isinstance(ids, list) else []
