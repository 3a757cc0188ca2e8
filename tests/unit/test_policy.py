"""Queue policy: order, blocking, denial, and that a blocked head costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.idset import IdSet
from fluxres.sched.policy import MIN_STALE_ENTRIES, Decision, Denied, Granted, Policy
from fluxres.sched.pool import Allocation, Inventory, Pool
from fluxres.sched.request import Request


class CountingPool(Pool):
    """Counts the tries to allocate."""

    tries = 0

    def allocate(self, request: Request) -> Allocation | None:
        self.tries += 1
        return super().allocate(request)


def make(cores: int = 4) -> tuple[CountingPool, Policy]:
    pool = CountingPool([Inventory(rank=0, host="a", cores=IdSet(range(cores)))])
    pool.set_up(IdSet([0]))
    return pool, Policy(pool)


def granted(decisions: list[Decision]) -> list[int]:
    return [decision.id for decision in decisions if isinstance(decision, Granted)]


def allocation_of(decision: Decision) -> Allocation:
    assert isinstance(decision, Granted)
    return decision.allocation


def test_priority_first_then_jobid() -> None:
    _, policy = make()
    for jobid, priority in ((1, 16), (2, 16), (3, 31), (4, 1)):
        policy.insert(jobid, Request(), priority=priority)
    assert granted(policy.schedule()) == [3, 1, 2, 4]
    assert len(policy) == 0


def test_a_head_that_does_not_fit_holds_up_its_queue() -> None:
    pool, policy = make()
    policy.insert(1, Request(nslots=3), priority=16)
    policy.insert(2, Request(nslots=2), priority=16)
    policy.insert(3, Request(nslots=1), priority=16)
    first = policy.schedule()
    assert granted(first) == [1]
    assert policy.schedule() == []
    pool.release(allocation_of(first[0]))
    assert granted(policy.schedule()) == [2, 3]


def test_a_blocked_head_is_not_tried_again_until_something_comes_free() -> None:
    pool, policy = make()
    policy.insert(1, Request(nslots=4), priority=16)
    [first] = policy.schedule()
    policy.insert(2, Request(), priority=16)
    assert policy.schedule() == []
    tries = pool.tries
    for jobid in range(3, 100):
        policy.insert(jobid, Request(), priority=16)
        assert policy.schedule() == []
    assert pool.tries == tries
    pool.release(allocation_of(first))
    assert granted(policy.schedule()) == [2, 3, 4, 5]


def test_a_more_urgent_job_is_tried_though_the_head_was_blocked() -> None:
    _, policy = make()
    policy.insert(1, Request(nslots=3), priority=16)
    policy.insert(2, Request(nslots=2), priority=16)
    assert granted(policy.schedule()) == [1]
    policy.insert(3, Request(), priority=31)
    assert granted(policy.schedule()) == [3]


def test_removing_the_blocked_head_lets_the_next_one_go() -> None:
    _, policy = make()
    policy.insert(1, Request(nslots=3), priority=16)
    policy.insert(2, Request(nslots=2), priority=16)
    policy.insert(3, Request(), priority=16)
    assert granted(policy.schedule()) == [1]
    assert policy.remove(2)
    assert not policy.remove(2)
    assert granted(policy.schedule()) == [3]


def test_a_request_that_never_fits_is_denied_and_the_next_one_goes() -> None:
    _, policy = make()
    policy.insert(1, Request(nslots=5), priority=16)
    policy.insert(2, Request(), priority=16)
    denied, served = policy.schedule()
    assert isinstance(denied, Denied)
    assert denied.id == 1
    assert denied.note.startswith("unsatisfiable request: 5 slot(s)")
    assert isinstance(served, Granted)
    assert 1 not in policy


def test_inserting_again_moves_a_job() -> None:
    _, policy = make(cores=1)
    policy.insert(1, Request(), priority=16)
    policy.insert(2, Request(), priority=16)
    policy.insert(2, Request(), priority=20)
    assert granted(policy.schedule()) == [2]
    assert len(policy) == 1
    policy.insert(1, Request(nslots=2), priority=16)
    [denied] = policy.schedule()
    assert isinstance(denied, Denied)
    assert policy.schedule() == []


def test_a_smaller_request_under_the_same_key_is_tried() -> None:
    _, policy = make()
    policy.insert(1, Request(nslots=2), priority=16)
    policy.insert(2, Request(nslots=3), priority=16)
    assert granted(policy.schedule()) == [1]
    policy.insert(2, Request(nslots=2), priority=16)
    assert granted(policy.schedule()) == [2]


def test_queues_wait_for_themselves_and_can_be_stopped() -> None:
    _, policy = make()
    policy.stop("batch")
    policy.insert(1, Request(), priority=31, queue="batch")
    policy.insert(2, Request(nslots=4), priority=16, queue="debug")
    policy.insert(3, Request(), priority=1)
    assert granted(policy.schedule()) == [2]
    policy.start("batch")
    assert granted(policy.schedule()) == []
    assert 1 in policy
    assert 3 in policy


def test_a_blocked_queue_does_not_hold_up_another() -> None:
    _, policy = make()
    policy.insert(1, Request(nslots=2), priority=31)
    policy.insert(2, Request(nslots=3), priority=31, queue="batch")
    policy.insert(3, Request(), priority=16, queue="debug")
    assert granted(policy.schedule()) == [1, 3]


def test_a_round_is_bounded() -> None:
    _, policy = make(cores=100)
    for jobid in range(10):
        policy.insert(jobid, Request(), priority=16)
    assert granted(policy.schedule(limit=4)) == [0, 1, 2, 3]
    assert granted(policy.schedule(limit=4)) == [4, 5, 6, 7]
    assert granted(policy.schedule(limit=4)) == [8, 9]


def test_entries_of_jobs_that_left_do_not_pile_up() -> None:
    _, policy = make()
    policy.insert(0, Request(nslots=4), priority=31)
    assert granted(policy.schedule()) == [0]
    for _ in range(100):
        for jobid in range(1, 50):
            policy.insert(jobid, Request(), priority=16)
    assert len(policy._lines[""].heap) <= 2 * 49 + 2 * MIN_STALE_ENTRIES


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 9), st.integers(1, 5), st.integers(1, 3)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 9), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_same_as_sorting_the_queue_every_time(steps: list[tuple[str, int, int, int]]) -> None:
    """Against a naive model that sorts all pending jobs and counts free cores."""
    pool, policy = make()
    pending: dict[int, tuple[int, int]] = {}
    running: dict[int, Allocation] = {}
    free = 4
    for verb, jobid, size, priority in steps:
        if verb == "insert" and jobid not in running:
            pending[jobid] = (-priority, size)
            policy.insert(jobid, Request(nslots=size), priority=priority)
        elif verb == "remove":
            assert policy.remove(jobid) == (pending.pop(jobid, None) is not None)
        elif verb == "finish" and jobid in running:
            free += running[jobid].nslots
            pool.release(running.pop(jobid))
        expected: list[tuple[str, int]] = []
        for jobid_, (_, size_) in sorted(pending.items(), key=lambda item: (item[1][0], item[0])):
            if size_ > 4:
                expected.append(("denied", jobid_))
            elif size_ <= free:
                expected.append(("granted", jobid_))
                free -= size_
            else:
                break
        decisions = policy.schedule()
        assert [(type(d).__name__.lower(), d.id) for d in decisions] == expected
        for decision in decisions:
            del pending[decision.id]
            if isinstance(decision, Granted):
                running[decision.id] = decision.allocation
        assert len(policy) == len(pending)


@pytest.mark.parametrize("count", [10_000])
def test_many_pending_jobs(count: int) -> None:
    pool, policy = make()
    policy.insert(0, Request(nslots=4), priority=31)
    [first] = policy.schedule()
    for jobid in range(1, count):
        policy.insert(jobid, Request(), priority=16)
        policy.schedule()
    assert pool.tries == 2
    pool.release(allocation_of(first))
    assert granted(policy.schedule()) == [1, 2, 3, 4]
