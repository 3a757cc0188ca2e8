"""Two of a kind: of two brokers on one statedir, or two shells of one job, exactly one goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Expect, Instance, check_invariants, eventually, process_state, wait_status

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, f58
from fluxres_shell import claim

STOP_SHELL = {"FLUXRES_FAILPOINT": "claim.before=stop"}
"""Stops every shell between its fork and its claim."""
RACERS = 6


def run_shell(directory: str, mark: dict[str, str]) -> subprocess.Popen[bytes]:
    """A shell as a program of its own on a directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "fluxres_shell.main", directory], env={**os.environ, **mark}, stderr=subprocess.PIPE
    )


def stopped_shells(instance: Instance, jobid: JobId) -> list[int]:
    """The pids of shells of the job that stopped just before the claim: their temporaries name them."""

    def pids() -> list[int]:
        names = [path.name for path in instance.jobdir(jobid).glob(f"{claim.TEMPORARY_PREFIX}*")]
        return [pid for name in names if process_state(pid := int(name.split(".")[1])) == "T"]

    return eventually(pids, what=f"the stopped shell of {f58(jobid)}")


# --- brokers


def test_a_second_broker_refuses_to_start(instance: Instance) -> None:
    jobid = instance.submit(instance.job("while not os.path.exists('go'): time.sleep(0.01)"))
    instance.wait_marked(jobid)
    second = subprocess.run(
        instance.command(), env=instance.environ, capture_output=True, timeout=PATIENCE, check=False
    )
    assert second.returncode == 1
    words = second.stderr.decode()
    assert words.startswith("fluxres-broker: cannot use statedir")
    assert f"(pid {instance.pid})" in words
    assert "Traceback" not in words
    (instance.path / "go").touch()
    check_invariants(instance, {jobid: Expect()})


