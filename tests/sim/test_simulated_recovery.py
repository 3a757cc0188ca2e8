"""Recoveries in memory: what `resource.eventlog` has of them, durably, and that it is right."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import trio

from fluxres.base.eventlog import decode
from fluxres.base.json import JsonValue
from fluxres.broker.changes import EVENTLOG_KEY
from fluxres.exec.recovery import LIMIT
from fluxres.job.value import JobState
from fluxres.kvs.ops import PRIMARY
from fluxres.testing.checks import check_jobs
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulated
from fluxres.testing.world import EPOCH

SIZE = 7
"""Ranks 1 and 2 are below rank 0; 3 and 4 below 1; 5 and 6 below 2."""
FOREVER = "100000"

Told = Mapping[str, JsonValue]


def recoveries(instance: Instance) -> list[Told]:
    """The contexts of all recovery events, as they are committed."""
    log = decode(instance.store.get(PRIMARY, EVENTLOG_KEY) or b"")
    return [event.context for event in log if event.name == "recovery"]


async def recovered(instance: Instance, count: int = 1) -> Told:
    """Wait until there are so many; the last of them."""
    while len(found := recoveries(instance)) < count:
        await instance.store.committed()
    assert len(found) == count
    return found[-1]


def check(told: Told, **expected: JsonValue) -> None:
    """Fail unless the event says that; what is not named is empty, 0, or absent."""
    nothing: dict[str, JsonValue] = {
        "restarted": "",
        "panicked": "",
        "running": 0,
        "rediscovered": 0,
        "finished": 0,
        "lost": 0,
        "pending": 0,
    }
    found = {key: value for key, value in told.items() if key not in ("began", "seconds", "why")}
    assert found == {**nothing, **expected}


def when(told: Told) -> tuple[float, float]:
    """When it began, in the simulation's time, and how long it took."""
    began, seconds = told["began"], told["seconds"]
    assert isinstance(began, float)
    assert isinstance(seconds, float)
    return began - EPOCH, seconds


async def begin(instance: Instance) -> None:
    """Start, and wait until rank 0 has nothing more to log."""
    await instance.start()
    await trio.sleep(2)


async def run(instance: Instance, *, nodes: int = SIZE, cores: int = 1) -> None:
    """Have one more job running, for good, on all ranks."""
    jobid = await instance.jobs.submit("sleep", FOREVER, nodes=nodes, tasks=nodes, cores=cores)
    await instance.jobs.wait(jobid, "start")


@simulated
async def test_a_first_start_is_no_recovery() -> None:
    async with Instance(SIZE, fanout=2, time_limit=10 * LIMIT) as instance:
        await begin(instance)
        await run(instance)
        await trio.sleep(2 * LIMIT)
        assert recoveries(instance) == []


@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
@simulated
async def test_rank_0_goes_and_comes_back(clean: bool) -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        await run(instance, nodes=2)
        await run(instance, cores=2)
        waiting = [await instance.jobs.submit("sleep", "1", nodes=SIZE, tasks=SIZE, cores=3) for _ in range(3)]
        await instance.jobs.wait(waiting[-1], "priority")
        died = trio.current_time()
        if clean:
            await instance.stop(0)
        else:
            instance.kill(0)
        await trio.sleep(5)
        await instance.restart(0)
        told = await recovered(instance)
        check(
            told,
            ranks="0-6",
            root=0,
            restarted="0",
            panicked="1-6",
            running=3,
            rediscovered=3,
            pending=3,
        )
        began, seconds = when(told)
        assert died <= began < died + 1
        assert 5 < seconds == pytest.approx(trio.current_time() - began, abs=0.1)
        how = "shut down" if clean else "restarted"
        assert str(told["why"]).startswith(f"rank 0 was {how}; rank 1: the parent, rank 0, is lost")
        assert all(instance.jobs.job(jobid).state is JobState.SCHED for jobid in waiting)


