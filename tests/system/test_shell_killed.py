"""SIGKILL of one shell: its job ends with an exception that says so, and nothing else suffers."""

from __future__ import annotations

import os
import signal

import pytest
from kit import Expect, Instance, check_invariants, eventually, process_gone

from fluxres.base.jobid import JobId

# Leaves a process that has its own session and lost its parent; then waits for ever.
DAEMON = """
print("begun", flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        mark("daemon")
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
KILLED = Expect(exception="exec", status=signal.SIGKILL.value, output=b"begun\n")


def test_only_its_own_job_ends(instance: Instance) -> None:
    victim, *others = instance.submit_many([instance.job(DAEMON) for _ in range(3)])
    for jobid in (victim, *others):
        instance.wait_marked(jobid, "daemon")
        instance.wait_output(jobid, b"begun\n")
    os.kill(instance.shell_pid(victim), signal.SIGKILL)
    check_invariants(instance, {victim: KILLED}, exact=False)
    exception = instance.exception(victim)
    assert exception is not None
    assert "killed" in str(exception["note"])
    assert "SIGKILL" in str(exception["note"]), "the kernel tells how it died"
    assert all(process_gone(marker.pid) for word in ("start", "daemon") for marker in instance.marked(victim, word))
    for jobid in others:
        assert instance.events(jobid)[-1] == "start"
        assert not process_gone(instance.wait_marked(jobid, "daemon").pid)
        instance.cancel(jobid)
    cancelled = Expect(exception="cancel", status=None, output=b"begun\n")
    check_invariants(instance, {victim: KILLED, **dict.fromkeys(others, cancelled)})


@pytest.mark.parametrize("stopped_first", [False, True])
def test_killed_while_no_broker_lives(instance: Instance, stopped_first: bool) -> None:
    jobid = instance.submit(instance.job(DAEMON))
    instance.wait_marked(jobid, "daemon")
    instance.wait_output(jobid, b"begun\n")
    shell = instance.shell_pid(jobid)
    instance.kill()
    if stopped_first:
        os.kill(shell, signal.SIGSTOP)
    os.kill(shell, signal.SIGKILL)
    eventually(lambda: process_gone(shell), what="the end of the shell")
    instance.start()
    check_invariants(instance, {jobid: KILLED})


def test_a_second_exception_is_logged_once(instance: Instance) -> None:
    """The job is cancelled, then loses its shell; the broker dies when both are durable, and says neither again."""
    instance.restart(env={"FLUXRES_FAILPOINT": "finish.after"})
    body = "import signal; signal.signal(15, signal.SIG_IGN); mark('deaf'); time.sleep(600)"
    jobid = instance.submit(instance.job(body))
    instance.wait_marked(jobid, "deaf")
    shell = instance.shell_pid(jobid)
    instance.cancel(jobid)
    os.kill(shell, signal.SIGKILL)
    assert instance.died() == -signal.SIGKILL
    instance.start()
    check_invariants(instance, {jobid: Expect(exception="cancel", status=signal.SIGKILL.value)})
    assert instance.events(jobid).count("exception") == 2


def test_a_shell_that_hangs_is_waited_for(instance: Instance) -> None:
    """Silence is never death: a stopped shell is neither given up nor run again, and goes on when it wakes."""
    jobid = instance.submit(
        instance.job("print('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)")
    )
    instance.wait_marked(jobid)
    instance.wait_output(jobid, b"begun\n")
    shell = instance.shell_pid(jobid)
    os.kill(shell, signal.SIGSTOP)
    try:
        instance.restart()
        (instance.path / "go").touch()
        other = instance.submit(instance.job("print('meanwhile')"))
        instance.wait_inactive(other)
        assert "finish" not in instance.events(jobid)
        assert instance.exception(jobid) is None
    finally:
        os.kill(shell, signal.SIGCONT)
    expect = {jobid: Expect(output=b"begun\n"), other: Expect(output=b"meanwhile\n")}
    check_invariants(instance, expect)


def test_a_shell_that_hangs_can_be_cancelled(instance: Instance) -> None:
    """A fatal exception ends the tasks, then the shell itself, which does not answer."""
    jobid: JobId = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_marked(jobid)
    shell = instance.shell_pid(jobid)
    os.kill(shell, signal.SIGSTOP)
    instance.cancel(jobid)
    check_invariants(instance, {jobid: Expect(exception="cancel", status=None)})
    assert process_gone(shell)