def test_a_second_broker_is_refused_while_the_first_is_stopped(instance: Instance) -> None:
    """A broker that hangs still holds its statedir."""
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        second = subprocess.run(
            instance.command(), env=instance.environ, capture_output=True, timeout=PATIENCE, check=False
        )
    finally:
        os.kill(instance.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert b"another broker" in second.stderr
    assert instance.fluxres("run", "true").returncode == 0


def test_a_broker_of_another_statedir_does_not_take_the_socket(make_instance: MakeInstance) -> None:
    """Two instances by mistake on one rundir: the second says so, and the first one keeps its socket."""
    first = make_instance("first")
    second = make_instance("second", settings={"broker": {"rundir": str(first.rundir)}})
    second.tolerated.append("another broker does")
    first.start()
    second.start(wait=False)
    eventually(lambda: f"cannot listen on {first.rundir}/local-0" in second.log, what="the refusal")
    assert first.rpc("attr.get", {"name": "broker.pid"})["value"] == str(first.pid)
    second.kill()
    assert first.rpc("attr.get", {"name": "broker.pid"})["value"] == str(first.pid)


# --- shells


def test_one_of_many_racing_shells_runs(instance: Instance) -> None:
    """The launcher's shell and others, all stopped just before the claim and let go at once: one runs the job."""
    instance.kill()
    instance.start(env=STOP_SHELL)
    jobid = instance.submit(instance.job("print('once'); sys.exit(4)"))
    own = stopped_shells(instance, jobid)[0]
    racers = [run_shell(str(instance.jobdir(jobid)), {**instance.environ, **STOP_SHELL}) for _ in range(RACERS)]
    pids = {own, *(racer.pid for racer in racers)}
    eventually(lambda: set(stopped_shells(instance, jobid)) == pids, what="all racers at the line")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    errors = [racer.communicate(timeout=PATIENCE)[1] for racer in racers]
    assert not any(errors), "a loser exits silently"
    assert [racer.returncode for racer in racers] == [0] * RACERS
    check_invariants(instance, {jobid: Expect(status=wait_status(4), output=b"once\n")})


def test_a_shell_that_comes_late_runs_nothing(instance: Instance) -> None:
    """Of a directory whose job has a shell, and of one whose job has ended (the directory kept as a copy)."""
    jobid = instance.submit(instance.job("while not os.path.exists('go'): time.sleep(0.01)"))
    instance.wait_marked(jobid)
    late = run_shell(str(instance.jobdir(jobid)), instance.environ)
    assert late.communicate(timeout=PATIENCE)[1] == b""
    assert late.returncode == 0
    before = set(os.listdir(instance.jobdir(jobid)))
    assert not any(name.startswith(claim.TEMPORARY_PREFIX) for name in before), "no trace is left"
    copy = instance.path / "copy"
    shutil.copytree(instance.jobdir(jobid), copy, ignore=shutil.ignore_patterns("sock*"))
    (instance.path / "go").touch()
    check_invariants(instance, {jobid: Expect()})
    again = run_shell(str(copy), instance.environ)
    again.communicate(timeout=PATIENCE)
    assert again.returncode == 0
    check_invariants(instance, {jobid: Expect()})


@pytest.mark.parametrize("restart", ["never", "before the cancel", "after the cancel"])
def test_a_start_cancelled_before_its_claim_never_runs(instance: Instance, restart: str) -> None:
    """The shell sleeps (SIGSTOP) between its fork and its claim, and wakes up when its job is long gone."""
    instance.kill()
    instance.start(env=STOP_SHELL)
    jobid = instance.submit(instance.job("print('never')"))
    shell = stopped_shells(instance, jobid)[0]
    if restart == "before the cancel":
        instance.restart(env=STOP_SHELL)
    instance.cancel(jobid)
    if restart == "after the cancel":
        instance.restart(env=STOP_SHELL)
    check_invariants(instance, {jobid: Expect(exception="cancel", tasks=0)})
    assert "start" not in instance.events(jobid)
    assert process_state(shell) == "T"
    os.kill(shell, signal.SIGCONT)
    eventually(lambda: process_state(shell) in "XZ", what="the end of the shell")
    assert instance.marked() == []
    instance.restart()
    check_invariants(instance, {jobid: Expect(exception="cancel", tasks=0)})


def test_a_stopped_start_whose_broker_dies_runs_once(instance: Instance) -> None:
    """The next broker starts another shell, since nobody has the claim; the first one wakes up too late."""
    instance.kill()
    instance.start(env=STOP_SHELL)
    jobid = instance.submit(instance.job("print('once')"))
    shell = stopped_shells(instance, jobid)[0]
    instance.restart()
    eventually(lambda: instance.marked(jobid), what="the start by another shell")
    os.kill(shell, signal.SIGCONT)
    check_invariants(instance, {jobid: Expect(output=b"once\n")})


def test_a_shell_that_wakes_up_while_its_directory_is_removed(instance: Instance) -> None:
    """Removing takes several steps: the spec is gone, and then the void claim, when the shell comes to link its own."""
    instance.kill()
    instance.start(env=STOP_SHELL)
    jobid = instance.submit(instance.job("print('never')"))
    shell = stopped_shells(instance, jobid)[0]
    instance.kill()
    (instance.jobdir(jobid) / "spec").unlink()
    os.kill(shell, signal.SIGCONT)
    eventually(lambda: process_state(shell) in "XZ", what="the end of the shell")
    assert instance.marked() == []


def test_a_running_broker_keeps_its_socket_from_a_refused_one(instance: Instance) -> None:
    """A refused broker touches nothing: the socket of the first one stays."""
    before = os.stat(instance.rundir / "local-0").st_ino
    subprocess.run(instance.command(), env=instance.environ, capture_output=True, timeout=PATIENCE, check=False)
    assert os.stat(instance.rundir / "local-0").st_ino == before
    try:
        instance.rpc("broker.ping", {})
    except FluxresError as error:
        pytest.fail(f"the broker does not answer any more: {error}")
