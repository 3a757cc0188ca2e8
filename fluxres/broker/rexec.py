"""The `rexec` service of every rank: runs commands for the instance owner, beside all jobs (RFC 42, flux-exec(1)).

| topic       | payload              | what it does                                                        |
|-------------|----------------------|---------------------------------------------------------------------|
| rexec.exec  | cmd, flags           | streaming: run a command; responses as below                        |
| rexec.write | matchtag, io         | standard input for the process of that request, of the same sender  |
| rexec.kill  | pid, signum          | signal the process, its group included; ESRCH for one not ours      |
| rexec.list  |                      | answers {rank, procs: [{pid, cmd}]}                                 |

`cmd` is {cmdline, env, cwd?, opts, channels}; `flags` are RFC 42's: the streams wanted, and whether credit is told.
Responses of `exec`: `started` {pid}; `add-credit` {channels: {stdin}}: bytes that may be sent; `output` {pid, io};
`finished` {status}, as wait(2) has it; then, with all output read to its end, ENODATA. `io` is RFC 24's data:
{stream, rank, data, encoding?, eof?}. A command that cannot be started is an error response: ENOENT, EACCES, ….

Output is read no faster than its requester takes it. A process whose requester is gone, or cancels, or whose broker's
incarnation ends, gets SIGTERM, and SIGKILL after `remote.GRACE`. Background processes (a request that is not
streaming), auxiliary channels, and the response `stopped` are not offered.
"""

from __future__ import annotations

import binascii
import errno
import logging
import os
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.broker.remote import INPUT_BOUND as CREDIT
from fluxres.broker.remote import STDERR, STDOUT, RemoteProcess
from fluxres.rpc.fields import Signum
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import Wire, WireMap

log = logging.getLogger("fluxres.rexec")

MAX_PROCESSES: Final = 1024
"""Processes that one broker runs at a time."""
MAX_EARLY: Final = 64
"""Requests whose input may come before their process has started; older ones' is dropped."""
BORROWED: Final = 4096
"""Bytes of input that a requester may send before it has any credit (RFC 42)."""
STDIN: Final = "stdin"


class Flag:
    """The flags of an exec request (RFC 42)."""

    STDOUT: Final = 1
    STDERR: Final = 2
    WRITE_CREDIT: Final = 8


class _Command(msgspec.Struct, frozen=True, kw_only=True):
    cmdline: Annotated[list[str], msgspec.Meta(min_length=1)]
    env: dict[str, str] = {}
    cwd: str | None = None
    opts: dict[str, str] = {}
    channels: Annotated[list[str], msgspec.Meta(max_length=0)] = []


class _Exec(msgspec.Struct, frozen=True, kw_only=True):
    cmd: _Command
    flags: Annotated[int, msgspec.Meta(ge=0)] = 0


class _Io(msgspec.Struct, frozen=True, kw_only=True):
    stream: str
    data: str = ""
    encoding: str = "UTF-8"
    eof: bool = False


class _Write(msgspec.Struct, frozen=True, kw_only=True):
    matchtag: int
    io: _Io


