"""Jobs in memory, and what becomes of them when brokers, shells, nodes and networks are lost (I1 to I4)."""

from __future__ import annotations

import signal
from random import Random

import pytest
import trio

from fluxres.base.jobid import JobId
from fluxres.job.value import JobState
from fluxres.testing.checks import check_job, check_jobs, check_joined, check_new
from fluxres.testing.instance import Instance
from fluxres.testing.programs import Task
from fluxres.testing.simulate import simulated
from fluxres.testing.world import TaskId


async def finish(instance: Instance) -> None:
    """Wait for all jobs, and check them."""
    for jobid in instance.jobs.ids:
        await instance.jobs.wait(jobid)
    check_jobs(instance)


async def fill(instance: Instance) -> list[JobId]:
    """Jobs of every kind: running on one rank and on many, writing, and more of them than there is room for."""
    jobs = instance.jobs
    await jobs.submit("print", "100", "every", "0.1", nodes=3, tasks=6)
    await jobs.submit("print", "40", "every", "0.25", nodes=min(8, instance.size))
    for _ in range(10):
        await jobs.submit("sleep", "7")
    await jobs.submit("exit", "3", tasks=2)
    for _ in range(3):
        await jobs.submit("print", "10", "every", "0.5", nodes=instance.size, cores=4)
    return jobs.ids


def running(instance: Instance) -> list[TaskId]:
    return [task for node in instance.nodes for shell in node.shells().values() for task in shell.tasks()]


# --- jobs


@pytest.mark.parametrize("size", [1, 7, 30])
@simulated
async def test_jobs_across_ranks(size: int) -> None:
    async with Instance(size, fanout=3) as instance:
        await instance.start()
        hello = await instance.jobs.submit("echo", "hello", "world")
        wide = await instance.jobs.submit("print", "3", nodes=size, tasks=2 * size)
        code = await instance.jobs.submit("exit", "7", tasks=size)
        missing = await instance.jobs.submit("nothing", nodes=size)
        await finish(instance)
        assert instance.jobs.output(hello) == {(0, "stdout"): b"hello world\n"}
        assert instance.jobs.output(wide) == {(task, "stdout"): b"line 1\nline 2\nline 3\n" for task in range(2 * size)}
        assert [instance.jobs.job(each).status for each in (hello, wide, code)] == [0, 0, 7 << 8]
        exception = instance.jobs.job(missing).exception
        assert exception is not None
        assert "command not found" in exception.note
        await trio.sleep(5)
        assert not any(node.directories for node in instance.nodes)


@simulated
async def test_what_a_task_may_do() -> None:
    async def stubborn(task: Task) -> int:
        task.ignored.add(signal.SIGTERM)
        assert task.environment["COLOUR"] == "green"
        await task.write(b"to stderr\n", "stderr")
        await trio.sleep(1000)
        return 0

    async with Instance(3, fanout=2) as instance:
        instance.programs["stubborn"] = stubborn
        await instance.start()
        jobid = await instance.jobs.submit("stubborn", nodes=2, environment={"COLOUR": "green"})
        await instance.jobs.wait(jobid, "start")
        await trio.sleep(1)
        await instance.jobs.cancel(jobid)
        await instance.jobs.wait(jobid)
        check_job(instance, jobid, fails=True)
        assert instance.jobs.output(jobid)[1, "stderr"] == b"to stderr\n"
        for task in instance.world.deeds.of(jobid):
            assert instance.world.deeds.signals[task] == [signal.SIGTERM, signal.SIGKILL]
            assert instance.world.deeds.statuses[task] == signal.SIGKILL


