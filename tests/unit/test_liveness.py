"""Torpid, lively, lost: by a table of short stories, and against a naive model that knows every silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.overlay.liveness import Change, Liveness

TORPID, LIVELY, LOST = Change.TORPID, Change.LIVELY, Change.LOST
Told: TypeAlias = list[tuple[float, str, Change]]


def ticked(liveness: Liveness, start: float, end: float, *, heard: Sequence[str] = ()) -> Told:
    """Tick every second from after `start` to `end`; before each tick the peers in `heard` are."""
    told = []
    now = start
    while now < end:
        now = min(now + 1, end)
        for peer in heard:
            liveness.heard(peer, now)
        told += [(now, peer, change) for peer, change in liveness.tick(now)]
    return told


def watching(*peers: str, torpid_min: float = 4, timeout: float = 10) -> Liveness:
    liveness = Liveness(torpid_min, timeout)
    liveness.tick(0)
    for peer in peers:
        liveness.watch(peer, 0)
    return liveness


def test_silence_is_torpid_then_lost_and_each_is_told_once() -> None:
    assert ticked(watching("a"), 0, 30) == [(4, "a", TORPID), (10, "a", LOST)]


def test_who_is_heard_is_lively() -> None:
    liveness = watching("a", "b")
    assert ticked(liveness, 0, 30, heard=["a"]) == [(4, "b", TORPID), (10, "b", LOST)]


def test_a_torpid_peer_comes_back() -> None:
    liveness = watching("a")
    assert ticked(liveness, 0, 6) == [(4, "a", TORPID)]
    liveness.heard("a", 6.5)
    assert ticked(liveness, 6, 20) == [(7, "a", LIVELY), (11, "a", TORPID), (17, "a", LOST)]


def test_heard_between_two_ticks_it_was_never_torpid() -> None:
    liveness = watching("a")
    assert ticked(liveness, 0, 3) == []
    liveness.heard("a", 4.5)
    assert liveness.tick(5) == []


def test_both_at_once_is_lost() -> None:
    assert ticked(watching("a", torpid_min=4, timeout=4), 0, 9) == [(4, "a", LOST)]


def test_a_forgotten_or_lost_peer_means_nothing() -> None:
    liveness = watching("a", "b")
    liveness.forget("a")
    liveness.forget("a")
    liveness.heard("a", 1)
    assert ticked(liveness, 0, 10) == [(4, "b", TORPID), (10, "b", LOST)]
    liveness.heard("b", 11)
    assert ticked(liveness, 10, 30) == []
    liveness.watch("b", 30)
    assert ticked(liveness, 30, 34) == [(34, "b", TORPID)]


# --- our own absence


@pytest.mark.parametrize("away", [2.5, 5, 20, 1e6])
def test_nobody_is_judged_by_our_own_absence(away: float) -> None:
    liveness = watching("a", "b")
    assert ticked(liveness, 0, 3) == []
    back = 3 + away
    assert liveness.tick(back) == []
    liveness.heard("a", back)  # it had spoken all the time: only now it is read
    assert ticked(liveness, back, back + 3, heard=["a"]) == [(back + 1, "b", TORPID)]


def test_what_is_read_before_the_late_tick_counts_too() -> None:
    liveness = watching("a")
    liveness.heard("a", 100)
    assert liveness.tick(100) == []
    assert ticked(liveness, 100, 120) == [(104, "a", TORPID), (110, "a", LOST)]


def test_a_torpid_peer_is_not_lost_by_our_absence() -> None:
    liveness = watching("a")
    assert ticked(liveness, 0, 5) == [(4, "a", TORPID)]
    assert liveness.tick(500) == []
    liveness.heard("a", 500)
    assert liveness.tick(501) == [("a", LIVELY)]


def test_who_is_always_late_judges_more_slowly() -> None:
    """Each tick counts for `step` = 2 s of silence, and only the first is excused."""
    liveness = watching("a", "b")
    told: Told = []
    for now in range(10, 100, 10):
        liveness.heard("b", now)
        told += [(now, peer, change) for peer, change in liveness.tick(now)]
    assert told == [(20, "a", TORPID), (50, "a", LOST)]


def test_the_first_tick_may_be_at_any_time() -> None:
    liveness = Liveness(4, 10)
    liveness.watch("a", 1000)
    assert ticked(liveness, 1000, 1010) == [(1004, "a", TORPID), (1010, "a", LOST)]


def test_a_watch_long_after_the_last_tick() -> None:
    """The first tick after it counts for nothing: it is late."""
    liveness = watching()
    liveness.watch("a", 1000)
    assert ticked(liveness, 1000, 1012) == [(1005, "a", TORPID), (1011, "a", LOST)]


@pytest.mark.parametrize(("torpid_min", "timeout"), [(0, 1), (-1, 1), (2, 1), (float("nan"), 1)])
def test_times_that_make_no_sense(torpid_min: float, timeout: float) -> None:
    with pytest.raises(ValueError, match="cannot judge silence"):
        Liveness(torpid_min, timeout)


def test_how_often_to_tick() -> None:
    liveness = Liveness(4, 10)
    assert (liveness.interval, liveness.step) == (1, 2)


# --- against a naive model


class Naive:
    """Ticks that are never late: silence is what the clock says."""

    def __init__(self) -> None:
        self.heard: dict[str, float] = {}
        self.torpid: set[str] = set()

    def tick(self, now: float) -> list[tuple[str, Change]]:
        told = []
        for peer in list(self.heard):
            silent = now - self.heard[peer]
            if silent >= 10:
                told.append((peer, LOST))
                self.forget(peer)
            elif silent >= 4 and peer not in self.torpid:
                told.append((peer, TORPID))
                self.torpid.add(peer)
            elif silent < 4 and peer in self.torpid:
                told.append((peer, LIVELY))
                self.torpid.discard(peer)
        return told

    def forget(self, peer: str) -> None:
        self.heard.pop(peer, None)
        self.torpid.discard(peer)


quarters = st.integers(0, 4).map(lambda n: n / 4)
steps = st.tuples(quarters, st.sampled_from(["watch", "forget", "heard", "heard", "none"]), st.sampled_from("ab"))


@given(st.lists(st.tuples(steps, st.booleans()), max_size=80))
def test_ticks_in_time(story: list[tuple[tuple[float, str, str], bool]]) -> None:
    liveness, naive = Liveness(4, 10), Naive()
    now = last = 0.0
    liveness.tick(now)
    for (gap, event, peer), tick in story:
        if now + gap - last > liveness.step:
            last = now
            assert sorted(liveness.tick(now), key=str) == sorted(naive.tick(now), key=str)
        now += gap
        if event == "watch":
            liveness.watch(peer, now)
            naive.forget(peer)
            naive.heard[peer] = now
        elif event == "forget":
            liveness.forget(peer)
            naive.forget(peer)
        elif event == "heard":
            liveness.heard(peer, now)
            if peer in naive.heard:
                naive.heard[peer] = now
        if tick:
            last = now
            assert sorted(liveness.tick(now), key=str) == sorted(naive.tick(now), key=str)


@given(st.lists(st.tuples(st.integers(0, 60).map(lambda n: n / 4), st.booleans()), max_size=60))
def test_ticks_at_any_time(story: list[tuple[float, bool]]) -> None:
    """However late ticks are: nobody is judged whose silence, by the clock, is not long enough; changes alternate."""
    liveness = Liveness(4, 10)
    liveness.watch("a", 0)
    now = heard = 0.0
    told: list[Change] = []
    for gap, speaks in story:
        now += gap
        if speaks:
            liveness.heard("a", now)
            heard = now if LOST not in told else heard
        for _, change in liveness.tick(now):
            told.append(change)
            assert now - heard >= {TORPID: 4, LIVELY: 0, LOST: 10}[change]
    assert all(told[i] is not told[i + 1] for i in range(len(told) - 1))
    assert LOST not in told[:-1]
    assert told[:1] in ([], [TORPID], [LOST])
