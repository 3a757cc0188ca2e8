"""Barriers: complete when every rank is there, told once and again on request, broken where somebody never comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.exec.backoff import FIRST, MOST, Backoff
from fluxres.exec.barriers import MAX_OPEN, Barrier, Barriers, Entered, barrier_of

START = Barrier("start", 0)
WAITS, COMPLETES, PASSES, BROKEN = Entered


def barriers(ranks: int, *, ended: tuple[int, ...] = (), complete: tuple[Barrier, ...] = ()) -> Barriers:
    return Barriers(range(ranks), ended=ended, is_complete=complete.__contains__)


def test_the_last_to_enter_completes_it() -> None:
    three = barriers(3)
    assert [three.enter(rank, START) for rank in (2, 0, 2, 0)] == [WAITS] * 4
    assert three.enter(1, START) is COMPLETES
    assert three.enter(0, START) is WAITS, "its completion is on its way to the disk"
    assert three.completed(START) == [0, 1, 2]


def test_what_the_store_has_is_passed_at_once() -> None:
    assert barriers(3, complete=(START,)).enter(1, START) is PASSES
    assert barriers(3, ended=(0,), complete=(START,)).enter(1, START) is PASSES
    assert barriers(3, complete=(START,)).enter(1, Barrier("start", 1)) is WAITS


def test_who_has_ended_never_comes() -> None:
    one_gone = barriers(3, ended=(1,))
    assert one_gone.enter(0, START) is BROKEN
    assert one_gone.enter(2, START) is WAITS, "it is told once"
    assert list(one_gone.gone) == [1]


@pytest.mark.parametrize(
    ("entered", "leaves", "broken"),
    [((0, 1), 2, True), ((0, 1), 0, True), ((0,), 0, False), ((), 0, False), ((0, 1, 2), 0, False)],
)
def test_a_rank_that_ends_breaks_what_others_wait_in(entered: tuple[int, ...], leaves: int, broken: bool) -> None:
    three = barriers(3)
    for rank in entered:
        three.enter(rank, START)
    assert three.left(leaves) == ([START] if broken else [])
    assert three.left((leaves + 1) % 3) == [], "it is told once"


def test_a_rank_alone_waits_for_nobody() -> None:
    assert barriers(1).enter(0, START) is COMPLETES


def test_the_open_ones_are_bounded() -> None:
    two = barriers(2)
    for seq in range(MAX_OPEN):
        assert two.enter(0, Barrier("b", seq)) is WAITS
    with pytest.raises(ProtocolError, match="are open already"):
        two.enter(0, Barrier("b", MAX_OPEN))
    assert two.enter(1, Barrier("b", 3)) is COMPLETES


@pytest.mark.parametrize(
    ("name", "seq"), [("", 0), ("a.b", 0), ("a" * 65, 0), ("grüß", 0), ("start", -1), ("a", 2**63)]
)
def test_no_name(name: str, seq: int) -> None:
    with pytest.raises(ProtocolError, match="cannot enter barrier"):
        barrier_of(name, seq)


def test_where_it_lies() -> None:
    assert barrier_of("pmi-1_x", 7).key == "exec.barrier.pmi-1_x.7"
    assert str(START) == "start/0"


@given(st.integers(1, 5), st.lists(st.integers(0, 4)))
def test_it_completes_once_and_only_when_all_are_in(ranks: int, order: list[int]) -> None:
    room = barriers(ranks)
    seen = set[int]()
    for rank in order:
        if rank < ranks:
            full = len(seen) == ranks
            seen.add(rank)
            assert (room.enter(rank, START) is COMPLETES) is (len(seen) == ranks and not full)


def test_pauses_double_up_to_a_bound_and_begin_anew() -> None:
    backoff = Backoff()
    pauses = [backoff.pause() for _ in range(10)]
    assert pauses[:3] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert pauses[-1] == MOST
    assert [backoff.is_news(reason) for reason in ("full", "full", "gone", "full")] == [True, False, True, True]
    backoff.succeeded()
    assert backoff.pause() == FIRST
    assert backoff.is_news("full")
