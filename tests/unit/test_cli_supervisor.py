"""fluxres.cli.supervisor: tables of what is done after what."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.cli.supervisor import (
    FORKER,
    RESTART_DELAY,
    SHUTDOWN_TIMEOUT,
    STABLE_FOR,
    START_TIMEOUT,
    START_TIMEOUT_PER_RANK,
    Do,
    Effect,
    Phase,
    RankState,
    Reports,
    Supervisor,
    describe,
)

KILLED = -signal.SIGKILL
TERMED = -signal.SIGTERM


def phase(instance: Supervisor) -> Phase:
    """Its phase now: of the attribute, mypy believes that it stays what an assertion has found."""
    return instance.phase


def starting(size: int, *, restart: bool = True, temporary: bool = True) -> Supervisor:
    """An instance of several ranks, whose brokers have been forked."""
    made = Supervisor(size, restart=restart, temporary=temporary, now=0)
    assert made.begin() == [Effect(Do.SPAWN, FORKER)]
    assert [made.state(rank) for rank in range(size)] == [RankState.WAITING] * size
    for rank in range(size):
        assert made.forked(rank) == []
    assert made.forker_ended() == []
    assert [made.state(rank) for rank in range(size)] == [RankState.STARTING] * size
    return made


def running(size: int, *, restart: bool = True, temporary: bool = False) -> Supervisor:
    """An instance that is online at time 1."""
    made = starting(size, restart=restart, temporary=temporary)
    for rank in range(size - 1):
        assert made.ready(rank) == []
    assert made.ready(size - 1) == [Effect(Do.ANNOUNCE)]
    assert phase(made) is Phase.RUNNING
    assert made.due() is None
    return made


def test_one_rank_is_started_singly() -> None:
    instance = Supervisor(1, restart=True, temporary=True, now=0)
    assert instance.begin() == [Effect(Do.SPAWN, 0)]
    assert instance.ready(0) == [Effect(Do.ANNOUNCE)]


def forking() -> Supervisor:
    """An instance of three ranks, whose ranks 0 and 1 have been forked."""
    made = Supervisor(3, restart=True, temporary=True, now=0)
    made.begin()
    made.forked(0)
    made.forked(1)
    return made


def test_who_was_not_forked_is_started_singly() -> None:
    instance = forking()
    assert instance.forker_ended() == [Effect(Do.SPAWN, 2)]
    assert instance.ready(0) == instance.ready(1) == []
    assert instance.ready(2) == [Effect(Do.ANNOUNCE)]


def test_online_while_the_forker_has_not_ended() -> None:
    instance = forking()
    assert instance.forked(2) == instance.ready(0) == instance.ready(1) == []
    assert instance.ready(2) == [Effect(Do.ANNOUNCE)]
    assert instance.forker_ended() == []
    assert phase(instance) is Phase.RUNNING


@pytest.mark.parametrize("restart", [True, False])
def test_stopped_while_brokers_are_forked(restart: bool) -> None:
    instance = Supervisor(3, restart=restart, temporary=True, now=0)
    instance.begin()
    instance.forked(0)
    assert instance.stop(1) == [Effect(Do.TERMINATE, FORKER), Effect(Do.TERMINATE, 0)]
    assert instance.forked(1) == [Effect(Do.TERMINATE, 1)]
    assert instance.exited(0, TERMED, 2) == instance.exited(1, TERMED, 2) == []
    assert phase(instance) is Phase.STOPPING_REST
    assert instance.forker_ended() == []
    assert phase(instance) is Phase.DONE


def test_a_forker_that_does_not_end_is_killed() -> None:
    instance = forking()
    assert instance.fail("why", 1)[0] == Effect(Do.TERMINATE, FORKER)
    assert instance.tick(1 + SHUTDOWN_TIMEOUT) == [Effect(Do.KILL, rank) for rank in (FORKER, 0, 1)]
    assert instance.forked(2) == [Effect(Do.KILL, 2)]
    assert instance.forker_ended() == []
    for rank in range(3):
        assert phase(instance) is Phase.STOPPING_REST
        instance.exited(rank, KILLED, 40)
    assert phase(instance) is Phase.DONE


@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 2**22))), st.integers(1, 30))
def test_reports_are_read_in_pieces(reports: list[tuple[int, int]], piece: int) -> None:
    data = b"".join(b"%d %d\n" % report for report in reports)
    reader = Reports()
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    assert [report for each in pieces for report in reader.feed(each)] == reports


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
    instance = starting(3, restart=restart)
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
    instance = starting(2)
    instance.ready(0)
    assert instance.exited(1, KILLED, 1) == [Effect(Do.SPAWN, 1)]
    assert instance.exited(0, KILLED, 1) == [Effect(Do.SPAWN, 0)]
    assert instance.ready(0) == []
    assert instance.ready(1) == [Effect(Do.ANNOUNCE)]


def test_not_online_in_time() -> None:
    instance = starting(3)
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
    instance = starting(2)
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
    steps=st.lists(
        st.tuples(
            st.sampled_from(["fork", "forker ends", "ready", "exit", "tick", "stop"]),
            st.integers(0, 3),
            st.integers(0, 4),
        )
    ),
)
def test_any_history_ends_when_every_broker_has(
    size: int, restart: bool, temporary: bool, steps: list[tuple[str, int, int]]
) -> None:
    """Spawned or forked, and not exited, is what is alive; DONE exactly when stopping has left none; no rank has two
    brokers, the forker counted as one more."""
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
    unforked = set(range(size)) if FORKER in alive else set()

    def end_forker() -> None:
        alive.remove(FORKER)
        unforked.clear()
        apply(instance.forker_ended())

    codes = (0, 1, KILLED, TERMED, 0)
    for what, rank, number in steps:
        now += number
        if what == "fork" and FORKER in alive and rank in unforked:
            unforked.remove(rank)
            alive.add(rank)
            apply(instance.forked(rank))
        elif what == "forker ends" and FORKER in alive:
            end_forker()
        elif what == "ready" and rank in alive:
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
    if FORKER in alive:
        end_forker()
    for rank in sorted(alive):
        alive.remove(rank)
        apply(instance.exited(rank, KILLED, now))
    assert phase(instance) is Phase.DONE
    assert not alive
