"""Rank 0 is killed right before and right after each of its commits; and everybody at random (I1 to I4, I7)."""

from __future__ import annotations

import contextlib
from functools import partial
from random import Random

import pytest
import trio

from fluxres.base.errors import RpcError
from fluxres.testing.checks import check_job, check_jobs, check_joined
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulate, simulated

SCHEDULES = 8
"""Random schedules that are run."""
PATIENCE = 60.0
"""Seconds after which a call must have ended; a silent peer is lost after 20."""


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


async def haunt(instance: Instance, random: Random, until: float, *, harsh: bool = False) -> None:
    """Kill, cut off, and restart whoever chance says; `harsh`: also shells and nodes, which costs jobs."""
    size = instance.size
    while trio.current_time() < until:
        await trio.sleep(random.expovariate(0.5))
        match random.randrange(9 if harsh else 7):
            case 0:
                instance.kill(0)
            case 1:
                instance.kill(*random.sample(range(size), random.randint(1, size)))
            case 2 | 3:
                instance.kill(random.randrange(size))
            case 4:
                instance.cut(random.sample(range(size), random.randint(1, 3)), one_way=random.random() < 0.5)
            case 5 | 6:
                instance.heal()
            case 7:
                shells = [shell for node in instance.nodes for shell in node.shells().values()]
                if shells:
                    random.choice(shells).kill()
            case 8:
                rank = random.randrange(size)
                await instance.reboot(rank, random.uniform(0, 5))
                await instance.restart(rank)
    instance.heal()


async def submit_some(instance: Instance, random: Random) -> None:
    """Jobs of one to all ranks, by way of anybody; some are cancelled."""
    for _ in range(15):
        nodes, lines, rank = random.randint(1, instance.size), random.randint(1, 30), random.randrange(instance.size)
        jobid = await instance.jobs.submit("print", str(lines), "every", "0.3", nodes=nodes, tasks=nodes, rank=rank)
        await trio.sleep(random.expovariate(0.5))
        if random.random() < 0.2:
            with contextlib.suppress(RpcError):  # it may have ended
                await instance.jobs.cancel(jobid, rank=random.randrange(instance.size))


async def ask(instance: Instance, random: Random) -> None:
    """Calls from anybody to anybody, each of which is answered, or fails, in time (I5)."""
    while True:
        await trio.sleep(random.uniform(0, 1))
        rank, nodeid = random.randrange(instance.size), random.randrange(instance.size)
        async with instance.client(rank) as handle:
            with trio.fail_after(PATIENCE), contextlib.suppress(RpcError):
                await handle.call("broker.ping", {}, nodeid=nodeid)


@pytest.mark.parametrize("harsh", [False, True], ids=["brokers", "all"])
@pytest.mark.parametrize("seed", range(SCHEDULES))
@simulated
async def test_random_kills_and_cuts(seed: int, harsh: bool) -> None:
    random = Random(seed)
    async with Instance(9, fanout=2, seed=seed, jitter=0.002, loss=0.001) as instance:
        instance.supervise(0.3)
        instance.launch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, instance, random)
            async with trio.open_nursery() as troubles:
                troubles.start_soon(partial(haunt, instance, random, 60, harsh=harsh))
                troubles.start_soon(submit_some, instance, random)
            nursery.cancel_scope.cancel()
        for jobid in instance.jobs.ids:
            await instance.jobs.wait(jobid)
            exception = instance.jobs.job(jobid).exception
            assert harsh or exception is None or exception.type == "cancel"
        check_jobs(instance)
        await instance.online()
        check_joined(instance)
        await trio.sleep(15)
        assert not any(node.directories for node in instance.nodes)


async def _history(seed: int) -> list[str]:
    """All that brokers log in a simulation of kills and cuts."""
    random = Random(seed)
    async with Instance(9, fanout=2, seed=seed, jitter=0.002, loss=0.001) as instance:
        instance.supervise(0.3)
        instance.launch()
        jobid = await instance.jobs.submit("print", "30", "every", "0.3", nodes=9)
        await haunt(instance, random, 60)
        await instance.jobs.wait(jobid)
        return instance.log.lines


def test_one_seed_is_one_history() -> None:
    first, again, other = (simulate(partial(_history, seed), seed=order) for seed, order in ((1, 1), (1, 1), (2, 1)))
    assert first == again != other
