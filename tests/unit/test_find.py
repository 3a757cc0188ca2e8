"""fluxres_shell.find: the facts about a shell, and that a process which is not it is never touched."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fluxres_shell import claim as claims
from fluxres_shell import find as finding
from fluxres_shell import pidfd as pidfds
from fluxres_shell.claim import ClaimRecord
from fluxres_shell.find import Found, Kind, PeerMismatch, bind, connect, find

SHA = "ab" * 32
BOUND = 20.0
NO_SUCH_PID = 2**31 - 1
BOOT_ID = claims.read_boot_id()
PID_NS = claims.read_pid_namespace()

Shell = subprocess.Popen[str]

both = pytest.mark.parametrize("force_fallback", [False, True], ids=["pidfs", "fallback"])

SHELL = """
    import os, sys
    from fluxres_shell import claim as claims, find
    dirfd = os.open(sys.argv[1], os.O_RDONLY)
    if sys.argv[2] == "claim":
        claim = claims.take(dirfd, "n", "ab" * 32)
    for line in sys.stdin:
        if line == "bind\\n":
            listener = find.bind(dirfd)
        elif line == "unbind\\n":
            listener.close()
        elif line == "serve\\n":
            listener.setblocking(True)
            with listener.accept()[0] as sock:
                sock.sendall(b"hello from " + str(os.getpid()).encode())
        print("ok", flush=True)
"""


class StartShell(Protocol):
    """Starts a process that claims a directory, the test's own by default."""

    def __call__(self, directory: Path | None = None, *, mode: str = "claim") -> Shell: ...


@pytest.fixture(autouse=True)
def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found, nothing here may send a signal."""

    def forbidden(pidfd: int, signum: int) -> None:
        raise AssertionError(f"signal {signum} sent")

    monkeypatch.setattr(signal, "pidfd_send_signal", forbidden)


@pytest.fixture
def dirfd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def order(shell: Shell, command: str) -> None:
    """Have the shell do something, and wait until it has."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{command}\n")
    shell.stdin.flush()
    assert shell.stdout.readline() == "ok\n"