@simulated
async def test_a_router_is_killed() -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        for _ in range(3):
            await run(instance)
        died = trio.current_time()
        instance.kill(1)
        await trio.sleep(3)
        assert recoveries(instance) == []
        await instance.restart(1)
        told = await recovered(instance)
        check(told, ranks="1,3-4", root=1, restarted="1", panicked="3-4", running=3, rediscovered=3)
        began, seconds = when(told)
        assert began == pytest.approx(died, abs=0.1)
        assert seconds == pytest.approx(trio.current_time() - died, abs=0.1)
        assert str(told["why"]).startswith("rank 1 was restarted; rank 3: the parent, rank 1, is lost")


@simulated
async def test_a_leaf_is_killed_twice_in_one_episode() -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        instance.kill(1, 6)
        await trio.sleep(1)
        await instance.restart(6)
        await instance.online([6])
        await trio.sleep(1)
        instance.kill(6)
        await instance.restart(6)
        await instance.online([6])
        assert recoveries(instance) == []
        await instance.restart(1)
        check(
            await recovered(instance),
            ranks="1,3-4,6",
            root=1,
            restarted="1,6",
            panicked="3-4",
            running=1,
            rediscovered=1,
        )


@simulated
async def test_an_idle_leaf_is_killed() -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        instance.kill(5)
        await instance.restart(5)
        check(await recovered(instance), ranks="5", root=5, restarted="5")


@simulated
async def test_jobs_end_while_their_ranks_are_away() -> None:
    """One finishes, of one its shell is killed, the third runs on: and each is counted as what it is."""
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        short = await instance.jobs.submit("sleep", "10", nodes=SIZE, tasks=SIZE)
        doomed = await instance.jobs.submit("sleep", FOREVER, nodes=SIZE, tasks=SIZE)
        await run(instance)
        for jobid in (short, doomed):
            await instance.jobs.wait(jobid, "start")
        await trio.sleep(1)  # their tasks start together, when all shells are there
        instance.kill(0, 4)
        await trio.sleep(20)
        instance.nodes[4].kill_shell(doomed)
        await instance.restart(0)
        await instance.jobs.wait(short, "flux-restart")
        await trio.sleep(5)
        assert recoveries(instance) == []
        await instance.restart(4)
        told = await recovered(instance)
        check(
            told,
            ranks="0-6",
            root=0,
            restarted="0,4",
            panicked="1-3,5-6",
            running=3,
            rediscovered=1,
            finished=1,
            lost=1,
        )
        for jobid in (short, doomed):
            await instance.jobs.wait(jobid)


@pytest.mark.parametrize("order", [range(SIZE), reversed(range(SIZE))])
@simulated
async def test_everybody_is_killed(order: list[int]) -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        await run(instance)
        instance.kill(*range(SIZE))
        await trio.sleep(10)
        back = trio.current_time()
        for rank in order:
            await instance.restart(rank)
            await trio.sleep(0.1)
        told = await recovered(instance)
        check(told, ranks="0-6", root=0, restarted="0-6", running=2, rediscovered=2)
        assert told["why"] == "rank 0 was restarted"
        began, seconds = when(told)
        assert back <= began <= back + 1  # nobody is left to tell when it was
        assert 0 < seconds < 2


@simulated
async def test_everything_is_shut_down_and_started_again() -> None:
    """Ranks that said goodbye are awaited only where their jobs wait for them."""
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance, nodes=3)
        await instance.call("broker.shutdown")
        for process in instance.processes.values():
            await process.ended.wait()
        await instance.start()
        told = await recovered(instance)
        check(told, ranks="0-2", root=0, restarted="0-2", running=1, rediscovered=1)
        assert told["why"] == "rank 0 was shut down"
        await instance.jobs.cancel(instance.jobs.ids[0])
        await instance.jobs.wait(instance.jobs.ids[0])
        await trio.sleep(2)
        await instance.call("broker.shutdown")
        for process in instance.processes.values():
            await process.ended.wait()
        await begin(instance)
        assert len(recoveries(instance)) == 1


