"""Jobs whose owner spoils their guest namespace: they end, with that as the reason, and nothing of them is left."""

from __future__ import annotations

import pytest
from kit import Instance, eventually, process_gone

from fluxres.exec.progress import guest_namespace
from fluxres.job.value import JobState

TALK = """
while not os.path.exists(sys.argv[1]):
    print("line", flush=True)
    time.sleep(0.02)
"""


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("key", ["output", "exec.eventlog"])
def test_a_key_that_is_a_directory(key: str, restarted: bool, instance: Instance) -> None:
    end = instance.path / "end"
    jobid = instance.submit(instance.job(TALK, str(end)))
    task = instance.wait_marked(jobid).pid
    instance.wait_event(jobid, "start")
    if restarted:
        instance.kill()
        instance.start()
    namespace = guest_namespace(jobid)
    instance.fluxres("kvs", "unlink", "-N", namespace, key)
    instance.fluxres("kvs", "mkdir", "-N", namespace, key)
    if restarted:
        instance.restart()
    end.touch()
    instance.wait_inactive(jobid)
    assert process_gone(task)
    assert instance.jobs()[jobid]["state"] == JobState.INACTIVE
    exception = instance.exception(jobid)
    assert exception is not None
    assert "it is a directory" in str(exception["note"])
    assert instance.status(jobid) is not None
    eventually(lambda: not instance.jobdir(jobid).exists(), what="the end of its directory")
    assert "panic" not in instance.log


def test_a_namespace_that_is_removed(instance: Instance) -> None:
    jobid = instance.submit(instance.job(TALK, str(instance.path / "never")))
    task = instance.wait_marked(jobid).pid
    instance.wait_event(jobid, "start")
    instance.rpc("kvs.namespace-remove", {"namespace": guest_namespace(jobid)})
    instance.wait_inactive(jobid)
    assert process_gone(task)
    assert instance.exception(jobid) is not None
    assert "panic" not in instance.log