@pytest.fixture
def start_shell(tmp_path: Path) -> Iterator[StartShell]:
    """Starts processes that claim the directory, as a shell would, and ends them."""
    shells: list[Shell] = []

    def start(directory: Path | None = None, *, mode: str = "claim") -> Shell:
        shell = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SHELL), str(directory or tmp_path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        shells.append(shell)
        order(shell, "hello")
        return shell

    yield start
    for shell in shells:
        for pipe in (shell.stdin, shell.stdout):
            assert pipe is not None
            pipe.close()
        shell.kill()
        shell.wait(BOUND)


def write_claim(directory: Path, *, pid: int, boot_id: str = BOOT_ID, pid_ns: int = PID_NS) -> Path:
    """A claim, not locked, that says what it is told to."""
    record = ClaimRecord(
        version=1,
        pid=pid,
        pid_ns=pid_ns,
        boot_id=boot_id,
        nonce="n",
        spec_sha256=SHA,
        void=False,
        reason="",
    )
    path = directory / claims.CLAIM
    path.write_bytes(record.encode())
    return path


def use_fallback(monkeypatch: pytest.MonkeyPatch, force_fallback: bool) -> None:
    for name in ("peer_pidfd", "same_process"):
        function = getattr(pidfds, name)
        monkeypatch.setattr(pidfds, name, functools.partial(function, force_fallback=force_fallback))


def test_nothing_and_unclaimed(dirfd: int, tmp_path: Path) -> None:
    assert find(dirfd) == Found(kind=Kind.NOTHING)
    (tmp_path / "claim.17.temporary").touch()
    (tmp_path / finding.SPEC).touch()
    assert find(dirfd) == Found(kind=Kind.UNCLAIMED)


def test_void(dirfd: int) -> None:
    assert claims.void(dirfd, "n", "cancelled")
    with find(dirfd) as found:
        assert (found.kind, found.reason, found.locked) == (Kind.VOID, "cancelled", False)
        assert found.claim is not None


def test_alive(dirfd: int, start_shell: StartShell) -> None:
    shell = start_shell()
    with find(dirfd) as found:
        assert (found.kind, found.locked, found.rebooted) == (Kind.ALIVE, True, False)
        assert found.claim is not None
        assert found.claim.pid == shell.pid
        assert found.pidfd is not None
        assert pidfds.pid_of(found.pidfd) == shell.pid
        shell.kill()
        assert pidfds.wait_dead(found.pidfd, BOUND)
        pidfd = found.pidfd
    found.close()  # a second time
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(pidfd)


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "reaped"])
def test_dead(dirfd: int, start_shell: StartShell, reaped: bool) -> None:
    shell = start_shell()
    shell.kill()
    os.waitid(os.P_PID, shell.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        shell.wait(BOUND)
    found = find(dirfd)
    assert (found.kind, found.rebooted, found.pidfd) == (Kind.DEAD, False, None)
    assert find(dirfd, boot_id="another").rebooted


def test_reused_pid_is_dead(dirfd: int, tmp_path: Path) -> None:
    """A living stranger has the pid now: the lock tells."""
    stranger = subprocess.Popen(["sleep", "1000"])
    write_claim(tmp_path, pid=stranger.pid)
    found = find(dirfd)
    assert (found.kind, found.pidfd) == (Kind.DEAD, None)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait(BOUND)


@pytest.mark.parametrize(
    ("pid", "boot_id", "pid_ns", "rebooted"),
    [
        (NO_SUCH_PID, BOOT_ID, PID_NS, False),  # a pid that nobody has here
        (os.getppid(), BOOT_ID, PID_NS - 1, False),  # one that a stranger has here, its shell elsewhere
        (os.getppid(), "another", PID_NS, True),  # another host, on a shared file system
    ],
)
def test_locked_from_out_of_sight(
    dirfd: int, tmp_path: Path, pid: int, boot_id: str, pid_ns: int, rebooted: bool
) -> None:
    with open(write_claim(tmp_path, pid=pid, boot_id=boot_id, pid_ns=pid_ns), "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        found = find(dirfd)
    assert (found.kind, found.locked, found.pidfd) == (Kind.ALIVE, True, None)
    assert found.rebooted == rebooted


def test_dead_but_locked_has_no_pidfd(dirfd: int, tmp_path: Path) -> None:
    """A child between fork and exec still has the lock, its shell is a zombie: not DEAD yet, but no
    pidfd either, as the pid may be anybody's the next moment."""
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    before = os.listdir("/proc/self/fd")
    with open(write_claim(tmp_path, pid=zombie.pid), "rb") as heir:
        fcntl.flock(heir, fcntl.LOCK_EX)
        found = find(dirfd)
    assert (found.kind, found.pidfd) == (Kind.ALIVE, None)
    assert os.listdir("/proc/self/fd") == before
    zombie.wait(BOUND)


@pytest.mark.parametrize("errnum", [None, errno.ESRCH, errno.EINVAL])
def test_dies_while_being_found(
    dirfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errnum: int | None
) -> None:
    """The shell dies, and a stranger (or a thread: EINVAL) has its pid, just before it is opened."""
    holder = open(write_claim(tmp_path, pid=os.getppid()), "rb")  # noqa: SIM115 (closed in the middle of find)
    fcntl.flock(holder, fcntl.LOCK_EX)
    opened: list[int] = []
    real = os.pidfd_open

    def dies_first(pid: int) -> int:
        holder.close()
        if errnum is not None:
            raise OSError(errnum, os.strerror(errnum))
        opened.append(real(pid))
        return opened[-1]

    monkeypatch.setattr(os, "pidfd_open", dies_first)
    found = find(dirfd)
    assert (found.kind, found.pidfd) == (Kind.DEAD, None)
    for fd in opened:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_no_descriptors_is_no_fact(dirfd: int, start_shell: StartShell, monkeypatch: pytest.MonkeyPatch) -> None:
    start_shell()

    def exhausted(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        find(dirfd)


def test_corrupt(dirfd: int, tmp_path: Path) -> None:
    path = tmp_path / claims.CLAIM
    path.write_bytes(b"{")
    found = find(dirfd)
    assert (found.kind, found.locked) == (Kind.CORRUPT, False)
    assert "not JSON" in found.reason
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert find(dirfd).locked
    path.unlink()
    path.mkdir()
    assert "not a regular file" in find(dirfd).reason


@both
@pytest.mark.parametrize("timeout", [0.0, BOUND])
def test_connect(
    dirfd: int,
    start_shell: StartShell,
    monkeypatch: pytest.MonkeyPatch,
    force_fallback: bool,
    timeout: float,
) -> None:
    use_fallback(monkeypatch, force_fallback)
    shell = start_shell()
    with find(dirfd) as found:
        assert connect(dirfd, found, timeout=timeout) is None  # no socket there
        order(shell, "bind")
        sock = connect(dirfd, found, timeout=timeout)
        assert sock is not None
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        order(shell, "serve")
        assert sock.recv(100) == f"hello from {shell.pid}".encode()
        sock.close()
        order(shell, "unbind")
        assert connect(dirfd, found, timeout=timeout) is None  # refused
        order(shell, "bind")  # as it will when asked to by SIGUSR1
        again = connect(dirfd, found, timeout=timeout)
        assert again is not None
        again.close()


def test_connect_without_a_pidfd(dirfd: int, start_shell: StartShell) -> None:
    order(start_shell(), "bind")
    with find(dirfd, pid_ns=1) as found:
        assert found.pidfd is None
        sock = connect(dirfd, found)
        assert sock is not None
        sock.close()


@both
def test_connect_to_an_impostor(
    dirfd: int, start_shell: StartShell, monkeypatch: pytest.MonkeyPatch, force_fallback: bool
) -> None:
    use_fallback(monkeypatch, force_fallback)
    shell, impostor = start_shell(), start_shell(mode="impostor")
    order(impostor, "bind")
    with find(dirfd) as found, pytest.raises(PeerMismatch) as caught:
        connect(dirfd, found)
    assert f"process {impostor.pid} listens" in str(caught.value)
    assert f"not process {shell.pid}" in str(caught.value)


@both
def test_connect_to_the_dying(
    dirfd: int, start_shell: StartShell, monkeypatch: pytest.MonkeyPatch, force_fallback: bool
) -> None:
    """The shell dies between the connection and the look at its peer: no answer, and no mismatch."""
    use_fallback(monkeypatch, force_fallback)
    shell = start_shell()
    order(shell, "bind")
    peer_pidfd = pidfds.peer_pidfd

    def after_its_death(sock: socket.socket) -> int:
        shell.kill()
        shell.wait(BOUND)
        return peer_pidfd(sock)

    monkeypatch.setattr(pidfds, "peer_pidfd", after_its_death)
    with find(dirfd) as found:
        assert connect(dirfd, found) is None


def test_connect_to_a_full_backlog(dirfd: int, start_shell: StartShell) -> None:
    order(start_shell(), "bind")
    accepted: list[socket.socket] = []
    with find(dirfd) as found:
        for _ in range(finding.LISTEN_BACKLOG + 2):
            sock = connect(dirfd, found)
            if sock is None:
                break
            accepted.append(sock)
        assert finding.LISTEN_BACKLOG <= len(accepted) <= finding.LISTEN_BACKLOG + 1
        assert connect(dirfd, found, timeout=0.01) is None
        assert connect(dirfd, found, timeout=1e-9) is None
    for sock in accepted:
        sock.close()


def test_connect_needs_the_living(dirfd: int) -> None:
    with pytest.raises(ValueError, match="cannot connect to a shell that is NOTHING"):
        connect(dirfd, find(dirfd))


def test_deep_directory(tmp_path: Path, start_shell: StartShell) -> None:
    """A socket's own path is limited to 108 bytes."""
    deep = tmp_path.joinpath(*["a" * 100] * 5)
    deep.mkdir(parents=True)
    order(start_shell(deep), "bind")
    fd = os.open(deep, os.O_RDONLY)
    with find(fd) as found:
        sock = connect(fd, found)
        assert sock is not None
        sock.close()
    os.close(fd)


def test_bind_replaces_in_one_step(dirfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / finding.SOCK).touch()
    (tmp_path / finding.SOCK_TEMPORARY).touch()  # of a shell that was killed while binding
    rename = os.rename
    listening: list[bool] = []

    def probe(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"/proc/self/fd/{src_dir_fd}/{source}")
            listening.append(True)
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", probe)
    with bind(dirfd) as first, bind(dirfd) as second:
        assert listening == [True, True]  # before the name is there for anyone to dial
        assert not second.getblocking()
        assert not first.get_inheritable()
        assert os.listdir(tmp_path) == [finding.SOCK]
