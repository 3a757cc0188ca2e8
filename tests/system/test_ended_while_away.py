"""Jobs that end while no broker lives: status and the whole output are there after the restart."""

from __future__ import annotations

import hashlib
import signal

import pytest
from kit import Expect, Instance, birth, check_invariants, eventually, process_gone, wait_status

from fluxres.base.jobid import JobId

# Waits until it may go on, says so, writes and ends as its words tell.
WAITS = """
while not os.path.exists("go"):
    time.sleep(0.01)
mark("going")
"""
MEGABYTE = 1024 * 1024


def end_while_away(instance: Instance, jobs: list[JobId]) -> None:
    """Kill the broker, let the jobs end, see their shells gone, start a broker."""
    for jobid in jobs:
        instance.wait_marked(jobid)
    shells = [instance.shell_pid(jobid) for jobid in jobs]
    instance.kill()
    assert not any(process_gone(pid) for pid in shells)
    (instance.path / "go").touch()
    eventually(lambda: all(map(process_gone, shells)), what="the end of the shells")
    instance.start()


def test_status_and_output(instance: Instance) -> None:
    jobs = {
        instance.submit(instance.job(WAITS + f"print('{n}' * 10); sys.exit({n})")): Expect(
            status=wait_status(n), output=f"{n}".encode() * 10 + b"\n"
        )
        for n in (0, 1, 7)
    }
    killed = instance.submit(instance.job(WAITS + "os.write(1, b'last words'); os.kill(os.getpid(), 9)"))
    jobs[killed] = Expect(status=wait_status(128 + signal.SIGKILL), output=b"last words")
    end_while_away(instance, list(jobs))
    check_invariants(instance, jobs)


def test_large_binary_output_and_several_tasks(instance: Instance) -> None:
    body = WAITS + (
        "import random\n"
        "data = random.Random(int(os.environ['FLUX_TASK_RANK'])).randbytes(1 << 20)\n"
        "os.write(2, b'to stderr')\n"
        "sys.stdout.buffer.write(data)\n"
    )
    import random

    jobid = instance.submit(instance.job(body, ntasks=3))
    eventually(lambda: len(instance.marked(jobid)) == 3, what="three tasks")
    end_while_away(instance, [jobid])
    check_invariants(instance, {jobid: Expect(tasks=3)})
    for task in range(3):
        assert instance.output(jobid, "stderr", task) == b"to stderr"
        stored = instance.output(jobid, "stdout", task)
        wanted = random.Random(task).randbytes(MEGABYTE)
        assert len(stored) == len(wanted)
        assert hashlib.sha256(stored).digest() == hashlib.sha256(wanted).digest()


def test_the_time_limit_is_enforced_while_away(instance: Instance) -> None:
    jobid = instance.submit(instance.job("mark('on'); time.sleep(600)", duration=2.0))
    instance.wait_marked(jobid)
    shell = instance.shell_pid(jobid)
    instance.kill()
    eventually(lambda: process_gone(shell), what="the end of the shell")
    instance.start()
    check_invariants(instance, {jobid: Expect(exception="timeout", status=wait_status(128 + signal.SIGALRM))})


def test_killed_again_while_what_ended_is_read_out(instance: Instance) -> None:
    """The cursor and the records are one transaction: read-outs that are cut off repeat and lose nothing."""
    body = WAITS + "sys.stdout.write(''.join(f'{n}\\n' for n in range(200_000))); sys.exit(5)"
    jobid = instance.submit(instance.job(body))
    end_while_away(instance, [jobid])
    for _ in range(3):
        instance.restart()
    output = "".join(f"{n}\n" for n in range(200_000)).encode()
    check_invariants(instance, {jobid: Expect(status=wait_status(5), output=output)})


@pytest.mark.parametrize("stop_first", [False, True])
def test_a_journal_with_a_torn_tail(instance: Instance, stop_first: bool) -> None:
    """What follows the exit record, or a write that was cut off, is no reason to lose what is whole."""
    jobid = instance.submit(instance.job(WAITS + "print('whole'); sys.exit(2)"))
    shell = instance.shell_pid(jobid)
    instance.wait_marked(jobid)
    identity = birth(shell)
    instance.kill()
    if stop_first:
        (instance.path / "go").touch()
        eventually(lambda: process_gone(shell), what="the end of the shell")
        for segment in instance.jobdir(jobid).glob("journal*"):
            with segment.open("ab") as file:
                file.write(b"\x00torn")
    instance.start()
    assert birth(shell) == identity or stop_first
    (instance.path / "go").touch()
    check_invariants(instance, {jobid: Expect(status=wait_status(2), output=b"whole\n")})
