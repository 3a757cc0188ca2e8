"""The tree in memory: bring-up in any order, and who restarts when somebody is lost (I6)."""

from __future__ import annotations

from random import Random

import pytest
import trio

from fluxres.testing.checks import check_joined, check_new, check_same
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulated


@pytest.mark.parametrize("size", [1, 7, 50])
@simulated
async def test_bring_up(size: int) -> None:
    async with Instance(size, fanout=3) as instance:
        await instance.start()
        check_joined(instance)
        status = await instance.call("overlay.health")
        assert status["status"] == "full"
        assert (await instance.call("groups.get", {"name": "broker.online"}))["members"] == (
            f"0-{size - 1}" if size > 1 else "0"
        )
        for rank in range(size):
            assert await instance.stop(rank) == 0


@pytest.mark.parametrize("seed", range(5))
@simulated
async def test_any_order(seed: int) -> None:
    random = Random(seed)
    async with Instance(20, fanout=2, seed=seed, jitter=0.01, loss=0.01) as instance:
        ranks = list(range(instance.size))
        random.shuffle(ranks)
        for rank in ranks:
            instance.launch([rank])
            await trio.sleep(random.uniform(0, 1))
        await instance.online()
        check_joined(instance)


@pytest.mark.parametrize("pause", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("seed", range(3))
@simulated
async def test_rank_0_is_killed(pause: float, seed: int) -> None:
    """Restarted at once, its children have not even seen the end of their connections (#3608)."""
    async with Instance(30, fanout=3, seed=seed, jitter=0.001) as instance:
        await instance.start()
        before = instance.uuids()
        instance.kill(0)
        await trio.sleep(pause)
        await instance.restart(0)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, list(range(instance.size)))


@simulated
async def test_rank_0_is_stopped() -> None:
    async with Instance(13, fanout=3) as instance:
        await instance.start()
        before = instance.uuids()
        assert await instance.stop(0) == 0
        await instance.restart(0)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, list(range(instance.size)))


@pytest.mark.parametrize("pause", [0.0, 0.05, 5.0])
@simulated
async def test_a_router_is_killed(pause: float) -> None:
    """Its subtree restarts and rejoins; nobody else does."""
    async with Instance(31, fanout=2) as instance:
        await instance.start()
        before = instance.uuids()
        below = list(instance.topology.subtree(1))
        others = [rank for rank in range(instance.size) if rank not in below]
        instance.kill(1)
        await trio.sleep(pause)
        if pause == 5.0:
            match await instance.call("overlay.health"):
                case {"status": status, "children": [{"rank": 1, "status": first}, {"rank": 2, "status": second}]}:
                    assert (status, first, second) == ("degraded", "lost", "full")
                case other:
                    raise AssertionError(other)
        await instance.restart(1)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, below)
        check_same(instance, before, others)
        assert (await instance.call("overlay.health"))["status"] == "full"


@simulated
async def test_all_brokers_are_killed_again_and_again() -> None:
    async with Instance(16, fanout=2) as instance:
        await instance.start()
        for round_ in range(10):
            before = instance.uuids()
            instance.kill(*range(instance.size))
            ranks = list(range(instance.size))
            Random(round_).shuffle(ranks)
            for rank in ranks:
                await instance.restart(rank)
                await trio.sleep(0.02)
            await instance.online()
            check_joined(instance)
            check_new(instance, before, ranks)


@simulated
async def test_a_node_loses_its_power() -> None:
    """Its parent and its children hear nothing, and find out by its silence, or when it is back."""
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        before = instance.uuids()
        below = list(instance.topology.subtree(2))
        await instance.reboot(2, 60)
        await instance.restart(2)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, below)
        check_same(instance, before, [rank for rank in range(15) if rank not in below])
        await instance.reboot(2, 0.1)
        await instance.restart(2)
        await instance.online()
        check_joined(instance)


@pytest.mark.parametrize("seconds", [5.0, 15.0, 22.0, 60.0])
@pytest.mark.parametrize("towards", ["both", "up", "down"])
@simulated
async def test_a_cut_and_its_heal(seconds: float, towards: str) -> None:
    """A short one passes unseen. Else either end notices first: the one that hears nothing."""
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        before = instance.uuids()
        below = list(instance.topology.subtree(1))
        others = [rank for rank in range(instance.size) if rank not in below]
        first, second = (others, below) if towards == "down" else (below, others)
        instance.cut(first, second, one_way=towards != "both")
        await trio.sleep(seconds)
        if seconds < 20:
            assert instance.is_online(1)
        instance.heal()
        await trio.sleep(2)
        await instance.online()
        check_joined(instance)
        check_same(instance, before, others)
        if seconds < 20:
            check_same(instance, before, below)
        else:
            check_new(instance, before, below)


@simulated
async def test_a_lost_child_is_disconnected_by_hand() -> None:
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        before = instance.uuids()
        below = list(instance.topology.subtree(2))
        await instance.call("overlay.disconnect-subtree", {"rank": 2})
        await trio.sleep(0.1)
        await instance.online()
        check_joined(instance)
        check_new(instance, before, below)
        check_same(instance, before, [rank for rank in range(15) if rank not in below])


@simulated
async def test_the_whole_instance_is_shut_down() -> None:
    async with Instance(15, fanout=2) as instance:
        await instance.start()
        await instance.call("broker.shutdown")
        for process in instance.processes.values():
            await process.ended.wait()
        assert {process.status for process in instance.processes.values()} == {0}
