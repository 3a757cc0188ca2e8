"""The shortest whole life of a job: submitted, run, ended, nothing left."""

from __future__ import annotations

from kit import Expect, Instance, check_invariants, wait_status


def test_a_job_runs_and_ends(instance: Instance) -> None:
    jobid = instance.submit(instance.job("print('hello'); sys.exit(3)"))
    check_invariants(instance, {jobid: Expect(status=wait_status(3), output=b"hello\n")})
    done = instance.fluxres("run", "sh", "-c", "cat; exit 4", data=b"in\n", check=False)
    assert (done.returncode, done.stdout) == (4, b"in\n")
    assert instance.stop() == 0