@simulated
async def test_the_time_limit_is_kept_by_the_shell() -> None:
    async with Instance(3, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("sleep", "1000", nodes=3, duration=5)
        await instance.jobs.wait(jobid, "start")
        instance.kill(0, 1, 2)
        await trio.sleep(20)
        assert running(instance) == []
        await instance.restart(0, 1, 2)
        await finish(instance)
        exception = instance.jobs.job(jobid).exception
        assert exception is not None
        assert exception.type == "timeout"


@simulated
async def test_standard_input() -> None:
    async with Instance(3, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("cat", nodes=3)
        for number in range(10):
            await instance.call("job-exec.stdin", {"id": int(jobid), "data": f"{number}\n"})
            if number == 4:
                instance.kill(0)
                await instance.restart(0)
        await instance.call("job-exec.stdin", {"id": int(jobid), "eof": True})
        await finish(instance)
        text = "".join(f"{number}\n" for number in range(10)).encode()
        assert instance.jobs.output(jobid) == {(task, "stdout"): text for task in range(3)}


# --- brokers that die


@pytest.mark.parametrize("size", [7, 50])
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
@simulated
async def test_the_exit_criterion(size: int, clean: bool) -> None:
    """Rank 0 is restarted with running and pending jobs: every broker restarts, and all jobs are recovered."""
    async with Instance(size, fanout=4) as instance:
        await instance.start()
        ids = await fill(instance)
        await instance.jobs.wait(ids[0], "start")
        await trio.sleep(2)
        before, tasks = instance.uuids(), running(instance)
        assert any(instance.jobs.job(jobid).state is JobState.SCHED for jobid in ids)
        if clean:
            await instance.stop(0)
        else:
            instance.kill(0)
        await trio.sleep(1)
        assert running(instance) == tasks
        await instance.restart(0)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, list(range(size)))
        assert set(running(instance)) >= set(tasks)
        await finish(instance)
        for jobid in ids:
            check_job(instance, jobid, fails=False)
        restarted = [event.name for event in instance.jobs.eventlog(ids[0])]
        assert "flux-restart" in restarted


@pytest.mark.parametrize("rank", [1, 2, 14])
@simulated
async def test_a_router_or_a_leaf_is_killed(rank: int) -> None:
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        ids = await fill(instance)
        await instance.jobs.wait(ids[0], "start")
        await trio.sleep(1)
        instance.kill(rank)
        await trio.sleep(3)
        await instance.restart(rank)
        await trio.sleep(0.01)
        instance.kill(rank)  # while it rejoins
        await instance.restart(rank)
        await finish(instance)
        for jobid in ids:
            check_job(instance, jobid, fails=False)


@simulated
async def test_everybody_is_killed_again_and_again() -> None:
    async with Instance(16, fanout=2) as instance:
        await instance.start()
        ids = await fill(instance)
        for round_ in range(10):
            instance.kill(*range(instance.size))
            ranks = list(range(instance.size))
            Random(round_).shuffle(ranks)
            for rank in ranks:
                await instance.restart(rank)
                await trio.sleep(0.01)
            await trio.sleep(0.5)
        await finish(instance)
        for jobid in ids:
            check_job(instance, jobid, fails=False)


@simulated
async def test_late_ranks_are_waited_for() -> None:
    """Jobs go to who is there; one that needs more waits, and does not fail."""
    async with Instance(15, fanout=2) as instance:
        await instance.start(range(7))
        small = await instance.jobs.submit("sleep", "1", nodes=5)
        large = await instance.jobs.submit("sleep", "1", nodes=15)
        await instance.jobs.wait(small)
        await trio.sleep(10)
        assert instance.jobs.job(large).state is JobState.SCHED
        instance.launch(range(7, 15))
        await finish(instance)
        check_job(instance, large, fails=False)


# --- shells and nodes that die


@simulated
async def test_a_shell_is_killed() -> None:
    async with Instance(7, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("print", "100", "every", "0.1", nodes=4, tasks=4)
        other = await instance.jobs.submit("sleep", "20", nodes=7, tasks=7)
        await instance.jobs.wait(jobid, "start")
        await trio.sleep(1)
        instance.nodes[3].kill_shell(jobid)
        await finish(instance)
        check_job(instance, jobid, fails=True)
        check_job(instance, other, fails=False)
        exception = instance.jobs.job(jobid).exception
        assert exception is not None
        assert "rank 3" in exception.note
        assert "SIGKILL" in exception.note


@simulated
async def test_a_node_reboots() -> None:
    async with Instance(7, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("print", "100", "every", "0.1", nodes=7)
        await instance.jobs.wait(jobid, "start")
        await trio.sleep(1)
        await instance.reboot(5)
        await instance.restart(5)
        other = await instance.jobs.submit("sleep", "1", nodes=7)
        await finish(instance)
        check_job(instance, jobid, fails=True)
        check_job(instance, other, fails=False)
        exception = instance.jobs.job(jobid).exception
        assert exception is not None
        assert "rebooted" in exception.note


# --- networks that are cut


@pytest.mark.parametrize("towards", ["both", "up", "down"])
@pytest.mark.parametrize("seconds", [3.0, 20.5, 22.0, 90.0])
@simulated
async def test_a_cut_costs_no_job(seconds: float, towards: str) -> None:
    """Whichever end notices first, or none: no job fails, and no task runs twice."""
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        ids = await fill(instance)
        ids.append(await instance.jobs.submit("print", "60", "every", "2", nodes=15, tasks=15))
        await trio.sleep(2)
        below = list(instance.topology.subtree(1))
        others = [rank for rank in range(instance.size) if rank not in below]
        first, second = (others, below) if towards == "down" else (below, others)
        instance.cut(first, second, one_way=towards != "both")
        await trio.sleep(seconds)
        instance.heal()
        await finish(instance)
        for jobid in ids:
            check_job(instance, jobid, fails=False)


@pytest.mark.parametrize("seconds", [1.0, 30.0])
@simulated
async def test_a_job_is_cancelled_while_a_rank_is_cut_off(seconds: float) -> None:
    """When the rank is back its tasks are killed, exactly those."""
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        doomed = await instance.jobs.submit("sleep", "1000", nodes=15, tasks=15)
        spared = await instance.jobs.submit("sleep", "100", nodes=15, tasks=15)
        await instance.jobs.wait(spared, "start")
        await trio.sleep(1)
        below = list(instance.topology.subtree(1))
        instance.cut(below)
        await trio.sleep(seconds)
        await instance.jobs.cancel(doomed)
        await trio.sleep(30)
        assert {task.rank for task in running(instance) if task.jobid == doomed} == set(below)
        instance.heal()
        await finish(instance)
        check_job(instance, doomed, fails=True)
        check_job(instance, spared, fails=False)
        signalled = instance.world.deeds.signals
        assert {task for task in signalled if task.jobid != doomed} == set()
        assert all(instance.world.deeds.statuses[task] == signal.SIGTERM for task in instance.world.deeds.of(doomed))


@simulated
async def test_a_job_starts_while_a_rank_is_cut_off() -> None:
    """Its resources are given, and its shells wait for each other, until the cut is healed."""
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        instance.cut(list(instance.topology.subtree(2)))
        jobid = await instance.jobs.submit("print", "5", nodes=15)
        await trio.sleep(60)
        assert instance.world.deeds.of(jobid) == []
        instance.heal()
        await finish(instance)
        check_job(instance, jobid, fails=False)
