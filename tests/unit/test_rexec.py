"""The `rexec` service: what its responses are, that output waits for its reader, and that no process outlives its
requester."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fluxres.base.errors import RpcError
from fluxres.broker import remote, rexec
from fluxres.broker.remote import INPUT_BOUND, RemoteProcess
from fluxres.broker.rexec import BORROWED, MAX_EARLY, Flag, Rexec
from fluxres.rpc.handle import Handle, ResponseStream
from fluxres.rpc.router import Router
from fluxres.wire.messages import Message, MessageFlag, Role, request
from fluxres.wire.payload import WireMap, pack

BOTH = Flag.STDOUT | Flag.STDERR
ALL = BOTH | Flag.WRITE_CREDIT
PATIENCE = 60
POLL = 0.01


def command(*argv: str, flags: int = BOTH, cwd: str | None = None, **env: str) -> WireMap:
    """An exec request."""
    environment: WireMap = {"PATH": os.environ["PATH"], **env}
    cmd: WireMap = {"cmdline": [*argv], "env": environment, "opts": {}, "channels": []}
    return {"cmd": cmd if cwd is None else {**cmd, "cwd": cwd}, "flags": flags}


def shell(script: str, flags: int = BOTH) -> WireMap:
    return command("sh", "-c", script, flags=flags)


class Rank:
    """A rank with its service, and one who calls it."""

    def __init__(self) -> None:
        self.router = Router(rank=3, size=4)
        self.handle = Handle(self.router, "test", os.getuid())
        self.rexec = Rexec(router=self.router, uri="local:///here")

    async def all_of(self, ask: WireMap) -> list[WireMap]:
        """All responses to a request, to its end."""
        async with self.handle.stream("rexec.exec", ask) as replies:
            return [reply async for reply in replies]

    async def running(self) -> int:
        """How many processes run."""
        procs = (await self.handle.call("rexec.list"))["procs"]
        assert isinstance(procs, list)
        return len(procs)


@pytest.fixture
async def rank() -> AsyncIterator[Rank]:
    made = Rank()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.rexec.service.run)
        yield made
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def started(rank: Rank, ask: WireMap) -> AsyncIterator[tuple[int, ResponseStream]]:
    """A process that runs: its pid, and what it says from now on."""
    async with rank.handle.stream("rexec.exec", ask) as replies:
        first = await replies.__anext__()
        assert first["type"] == "started"
        pid = first["pid"]
        assert isinstance(pid, int)
        yield pid, replies


async def until(check: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not check():
            await trio.testing.wait_all_tasks_blocked(POLL)


def is_gone(pid: int) -> bool:
    """Whether a process is dead and reaped."""
    return not Path(f"/proc/{pid}").exists()


def is_dead(pid: int) -> bool:
    """The same, or a zombie: orphans are reaped by whoever is there to do so."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def output(replies: list[WireMap], stream: str) -> bytes:
    """What came out of one stream, its end included."""
    text = b""
    ended = False
    for reply in replies:
        io = reply.get("io")
        if reply["type"] == "output" and isinstance(io, dict) and io["stream"] == stream:
            assert not ended
            assert io["rank"] == "3"
            ended = io.get("eof") is True
            text += str(io.get("data", "")).encode()
    assert ended
    return text


def status(replies: list[WireMap]) -> WireMap:
    return next(reply for reply in replies if reply["type"] == "finished")


# -- what a command says


async def test_output_and_status(rank: Rank) -> None:
    replies = await rank.all_of(shell("echo out; echo err >&2; exit 3"))
    assert replies[0]["type"] == "started"
    assert output(replies, "stdout") == b"out\n"
    assert output(replies, "stderr") == b"err\n"
    assert status(replies) == {"type": "finished", "status": 3 << 8}
    assert is_gone(int(str(replies[0]["pid"])))
    assert await rank.running() == 0


async def test_death_by_a_signal(rank: Rank) -> None:
    assert status(await rank.all_of(shell("kill -TERM $$")))["status"] == signal.SIGTERM


async def test_where_a_command_runs_and_with_what(rank: Rank, tmp_path: Path) -> None:
    ask = command("sh", "-c", 'pwd; echo "$A $FLUXRES_URI"', cwd=str(tmp_path), A="b", FLUXRES_URI="local:///there")
    assert output(await rank.all_of(ask), "stdout") == f"{tmp_path}\nb local:///here\n".encode()


async def test_bytes_that_are_no_text(rank: Rank) -> None:
    replies = await rank.all_of(shell(r"printf '\377'"))
    io = next(reply["io"] for reply in replies if reply["type"] == "output" and "data" in str(reply["io"]))
    assert io == {"stream": "stdout", "rank": "3", "data": "/w==", "encoding": "base64"}


