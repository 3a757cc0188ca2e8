"""The exit criterion at size 1: a broker is killed with jobs running and pending, and nothing of that is lost."""

from __future__ import annotations

from collections import Counter

from conftest import MakeInstance
from kit import Expect, Instance, birth, check_invariants, eventually, process_gone, wait_status

from fluxres.job.value import JobState

RUNNING = 8
PENDING = 20

# Prints a numbered line every 20 ms until told to end; then says how many there were.
COUNTER = """
number, pause = 0, float(sys.argv[1])
def say():
    global number
    number += 1
    print(number, flush=True)
    if number % 10 == 0:
        mark("lines", number)
    time.sleep(pause)
while not os.path.exists("end"):
    say()
for _ in range(5):
    say()
mark("end", number)
sys.exit(7)
"""


def lines(count: int) -> bytes:
    """What COUNTER prints."""
    return b"".join(b"%d\n" % number for number in range(1, count + 1))


def lines_printed(instance: Instance) -> Counter[str]:
    """How often each job has said that it printed more lines."""
    return Counter(marker.jobid for marker in instance.marked(word="lines"))


def test_a_killed_broker_loses_nothing(make_instance: MakeInstance) -> None:
    instance = make_instance(cores=RUNNING)
    instance.start()
    running = instance.submit_many([instance.job(COUNTER, "0.02") for _ in range(RUNNING)])
    pending = instance.submit_many([instance.job("print('ran'); sys.exit(3)") for _ in range(PENDING)])
    pids = {jobid: instance.wait_marked(jobid).pid for jobid in running}
    births = {jobid: birth(pid) for jobid, pid in pids.items()}
    for jobid in running:
        instance.wait_marked(jobid, "lines")
    states = instance.jobs()
    assert all(states[jobid]["state"] == JobState.RUN for jobid in running)
    assert all(states[jobid]["state"] == JobState.SCHED for jobid in pending)

    instance.kill()
    printed = lines_printed(instance)
    eventually(lambda: all(lines_printed(instance)[job] > printed[job] for job in printed), what="lines meanwhile")
    instance.start()

    assert set(instance.jobs()) == {*running, *pending}
    for jobid in running:
        instance.wait_event(jobid, "reattach", "guest.exec.eventlog")
        assert birth(pids[jobid]) == births[jobid]
        assert not process_gone(pids[jobid])
    assert len(instance.marked()) == RUNNING, "a job began although all cores were in use"
    (instance.path / "end").touch()
    instance.wait_inactive()
    ends = {jobid: instance.wait_marked(jobid, "end") for jobid in running}
    expect = {jobid: Expect(status=wait_status(7), output=lines(int(end.rest[0]))) for jobid, end in ends.items()}
    expect |= {jobid: Expect(status=wait_status(3), output=b"ran\n") for jobid in pending}
    check_invariants(instance, expect)
    assert {jobid: end.pid for jobid, end in ends.items()} == pids


def test_brokers_killed_again_and_again(make_instance: MakeInstance) -> None:
    instance = make_instance(cores=3)
    instance.start()
    jobs = instance.submit_many([instance.job(COUNTER, "0.001") for _ in range(3)])
    for jobid in jobs:
        instance.wait_marked(jobid)
    for _ in range(5):
        instance.restart()
    (instance.path / "end").touch()
    ends = {jobid: instance.wait_marked(jobid, "end") for jobid in jobs}
    expect = {jobid: Expect(status=wait_status(7), output=lines(int(end.rest[0]))) for jobid, end in ends.items()}
    check_invariants(instance, expect)
    assert instance.stop() == 0
