"""fluxres_shell.claim: invariant I2 begins here. Real files, real locks, real racers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres_shell import claim as claims
from fluxres_shell.claim import ClaimCorrupt, ClaimLost, ClaimRecord

SHA = "ab" * 32
ROUNDS = 100
RACERS = 4
BOUND = 20.0
RECORD = ClaimRecord(
    version=1, pid=17, pid_ns=4026531836, boot_id="b", nonce="n", spec_sha256=SHA, void=False, reason=""
)


@pytest.fixture
def dirfd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_take_is_locked_and_readable(dirfd: int, tmp_path: Path) -> None:
    with claims.take(dirfd, "nonce-1", SHA) as claim:
        assert os.listdir(tmp_path) == ["claim"]
        assert not os.get_inheritable(claim.fd)
        record = claims.read(dirfd)
        assert record == claim.record
        assert record is not None
        assert (record.pid, record.nonce, record.spec_sha256) == (os.getpid(), "nonce-1", SHA)
        assert (record.void, record.boot_id) == (False, claims.read_boot_id())
        fd = claims.open_claim(dirfd)
        assert fd is not None
        assert claims.is_locked(fd)
        assert claims.is_locked(fd)
    assert not claims.is_locked(fd)
    os.close(fd)


def test_second_take_is_lost_without_trace(dirfd: int, tmp_path: Path) -> None:
    with claims.take(dirfd, "n", SHA) as first:
        with pytest.raises(ClaimLost, match="cannot take the claim"):
            claims.take(dirfd, "n", SHA)
        assert not claims.void(dirfd, "n", "cancelled")
        assert claims.read(dirfd) == first.record
    with pytest.raises(ClaimLost):  # a dead shell's claim is a claim
        claims.take(dirfd, "n", SHA)
    assert os.listdir(tmp_path) == ["claim"]


def test_void_is_final(dirfd: int, tmp_path: Path) -> None:
    assert claims.void(dirfd, "n", "cancelled " * 1000)
    record = claims.read(dirfd)
    assert record is not None
    assert record.void
    assert record.reason.startswith("cancelled")
    assert not claims.void(dirfd, "n", "again")
    with pytest.raises(ClaimLost):
        claims.take(dirfd, "n", SHA)
    assert os.listdir(tmp_path) == ["claim"]


def test_no_claim(dirfd: int) -> None:
    assert claims.read(dirfd) is None
    assert claims.open_claim(dirfd) is None


def changed(**changes: object) -> bytes:
    return json.dumps({**json.loads(RECORD.encode()), **changes}).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (RECORD.encode()[:-5], "not JSON"),
        (b"[" * 4000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b" " * (claims.CLAIM_MAX + 1), "longer than 4096 bytes"),
        (changed(version=2), "version 2"),
        (changed(version=True), "version is True"),
        (changed(pid="1"), "pid is '1'"),
        (changed(pid=0), "pid is 0"),
        (changed(pid=2**31), "pid is 2147483648"),
        (changed(pid_ns=None), "pid_ns is None"),
        (changed(void=0), "void is 0"),
        (changed(nonce=7), "nonce is 7"),
        (changed(spec_sha256="ab"), "spec_sha256 is 'ab'"),
    ],
)
def test_corrupt(dirfd: int, tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "claim").write_bytes(content)
    with pytest.raises(ClaimCorrupt, match="cannot read the claim") as caught:
        claims.read(dirfd)
    assert why in str(caught.value)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_not_a_file_is_corrupt(dirfd: int, tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "claim")
    with pytest.raises(ClaimCorrupt, match="not a regular file"):
        claims.read(dirfd)


@given(st.binary(max_size=200))
def test_decode_never_fails_otherwise(content: bytes) -> None:
    with contextlib.suppress(ClaimCorrupt):
        claims.decode(content)


@given(nonce=st.text(max_size=100), reason=st.text(max_size=100), pid=st.integers(1, 2**22))
def test_decode_reverses_encode(nonce: str, reason: str, pid: int) -> None:
    record = replace(RECORD, nonce=nonce, reason=reason, pid=pid, void=True)
    assert claims.decode(record.encode()) == record


def test_too_long_to_write(dirfd: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the bound is 4096"):
        claims.take(dirfd, "n" * claims.CLAIM_MAX, SHA)
    assert os.listdir(tmp_path) == []


def test_sweep_leaves_the_locked(dirfd: int, tmp_path: Path) -> None:
    (tmp_path / "claim.17.dead").write_text("half a rec")
    (tmp_path / "claims-not-ours").touch()
    with open(tmp_path / "claim.18.alive", "wb") as racer:
        fcntl.flock(racer, fcntl.LOCK_EX)
        assert claims.sweep(dirfd) == ["claim.17.dead"]
        assert sorted(os.listdir(tmp_path)) == ["claim.18.alive", "claims-not-ours"]
    assert claims.sweep(dirfd) == ["claim.18.alive"]
    assert claims.sweep(dirfd) == []


def sweep_before_lock(dirfd: int, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have the first `times` temporaries swept between their creation and their lock."""
    flock = fcntl.flock
    left = times

    def sweep_then_flock(fd: int, operation: int) -> None:
        nonlocal left
        if operation == fcntl.LOCK_EX and left > 0:
            left -= 1
            monkeypatch.setattr(fcntl, "flock", flock)
            assert len(claims.sweep(dirfd)) == 1
            monkeypatch.setattr(fcntl, "flock", sweep_then_flock)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_then_flock)