async def test_streams_that_nobody_wants_go_nowhere(rank: Rank) -> None:
    replies = await rank.all_of(shell("echo out; echo err >&2", flags=Flag.STDERR))
    assert output(replies, "stderr") == b"err\n"
    assert {str(reply["type"]) for reply in replies} == {"started", "output", "finished"}
    assert [reply["type"] for reply in await rank.all_of(shell("echo x", flags=0))] == ["started", "finished"]


@pytest.mark.parametrize(
    ("ask", "errnum", "text"),
    [
        (command("no-such-program"), errno.ENOENT, "cannot start 'no-such-program': No such file or directory"),
        (command("/etc/passwd"), errno.EACCES, "cannot start '/etc/passwd': Permission denied"),
        (command("true", cwd="/no/such"), errno.EINVAL, "working directory '/no/such': No such file or directory"),
        (command("true\0x"), errno.EINVAL, "NUL byte"),
        ({"cmd": {"cmdline": []}}, errno.EPROTO, "cmdline"),
        ({"cmd": {"cmdline": ["true"], "channels": ["AUX"]}}, errno.EPROTO, "channels"),
    ],
)
async def test_what_cannot_be_started(ask: WireMap, errnum: int, text: str, rank: Rank) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RpcError, match=text) as caught:
        await rank.all_of(ask)
    assert caught.value.errnum == errnum
    assert len(os.listdir("/proc/self/fd")) == fds


async def test_a_request_that_is_not_streaming_is_refused(rank: Rank) -> None:
    with pytest.raises(RpcError) as caught:
        await rank.handle.call("rexec.exec", command("true"))
    assert caught.value.errnum == errno.EPROTO


async def test_guests_are_refused(rank: Rank) -> None:
    answers: list[Message] = []

    class Guest:
        id = "guest"
        hop = None

        def deliver(self, message: Message) -> None:
            answers.append(message)

        async def drained(self, asked: object) -> None:
            await trio.lowlevel.checkpoint()

        def on_room(self, asked: object, callback: Callable[[], None]) -> None:
            callback()

    guest = Guest()
    rank.router.add_endpoint(guest)
    for topic in ("exec", "kill", "list"):
        asked = request(f"rexec.{topic}", pack(command("true")), matchtag=1, flags=MessageFlag.STREAMING, userid=7)
        rank.router.receive(guest, asked._replace(rolemask=Role.USER | Role.LOCAL))
    assert [answer.errnum for answer in answers] == [errno.EPERM] * 3


async def test_processes_are_bounded(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rexec, "MAX_PROCESSES", 1)
    async with started(rank, command("sleep", "1000")):
        with pytest.raises(RpcError) as caught:
            await rank.all_of(command("true"))
        assert caught.value.errnum == errno.EAGAIN


# -- input


def write(rank: Rank, matchtag: int, data: str = "", *, eof: bool = False, **io: str) -> None:
    payload: WireMap = {"matchtag": matchtag, "io": {"stream": "stdin", "rank": "0", "data": data, "eof": eof, **io}}
    rank.handle.send("rexec.write", payload)


async def test_input_and_its_credit(rank: Rank) -> None:
    """The handle's first call has matchtag 1."""
    async with started(rank, command("cat", flags=ALL)) as (_pid, replies):
        assert await replies.__anext__() == {"type": "add-credit", "channels": {"stdin": INPUT_BOUND}}
        write(rank, 1, "one\n")
        assert await replies.__anext__() == {"type": "add-credit", "channels": {"stdin": 4}}
        write(rank, 1, "dHdvCg==", encoding="base64")
        write(rank, 1, "x", stream="AUX")
        write(rank, 2, "x")
        write(rank, 1, eof=True)
        write(rank, 1, "late")
        rest = [reply async for reply in replies]
    assert output(rest, "stdout") == b"one\ntwo\n"
    assert status(rest)["status"] == 0


async def test_input_before_the_process(rank: Rank) -> None:
    async with rank.handle.stream("rexec.exec", command("cat")) as replies:
        write(rank, 1, "early", eof=True)
        assert output([reply async for reply in replies], "stdout") == b"early"


async def test_early_input_is_bounded(rank: Rank) -> None:
    for tag in range(2, 2 * MAX_EARLY):
        write(rank, tag, "old", eof=True)
    write(rank, 1, "x" * BORROWED)
    write(rank, 1, "more")
    write(rank, 1, eof=True)
    assert output(await rank.all_of(command("cat")), "stdout") == b"x" * BORROWED
    assert output(await rank.all_of(shell("cat & wait")), "stdout") == b""


