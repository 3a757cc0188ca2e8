"""The `job-info` service: reads the records of jobs, active or not, and follows their eventlogs.

`job-info.lookup {id, keys, flags}` answers the values as text. `job-info.eventlog-watch {id, path, flags, position}`
streams events as `{event, position}`, each one line; `position` given back on a later watch goes on right after it,
so that a client follows over any number of restarts and misses nothing. It ends with ENODATA when no event can follow.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import decode
from fluxres.base.jobid import JobId, f58, kvs_path
from fluxres.job.records import JobRecords
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Chunk
from fluxres.kvs.watch import Watch
from fluxres.rpc.fields import AnyJobId
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

GUEST: Final = "guest."
EVENTLOG: Final = "eventlog"
EXEC_EVENTLOG: Final = "guest.exec.eventlog"
LOOKUP: Final = frozenset({EVENTLOG, "jobspec", "R"})
"""What may be asked for beside what is in the guest namespace."""
WATCHED: Final = frozenset({EVENTLOG, EXEC_EVENTLOG, "guest.output", "guest.input"})
WAITCREATE: Final = 1
"""Watch flag: wait for a path that does not exist (yet)."""
ENDS: Final = frozenset({"finish", "clean"})
LAST: Final = {EVENTLOG: "clean", EXEC_EVENTLOG: "done"}


class _Lookup(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    keys: list[str]
    flags: int = 0


class _Watch(msgspec.Struct, frozen=True, kw_only=True):
    id: AnyJobId
    path: str = EVENTLOG
    flags: int = 0
    position: tuple[int, int] = (0, 0)


class JobInfo:
    """Serves `job-info.*` from the store."""

    def __init__(self, *, router: Router, kvs: Kvs) -> None:
        self._kvs = kvs
        self._records = JobRecords(kvs)
        self.service = Service("job-info", router)
        self.service.method("lookup", self._lookup)
        self.service.task("eventlog-watch", self._watch)

    def _check(self, request: Request, jobid: JobId) -> None:
        """Raise RpcError ENOENT or EPERM unless the sender may read the job."""
        userid = self._records.job(jobid).userid if not request.is_owner else request.userid
        if userid != request.userid:
            raise RpcError(errno.EPERM, f"job {f58(jobid)} is another user's")

    def _lookup(self, request: Request) -> WireMap:
        ask = request.parse(_Lookup)
        jobid = JobId(ask.id)
        self._check(request, jobid)
        answer: WireMap = {"id": ask.id}
        for key in ask.keys:
            if key not in LOOKUP and not key.startswith(GUEST):
                raise RpcError(errno.EINVAL, f"cannot look up {key!r} of a job")
            answer[key] = self._records.read(kvs_path(jobid, key), f"{key} of job {f58(jobid)}").decode(
                errors="replace"
            )
        return answer

    async def _watch(self, request: Request) -> None:
        ask = request.parse(_Watch)
        jobid = JobId(ask.id)
        self._check(request, jobid)
        if ask.path not in WATCHED:
            raise RpcError(errno.EINVAL, f"cannot watch {ask.path!r} of a job: one of {', '.join(sorted(WATCHED))}")
        self._records.check_quarantine(jobid)  # nothing more would ever come
        seq, index = ask.position
        end = _End()
        key = kvs_path(jobid, ask.path)
        if not ask.flags & WAITCREATE and not self._kvs.exists(PRIMARY, key):
            raise RpcError(errno.ENOENT, f"there is no {ask.path} of job {f58(jobid)}")
        async with (
            trio.open_nursery() as nursery,
            self._kvs.watch(PRIMARY, key, after=max(0, seq - 1)) as watch,
        ):
            if ask.path != EVENTLOG:
                nursery.start_soon(self._wait_end, jobid, end)
            done = False
            while not done and (batch := await end.more(watch)):
                for chunk in batch:
                    with _readable(jobid):
                        for at, line in _lines(chunk, index if chunk.seq == seq else 0):
                            await request.stream({"event": line, "position": [chunk.seq, at + 1]})
                            done = done or _is_last(ask.path, line)
            nursery.cancel_scope.cancel()

    async def _wait_end(self, jobid: JobId, end: _End) -> None:
        """Wait until nothing can be added to the guest namespace: the job has finished, or never ran."""
        async with self._kvs.watch(PRIMARY, kvs_path(jobid, EVENTLOG)) as watch:
            with _readable(jobid):
                while not any(event.name in ENDS for chunk in await watch.batch() for event in decode(chunk.data)):
                    pass
        end.come()


class _End:
    """The end of what is watched: it may come while somebody waits for more."""

    def __init__(self) -> None:
        self._here = False
        self._waiting: trio.CancelScope | None = None

    def come(self) -> None:
        """Nothing is added any more."""
        self._here = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def more(self, watch: Watch) -> list[Chunk]:
        """The next chunks; none where the end has come and all have been read."""
        if not self._here:
            with trio.CancelScope() as self._waiting:
                return await watch.batch()
        return watch.ready()


@contextlib.contextmanager
def _readable(jobid: JobId) -> Iterator[None]:
    """Answer EIO for an eventlog in the store that makes no sense."""
    try:
        yield
    except ValueError as error:
        raise RpcError(errno.EIO, f"cannot read the record of job {f58(jobid)}: {error}") from error


def _lines(chunk: Chunk, skip: int) -> Iterator[tuple[int, str]]:
    """The lines of one chunk from number `skip` on; every append is of whole lines."""
    for at, line in enumerate(chunk.data.decode().splitlines(keepends=True)):
        if at >= skip:
            yield at, line


def _is_last(path: str, line: str) -> bool:
    last = LAST.get(path)
    return last is not None and f'"{last}"' in line and decode(line)[0].name == last