def test_swept_racer_tries_again(dirfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_before_lock(dirfd, monkeypatch, claims.TAKE_ATTEMPTS - 1)
    with claims.take(dirfd, "n", SHA) as claim:
        assert os.listdir(tmp_path) == ["claim"]
        assert claims.read(dirfd) == claim.record


def test_swept_racer_gives_up(dirfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    sweep_before_lock(dirfd, monkeypatch, claims.TAKE_ATTEMPTS)
    with pytest.raises(OSError, match="cannot write the claim"):
        claims.take(dirfd, "n", SHA)
    assert os.listdir(tmp_path) == []
    assert os.listdir("/proc/self/fd") == before


def test_directory_gone(dirfd: int, tmp_path: Path) -> None:
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        claims.take(dirfd, "n", SHA)


def python(script: str, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> int:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    return process.wait(BOUND)


RACER = """
    import os, sys
    from fluxres_shell import claim as claims
    for line in sys.stdin:
        dirfd = os.open(line.strip(), os.O_RDONLY)
        print("ready", flush=True)
        sys.stdin.readline()
        claim = None
        try:
            if sys.argv[1] == "void":
                print("won" if claims.void(dirfd, "n", "raced") else "lost", flush=True)
            else:
                claim = claims.take(dirfd, "n", "ab" * 32)
                print("won", flush=True)
        except claims.ClaimLost:
            print("lost", flush=True)
        sys.stdin.readline()
        os.close(dirfd)
        if claim is not None:
            claim.close()
        print("done", flush=True)
"""


def race(racers: list[subprocess.Popen[str]], directory: Path) -> subprocess.Popen[str]:
    """One round: all are let go at once; the one winner."""
    directory.mkdir()
    for racer in racers:
        tell(racer, str(directory))
    assert [hear(racer) for racer in racers] == ["ready"] * len(racers)
    for racer in racers:
        tell(racer, "go")
    results = [hear(racer) for racer in racers]
    assert sorted(results) == ["lost"] * (len(racers) - 1) + ["won"]
    return racers[results.index("won")]


def check_round(directory: Path, winner: subprocess.Popen[str], is_void: bool) -> None:
    assert os.listdir(directory) == ["claim"]
    fd = os.open(directory / "claim", os.O_RDONLY)
    record = claims.read_open(fd)
    assert (record.pid, record.void) == (winner.pid, is_void)
    assert claims.is_locked(fd) != is_void
    os.close(fd)


def test_racers(tmp_path: Path) -> None:
    """Shells, and a broker that voids: exactly one wins each round, and the others leave no trace."""
    racers = [python(RACER, "shell") for _ in range(RACERS - 1)] + [python(RACER, "void")]
    winners: set[int] = set()
    for number in range(ROUNDS):
        order = racers[number % RACERS :] + racers[: number % RACERS]
        winner = race(order, tmp_path / str(number))
        check_round(tmp_path / str(number), winner, is_void=winner is racers[-1])
        winners.add(winner.pid)
        for racer in racers:
            tell(racer, "end")
        assert [hear(racer) for racer in racers] == ["done"] * RACERS
    assert [finish(racer) for racer in racers] == [0] * RACERS
    assert len(winners) > 1, "that was no race"


TAKER = """
    import os, sys
    from fluxres_shell import claim as claims
    claims.take(os.open(sys.argv[1], os.O_RDONLY), "n", "ab" * 32)
"""


@pytest.mark.parametrize("side", ["before", "after"])
def test_killed_around_the_link(dirfd: int, tmp_path: Path, side: str) -> None:
    taker = python(TAKER, str(tmp_path), env={"FLUXRES_FAILPOINT": f"claim.{side}"})
    assert taker.wait(BOUND) == -signal.SIGKILL
    finish(taker)
    assert (claims.read(dirfd) is not None) == (side == "after")
    assert len(claims.sweep(dirfd)) == 1
    assert os.listdir(tmp_path) == (["claim"] if side == "after" else [])
    if side == "after":
        fd = claims.open_claim(dirfd)
        assert fd is not None
        assert not claims.is_locked(fd)
        os.close(fd)


HOLDER = """
    import os, subprocess, sys
    from fluxres_shell import claim as claims
    claim = claims.take(os.open(sys.argv[1], os.O_RDONLY), "n", "ab" * 32)
    child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


def test_children_do_not_hold_the_lock(dirfd: int, tmp_path: Path) -> None:
    """The shell is killed and stays a zombie, its child lives on: the lock is free."""
    holder = python(HOLDER, str(tmp_path))
    child = os.pidfd_open(int(hear(holder)))
    fd = claims.open_claim(dirfd)
    assert fd is not None
    assert claims.is_locked(fd)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert not claims.is_locked(fd)
    signal.pidfd_send_signal(child, signal.SIGKILL)
    finish(holder)
    os.close(child)
    os.close(fd)
