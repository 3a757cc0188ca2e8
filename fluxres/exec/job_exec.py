"""The `job-exec` service of rank 0 (RFC 32): runs the jobs that the manager hands it, over all their ranks.

| topic              | payload                             | what it does                                              |
|--------------------|-------------------------------------|-----------------------------------------------------------|
| job-exec.start     | id, userid, jobspec, R, tasks,      | streaming, RFC 32 responses; `killed` says that a fatal   |
|                    | taskmap, nonce, t_submit, reattach, | exception is logged already, `released` which ranks'      |
|                    | killed, released                    | release is                                                |
| job-exec.kill      | id, signum                          | signal the job's tasks                                    |
| job-exec.end       | id                                  | a fatal exception is logged: end the tasks                |
| job-exec.released  | id, ranks, final                    | a `release` of the job is durable; `ranks` may be "all"   |
| job-exec.stdin     | id, data, encoding, eof, offset     | standard input, answered when it is durable               |
| job-exec.inventory | rank, ids                           | what a rank has on disk; answers {unknown, lost}          |

`tasks` are [rank, first task, number of tasks], the layout that the manager made of jobspec and R. Of an inventory,
`unknown` are jobs of which nothing is to be kept, and `lost` active ones whose part on that rank was given up
(declared lost, say): what still runs of it is to be killed, and then nothing of it to be kept.
"""

from __future__ import annotations

import base64
import errno
import logging
from collections.abc import Callable
from typing import Final, cast

import msgspec

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, encode
from fluxres.base.eventlog import decode as decode_events
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58, kvs_path
from fluxres.base.json import JsonObject, JsonValue
from fluxres.exec.attachments import Attachments
from fluxres.exec.job_run import JobRun, Plan, Subtree
from fluxres.exec.progress import RankState, decode, guest_namespace, progress_key
from fluxres.exec.ranks import Ranks
from fluxres.exec.spec import ExecSettings, SpecBuilder
from fluxres.exec.stdin import INPUT_KEY, StoredInput
from fluxres.exec.translate import EXEC_EVENTLOG_KEY
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append
from fluxres.rpc.fields import AnyJobId, Signum
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.exec")

ALL: Final = "all"
"""What RFC 21 says for the ranks of a release, where they are not told one by one."""


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    userid: int
    jobspec: dict[str, object]
    R: dict[str, object]
    tasks: list[tuple[int, int, int]]
    taskmap: list[list[int]]
    nonce: str
    t_submit: float
    reattach: bool
    killed: bool = False
    released: str = ""


