"""SIGKILL of the launcher: running jobs go on, and the next one starts with another launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from kit import Expect, Instance, birth, check_invariants, eventually, process_gone, wait_status

TALK = """
for i in range(200):
    print(i, flush=True)
    time.sleep(0.005)
mark("talked")
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
sys.exit(9)
"""
TALKED = b"".join(b"%d\n" % i for i in range(200))


def launchers(instance: Instance) -> list[int]:
    """The pids of the instance's launchers: shells are forks of one, in sessions of their own, with another name."""
    found = []
    for pid in instance.processes():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        if b"--launcher" in arguments and name != "fluxres-shell":
            found.append(pid)
    return found


def test_jobs_go_on_and_start_after_the_launcher_was_killed(instance: Instance) -> None:
    end = instance.path / "end"
    running = [instance.submit(instance.job(TALK, str(end))) for _ in range(3)]
    for jobid in running:
        instance.wait_marked(jobid)
    shells = [birth(instance.shell_pid(jobid)) for jobid in running]
    (launcher,) = launchers(instance)
    os.kill(launcher, signal.SIGKILL)
    eventually(lambda: process_gone(launcher), what="the end of the launcher")
    later = instance.submit(instance.job())
    instance.wait_inactive(later)
    assert [birth(pid) for pid, _ in shells] == shells, "a shell died with its launcher"
    assert launcher not in launchers(instance)
    end.touch()
    talked = Expect(status=wait_status(9), output=TALKED)
    check_invariants(instance, {**dict.fromkeys(running, talked), later: Expect(output=b"")})


def test_a_launcher_killed_with_starts_under_way(instance: Instance) -> None:
    """Whatever the launcher had taken on and not done is asked of the next one: every job runs, once."""
    warm = instance.submit(instance.job())
    instance.wait_inactive(warm)
    jobids = [warm]
    for _ in range(5):
        (launcher,) = eventually(lambda: launchers(instance), what="a launcher")
        os.kill(launcher, signal.SIGSTOP)
        jobids += instance.submit_many([instance.job("print('ran')")] * 4)
        for jobid in jobids[-4:]:
            instance.wait_event(jobid, "alloc")
        os.kill(launcher, signal.SIGKILL)
        instance.wait_inactive(*jobids)
    outputs = {jobid: Expect(output=b"ran\n") for jobid in jobids[1:]}
    check_invariants(instance, {**outputs, warm: Expect(output=b"")})
