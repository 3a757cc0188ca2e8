"""The launcher: forks shells on request, reaps them, and may be killed without harm."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shellkit import PATIENCE, make_spec, process_gone, read_journal, wait_until

from fluxres.wire.payload import pack, unpack_map
from fluxres_shell import find
from fluxres_shell.records import ExitRecord
from fluxres_shell.segments import exit_record


class Launcher:
    """A real launcher and the broker's end of its socket."""

    def __init__(self, **env: str) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fluxres_shell.main", "--launcher", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **env},
            )
        self.shells: list[int] = []

    def close(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait(PATIENCE)

    def launch(self, path: Path, *command: str, **changes: object) -> int:
        """Have a shell forked for a new directory; the reading end of `ready`."""
        path.mkdir(mode=0o700)
        (path / "spec").write_text(json.dumps(make_spec(path, *command, **changes)))
        return self.send(path)

    def send(self, path: Path) -> int:
        """Ask for a shell of the directory `path`."""
        dirfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        ready, theirs = os.pipe()
        packet = pack({"dir": str(path), "id": 7, "rank": 0})
        socket.send_fds(self.sock, [packet], [dirfd, theirs])
        os.close(dirfd)
        os.close(theirs)
        return ready


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    one = Launcher()
    yield one
    one.close()


def wait_ready(ready: int) -> None:
    """Wait until the shell has closed its end."""
    assert select.select([ready], [], [], PATIENCE)[0]
    assert os.read(ready, 1) == b""
    os.close(ready)


def exit_in(path: Path) -> ExitRecord | None:
    dirfd = os.open(path, os.O_RDONLY)
    try:
        return exit_record(dirfd)
    finally:
        os.close(dirfd)


def shell_pid(path: Path) -> int:
    dirfd = os.open(path, os.O_RDONLY)
    try:
        with find.find(dirfd) as facts:
            assert facts.claim is not None
            return facts.claim.pid
    finally:
        os.close(dirfd)


def test_ready_closes_once_the_shell_listens(launcher: Launcher, tmp_path: Path) -> None:
    ready = launcher.launch(tmp_path / "s", "sleep", "1000")
    wait_ready(ready)
    dirfd = os.open(tmp_path / "s", os.O_RDONLY)
    with find.find(dirfd) as facts:
        assert facts.kind is find.Kind.ALIVE
        sock = find.connect(dirfd, facts)
    assert sock is not None
    sock.close()
    os.close(dirfd)
    os.kill(shell_pid(tmp_path / "s"), signal.SIGKILL)


def test_many_shells_run_and_are_reaped(launcher: Launcher, tmp_path: Path) -> None:
    ready = [launcher.launch(tmp_path / str(index), "sh", "-c", f"exit {index}", id=index + 1) for index in range(20)]
    for one in ready:
        wait_ready(one)
    for index in range(20):
        wait_until(lambda index=index: exit_in(tmp_path / str(index)) is not None)  # type: ignore[misc]
        record = exit_in(tmp_path / str(index))
        assert record is not None
        assert record.status == index << 8
        pid = shell_pid(tmp_path / str(index))
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))  # type: ignore[misc]


@pytest.mark.parametrize("how", ["socket", "SIGKILL"])
def test_shells_outlive_their_launcher(launcher: Launcher, tmp_path: Path, how: str) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    wait_ready(launcher.launch(tmp_path / "s", "sh", "-c", f"read x < {fifo}; exit 4"))
    if how == "socket":
        launcher.sock.close()
        assert launcher.process.wait(PATIENCE) == 0
    else:
        launcher.process.kill()
        launcher.process.wait(PATIENCE)
    fifo.write_text("go\n")
    wait_until(lambda: exit_in(tmp_path / "s") is not None)
    record = exit_in(tmp_path / "s")
    assert record is not None
    assert record.status == 4 << 8


def test_a_shell_depends_on_nothing_of_the_launcher(launcher: Launcher, tmp_path: Path) -> None:
    wait_ready(launcher.launch(tmp_path / "s", "sleep", "1000"))
    pid = shell_pid(tmp_path / "s")
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"

    def links() -> set[str]:
        found = set()
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        return found

    theirs = os.readlink(f"/proc/self/fd/{launcher.sock.fileno()}")
    assert theirs not in links()
    wait_until(lambda: os.readlink(f"/proc/{pid}/fd/2") == os.devnull)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process_gone(pid))


@pytest.mark.parametrize("packet", [b"\xff", b"\xa0", pack({"dir": "x", "id": "7", "rank": 0}), pack([])])
@pytest.mark.parametrize("descriptors", [0, 1, 2, 3])
def test_nonsense_is_answered(launcher: Launcher, packet: bytes, descriptors: int) -> None:
    socket.send_fds(launcher.sock, [packet], [launcher.sock.fileno()] * descriptors)
    answer = unpack_map(launcher.sock.recv(4096))
    assert answer["errnum"] == errno.EPROTO
    assert launcher.process.poll() is None


@pytest.mark.parametrize(("point", "runs"), [("fork.before", False), ("fork.after", True)])
def test_killed_around_the_fork(tmp_path: Path, point: str, runs: bool) -> None:
    launcher = Launcher(FLUXRES_FAILPOINT=point)
    try:
        wait_ready(launcher.launch(tmp_path / "s", "true"))
        assert launcher.process.wait(PATIENCE) == -signal.SIGKILL
        if runs:
            wait_until(lambda: exit_in(tmp_path / "s") is not None)
        assert (tmp_path / "s" / "claim").exists() == runs
    finally:
        launcher.close()


def test_the_journal_of_a_forked_shell_is_whole(launcher: Launcher, tmp_path: Path) -> None:
    wait_ready(launcher.launch(tmp_path / "s", "echo", "hello"))
    wait_until(lambda: exit_in(tmp_path / "s") is not None)
    dirfd = os.open(tmp_path / "s", os.O_RDONLY)
    records = read_journal(dirfd)
    os.close(dirfd)
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