async def test_more_input_than_its_credit_ends_the_process(rank: Rank) -> None:
    with pytest.raises(RpcError, match="more standard input") as caught:
        async with started(rank, command("sleep", "1000")) as (pid, replies):
            for _ in range(5):  # a pipe takes 64 KiB
                write(rank, 1, "x" * (INPUT_BOUND // 2))
            async for _reply in replies:
                pass
    assert caught.value.errnum == errno.ENOBUFS
    await until(lambda: is_gone(pid))


async def test_input_that_nobody_reads_is_dropped(rank: Rank) -> None:
    ask = shell("exec <&-; echo closed; exec sleep 1000", flags=ALL)
    async with started(rank, ask) as (pid, replies):
        credit = 0
        async for reply in replies:
            if reply["type"] == "output":
                write(rank, 1, "x" * INPUT_BOUND)
                write(rank, 1, eof=True)
            elif credit and reply["type"] == "add-credit":
                await rank.handle.call("rexec.kill", {"pid": pid, "signum": signal.SIGKILL})
            credit += reply["type"] == "add-credit"
    assert credit == 2


async def test_the_end_of_a_process_ends_its_input(rank: Rank) -> None:
    replies = await rank.all_of(shell("exec 3<&0; cat <&3 & true"))
    assert output(replies, "stdout") == b""


async def test_bad_base64_is_dropped_with_its_reason(rank: Rank) -> None:
    with pytest.raises(RpcError) as caught:
        payload: WireMap = {"matchtag": 1, "io": {"stream": "stdin", "data": "?", "encoding": "base64"}}
        await rank.handle.call("rexec.write", payload)
    assert caught.value.errnum == errno.EPROTO


# -- signals, and the end


async def test_kill(rank: Rank) -> None:
    async with started(rank, command("sleep", "1000")) as (pid, replies):
        await rank.handle.call("rexec.kill", {"pid": pid, "signum": signal.SIGINT})
        assert status([reply async for reply in replies])["status"] == signal.SIGINT
    for other in (pid, os.getpid(), 1):
        with pytest.raises(RpcError) as caught:
            await rank.handle.call("rexec.kill", {"pid": other, "signum": signal.SIGINT})
        assert caught.value.errnum == errno.ESRCH


def said_pid(reply: WireMap) -> int:
    """The pid that a process says."""
    io = reply["io"]
    assert isinstance(io, dict)
    return int(str(io["data"]))


async def test_nothing_outlives_its_requester(rank: Rank) -> None:
    async with started(rank, shell("sleep 1000 & echo $!; wait")) as (pid, replies):
        child = said_pid(await replies.__anext__())
    await until(lambda: is_gone(pid) and is_dead(child))
    assert await rank.running() == 0


async def test_what_a_dead_process_left_behind_ends_with_its_requester(rank: Rank) -> None:
    async with started(rank, shell("sleep 1000 & echo $!")) as (pid, replies):
        said = [await replies.__anext__(), await replies.__anext__()]
        assert status(said)["status"] == 0
        child = said_pid(next(reply for reply in said if reply["type"] == "output"))
        assert await rank.running() == 1
    await until(lambda: is_gone(pid) and is_dead(child))


async def test_a_process_that_does_not_heed_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The incarnation ends: bounded, though the process will not go."""
    monkeypatch.setattr(remote, "GRACE", 0.05)
    rank = Rank()
    ask = shell("trap '' TERM; echo ready; while :; do sleep 1000; done")
    async with trio.open_nursery() as requester:
        async with trio.open_nursery() as incarnation:
            await incarnation.start(rank.rexec.service.run)
            replies = await requester.start(_hold, rank, ask)
            pid = int(str((await replies.__anext__())["pid"]))
            assert (await replies.__anext__())["type"] == "output"
            incarnation.cancel_scope.cancel()
        assert is_gone(pid)
        requester.cancel_scope.cancel()


async def _hold(rank: Rank, ask: WireMap, task_status: trio.TaskStatus[ResponseStream]) -> None:
    async with rank.handle.stream("rexec.exec", ask) as replies:
        task_status.started(replies)
        await trio.sleep_forever()


async def test_a_process_that_cannot_be_killed_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "GRACE", 0.01)
    monkeypatch.setattr(remote, "KILL_WAIT", 0.01)
    monkeypatch.setattr(os, "killpg", lambda _pid, _signum: None)
    process = RemoteProcess(["sleep", "1000"], env={"PATH": os.environ["PATH"]}, cwd=None, outputs=())
    await process.kill()
    process.close()
    assert f"leaving process {process.pid} alone" in caplog.text
    _reap(process.pid)


def _reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


async def test_a_slow_reader_holds_the_process_up(rank: Rank) -> None:
    """What is under way is bounded by the stream's buffer; nothing is lost."""
    size = 32 * 1024 * 1024
    async with started(rank, command("head", "-c", str(size), "/dev/zero")) as (pid, replies):
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not is_dead(pid)
        taken = 0
        async for reply in replies:
            io = reply.get("io")
            if isinstance(io, dict):
                taken += len(str(io.get("data", "")))
    assert taken == size
