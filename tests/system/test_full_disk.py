"""A full disk under the statedir: an error for whoever submits, nothing for those who run, and no lie to anybody.

On a small file system of its own (tmpfs), filled to the last byte.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from conftest import MakeInstance
from kit import Expect, Instance, birth, check_invariants, check_job, eventually, submission, wait_status

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId

DISK: Final = 24 * 1024 * 1024
"""Bytes of the file system: what an instance needs, and a little more."""
UNTIL: Final = """
def until(path):
    while not os.path.exists(path): time.sleep(0.01)
"""
TALK: Final = (
    UNTIL
    + """
n = 0
while not os.path.exists(sys.argv[1]):
    os.write(1, b"line %d " % n + b"x" * 100 + b"\\n")
    n += 1
    time.sleep(0.001)
mark("wrote", n)
sys.exit(7)
"""
)


class Disk:
    """A small file system, and the file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave no room at all, also where some is given back meanwhile."""
        fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (1 << 20, 1 << 16, 1 << 12, 1):
                with pytest.raises(OSError, match="No space left"):
                    while os.write(fd, b"\0" * size):
                        pass
        finally:
            os.close(fd)

    def empty(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "fluxres-test", str(path)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def full(disk: Disk, make_instance: MakeInstance) -> Instance:
    """An instance whose statedir is on the small disk."""
    instance = make_instance(state=disk.path / "state")
    instance.start()
    return instance


def refused(instance: Instance) -> bool:
    """Whether a submission is refused for lack of room, with that as its reason."""
    try:
        instance.rpc("job-ingest.submit", submission(instance.job("print('too much')")))
    except RpcError as error:
        return error.errnum == errno.ENOSPC and "space" in error.text
    return False


def talked(count: int) -> bytes:
    """What the talking job writes with so many lines."""
    return b"".join(b"line %d " % n + b"x" * 100 + b"\n" for n in range(count))


def fill_until_refused(instance: Instance, disk: Disk) -> list[JobId]:
    """Fill the disk until nothing can be submitted; jobs that were still taken."""
    taken: list[JobId] = []

    def look() -> bool:
        disk.fill()
        before = set(instance.jobs())
        answer = refused(instance)
        taken.extend(set(instance.jobs()) - before)
        return answer

    eventually(look, what="ENOSPC")
    return taken


def finish(instance: Instance, disk: Disk, talking: JobId, end: Path, taken: list[JobId]) -> None:
    """Give the room back: everything goes on, and nothing is missing."""
    disk.empty()
    after = eventually(lambda: instance.submit(instance.job("print('after')")), what="room")
    end.touch()
    instance.wait_inactive(talking, after)
    wrote = int(instance.wait_marked(talking, "wrote").rest[0])
    expected = {talking: Expect(status=wait_status(7), output=talked(wrote)), after: Expect(output=b"after\n")}
    expected |= dict.fromkeys(taken, Expect(output=b"too much\n"))
    check_invariants(instance, expected, exact=False)


def test_running_jobs_go_on(full: Instance, disk: Disk) -> None:
    end = full.path / "end"
    talking = full.submit(full.job(TALK, str(end)))
    full.wait_marked(talking)
    shell = birth(full.shell_pid(talking))
    taken = fill_until_refused(full, disk)
    broker = full.pid
    for _ in range(3):
        assert refused(full), "still full"
    full.jobs()
    assert birth(shell[0]) == shell
    assert full.pid == broker
    assert full.broker is not None
    assert full.broker.poll() is None
    finish(full, disk, talking, end, taken)


def test_a_job_that_ends_on_a_full_disk(full: Instance, disk: Disk) -> None:
    """Its exit status finds the room that was reserved for it, and waits for the broker."""
    go = full.path / "go"
    body = UNTIL + "until(sys.argv[1])\nprint('last words'); mark('done'); sys.exit(5)"
    ending = full.submit(full.job(body, str(go)))
    full.wait_marked(ending)
    taken = fill_until_refused(full, disk)
    go.touch()
    full.wait_marked(ending, "done")
    disk.empty()
    check_invariants(full, {ending: Expect(status=wait_status(5), output=b"last words\n")}, exact=False)
    check_invariants(full, dict.fromkeys(taken, Expect(output=b"too much\n")), exact=False)


def test_death_on_a_full_disk(full: Instance, disk: Disk) -> None:
    """The broker dies, and cannot start for lack of room, or can and does no harm; later everything is there."""
    end = full.path / "end"
    talking = full.submit(full.job(TALK, str(end)))
    done = full.submit(full.job("print('done')"))
    full.wait_inactive(done)
    full.wait_marked(talking)
    taken = fill_until_refused(full, disk)
    full.kill()
    disk.fill()
    full.tolerated.append("panic: .*(space|full)")
    full.start(wait=False)
    eventually(lambda: full.log.count("online") > 1 or "space" in full.log or "full" in full.log, what="a try")
    disk.empty()
    eventually(lambda: full.jobs() is not None, what="a broker")
    disk.path.joinpath("ballast").touch()
    finish(full, disk, talking, end, taken)
    check_job(full, done, Expect(output=b"done\n"))