class _Kill(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    signum: Signum


_Key = tuple[tuple[str, ...], int]
"""Names an exec request: where it came from, and its matchtag."""


class Rexec:
    """Serves `rexec.*` on one rank. `uri` is the broker's own, which processes find in FLUXRES_URI."""

    def __init__(self, *, router: Router, uri: str) -> None:
        self._rank = router.rank
        self._uri = uri
        self._running: dict[_Key, _Run] = {}
        self._early: dict[_Key, list[tuple[bytes, bool]]] = {}
        self.service = Service("rexec", router, owner_only=True)
        self.service.task("exec", self._exec)
        self.service.method("write", self._write)
        self.service.method("kill", self._kill)
        self.service.method("list", self._list)

    async def _exec(self, request: Request) -> None:
        ask = request.parse(_Exec)
        if not request.message.is_streaming or not request.message.wants_response:
            raise RpcError(errno.EPROTO, "rexec.exec wants a streaming request: processes run for their requester")
        if len(self._running) >= MAX_PROCESSES:
            raise RpcError(errno.EAGAIN, f"cannot run a command: {MAX_PROCESSES} processes run here already")
        key = (request.message.route, request.message.matchtag)
        early = self._early.pop(key, [])
        run = _Run(ask, request, rank=self._rank, uri=self._uri)
        self._running[key] = run
        try:
            for data, eof in early:
                run.process.write(data, eof=eof)
            await run.attend()
        except BaseException:
            await run.process.kill()
            raise
        finally:
            del self._running[key]
            run.process.close()

    def _write(self, request: Request) -> None:
        ask = request.parse(_Write)
        if ask.io.stream != STDIN:
            return  # there are no other channels: ignored (RFC 42)
        key = (request.message.route, ask.matchtag)
        data = _decoded(ask.io)
        run = self._running.get(key)
        if run is not None:
            run.write(data, eof=ask.io.eof)
        elif len(data) + sum(len(each) for each, _ in self._early.get(key, [])) <= BORROWED:
            # Its process is about to be started, or has ended: only the first will ask for this.
            self._early.setdefault(key, []).append((data, ask.io.eof))
            while len(self._early) > MAX_EARLY:
                del self._early[next(iter(self._early))]

    def _kill(self, request: Request) -> None:
        ask = request.parse(_Kill)
        for run in self._running.values():
            if run.process.pid == ask.pid:
                run.process.signal(ask.signum)
                return
        raise RpcError(errno.ESRCH, f"process {ask.pid} is none that runs here for anybody")

    def _list(self, request: Request) -> WireMap:
        procs: list[Wire] = [{"pid": run.process.pid, "cmd": run.name} for run in self._running.values()]
        return {"rank": self._rank, "procs": procs}


class _Run:
    """One exec request, and its process."""

    def __init__(self, ask: _Exec, request: Request, *, rank: int, uri: str) -> None:
        self._request = request
        self._rank = str(rank)
        self._credit = bool(ask.flags & Flag.WRITE_CREDIT)
        self._overrun: RpcError | None = None
        self._scope = trio.CancelScope()
        self._outputs = [name for name, flag in ((STDOUT, Flag.STDOUT), (STDERR, Flag.STDERR)) if ask.flags & flag]
        self.name = ask.cmd.cmdline[0]
        env = {**_environment(ask.cmd.env), "FLUXRES_URI": uri}
        self.process = RemoteProcess(ask.cmd.cmdline, env=env, cwd=ask.cmd.cwd, outputs=self._outputs)

    def write(self, data: bytes, *, eof: bool) -> None:
        """Take input for the process. A requester that sends more than it may loses the process."""
        try:
            self.process.write(data, eof=eof)
        except RpcError as error:
            self._overrun = error
            self._scope.cancel()

    async def attend(self) -> None:
        """Tell the requester all about the process, to its end."""
        await self._request.stream({"type": "started", "pid": self.process.pid})
        if self._credit:
            await self._request.stream({"type": "add-credit", "channels": {STDIN: CREDIT}})
        with self._scope:
            async with trio.open_nursery() as nursery:
                feeding: trio.CancelScope = await nursery.start(self._feed)
                for name in self._outputs:
                    nursery.start_soon(self._relay, name)
                status = await self.process.ended()
                feeding.cancel()
                await self._request.stream({"type": "finished", "status": status})
        if self._overrun is not None:
            raise self._overrun

    async def _feed(self, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await self.process.feed(self._give_credit)

    async def _give_credit(self, taken: int) -> None:
        if self._credit:
            await self._request.stream({"type": "add-credit", "channels": {STDIN: taken}})

    async def _relay(self, name: str) -> None:
        """Send one stream of output on, until its last writer has closed it."""
        while data := await self.process.read(name):
            await self._send_output({"stream": name, "rank": self._rank, **_encoded(data)})
        await self._send_output({"stream": name, "rank": self._rank, "eof": True})

    async def _send_output(self, io: WireMap) -> None:
        await self._request.stream({"type": "output", "pid": self.process.pid, "io": io})


def _environment(given: Mapping[str, str]) -> Mapping[str, str]:
    """The environment that a command asks for; one that asks for none gets the broker's search path."""
    return given or {"PATH": os.environ.get("PATH", os.defpath)}


def _encoded(data: bytes) -> WireMap:
    """Output as RFC 24 has it: text where it is UTF-8."""
    try:
        return {"data": data.decode()}
    except UnicodeDecodeError:
        return {"data": binascii.b2a_base64(data, newline=False).decode(), "encoding": "base64"}


def _decoded(io: _Io) -> bytes:
    if io.encoding != "base64":
        return io.data.encode()
    try:
        return binascii.a2b_base64(io.data, strict_mode=True)
    except binascii.Error as error:
        raise RpcError(errno.EPROTO, f"cannot take input: its data is not base64: {error}") from error
