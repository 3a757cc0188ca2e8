"""fluxres exec: what it makes of what brokers answer, and the whole way with the real service."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from clikit import Run
from fakebroker import Answer, FakeBroker

from fluxres.base.errors import RpcError
from fluxres.broker.attributes import Attributes
from fluxres.broker.connector import Connector
from fluxres.broker.rexec import Rexec
from fluxres.cli.main import main
from fluxres.cli.remote_run import RemoteRun
from fluxres.rpc.router import Router
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap

PATIENCE = 60


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(["exec", *argv])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


def output(rank: int, stream: str, data: str = "", **io: bool | str) -> WireMap:
    return {"type": "output", "pid": 1, "io": {"stream": stream, "rank": str(rank), "data": data, **io}}


def exited(rank: int, status: int, *said: WireMap) -> list[Answer]:
    """All that a broker says of a command that has ended."""
    ends = [output(rank, stream, eof=True) for stream in ("stdout", "stderr")]
    return [
        {"type": "started", "pid": 100 + rank},
        {"type": "add-credit", "channels": {"stdin": 4096}},
        *said,
        *ends,
        {"type": "finished", "status": status},
        errno.ENODATA,
    ]


class Brokers:
    """Four brokers, with what they answer to an exec request."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.answers: dict[int, Iterable[Answer]] = {}
        broker.on("attr.get", {"value": "4", "flags": 1})
        broker.handlers["rexec.exec"] = self._exec

    def _exec(self, message: Message, _payload: WireMap) -> Iterator[Answer]:
        yield from self.answers.get(message.nodeid, exited(message.nodeid, 0))

    def asked(self) -> list[int]:
        return sorted(message.nodeid for message in self.broker.messages if message.topic == "rexec.exec")


@pytest.fixture
def brokers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Brokers]:
    with FakeBroker(tmp_path / "local-0") as broker:
        monkeypatch.setenv("FLUXRES_URI", broker.uri)
        yield Brokers(broker)


def test_where_it_runs(run: Run, brokers: Brokers) -> None:
    for options, ranks in (
        (["-r", "0,2-3"], [0, 2, 3]),
        (["-r", "all", "-x", "1-2"], [0, 3]),
        (["-x", "0"], [1, 2, 3]),
        ([], [0, 1, 2, 3]),
    ):
        brokers.broker.messages.clear()
        assert run("-n", *options, "true") == (0, "", "")
        assert brokers.asked() == ranks
    assert run("-n", "-r0", "-x0", "true")[2] == "fluxres-exec: cannot run the command: no rank is left to run it on\n"
    for wrong in (["-r", "x", "true"], ["-r", "4294967290-4294967294", "true"], ["-x", "all", "true"], ["-n"], ["--"]):
        assert run(*wrong)[0] == 2


def test_what_is_asked(run: Run, brokers: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "b")
    run("-n", "-r0", "--", "cmd", "-x", "-n")
    payload = next(payload for topic, payload in brokers.broker.seen if topic == "rexec.exec")
    cmd = payload["cmd"]
    assert isinstance(cmd, dict)
    assert cmd["cmdline"] == ["cmd", "-x", "-n"]
    assert cmd["cwd"] == os.getcwd()
    env = cmd["env"]
    assert isinstance(env, dict)
    assert env["A"] == "b"
    assert "FLUXRES_URI" not in env
    run("-n", "-r0", "-d", "/tmp", "true")
    run("-n", "-r0", "-d", "none", "true")
    asked = [payload["cmd"] for topic, payload in brokers.broker.seen if topic == "rexec.exec"]
    assert [isinstance(each, dict) and each.get("cwd") for each in asked] == [os.getcwd(), "/tmp", None]


def test_output(run: Run, brokers: Brokers) -> None:
    said = [output(1, "stdout", "a\nb"), output(1, "stderr", "e\n"), output(1, "stdout", "/w==", encoding="base64")]
    brokers.answers = {1: exited(1, 0, said[0], said[1], output(1, "stdout", "c\nd"))}
    assert run("-n", "-r1", "x") == (0, "a\nbc\nd", "e\n")
    assert run("-n", "-l", "-r1", "x") == (0, "1: a\n1: bc\n1: d", "1: e\n")
    brokers.answers = {1: [{"type": "started", "pid": 7}, output(1, "stdout", "a"), (errno.EHOSTUNREACH, "gone")]}
    assert run("-n", "-l", "-r1", "x") == (68, "1: a", "fluxres-exec: cannot run x on rank 1: gone\n")


@pytest.mark.parametrize(
    ("statuses", "code", "said"),
    [
        ([0, 0, 0, 0], 0, ""),
        ([2 << 8] * 4, 2, "[0-3]: Exit 2\n"),
        ([0, 1 << 8, 3 << 8, 1 << 8], 3, "[1,3]: Exit 1\n2: Exit 3\n"),
        ([0, 0, 11 | 0x80, 1 << 8], 139, "2: Segmentation fault\n3: Exit 1\n"),
        ([0, 0, 0, 34], 162, "3: Real-time signal 0\n"),
    ],
)
def test_exit_codes(statuses: list[int], code: int, said: str, run: Run, brokers: Brokers) -> None:
    brokers.answers = {rank: exited(rank, status) for rank, status in enumerate(statuses)}
    status, out, err = run("-n", "x")
    assert (status, out) == (code, "")
    assert sorted(err.splitlines()) == sorted(said.splitlines())
    assert run("-nq", "x") == (code, "", "")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ((errno.EHOSTUNREACH, "rank 2 is lost"), 68, "rank 2 is lost"),
        ((errno.ENOENT, "cannot start 'x': No such file or directory"), 127, "No such file or directory"),
        ((errno.EACCES, "cannot start 'x': Permission denied"), 126, "Permission denied"),
        ((errno.EPERM, "service rexec is for the instance owner"), 126, "service rexec is for the instance owner"),
        ((errno.EAGAIN, "too many"), 1, "too many"),
        (errno.ENODATA, 1, "No data available"),
    ],
)
def test_errors_of_a_rank(error: Answer, code: int, text: str, run: Run, brokers: Brokers) -> None:
    brokers.answers = {2: [error], 1: exited(1, 0)}
    assert run("-n", "x") == (code, "", f"fluxres-exec: cannot run x on rank 2: {text}\n")


