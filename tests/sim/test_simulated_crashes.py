"""Rank 0 is killed right before and right after each of its commits; and everybody at random (I1 to I4, I7)."""

from __future__ import annotations

from random import Random

import pytest
import trio

from fluxres.testing.checks import check_job, check_jobs, check_joined
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulated

SCHEDULES = 20
"""Random schedules that are run."""


async def story(instance: Instance) -> None:
    """A few jobs, one of which is cancelled, and one waits for the others' resources."""
    jobs = instance.jobs
    first = await jobs.submit("print", "4", "every", "0.2", nodes=3, tasks=3)
    doomed = await jobs.submit("sleep", "100", nodes=2, tasks=2)
    await jobs.submit("exit", "3", tasks=2)
    chatty = await jobs.submit("print", "5", nodes=3, tasks=3)
    waiting = await jobs.submit("echo", "at last", nodes=3)
    await jobs.wait(doomed, "start")
    await jobs.cancel(doomed)
    for jobid in jobs.ids:
        await jobs.wait(jobid)
    check_jobs(instance)
    check_job(instance, doomed, fails=True)
    for jobid in (first, chatty, waiting):
        check_job(instance, jobid, fails=False)


async def run(*, before: set[int], after: set[int]) -> int:
    """The story, with rank 0 killed at these commits; how many commits it took."""

    async with Instance(3, fanout=1) as instance:
        instance.supervise(0.1)

        def kill_before(number: int) -> None:
            if number in before:
                before.discard(number)
                instance.kill(0)

        def kill_after(number: int) -> None:
            if number in after:
                instance.kill(0)

        instance.store.before_commit = kill_before
        instance.store.after_commit = kill_after
        instance.launch()
        await story(instance)
        await instance.online()
        check_joined(instance)
        return instance.store.commits


@simulated
async def test_each_commit_may_be_the_last() -> None:
    commits = await run(before=set(), after=set())
    assert commits > 20
    for number in range(1, commits + 1):
        await run(before={number}, after=set())
        await run(before=set(), after={number})


@pytest.mark.parametrize("distance", [1, 2, 5])
@simulated
async def test_two_commits_may_be_the_last(distance: int) -> None:
    for number in range(1, 30):
        await run(before=set(), after={number, number + distance})


async def haunt(instance: Instance, random: Random, until: float) -> None:
    """Kill, cut off, and restart whoever chance says."""
    while trio.current_time() < until:
        await trio.sleep(random.expovariate(0.5))
        match random.randrange(6):
            case 0:
                instance.kill(0)
            case 1:
                instance.kill(*random.sample(range(instance.size), random.randint(1, instance.size)))
            case 2 | 3:
                instance.kill(random.randrange(instance.size))
            case 4:
                instance.cut(random.sample(range(instance.size), random.randint(1, 3)), one_way=random.random() < 0.5)
            case 5:
                instance.heal()
    instance.heal()


@pytest.mark.parametrize("seed", range(SCHEDULES))
@simulated
async def test_random_kills_and_cuts(seed: int) -> None:
    random = Random(seed)
    async with Instance(9, fanout=2, seed=seed, jitter=0.002, loss=0.001) as instance:
        instance.supervise(0.3)
        instance.launch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(haunt, instance, random, 60)
            for _ in range(15):
                nodes = random.randint(1, instance.size)
                length = random.randint(1, 30)
                await instance.jobs.submit("print", str(length), "every", "0.3", nodes=nodes, tasks=nodes)
                await trio.sleep(random.expovariate(0.5))
        for jobid in instance.jobs.ids:
            await instance.jobs.wait(jobid)
            check_job(instance, jobid, fails=False)
        check_jobs(instance)
        await instance.online()
        check_joined(instance)