class _Signal(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    signum: Signum


class _Id(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId


class _Released(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    ranks: str = ALL
    final: bool = True


class _Stdin(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    data: str = ""
    encoding: str = "UTF-8"
    eof: bool = False
    offset: int = -1


class _Inventory(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    ids: list[AnyJobId]


class JobExec:
    """Runs jobs for the manager.

    `is_active` tells whether the manager has a job; `is_known` also of those whose records cannot be read, and whose
    directories are therefore kept. `ranks` tells who is online, and `subtree` runs a block in the scope of the child
    that leads to a rank. `attachments` is told which shells answer.
    """

    def __init__(
        self,
        *,
        router: Router,
        handle: Handle,
        kvs: Kvs,
        ranks: Ranks,
        attachments: Attachments,
        subtree: Subtree,
        instance: str,
        settings: ExecSettings,
        is_active: Callable[[JobId], bool],
        is_known: Callable[[JobId], bool],
        now: Callable[[], float],
    ) -> None:
        self._handle = handle
        self._kvs = kvs
        self._ranks = ranks
        self._attachments = attachments
        self._subtree = subtree
        self._instance = instance
        self._settings = settings
        self._is_active = is_active
        self._is_known = is_known
        self._now = now
        self._runs: dict[JobId, JobRun] = {}
        self._inputs: dict[JobId, StoredInput] = {}
        self._ended_early: set[JobId] = set()
        self.service = Service("job-exec", router)
        self.service.task("start", self._start)
        self.service.task("kill", self._kill)
        self.service.task("stdin", self._stdin)
        self.service.method("end", self._end_run)
        self.service.method("released", self._released)
        self.service.method("inventory", self._inventory)

    async def _start(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Start)
        jobid = JobId(ask.id)
        if jobid in self._runs:
            raise RpcError(errno.EEXIST, f"job {f58(jobid)} is running already")
        if jobid in self._ended_early:
            self._ended_early.discard(jobid)
            ask = msgspec.structs.replace(ask, killed=True)
        run = self._runs[jobid] = JobRun(
            self._plan(ask),
            kvs=self._kvs,
            handle=self._handle,
            ranks=self._ranks,
            attachments=self._attachments,
            subtree=self._subtree,
            respond=request.respond,
            now=self._now,
        )
        try:
            if ask.reattach:
                await self._log(jobid, "reattach")
            await run.run()
        finally:
            del self._runs[jobid]
            self._inputs.pop(jobid, None)

    def _plan(self, ask: _Start) -> Plan:
        jobid = JobId(ask.id)
        layout = {rank: list(range(first, first + count)) for rank, first, count in ask.tasks}
        ranks = {}
        for rank in layout:
            record = self._kvs.get(PRIMARY, progress_key(jobid, rank))
            if record is None:
                raise RpcError(errno.ENOENT, f"job {f58(jobid)} has no progress record for rank {rank}")
            ranks[rank] = decode(record)

        spec = SpecBuilder(
            jobid=jobid,
            nonce=ask.nonce,
            instance=self._instance,
            userid=ask.userid,
            jobspec=cast("JsonObject", ask.jobspec),
            resources=cast("JsonObject", ask.R),
            layout=layout,
            taskmap=cast("JsonValue", ask.taskmap),
            t_submit=ask.t_submit,
        )
        return Plan(
            jobid=jobid,
            nonce=ask.nonce,
            ranks=ranks,
            spec=spec.build,
            reattach=ask.reattach,
            killed=ask.killed,
            released=_ranks(ask.released),
            kill_timeout=self._settings.kill_timeout,
        )

    async def _log(self, jobid: JobId, name: str) -> None:
        line = encode(Event(self._now(), name))
        try:
            await self._kvs.commit(Append(guest_namespace(jobid), EXEC_EVENTLOG_KEY, line.encode()), hold=True)
        except RpcError as error:  # its owner has spoilt it; `JobRun` deals with that
            log.error("job %s: cannot log %s: %s", f58(jobid), name, error.text)

    def _run(self, jobid: int) -> JobRun:
        run = self._runs.get(JobId(jobid))
        if run is None:
            raise RpcError(errno.ENOENT, f"job {f58(jobid)} is not running")
        return run

    async def _kill(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Signal)
        await self._run(ask.id).signal(ask.signum)

    def _end_run(self, request: Request) -> None:
        request.require_owner()
        jobid = JobId(request.parse(_Id).id)
        if jobid in self._runs:
            self._runs[jobid].kill()
        elif self._is_active(jobid):
            self._ended_early.add(jobid)  # its start is on the way to a task of its own

    def _released(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Released)
        ranks = None if ask.ranks == ALL else _ranks(ask.ranks)
        self._run(ask.id).released(ranks, final=ask.final)

    def _inventory(self, request: Request) -> WireMap:
        request.require_owner()
        ask = request.parse(_Inventory)
        unknown = [jobid for jobid in ask.ids if not self._is_known(JobId(jobid))]
        return {"unknown": [*unknown], "lost": [jobid for jobid in ask.ids if self._is_lost(jobid, ask.rank)]}

    def _is_lost(self, jobid: int, rank: int) -> bool:
        """Whether an active job's part on `rank` was given up; that of a rank declared lost is, if not durably yet."""
        if not self._is_active(JobId(jobid)):
            return False
        try:
            record = self._kvs.get(PRIMARY, progress_key(JobId(jobid), rank))
            progress = None if record is None else decode(record)
        except (RpcError, ValueError) as error:  # then nothing of it is touched
            log.error("cannot read how far job %s has come on rank %d: %s", f58(jobid), rank, error)
            return False
        if progress is None:
            return False
        declared = self._ranks.declared(rank) is not None
        return progress.state is RankState.LOST or (declared and not progress.ended)

    async def _stdin(self, request: Request) -> WireMap:
        ask = request.parse(_Stdin)
        jobid = JobId(ask.id)
        await self._wait_for_guest(jobid)
        self._check_input(request, jobid)
        try:
            data = base64.b64decode(ask.data, validate=True) if ask.encoding == "base64" else ask.data.encode()
        except ValueError as error:
            raise RpcError(errno.EINVAL, f"cannot take standard input: {error}") from error
        stored = self._stored_input(jobid)
        offset = stored.size if ask.offset < 0 else ask.offset
        if offset > stored.size:
            raise RpcError(errno.EINVAL, f"cannot take input at offset {offset}: {stored.size} bytes are stored")
        data = data[stored.size - offset :]
        ops = [self._input_op(jobid, data, eof=ask.eof)] if not stored.ended and (data or ask.eof) else []
        if ops:
            stored.added(data, eof=ask.eof)
        end = stored.size
        try:
            await self._kvs.commit(*ops, hold=True)  # without any it still ends after those before it
        except RpcError:
            self._inputs.pop(jobid, None)
            raise
        if (run := self._runs.get(jobid)) is not None:
            run.has_input()
        return {"offset": end}

    def _stored_input(self, jobid: JobId) -> StoredInput:
        stored = self._inputs.get(jobid)
        if stored is None:
            try:
                stored = self._inputs[jobid] = StoredInput(self._kvs, guest_namespace(jobid))
            except ValueError as error:
                raise RpcError(errno.EIO, f"cannot read the input of job {f58(jobid)}: {error}") from error
        return stored

    async def _wait_for_guest(self, jobid: JobId) -> None:
        """Wait until the job has its guest namespace, with `alloc`, or has ended, or its sender cancels."""
        if not self._is_active(jobid):
            return
        async with self._kvs.watch(PRIMARY, kvs_path(jobid, "eventlog")) as watch:
            async for chunk in watch:
                if any(event.name in ("alloc", "clean") for event in decode_events(chunk.data)):
                    return

    def _check_input(self, request: Request, jobid: JobId) -> None:
        if not self._is_active(jobid):
            raise RpcError(errno.ENOENT, f"job {f58(jobid)} is not active")
        owner = self._kvs.namespace(guest_namespace(jobid)).owner
        if not request.is_owner and owner != request.userid:
            raise RpcError(errno.EPERM, f"job {f58(jobid)} is another user's")

    def _input_op(self, jobid: JobId, data: bytes, *, eof: bool) -> Append:
        context: JsonObject = {"stream": "stdin", "rank": "all"}
        try:
            context["data"] = data.decode()
        except UnicodeDecodeError:
            context["data"] = base64.b64encode(data).decode()
            context["encoding"] = "base64"
        if eof:
            context["eof"] = True
        line = encode(Event(self._now(), "data", context))
        return Append(guest_namespace(jobid), INPUT_KEY, line.encode())


def _ranks(text: str) -> IdSet:
    try:
        return IdSet.parse(text)
    except ValueError as error:
        raise RpcError(errno.EPROTO, f"cannot take these ranks: {error}") from error