def test_a_lost_connection(run: Run, brokers: Brokers) -> None:
    def cut(_message: Message, _payload: WireMap) -> Iterator[Answer]:
        brokers.broker.cut()
        yield from ()

    brokers.broker.handlers["rexec.exec"] = cut
    status, _out, err = run("-n", "-r0", "x")
    assert status == 1
    assert err.startswith("fluxres-exec: cannot reach the broker at ")


# -- the pure part


def test_input_waits_for_the_slowest() -> None:
    ranks = RemoteRun([0, 1])
    started: WireMap = {"type": "started", "pid": 1}
    ranks.take(0, started)
    ranks.take(0, {"type": "add-credit", "channels": {"stdin": 10}})
    assert ranks.room == 0
    assert str(ranks.unfinished) == "0-1"
    ranks.take(1, started)
    assert ranks.room == 0
    ranks.take(1, {"type": "add-credit", "channels": {"stdin": 4}})
    assert ranks.room == 4
    ranks.sent(4)
    assert ranks.room == 0
    ranks.take(1, {"type": "finished", "status": 0})
    assert ranks.room == 6
    assert ranks.running == {0: 1}
    assert ranks.ended(1, RpcError(errno.ENODATA)) is None
    assert ranks.ended(0, RpcError(errno.EHOSTUNREACH, "gone")) == "gone"
    assert ranks.done
    assert ranks.room == 0


# -- with the real service


@asynccontextmanager
async def broker(directory: Path) -> AsyncIterator[str]:
    """A broker of one rank that can do just this; its URI."""
    router = Router(rank=0, size=1)
    path = str(directory / "local-0")
    services = [Rexec(router=router, uri=f"local://{path}").service, Attributes(router, {"size": lambda: "1"}).service]
    async with trio.open_nursery() as nursery:
        for service in services:
            await nursery.start(service.run)
        await nursery.start(Connector(path, router, owner=os.getuid(), guests=False).run)
        yield f"local://{path}"
        nursery.cancel_scope.cancel()


def command(uri: str, *argv: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "fluxres.cli.main", "exec", *argv], {**os.environ, "FLUXRES_URI": uri}


async def complete(uri: str, *argv: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run fluxres exec with this input: its exit status and output."""
    args, env = command(uri, *argv)
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(args, env=env, stdin=stdin, capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout, done.stderr


async def test_input_reaches_the_command_and_comes_back(tmp_path: Path) -> None:
    async with broker(tmp_path) as uri:
        data = os.urandom(1_000_000)
        assert await complete(uri, "cat", stdin=data) == (0, data, b"")
        assert await complete(uri, "-l", "printf", "a", stdin=data) == (0, b"0: a", b"")
        assert await complete(uri, "true", stdin=data) == (0, b"", b"")
        assert await complete(uri, "-n", "cat", stdin=data) == (0, b"", b"")
        assert await complete(uri, "-l", "sh", "-c", "pwd; exit 3") == (
            3,
            f"0: {os.getcwd()}\n".encode(),
            b"0: Exit 3\n",
        )
        said = b"fluxres-exec: cannot run ./nosuch on rank 0: No such file or directory\n"
        assert await complete(uri, "./nosuch") == (127, b"", said)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signals_go_to_the_command(signum: int, code: int, tmp_path: Path) -> None:
    async with broker(tmp_path) as uri:
        args, env = command(uri, "-nq", "sh", "-c", "echo ready; exec sleep 1000")
        process = await trio.lowlevel.open_process(args, env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert process.stdout is not None
        with trio.fail_after(PATIENCE):
            assert await process.stdout.receive_some() == b"ready\n"
            process.send_signal(signum)
            assert await process.wait() == code
        await process.stdout.aclose()


async def test_ctrl_c_in_the_end_leaves_a_command_that_does_not_heed_it(tmp_path: Path) -> None:
    script = "trap 'echo again' INT; echo ready; while :; do sleep 1000 & wait; done"
    async with broker(tmp_path) as uri:
        args, env = command(uri, "-nv", "sh", "-c", script)
        process = await trio.lowlevel.open_process(
            args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with trio.fail_after(PATIENCE):
            assert await process.stdout.receive_some() == b"ready\n"
            while process.poll() is None:  # however slow this machine is, three come close enough together in the end
                process.send_signal(signal.SIGINT)
                await trio.sleep(0.05)
        said = b""
        while data := await process.stderr.receive_some():
            said += data
        assert process.returncode == 1
        assert b"fluxres-exec: sending SIGINT to 1 processes\n" in said
        assert b"one more ctrl-C within 1s leaves the command\n" in said
        assert said.endswith(b"fluxres-exec: leaving the command where it still runs: 0\n")
        await process.stdout.aclose()
        await process.stderr.aclose()
