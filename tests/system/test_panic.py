"""An incarnation that panics: the same process begins the next one, which takes up every job, as after a SIGKILL."""

from __future__ import annotations

import pytest
from conftest import MakeInstance
from kit import BROKER_PLACES, Expect, check_invariants, wait_status

SIDES = ("before", "after")
JOBS = 6
BODY = "print('begun', flush=True); time.sleep(0.05); print('ended'); sys.exit(3)"


@pytest.mark.parametrize("failpoint", [f"{place}.{side}" for place in BROKER_PLACES for side in SIDES])
def test_the_next_incarnation_goes_on(failpoint: str, make_instance: MakeInstance) -> None:
    instance = make_instance(cores=3)
    instance.tolerated += ["Panicked", "Traceback"]
    instance.start(env={"FLUXRES_FAILPOINT": f"{failpoint}@2=panic"})
    pid = instance.pid
    jobspec = instance.job(BODY)
    jobs = {}
    for number in range(JOBS):
        # As every client does: a submission that got no answer is asked again, with its key.
        jobid = instance.insist(jobspec, key=f"job-{number}")
        jobs[jobid] = Expect(status=wait_status(3), output=b"begun\nended\n")
    assert len(jobs) == JOBS
    check_invariants(instance, jobs)
    assert instance.rpc("attr.get", {"name": "broker.boot-count"})["value"] == "2", "it did not panic, or not once"
    assert instance.pid == pid
    assert instance.stop() == 0
    assert all("Panicked" in line for line in instance.log.splitlines() if "panic:" in line)
