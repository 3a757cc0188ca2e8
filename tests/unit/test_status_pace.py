"""When readers are told something: never more often than allowed, spread evenly, and never much later."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fluxres.status.pace import MAX_INTERVAL, MAX_RATE, MIN_INTERVAL, Readers, interval, slots_of, turn

FEW = int(MIN_INTERVAL * MAX_RATE)


def test_few_readers_keep_the_interval() -> None:
    assert turn(10.0, 10.0, 1, interval(1)) == 10.0 + MIN_INTERVAL
    assert turn(10.0, 9.0, 1, interval(FEW)) == 10.0


def test_many_readers_get_slower() -> None:
    assert interval(0) == interval(FEW) == MIN_INTERVAL
    assert [interval(readers) for readers in (FEW + 1, 41, 101, 201, 400, 401, 1001)] == [0.2, 0.5, 1, 2, 2, 5, 10]


def test_large_messages_are_fewer() -> None:
    assert interval(1, 100_000) == MIN_INTERVAL
    assert interval(512, 100_000) == interval(512)
    assert interval(200, 200_000) == 2.0
    assert interval(500, 1e9) == MAX_INTERVAL
    assert interval(2000, 1e9) == 10.0, "the rate is kept all the same"


@given(
    st.floats(0, 1e6),
    st.floats(0, 100),
    st.integers(1, 10_000),
    st.integers(1, 5000),
)
def test_a_turn_comes_within_one_and_a_half_intervals(now: float, ago: float, number: int, readers: int) -> None:
    at = turn(now, now - ago, number, interval(readers))
    assert now - 1e-6 <= at <= now + 1.5 * interval(readers) + 1e-6


@given(st.integers(FEW + 1, 2000))
def test_turns_are_spread(readers: int) -> None:
    """Each slot has its share, and whoever shares one is told at the same moment."""
    every = interval(readers)
    slots = slots_of(every)
    turns = Counter(turn(1000.0, 1000.0, number, every) for number in range(readers))
    assert len(turns) == slots
    assert max(turns.values()) - min(turns.values()) <= 1


@given(st.integers(FEW + 1, 2000), st.integers(0, 2000))
def test_the_rate_is_kept(readers: int, number: int) -> None:
    """Whoever always has something to hear hears it once an interval."""
    at, heard = 0.0, []
    for _ in range(20):
        at = turn(at, at, number, interval(readers))
        heard.append(at)
    gaps = [later - earlier for earlier, later in itertools.pairwise(heard)]
    assert min(gaps) > 0.99 * interval(readers)


def test_readers_are_counted() -> None:
    readers = Readers()
    assert [readers.join(), readers.join()] == [1, 2]
    readers.leave()
    assert (readers.count, readers.join()) == (1, 3)


def test_the_usual_size_is_learnt() -> None:
    readers = Readers()
    for _ in range(200):
        readers.join()
    for _ in range(200):
        readers.told(1024 * 1024)
    assert readers.interval == interval(200, 1024 * 1024) == MAX_INTERVAL
    for _ in range(200):
        readers.told(100)
    assert readers.interval == interval(200) == 1.0
