"""What must be true of a simulated instance, whoever was killed (DESIGN §12). Each check raises AssertionError.

The tasks' own record of what they did (`world.Deeds`) is what the instance's records are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxres.base.jobid import JobId, f58
from fluxres.job.value import JobState
from fluxres.testing.instance import Instance
from fluxres.testing.world import TaskId
from fluxres_shell.state import exit_code

Fault = AssertionError


def check_jobs(instance: Instance) -> None:
    """I1 to I4 of all jobs that were submitted, each of which must have ended."""
    twice = instance.world.deeds.twice()
    if twice:
        raise Fault(f"I2: tasks ran twice: {twice}")
    for jobid in instance.jobs.ids:
        check_job(instance, jobid)


def check_job(instance: Instance, jobid: JobId, *, fails: bool | None = None) -> None:
    """I1, I3 and I4 of a job. `fails` says whether it has to have a fatal exception, or none at all; None: it may."""
    name = f58(jobid)
    job = instance.jobs.job(jobid)
    if job.state is not JobState.INACTIVE:
        raise Fault(f"I1: job {name} is {job.state.name}")
    failed = job.fatal
    if fails is True and not failed:
        raise Fault(f"job {name} did not fail")
    if fails is False and job.exception is not None:
        raise Fault(f"job {name} has the exception {job.exception}")
    _check_output(instance, jobid, complete=not failed)
    deeds = instance.world.deeds
    codes = [exit_code(deeds.statuses[task]) for task in deeds.of(jobid) if task in deeds.statuses]
    if not failed and job.status != max(codes, default=0) << 8:
        raise Fault(f"I4: job {name} has the wait status {job.status}, its tasks exited with {codes}")


def _check_output(instance: Instance, jobid: JobId, *, complete: bool) -> None:
    """I3: every byte that a task wrote, once and in order; a prefix, where its shell or node died."""
    deeds = instance.world.deeds
    tasks = deeds.of(jobid)
    if not tasks:
        return
    stored = instance.jobs.output(jobid)
    written: Mapping[tuple[TaskId, str], bytearray] = {
        where: data for where, data in deeds.output.items() if where[0].jobid == jobid
    }
    unknown = stored.keys() - {(task.task, stream) for task, stream in written}
    if unknown:
        raise Fault(f"I3: job {f58(jobid)} has output that nobody wrote: {sorted(unknown)}")
    for (task, stream), data in written.items():
        there = stored.get((task.task, stream), b"")
        if not (there == data if complete else data.startswith(there)):
            raise Fault(f"I3: {task}: {stream} is {there!r:.200}, and {bytes(data)!r:.200} was written")


def check_joined(instance: Instance) -> None:
    """Every broker is joined to its parent as the incarnation that it is, and rank 0 knows it as that."""
    for rank in range(instance.size):
        incarnation = instance.processes[rank].loop.incarnation
        if incarnation is None or not instance.is_online(rank):
            raise Fault(f"rank {rank} is not online")
        children = {child: each.hello.uuid for child, each in incarnation.overlay.down.online.items()}
        expected = {child: instance.processes[child].uuid for child in instance.topology.children(rank)}
        if children != expected:
            raise Fault(f"rank {rank} has the children {children}, and they are {expected}")


def check_new(instance: Instance, before: Mapping[int, str], ranks: list[int]) -> None:
    """I6: of these ranks, no incarnation of `before` is left."""
    after = instance.uuids()
    same = [rank for rank in ranks if after.get(rank) == before.get(rank)]
    if same:
        raise Fault(f"I6: ranks {same} are the incarnations that they were")


def check_same(instance: Instance, before: Mapping[int, str], ranks: list[int]) -> None:
    """Nothing has happened to these ranks."""
    after = instance.uuids()
    other = [rank for rank in ranks if after.get(rank) != before.get(rank)]
    if other:
        raise Fault(f"ranks {other} were restarted, and had no reason to be")
