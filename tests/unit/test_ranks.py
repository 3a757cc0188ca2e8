"""Ranks: who is online as which incarnation, who was declared lost, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import pytest
import trio
import trio.testing

from fluxres.exec.ranks import Presence, Ranks


def presence(rank: int, uuid: str = "a", *, statedir: str = "", incarnation: int = 1) -> Presence:
    return Presence(
        rank=rank,
        uuid=uuid,
        host=f"n{rank}",
        statedir=statedir or f"statedir-{rank}",
        incarnation=incarnation,
        boot_id="boot",
        cores="0-3",
    )


async def test_a_rank_is_online_from_joined_to_left() -> None:
    ranks = Ranks()
    told: list[tuple[int, bool]] = []
    ranks.on_change(lambda rank, online: told.append((rank, online)))
    with pytest.raises(KeyError):
        ranks.statedir(3)
    ranks.joined(presence(3))
    assert (ranks.online(3), str(ranks.online_ranks()), ranks.statedir(3)) == (True, "3", "statedir-3")
    assert ranks.presence(3) == presence(3)
    ranks.left(3, "another")
    assert ranks.online(3)
    ranks.left(3, "a")
    ranks.left(3, "a")
    assert (ranks.online(3), str(ranks.online_ranks()), ranks.statedir(3)) == (False, "", "statedir-3")
    assert told == [(3, True), (3, False)]


async def test_a_later_incarnation_supersedes_and_the_earlier_one_says_nothing_any_more() -> None:
    ranks = Ranks()
    told: list[bool] = []
    ranks.on_change(lambda _rank, online: told.append(online))
    ranks.joined(presence(1, "a"))
    ranks.joined(presence(1, "b", statedir="other"))
    ranks.left(1, "a")
    assert ranks.online(1)
    assert ranks.statedir(1) == "other"
    assert told == [True, False, True]


def test_statedirs_are_remembered_from_the_lives_before() -> None:
    ranks = Ranks()
    ranks.remember(7, "old")
    assert (ranks.statedir(7), ranks.online(7)) == ("old", False)


@pytest.mark.parametrize(
    ("wait", "happens"),
    [
        (lambda ranks: ranks.wait_online(2), lambda ranks: ranks.joined(presence(2))),
        (lambda ranks: ranks.wait_declared(2), lambda ranks: ranks.declare(2, "burnt")),
    ],
)
async def test_waiting(
    wait: Callable[[Ranks], Coroutine[None, None, str | None]], happens: Callable[[Ranks], None]
) -> None:
    ranks = Ranks()
    ended: list[str | None] = []

    async def waiter() -> None:
        ended.append(await wait(ranks))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter)
        nursery.start_soon(waiter)
        await trio.testing.wait_all_tasks_blocked()
        ranks.joined(presence(1))
        ranks.declare(1, "other")
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        happens(ranks)
    assert len(ended) == 2
    await waiter()
    assert len(ended) == 3


async def test_who_is_gone_before_the_waiter_runs_is_waited_for_again() -> None:
    ranks = Ranks()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ranks.wait_online, 2)
        await trio.testing.wait_all_tasks_blocked()
        ranks.joined(presence(2))
        ranks.left(2, "a")
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        ranks.joined(presence(2, "b"))


async def test_a_declaration_stands_until_it_is_confirmed_online_or_not() -> None:
    ranks = Ranks()
    ranks.declare(2, "burnt")
    ranks.joined(presence(2))
    assert ranks.declared(2) == "burnt"
    assert await ranks.wait_declared(2) == "burnt"
    assert dict(ranks.declarations()) == {2: "burnt"}
    ranks.confirm(2)
    ranks.confirm(2)
    assert ranks.declared(2) is None
