"""fluxres.cli.supervisor: tables of what is done after what."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.cli.supervisor import (
    RESTART_DELAY,
    SHUTDOWN_TIMEOUT,
    STABLE_FOR,
    START_TIMEOUT,
    START_TIMEOUT_PER_RANK,
    Do,
    Effect,
    Phase,
    RankState,
    Supervisor,
    describe,
)

KILLED = -signal.SIGKILL
TERMED = -signal.SIGTERM


def phase(instance: Supervisor) -> Phase:
    """Its phase now: of the attribute, mypy believes that it stays what an assertion has found."""
    return instance.phase


def running(size: int, *, restart: bool = True, temporary: bool = False) -> Supervisor:
    """An instance that is online at time 1."""
    made = Supervisor(size, restart=restart, temporary=temporary, now=0)
    assert made.begin() == [Effect(Do.SPAWN, rank) for rank in range(size)]
    for rank in range(size - 1):
        assert made.ready(rank) == []
    assert made.ready(size - 1) == [Effect(Do.ANNOUNCE)]
    assert phase(made) is Phase.RUNNING
    assert made.due() is None
    return made


def test_announced_once() -> None:
    instance = running(2)
    assert instance.exited(1, KILLED, 10) == [Effect(Do.SPAWN, 1)]
    assert instance.ready(1) == []
    assert instance.ready(1) == []


def test_restarted_at_once_and_then_with_a_delay() -> None:
    instance = running(2)
    assert instance.exited(0, KILLED, 10) == [Effect(Do.SPAWN, 0)]
    assert instance.exited(0, 1, 11) == []
    assert instance.state(0) is RankState.DEAD
    assert instance.due() == 11 + RESTART_DELAY
    assert instance.tick(11) == []
    assert instance.tick(11 + RESTART_DELAY) == [Effect(Do.SPAWN, 0)]
    assert instance.ready(0) == []
    assert instance.exited(0, KILLED, 12 + STABLE_FOR) == [Effect(Do.SPAWN, 0)]
    assert phase(instance) is Phase.RUNNING


@pytest.mark.parametrize(
    ("code", "restart", "failure"),
    [
        (3, True, "broker 1 exited with status 3 before it was online"),
        (0, True, "broker 1 exited with status 0 before it was online"),
        (KILLED, False, "broker 1 was killed by signal 9 (Killed) before it was online"),
    ],
)
def test_a_broker_that_refuses_ends_the_bring_up(code: int, restart: bool, failure: str) -> None:
    instance = Supervisor(3, restart=restart, temporary=True, now=0)
    instance.begin()
    instance.ready(0)
    assert instance.exited(1, code, 1)[:2] == [Effect(Do.TERMINATE, 0), *instance_asks(restart)][:2]
    assert instance.failure == failure
    assert phase(instance) is Phase.STOPPING_REST
    assert instance.exited(0, 0, 2) == instance.exited(2, TERMED, 2) == []
    assert phase(instance) is Phase.DONE


def instance_asks(restart: bool) -> list[Effect]:
    """Without restarts, somebody else may have started the rank that is not there."""
    return [Effect(Do.TERMINATE, 2)] if restart else [Effect(Do.ASK, 1)]


def test_a_broker_that_is_killed_during_the_bring_up_is_started_again() -> None:
    instance = Supervisor(2, restart=True, temporary=True, now=0)
    instance.begin()
    instance.ready(0)
    assert instance.exited(1, KILLED, 1) == [Effect(Do.SPAWN, 1)]
    assert instance.exited(0, KILLED, 1) == [Effect(Do.SPAWN, 0)]
    assert instance.ready(0) == []
    assert instance.ready(1) == [Effect(Do.ANNOUNCE)]


def test_not_online_in_time() -> None:
    instance = Supervisor(3, restart=True, temporary=True, now=0)
    instance.begin()
    instance.ready(1)
    due = instance.due()
    assert due == START_TIMEOUT + 3 * START_TIMEOUT_PER_RANK
    assert instance.tick(due - 1) == []
    assert instance.tick(due) == [Effect(Do.TERMINATE, rank) for rank in range(3)]
    assert instance.failure == "not online in time: rank 0,2"


def test_stop_asks_rank_0_first() -> None:
    instance = running(3)
    assert instance.stop(10) == [Effect(Do.TERMINATE, 0)]
    assert instance.stop(11) == []
    assert instance.exited(0, 0, 12) == [Effect(Do.TERMINATE, 1), Effect(Do.TERMINATE, 2)]
    instance.exited(1, 0, 13)
    assert phase(instance) is Phase.STOPPING_REST
    instance.exited(2, 0, 13)
    assert phase(instance) is Phase.DONE
    assert instance.failure is None
    assert instance.due() is None


def test_rank_0_ending_by_itself_ends_the_instance() -> None:
    instance = running(2)
    assert instance.exited(0, 0, 10) == [Effect(Do.TERMINATE, 1)]
    instance.exited(1, TERMED, 11)
    assert phase(instance) is Phase.DONE


def test_another_rank_ending_by_itself_is_left_alone() -> None:
    instance = running(2)
    assert instance.exited(1, 0, 10) == []
    assert instance.state(1) is RankState.ENDED
    assert instance.due() is None
    instance.stop(11)
    instance.exited(0, 0, 12)
    assert phase(instance) is Phase.DONE


def test_who_does_not_end_is_killed() -> None:
    instance = running(2)
    instance.stop(10)
    assert instance.tick(10 + SHUTDOWN_TIMEOUT) == [Effect(Do.KILL, 0), Effect(Do.KILL, 1)]
    instance.exited(0, KILLED, 41)
    instance.exited(1, KILLED, 41)
    assert phase(instance) is Phase.DONE


def test_a_temporary_instance_waits_for_rank_0_to_cancel_its_jobs() -> None:
    instance = running(2, temporary=True)
    instance.exited(0, KILLED, 10)
    assert instance.stop(10) == []
    assert instance.ready(0) == [Effect(Do.TERMINATE, 0)]
    assert instance.exited(0, KILLED, 10 + STABLE_FOR) == [Effect(Do.SPAWN, 0)]
    assert instance.ready(0) == [Effect(Do.TERMINATE, 0)]
    assert instance.exited(0, 0, 20) == [Effect(Do.TERMINATE, 1)]


@pytest.mark.parametrize("code", [0, 1, KILLED, TERMED])
def test_a_durable_instance_does_not(code: int) -> None:
    instance = running(2)
    instance.exited(0, KILLED, 10)
    assert instance.stop(10) == [Effect(Do.TERMINATE, 0), Effect(Do.TERMINATE, 1)]
    assert instance.exited(0, code, 11) == []
    instance.exited(1, code, 11)
    assert phase(instance) is Phase.DONE


def test_without_restarts_who_died_stays_dead_and_may_have_been_replaced() -> None:
    instance = running(2, restart=False)
    assert instance.exited(1, KILLED, 10) == []
    assert instance.exited(0, KILLED, 10) == []
    assert instance.due() is None
    assert phase(instance) is Phase.RUNNING
    assert instance.stop(11) == [Effect(Do.ASK, 0), Effect(Do.ASK, 1)]
    assert phase(instance) is Phase.DONE


def test_interrupted_bring_up() -> None:
    instance = Supervisor(2, restart=True, temporary=True, now=0)
    instance.begin()
    assert instance.stop(1) == [Effect(Do.TERMINATE, 0), Effect(Do.TERMINATE, 1)]
    instance.exited(0, TERMED, 2)
    instance.exited(1, TERMED, 2)
    assert phase(instance) is Phase.DONE
    assert instance.failure is None


def test_describe() -> None:
    assert describe(3) == "exited with status 3"
    assert describe(KILLED) == "was killed by signal 9 (Killed)"


@given(
    size=st.integers(1, 4),
    restart=st.booleans(),
    temporary=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["ready", "exit", "tick", "stop"]), st.integers(0, 3), st.integers(0, 4))),
)
def test_any_history_ends_when_every_broker_has(
    size: int, restart: bool, temporary: bool, steps: list[tuple[str, int, int]]
) -> None:
    """Spawned and not exited is what is alive; DONE exactly when stopping has left none; no rank has two brokers."""
    instance = Supervisor(size, restart=restart, temporary=temporary, now=0)
    alive: set[int] = set()
    now = 0.0

    def apply(effects: list[Effect]) -> None:
        for do, rank in effects:
            assert do is not Do.SPAWN or rank not in alive
            assert do not in (Do.TERMINATE, Do.KILL) or rank in alive
            if do is Do.SPAWN:
                alive.add(rank)

    apply(instance.begin())
    codes = (0, 1, KILLED, TERMED, 0)
    for what, rank, number in steps:
        now += number
        if what == "ready" and rank in alive:
            apply(instance.ready(rank))
        elif what == "exit" and rank in alive:
            alive.remove(rank)
            apply(instance.exited(rank, codes[number], now))
        elif what == "tick":
            apply(instance.tick(now))
        elif what == "stop":
            apply(instance.stop(now))
        assert (phase(instance) is Phase.DONE) <= (not alive)
    apply(instance.stop(now))
    for _ in range(2):
        now += SHUTDOWN_TIMEOUT + START_TIMEOUT
        apply(instance.tick(now))
    for rank in sorted(alive):
        alive.remove(rank)
        apply(instance.exited(rank, KILLED, now))
    assert phase(instance) is Phase.DONE
    assert not alive
