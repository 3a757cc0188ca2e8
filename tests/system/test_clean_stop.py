"""A clean stop (SIGTERM) of a durable instance leaves running jobs running; a temporary one takes them along."""

from __future__ import annotations

import signal

import pytest
from conftest import MakeInstance
from kit import Expect, Instance, birth, check_invariants, eventually, process_gone, wait_status

WAITS = """
print("begun", flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
print("ended")
sys.exit(6)
"""
EXPECT = Expect(status=wait_status(6), output=b"begun\nended\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_running_jobs_run_on(instance: Instance, signum: int) -> None:
    jobs = instance.submit_many([instance.job(WAITS) for _ in range(4)])
    pending = instance.submit(instance.job("print('later')"))
    births = [birth(instance.wait_marked(jobid).pid) for jobid in jobs]
    assert instance.broker is not None
    instance.broker.send_signal(signum)
    assert instance.died() == 0
    assert [birth(pid) for pid, _ in births] == births
    assert not instance.marked(pending), "a pending job began while the instance was stopping"
    assert not (instance.rundir / "local-0").exists()
    instance.start()
    assert [birth(pid) for pid, _ in births] == births
    (instance.path / "go").touch()
    check_invariants(instance, {**dict.fromkeys(jobs, EXPECT), pending: Expect(output=b"later\n")})
    assert instance.stop() == 0


def test_jobs_that_end_after_the_stop(instance: Instance) -> None:
    jobid = instance.submit(instance.job(WAITS))
    instance.wait_marked(jobid)
    shell = instance.shell_pid(jobid)
    assert instance.stop() == 0
    (instance.path / "go").touch()
    eventually(lambda: process_gone(shell), what="the end of the shell")
    instance.start()
    check_invariants(instance, {jobid: EXPECT})


def test_stopped_in_the_middle_of_everything(instance: Instance) -> None:
    """Jobs at every step of their lives when the stop comes, again and again."""
    jobs = []
    for number in range(4):
        jobs += instance.submit_many([instance.job(f"print({number})") for _ in range(8)])
        assert instance.stop() == 0
        instance.start()
    expect = {jobid: Expect(output=b"%d\n" % (number // 8)) for number, jobid in enumerate(jobs)}
    check_invariants(instance, expect)


def test_a_temporary_instance_leaves_nothing_behind(make_instance: MakeInstance) -> None:
    instance = make_instance(settings={"broker": {"temporary": True}})
    instance.start()
    jobs = instance.submit_many([instance.job(WAITS) for _ in range(6)])
    for jobid in jobs[:4]:
        instance.wait_marked(jobid)
    assert instance.stop() == 0
    eventually(lambda: not instance.processes(), what="the end of all processes")
    assert len(instance.marked()) == 4
