"""A reused pid, a reboot, a damaged directory: a stranger is never attached or signalled, and the job ends with an
exception that says why; what has begun is never begun again.

The claims are forged while no broker lives: the file that a dead shell left, with another pid, boot id, nonce or
content. The stranger is a living process that ends at any signal that it gets.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import PATIENCE, Expect, Instance, check_invariants, eventually, process_gone, wait_status

from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject

OTHER_BOOT = "00000000-0000-4000-8000-000000000000"
STRANGER = """
import signal, sys, time
for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    try:
        signal.signal(signum, lambda signum, frame: sys.exit(100 + signum))
    except OSError:
        pass
print("ready", flush=True)
time.sleep(600)
"""
BEGUN = "print('begun', flush=True); time.sleep(600)"
LOST = Expect(exception="exec", status=signal.SIGKILL.value, output=b"begun\n")


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any instance, and must not notice one."""
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", STRANGER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        yield process
        assert process.poll() is None, f"the stranger was signalled: {process.returncode}"
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def dead_shell(instance: Instance) -> JobId:
    """A job whose output is stored, and whose shell and broker were killed."""
    jobid = instance.submit(instance.job(BEGUN))
    instance.wait_output(jobid, b"begun\n")
    shell = instance.shell_pid(jobid)
    instance.kill()
    os.kill(shell, signal.SIGKILL)
    eventually(lambda: process_gone(shell), what="the end of the shell")
    return jobid


def claim_path(instance: Instance, jobid: JobId) -> Path:
    """The claim's path."""
    return instance.jobdir(jobid) / "claim"


def forge(instance: Instance, jobid: JobId, **changes: str | int | bool) -> None:
    """Rewrite the claim, which nobody holds any more."""
    path = claim_path(instance, jobid)
    record: JsonObject = json.loads(path.read_text(encoding="ascii"))
    path.write_text(json.dumps({**record, **changes}) + "\n", encoding="ascii")


def note_of(instance: Instance, jobid: JobId) -> str:
    """Why the job ended."""
    exception = instance.exception(jobid)
    assert exception is not None
    return str(exception["note"])


def test_a_reused_pid(instance: Instance, stranger: subprocess.Popen[bytes]) -> None:
    jobid = dead_shell(instance)
    forge(instance, jobid, pid=stranger.pid)
    instance.start()
    check_invariants(instance, {jobid: LOST})
    assert note_of(instance, jobid).startswith("the job shell was killed")


def bind_at(listener: socket.socket, path: Path) -> None:
    """Bind a socket at a path of any length: one that is too long for bind(2) is told by its directory."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def test_a_reused_pid_whose_process_listens_on_the_socket(
    instance: Instance, stranger: subprocess.Popen[bytes]
) -> None:
    jobid = dead_shell(instance)
    forge(instance, jobid, pid=stranger.pid)
    path = instance.jobdir(jobid) / "sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        bind_at(listener, path)
        listener.listen()
        listener.setblocking(False)
        instance.start()
        check_invariants(instance, {jobid: LOST})
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_an_impostor_on_the_socket_of_a_living_shell(instance: Instance) -> None:
    """The peer is checked against the shell's pidfd; the shell is asked to bind its socket again."""
    jobid = instance.submit(
        instance.job("print('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)")
    )
    instance.wait_output(jobid, b"begun\n")
    instance.kill()
    path = instance.jobdir(jobid) / "sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        bind_at(listener, path)
        listener.listen()
        listener.setblocking(False)
        instance.start()
        instance.wait_event(jobid, "reattach", "guest.exec.eventlog")
        (instance.path / "go").touch()
        check_invariants(instance, {jobid: Expect(output=b"begun\n")})
        said = b""
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                break
            with connection:
                said += connection.recv(4096)
    assert said == b"", "something was said to an impostor"


def test_another_boot(instance: Instance, stranger: subprocess.Popen[bytes]) -> None:
    jobid = dead_shell(instance)
    forge(instance, jobid, pid=stranger.pid, boot_id=OTHER_BOOT)
    instance.start()
    check_invariants(instance, {jobid: LOST})
    assert "rebooted" in note_of(instance, jobid)


def test_another_boot_after_the_exit_record(instance: Instance, stranger: subprocess.Popen[bytes]) -> None:
    """A valid exit record wins over everything else: the job had ended before the node went down."""
    jobid = instance.submit(instance.job("while not os.path.exists('go'): time.sleep(0.01)\nprint('all'); sys.exit(5)"))
    instance.wait_marked(jobid)
    shell = instance.shell_pid(jobid)
    instance.kill()
    (instance.path / "go").touch()
    eventually(lambda: process_gone(shell), what="the end of the shell")
    forge(instance, jobid, pid=stranger.pid, boot_id=OTHER_BOOT)
    instance.start()
    check_invariants(instance, {jobid: Expect(status=wait_status(5), output=b"all\n")})


def test_another_nonce(instance: Instance, stranger: subprocess.Popen[bytes]) -> None:
    jobid = dead_shell(instance)
    forge(instance, jobid, pid=stranger.pid, nonce="of-another-job")
    instance.start()
    check_invariants(instance, {jobid: LOST})
    assert "nonce" in note_of(instance, jobid)


@pytest.mark.parametrize("content", [b"", b"\x00" * 300, b"{}", b'{"version": 2}', b"x" * 10_000])
def test_a_claim_that_cannot_be_read(instance: Instance, content: bytes) -> None:
    jobid = dead_shell(instance)
    claim_path(instance, jobid).write_bytes(content)
    instance.start()
    check_invariants(instance, {jobid: LOST})
    assert "cannot read the claim" in note_of(instance, jobid)


def test_a_void_claim_of_a_job_that_had_begun(instance: Instance) -> None:
    jobid = dead_shell(instance)
    forge(instance, jobid, void=True, spec_sha256="", reason="forged")
    instance.start()
    check_invariants(instance, {jobid: LOST})


@pytest.mark.parametrize("lost", ["claim", "directory", "journal"])
def test_what_had_begun_is_not_begun_again(instance: Instance, lost: str) -> None:
    """Somebody removed the claim, all of the directory, or the journal."""
    jobid = dead_shell(instance)
    match lost:
        case "claim":
            claim_path(instance, jobid).unlink()
        case "directory":
            shutil.rmtree(instance.jobdir(jobid).parent)
        case _:
            for path in instance.jobdir(jobid).glob("journal*"):
                path.unlink()
    other = instance.jobdir(jobid).parent
    assert other.exists() == (lost != "directory")
    instance.start()
    check_invariants(instance, {jobid: LOST})


def test_a_directory_removed_under_a_living_shell(instance: Instance) -> None:
    """Nobody can find that shell again: its job ends with an exception, and its tasks are ended by their mark."""
    jobid = instance.submit(instance.job(BEGUN))
    instance.wait_output(jobid, b"begun\n")
    task = instance.wait_marked(jobid).pid
    instance.kill()
    shutil.rmtree(instance.jobdir(jobid).parent)
    instance.start()
    check_invariants(instance, {jobid: LOST})
    assert process_gone(task)
