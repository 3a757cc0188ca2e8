"""Commands that wait for something, while the broker is killed and restarted under them, again and again.

What they print, piped into a file, is byte for byte what an undisturbed run prints, and the exit code is right; also
with 200 MB of output, in bounded memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from conftest import MakeInstance
from kit import PATIENCE, PYTHON, Expect, Instance, check_invariants, eventually, wait_status

from fluxres.base.jobid import JobId, parse_jobid

LINES: Final = 400
TALK: Final = f"""
import sys, time
for i in range({LINES}):
    print("out", i, flush=True)
    if i % 10 == 0: print("err", i, file=sys.stderr, flush=True)
    time.sleep(0.005)
print("no newline at the end", end="")
sys.exit(7)
"""
TALKED: Final = b"".join(b"out %d\n" % i for i in range(LINES)) + b"no newline at the end"
COMPLAINED: Final = b"".join(b"err %d\n" % i for i in range(0, LINES, 10))
DEATHS: Final = 3
MEGABYTE: Final = 1024 * 1024
FLOOD: Final = 200 * MEGABYTE
FLOOD_JOB: Final = f"""
import sys
block = bytes(range(256)) * 256
for i in range({FLOOD} // len(block)):
    sys.stdout.buffer.write(i.to_bytes(8, "big") + block[8:])
sys.exit(5)
"""
MEMORY_BOUND: Final = 160 * MEGABYTE
"""Bytes of resident memory that neither a client nor a broker may reach; about 40 MB are Python and the store."""


def growing(path: Path, beyond: int) -> None:
    """Wait until the file has more than `beyond` bytes."""
    eventually(lambda: path.stat().st_size > beyond, what=f"byte {beyond} of {path}")


def start_into(instance: Instance, path: Path, *args: str) -> subprocess.Popen[bytes]:
    """Start a command with its standard output in a file."""
    with path.open("wb") as file:
        return instance.popen(*args, stdout=file.fileno())


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """The exit code and standard error of a command."""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def disturb(instance: Instance, path: Path, total: int, deaths: int = DEATHS) -> None:
    """Kill and restart the broker while the file grows to `total` bytes."""
    for death in range(deaths):
        growing(path, death * total // (deaths + 1))
        instance.restart()


def command(*args: str) -> Sequence[str]:
    """The words of a job that talks."""
    return (*args, *PYTHON, TALK)


def test_run(instance: Instance) -> None:
    undisturbed = instance.fluxres(*command("run"), check=False)
    assert (undisturbed.returncode, undisturbed.stdout) == (7, TALKED)
    path = instance.path / "out"
    process = start_into(instance, path, *command("run"))
    disturb(instance, path, len(TALKED))
    code, errors = finish(process)
    assert (code, path.read_bytes()) == (7, TALKED)
    assert errors == undisturbed.stderr
    assert [line for line in errors.splitlines(keepends=True) if line.startswith(b"err ")] == COMPLAINED.splitlines(
        keepends=True
    )


def test_attach(instance: Instance) -> None:
    jobid = instance.submit(instance.jobspec(*PYTHON, TALK))
    paths = [instance.path / f"out{n}" for n in range(3)]
    attached = [start_into(instance, path, "job", "attach", str(int(jobid))) for path in paths]
    disturb(instance, paths[0], len(TALKED))
    codes = [finish(process)[0] for process in attached]
    assert codes == [7, 7, 7]
    assert [path.read_bytes() for path in paths] == [TALKED] * 3
    late = instance.fluxres("job", "attach", str(int(jobid)), check=False)
    assert (late.returncode, late.stdout) == (7, TALKED)


def test_submit_wait_and_others(instance: Instance) -> None:
    """Commands that print little, and wait for long."""
    held = instance.path / "held"
    body = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(3)"
    jobid = instance.submit(instance.job(body, str(held)))
    path = instance.path / "out"
    wait = "import os, sys, time\n" + body
    submit = start_into(instance, path, "submit", "--wait", *PYTHON, wait, str(held))
    others = [
        instance.popen("job", "wait-event", str(int(jobid)), "clean"),
        instance.popen("job", "wait", str(int(jobid))),
        instance.popen("job", "eventlog", "--follow", str(int(jobid))),
    ]
    growing(path, 0)
    submitted = parse_jobid(path.read_text(encoding="utf-8").strip())
    for _ in range(DEATHS):
        instance.restart()
    held.touch()
    assert finish(submit)[0] == 3
    assert parse_jobid(path.read_text(encoding="utf-8").strip()) == submitted, "printed once"
    assert [finish(process)[0] for process in others[:2]] == [0, 1], "wait says only whether it went well, as flux does"
    follow, _ = others[2].communicate(timeout=PATIENCE)
    assert follow == instance.fluxres("job", "eventlog", str(int(jobid))).stdout
    check_invariants(
        instance,
        {jobid: Expect(status=wait_status(3)), submitted: Expect(status=wait_status(3), tasks=0)},
    )


def test_submit_pending_over_deaths(make_instance: MakeInstance) -> None:
    """A command that waits for a job that has no resources yet."""
    instance = make_instance(cores=1)
    instance.start()
    blocker = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_marked(blocker)
    path = instance.path / "out"
    process = start_into(instance, path, "run", "sh", "-c", "echo at last; exit 4")
    eventually(lambda: len(instance.jobs()) == 2, what="the second job")
    for _ in range(DEATHS):
        instance.restart()
    instance.cancel(blocker)
    assert finish(process)[0] == 4
    assert path.read_bytes() == b"at last\n"


# --- a flood


class Memory:
    """Watches the resident memory of processes: the highest of each, by the kernel's own count."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}

    def look(self, *pids: int) -> None:
        """Note how much these have had at most until now."""
        for pid in pids:
            try:
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self.peaks[pid] = int(line.split()[1]) * 1024


class Digest(threading.Thread):
    """Reads a pipe to its end, keeping only how much came and its digest."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.size = 0
        self._sum = hashlib.sha256()

    def run(self) -> None:
        """Read."""
        while data := os.read(self._fd, MEGABYTE):
            self._sum.update(data)
            self.size += len(data)
        os.close(self._fd)

    @property
    def hexdigest(self) -> str:
        """The digest of everything."""
        return self._sum.hexdigest()


def flooded() -> str:
    """The digest of what the flood job writes."""
    block = bytes(range(256)) * 256
    digest = hashlib.sha256()
    for i in range(FLOOD // len(block)):
        digest.update(i.to_bytes(8, "big") + block[8:])
    return digest.hexdigest()


@pytest.mark.timeout(600)
def test_a_flood_in_bounded_memory(make_instance: MakeInstance) -> None:
    instance = make_instance(settings={"exec": {"journal-limit": 16 * MEGABYTE}})
    instance.start()
    memory = Memory()
    ours, theirs = os.pipe()
    process = instance.popen("run", *PYTHON, FLOOD_JOB, stdout=theirs)
    os.close(theirs)
    digest = Digest(ours)
    digest.start()
    for part in (1, 2):

        def reached(goal: int = part * FLOOD // 3) -> bool:
            memory.look(process.pid, instance.pid, *instance.processes())
            return digest.size > goal

        eventually(reached, timeout=240, what=f"{part}/3 of the flood")
        instance.restart()

    def ended() -> bool:
        memory.look(process.pid, instance.pid)
        return not digest.is_alive()

    eventually(ended, timeout=240, what="the end of the flood")
    assert finish(process)[0] == 5
    assert (digest.size, digest.hexdigest) == (FLOOD, flooded())
    assert {pid: peak for pid, peak in memory.peaks.items() if peak > MEMORY_BOUND} == {}


def test_a_reader_that_stops(instance: Instance) -> None:
    """A command whose output nobody reads: it and the broker keep still, and nothing is lost once it is read."""
    ours, theirs = os.pipe()
    size = 8 * MEGABYTE
    job = f"import sys\nsys.stdout.write('x' * {size})"
    process = instance.popen("run", *PYTHON, job, stdout=theirs)
    os.close(theirs)
    (jobid,) = eventually(lambda: list(instance.jobs()), what="the job")
    instance.wait_inactive(JobId(jobid))
    instance.restart()
    assert process.poll() is None
    digest = Digest(ours)
    digest.start()
    assert finish(process)[0] == 0
    digest.join(PATIENCE)
    assert (digest.size, digest.hexdigest) == (size, hashlib.sha256(b"x" * size).hexdigest())


def test_interrupt_while_the_broker_is_away(instance: Instance) -> None:
    """Two Ctrl-C leave the job to itself: it ends as it would have."""
    process = instance.popen("run", *command())
    (jobid,) = eventually(lambda: list(instance.jobs()), what="the job")
    instance.wait_event(jobid, "start")
    connected = sockets(process.pid)
    instance.kill()
    eventually(lambda: sockets(process.pid) < connected, what="the loss of the connection")
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    while b"one more" not in process.stderr.readline():  # two at a time would count as one
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    instance.start()
    check_invariants(instance, {jobid: Expect(status=wait_status(7), output=TALKED, tasks=0)})


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(entry).startswith("socket:")
    return count
