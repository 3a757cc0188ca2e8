"""What a node gives a job: cores to be bound to, a cgroup where it lets us; and brokers in odd surroundings."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Expect, Instance, check_invariants, eventually, wait_status

from fluxres.base.errors import RpcError
from fluxres_shell.cgroup import find_mount

WHERE = "print(open('/proc/self/cgroup').read().strip().rpartition('0::')[2], sorted(os.sched_getaffinity(0)))"


def writable_cgroup() -> bool:
    """Whether a cgroup v2 can be made below our own."""
    mount = find_mount()
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::")[2].strip()
    return mount is not None and os.access(f"{mount}{own}", os.W_OK)


@pytest.mark.skipif(not writable_cgroup(), reason="no cgroup v2 that we may write to")
def test_a_job_has_a_cgroup_that_goes_with_it(instance: Instance) -> None:
    """With what it used in the exit record; and none is left when the broker is shut down."""
    jobid = instance.submit(instance.job(WHERE))
    check_invariants(instance, {jobid: Expect()})
    path = instance.output(jobid).decode().split()[0]
    assert os.path.basename(os.path.dirname(path)).startswith("fluxres-")
    assert os.path.basename(path).startswith("job-f")
    mount = find_mount()
    assert not os.path.exists(f"{mount}{path}")
    assert instance.stop() == 0


def test_a_task_that_hides_dies_with_its_shell(instance: Instance) -> None:
    """A descendant that left its parents and its environment is found by the cgroup, where there is one."""
    if not writable_cgroup():
        pytest.skip("no cgroup v2 that we may write to")
    hide = (
        "\nif os.fork() == 0:\n os.setsid()\n os.execve('/bin/sleep', ['sleep', '600'], {})\nprint('hid', flush=True)"
    )
    jobid = instance.submit(instance.job(hide + "\ntime.sleep(600)"))
    instance.wait_output(jobid, b"hid\n")
    (group,) = Path("/proc").glob(f"{instance.marked(jobid)[0].pid}/cgroup")
    procs = Path(f"{find_mount()}{group.read_text(encoding='utf-8').rpartition('0::')[2].strip()}/cgroup.procs")
    assert len(procs.read_text(encoding="ascii").split()) == 2
    os.kill(instance.shell_pid(jobid), 9)
    check_invariants(instance, {jobid: Expect(status=None, exception="exec", tasks=1)})
    assert not procs.exists()


def test_tasks_are_bound_to_the_cores_of_their_job(make_instance: MakeInstance) -> None:
    """Where cores are the system's own; configured ones mean nothing to it."""
    instance = make_instance("counted")
    instance.start()
    jobid = instance.submit(instance.job(WHERE))
    check_invariants(instance, {jobid: Expect()})
    assert instance.output(jobid).decode().split(" ", 1)[1].strip() == str(sorted(os.sched_getaffinity(0)))


def test_nobody_writes_over_the_records_of_jobs(instance: Instance) -> None:
    jobid = instance.submit(instance.job("sys.exit(3)"))
    for key in ("job", "job.x", "job-index", "job-submit.0.x", "."):
        with pytest.raises(RpcError) as caught:
            instance.rpc("kvs.commit", {"namespace": "primary", "ops": [{"key": key, "flags": 0, "dirent": None}]})
        assert caught.value.errnum == errno.EPERM, key
    with pytest.raises(RpcError, match="the name is for a job's"):
        instance.rpc("kvs.namespace-create", {"namespace": "job-x"})
    check_invariants(instance, {jobid: Expect(status=wait_status(3))})


def test_a_broker_without_standard_descriptors(make_instance: MakeInstance) -> None:
    """Its files and sockets must not get their numbers: jobs run all the same."""
    instance = make_instance()
    command = "exec " + " ".join(instance.command()) + " <&- >&- 2>&-"
    instance.broker = subprocess.Popen(["/bin/sh", "-c", command], env=instance.environ, cwd="/")
    eventually(lambda: (instance.rundir / "local-0").exists(), what="the socket")
    done = instance.fluxres("run", "echo", "ok")
    assert done.stdout == b"ok\n"


def test_a_broker_that_is_refused_says_so_and_exits(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    assert instance.stop() == 0
    (instance.statedir / "identity.json").write_text("{", encoding="utf-8")
    instance.tolerated.append("panic:")
    refused = subprocess.run(
        instance.command(), env=instance.environ, stderr=subprocess.PIPE, timeout=PATIENCE, check=False
    )
    assert refused.returncode == 1
    last = refused.stderr.decode().splitlines()[-1]
    assert last.startswith("fluxres-broker: cannot read ")
    assert "move the statedir away" in last
