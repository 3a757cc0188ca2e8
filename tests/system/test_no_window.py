"""No window: whatever was answered stays true, however soon after the answer the SIGKILL comes."""

from __future__ import annotations

import os
import signal

from kit import Expect, Instance, check_invariants, eventually, submission, wait_status

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId
from fluxres.job.value import JobState

HOLD = 0
"""The urgency that holds a job."""
BURST = 300
ANSWERS = 40
"""Answers that have come in a burst when the broker is killed."""


def test_what_was_answered_stays_true(instance: Instance) -> None:
    finished = instance.submit_many([instance.job(f"print({n}); sys.exit({n})") for n in range(8)])
    instance.wait_inactive(*finished)
    ran = instance.submit(instance.job("print('late'); sys.exit(9)"), urgency=HOLD)
    held = [instance.submit(instance.job("print('late'); sys.exit(9)"), urgency=HOLD) for _ in range(20)]
    cancelled = held[:5]
    changed = held[5]
    with instance.client() as client:
        for jobid in cancelled:
            client.call("job-manager.raise", {"id": int(jobid), "type": "cancel", "severity": 0, "note": "no"})
        answer = client.call("job-manager.urgency", {"id": int(changed), "urgency": 7})
        assert answer["old_urgency"] == HOLD
        os.kill(instance.pid, signal.SIGKILL)  # right after the last answer
    assert instance.died() == -signal.SIGKILL
    instance.start()

    listed = instance.jobs()
    assert set(listed) == {*finished, ran, *held}
    assert listed[changed]["urgency"] == 7
    newer = [instance.submit(instance.job("sys.exit(1)")) for _ in range(3)]
    assert min(newer) > max(listed), "a jobid below one that was given already"
    for jobid in {ran, *held} - {changed, *cancelled}:
        assert instance.jobs()[jobid]["state"] == JobState.SCHED
        instance.rpc("job-manager.urgency", {"id": int(jobid), "urgency": 16})
    expect = {jobid: Expect(status=wait_status(n), output=b"%d\n" % n) for n, jobid in enumerate(finished)}
    expect |= {jobid: Expect(status=wait_status(9), output=b"late\n") for jobid in (ran, *held)}
    expect |= {jobid: Expect(exception="cancel", tasks=0, status=None) for jobid in cancelled}
    expect |= {jobid: Expect(status=wait_status(1)) for jobid in newer}
    check_invariants(instance, expect)


def test_a_burst_of_submissions_cut_off(instance: Instance) -> None:
    jobspec = instance.job("print('once')")
    keys = [f"burst-{number}" for number in range(BURST)]
    answered: dict[str, JobId] = {}
    with instance.client() as client:
        tags = {
            client.open("job-ingest.submit", submission(jobspec, key=key, urgency=HOLD), streaming=False): key
            for key in keys
        }
        try:
            while (reply := client.receive(60)) is not None:
                assert reply.error is None
                number = reply.payload["id"]
                assert isinstance(number, int)
                answered[tags[reply.matchtag]] = JobId(number)
                if len(answered) == ANSWERS:
                    os.kill(instance.pid, signal.SIGKILL)
        except FluxresError:
            pass  # the broker is dead; what it had answered before is read by now
    assert instance.died() == -signal.SIGKILL
    assert len(answered) >= ANSWERS
    instance.start()

    listed = instance.jobs()
    assert set(answered.values()) <= set(listed), "an answered submission is lost"
    again = {key: instance.submit(jobspec, key=key, urgency=HOLD) for key in keys}
    assert {key: again[key] for key in answered} == answered, "another jobid for the same key"
    assert len(set(again.values())) == BURST, "one jobid for two keys"
    assert set(again.values()) == set(instance.jobs()), "a job that has no key"
    assert set(listed) <= set(again.values())


def test_running_jobs_cancelled_just_before_the_kill(instance: Instance) -> None:
    jobs = instance.submit_many([instance.job("time.sleep(600)") for _ in range(4)])
    pids = [instance.wait_marked(jobid).pid for jobid in jobs]
    with instance.client() as client:
        for jobid in jobs:
            client.call("job-manager.raise", {"id": int(jobid), "type": "cancel", "severity": 0, "note": "no"})
        os.kill(instance.pid, signal.SIGKILL)
    assert instance.died() == -signal.SIGKILL
    instance.start()
    check_invariants(instance, dict.fromkeys(jobs, Expect(exception="cancel", status=None)))
    assert len(pids) == len(instance.marked())


def test_a_submission_that_got_no_answer_is_asked_again(instance: Instance) -> None:
    """The key draws the line: whether or not the first one was stored, there is one job."""
    jobspec = instance.job("print('once')")
    for number in range(5):
        with instance.client() as client:
            client.open("job-ingest.submit", submission(jobspec, key=f"key-{number}"), streaming=False)
            instance.kill()
        instance.start()
        first = instance.submit(jobspec, key=f"key-{number}")
        assert instance.submit(jobspec, key=f"key-{number}") == first
    eventually(lambda: len(instance.jobs()) == 5, what="five jobs")
    check_invariants(instance, dict.fromkeys(instance.jobs(), Expect(output=b"once\n")))