@simulated
async def test_rank_0_comes_back_again_and_again() -> None:
    """A life that dies before all is back has no event: the next one awaits whom it awaited."""
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        instance.kill(0, 6)
        await instance.restart(0)
        await instance.online(range(6))
        await trio.sleep(1)
        instance.kill(0)
        await instance.restart(0)
        await instance.online(range(6))
        await trio.sleep(1)
        assert recoveries(instance) == []
        await instance.restart(6)
        check(
            await recovered(instance),
            ranks="0-6",
            root=0,
            restarted="0,6",
            panicked="1-5",
            running=1,
            rediscovered=1,
        )


@simulated
async def test_a_leaf_that_is_shut_down_is_no_drama() -> None:
    async with Instance(SIZE, fanout=2, time_limit=10 * LIMIT) as instance:
        await begin(instance)
        assert await instance.stop(5) == 0
        await trio.sleep(5)
        assert (await instance.call("resource.status"))["offline"] == "5"
        await instance.restart(5)
        await instance.online()
        await trio.sleep(LIMIT)
        assert recoveries(instance) == []
        # Nor is it awaited by the next life of rank 0.
        assert await instance.stop(5) == 0
        await trio.sleep(1)
        instance.kill(0)
        await instance.restart(0)
        check(await recovered(instance), ranks="0-4,6", root=0, restarted="0", panicked="1-4,6")


@simulated
async def test_jobs_wait_for_a_leaf_that_is_shut_down() -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        assert await instance.stop(5) == 0
        await trio.sleep(30)
        await instance.restart(5)
        told = await recovered(instance)
        check(told, ranks="5", root=5, restarted="5", running=1, rediscovered=1)
        assert told["why"] == "rank 5 was shut down"
        assert when(told)[1] > 30


@simulated
async def test_a_node_that_stays_away_does_not_hide_what_happens_then() -> None:
    async with Instance(SIZE, fanout=2, time_limit=10 * LIMIT) as instance:
        await begin(instance)
        await run(instance)
        instance.kill(6)
        lost = trio.current_time()
        check(
            await recovered(instance),
            ranks="6",
            root=6,
            running=1,
            away="6",
            detached=1,
        )
        instance.kill(1)
        await instance.restart(1)
        told = await recovered(instance, 2)
        check(told, ranks="1,3-4", root=1, restarted="1", panicked="3-4", running=1, rediscovered=1)
        await instance.restart(6)
        told = await recovered(instance, 3)
        check(told, ranks="6", root=6, restarted="6", running=1, rediscovered=1)
        began, seconds = when(told)
        assert began == pytest.approx(lost, abs=0.1)
        assert seconds > LIMIT


@simulated
async def test_a_rank_that_is_declared_lost_is_awaited_no_longer() -> None:
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        instance.kill(6)
        await trio.sleep(1)
        await instance.call("resource.declare-lost", {"ranks": "6", "reason": "it burned"})
        check(await recovered(instance), ranks="6", root=6, running=1, lost=1)
        for jobid in instance.jobs.ids:
            await instance.jobs.wait(jobid, "exception")


@simulated
async def test_a_cut_that_heals() -> None:
    """Its ranks panicked, but not when rank 0 noticed: by their own clocks, of which only differences are believed."""
    async with Instance(SIZE, fanout=2) as instance:
        await begin(instance)
        await run(instance)
        instance.cut([2, 5, 6])
        await trio.sleep(60)
        instance.heal()
        told = await recovered(instance)
        check(told, ranks="2,5-6", root=2, panicked="2,5-6", running=1, rediscovered=1)
        assert str(told["why"]).startswith("rank 2: the parent, rank 0, is lost: it has been silent")
        instance.jobs.ids.clear()
        check_jobs(instance)
