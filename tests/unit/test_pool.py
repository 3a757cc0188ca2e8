"""The resource pool and constraints: what a request gets, and that nothing is ever given twice."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.idset import IdSet
from fluxres.sched import pool as pool_module
from fluxres.sched.constraint import (
    ANY_RANK,
    MAX_CONSTRAINT_DEPTH,
    MAX_CONSTRAINT_ITEMS,
    matches,
    parse_constraint,
)
from fluxres.sched.pool import Allocation, Inventory, Pool, PoolError, Share, Usage
from fluxres.sched.request import Request


def ids(text: str) -> IdSet:
    return IdSet.parse(text)


def make_pool(*cores: int, gpus: int = 0, up: bool = True) -> Pool:
    """A pool of ranks 0, 1, … on host0, host1, …; rank 0 has the property `first`."""
    pool = Pool(
        Inventory(
            rank=rank,
            host=f"host{rank}",
            cores=IdSet(range(count)),
            gpus=IdSet(range(gpus)),
            properties=frozenset({"first"} if rank == 0 else {"other"}),
        )
        for rank, count in enumerate(cores)
    )
    if up:
        pool.set_up(IdSet(range(len(cores))))
    return pool


def shown(allocation: Allocation | None) -> list[str] | None:
    if allocation is None:
        return None
    return [f"{s.rank}:{s.cores}" + (f"/{s.gpus}" if s.gpus else "") for s in allocation.shares]


@pytest.mark.parametrize(
    ("cores", "request_", "expected"),
    [
        pytest.param((4, 4), Request(), ["0:0"], id="one core, lowest rank"),
        pytest.param((2, 4), Request(), ["1:0"], id="most free cores first"),
        pytest.param((4, 4), Request(nslots=6), ["0:0-3", "1:0-1"], id="slots over as few nodes as it takes"),
        pytest.param((4, 4), Request(nnodes=2, nslots=2), ["0:0", "1:0"], id="one slot on each of two nodes"),
        pytest.param((4, 4), Request(nnodes=2, nslots=4, cores_per_slot=2), ["0:0-3", "1:0-3"], id="even slots"),
        pytest.param((3, 3), Request(nslots=3, cores_per_slot=2), None, id="a slot never spans ranks"),
        pytest.param((4, 4), Request(nnodes=3, nslots=3), None, id="too few nodes"),
        pytest.param((4, 8), Request(nnodes=1, nslots=1, exclusive=True), ["1:0-7"], id="a whole node"),
        pytest.param((2,), Request(nslots=2, gpus_per_slot=1), None, id="no gpus"),
    ],
)
def test_allocate(cores: tuple[int, ...], request_: Request, expected: list[str] | None) -> None:
    assert shown(make_pool(*cores).allocate(request_)) == expected


def test_allocate_gives_gpus_of_the_same_rank() -> None:
    pool = make_pool(4, 4, gpus=2)
    assert shown(pool.allocate(Request(nslots=3, gpus_per_slot=1))) == ["0:0-1/0-1", "1:0/0"]
    assert pool.allocate(Request(nslots=2, gpus_per_slot=1)) is None
    assert shown(pool.allocate(Request(nslots=1, gpus_per_slot=1))) == ["1:1/1"]


def test_exclusive_wants_an_idle_node() -> None:
    pool = make_pool(4, 4)
    first = pool.allocate(Request())
    assert shown(pool.allocate(Request(nnodes=1, nslots=1, exclusive=True))) == ["1:0-3"]
    assert pool.allocate(Request(nnodes=1, nslots=1, exclusive=True)) is None
    assert first is not None
    pool.release(first)
    assert shown(pool.allocate(Request(nnodes=1, nslots=1, exclusive=True))) == ["0:0-3"]


def test_ranks_begin_down_and_drained_ranks_are_left_alone() -> None:
    pool = make_pool(1, 1, up=False)
    assert pool.allocate(Request()) is None
    pool.set_up(ids("0-1,77"))
    pool.drain(ids("0,77"))
    assert (str(pool.usable_ranks()), str(pool.unusable_ranks()), str(pool.drained_ranks())) == (
        "1",
        "0",
        "0,77",
    )
    assert shown(pool.allocate(Request())) == ["1:0"]
    assert pool.allocate(Request()) is None
    pool.undrain(ids("0"))
    held = pool.allocate(Request())
    assert shown(held) == ["0:0"]
    pool.set_down(ids("0"))
    assert [share.rank for share in pool.allocated()] == [0, 1]
    assert held is not None
    pool.release(held)
    assert pool.allocate(Request()) is None


def test_partial_release_gives_back_one_rank() -> None:
    pool = make_pool(2, 2)
    whole = pool.allocate(Request(nnodes=2, nslots=2, cores_per_slot=2))
    assert whole is not None
    assert str(whole.ranks()) == "0-1"
    pool.release(whole.only(ids("1")))
    assert shown(pool.allocate(Request(nslots=2))) == ["1:0-1"]
    with pytest.raises(PoolError, match="cannot release core0-1 of rank 0: not in use"):
        pool.release(whole.only(ids("0")))
        pool.release(whole.only(ids("0")))


def test_claim_takes_exactly_what_it_names_even_on_a_rank_that_is_down() -> None:
    pool = make_pool(4, up=False)
    claimed = Allocation(shares=(Share(rank=0, cores=ids("1-2")),), nslots=2)
    pool.claim(claimed)
    pool.set_up(ids("0"))
    assert shown(pool.allocate(Request(nslots=2))) == ["0:0,3"]


def test_a_rank_may_be_drained_before_it_is_there() -> None:
    pool = make_pool(1)
    pool.drain(ids("1"))
    pool.add(Inventory(rank=1, host="host1", cores=ids("0-7")))
    pool.set_up(ids("1"))
    assert shown(pool.allocate(Request())) == ["0:0"]
    pool.undrain(ids("1"))
    assert shown(pool.allocate(Request())) == ["1:0"]


def test_torpid_ranks_get_nothing_new() -> None:
    pool = make_pool(1, 2)
    pool.set_torpid(ids("1"))
    assert (str(pool.torpid_ranks()), str(pool.usable_ranks()), str(pool.unusable_ranks())) == ("1", "0", "1")
    assert shown(pool.allocate(Request())) == ["0:0"]
    assert pool.allocate(Request()) is None
    before = pool.generation
    pool.set_lively(ids("1"))
    assert pool.generation > before
    assert shown(pool.allocate(Request())) == ["1:0"]


def test_what_a_rank_has_no_longer_stays_claimed_and_is_not_given_again() -> None:
    pool = make_pool(4, gpus=1)
    held = pool.allocate(Request(nslots=3, gpus_per_slot=0))
    assert shown(held) == ["0:0-2"]
    assert pool.in_use(0)
    before = pool.generation
    pool.replace(Inventory(rank=0, host="new", cores=ids("2-3")))
    assert pool.generation > before
    assert pool.find(0) == Inventory(rank=0, host="new", cores=ids("2-3"))
    assert [str(share.cores) for share in pool.allocated()] == ["0-2"]
    assert shown(pool.allocate(Request())) == ["0:3"]
    assert pool.allocate(Request()) is None
    assert held is not None
    pool.release(held)
    assert shown(pool.allocate(Request())) == ["0:2"]
    assert pool.allocate(Request()) is None
    with pytest.raises(PoolError, match="cannot replace rank 5 in the resource pool: it is not there"):
        pool.replace(Inventory(rank=5, host="a", cores=ids("0")))


def test_a_restart_claims_also_what_a_rank_has_no_longer() -> None:
    pool = make_pool(2)
    claimed = Allocation(shares=(Share(rank=0, cores=ids("1-7"), gpus=ids("0")),), nslots=7)
    pool.claim(claimed)
    with pytest.raises(PoolError, match="cannot claim core7 of rank 0: in use by another job"):
        pool.claim(Allocation(shares=(Share(rank=0, cores=ids("7")),), nslots=1))
    assert pool.allocate(Request(nnodes=1, exclusive=True)) is None
    assert shown(pool.allocate(Request())) == ["0:0"]
    pool.release(claimed)
    assert shown(pool.allocate(Request())) == ["0:1"]


@pytest.mark.parametrize(
    ("request_", "waits"),
    [
        (Request(nslots=100), True),
        (Request(gpus_per_slot=8), True),
        (Request(nnodes=3, nslots=3, cores_per_slot=64), False),
        (Request(nnodes=2, nslots=2, cores_per_slot=64), True),
        (Request(nnodes=4, nslots=4), True),
        (Request(nnodes=5, nslots=5), False),
    ],
)
def test_while_ranks_were_never_seen_what_may_fit_on_them_waits(request_: Request, waits: bool) -> None:
    seen = [Inventory(rank=rank, host=f"host{rank}", cores=ids("0-3")) for rank in range(2)]
    pool = Pool(seen, size=4)
    assert (pool.why_unsatisfiable(request_) is None) is waits
    for rank in (2, 3):
        pool.add(Inventory(rank=rank, host=f"host{rank}", cores=ids("0-3")))
    assert (pool.why_unsatisfiable(request_) is None) is (request_ == Request(nnodes=4, nslots=4))


@pytest.mark.parametrize(
    ("shares", "why"),
    [
        ((Share(rank=5, cores=ids("0")),), "cannot claim rank 5: not in the resource pool"),
        (
            (Share(rank=0, cores=ids("1"), gpus=ids("3")), Share(rank=5, cores=ids("0"))),
            "cannot claim rank 5: not in the resource pool",
        ),
        ((Share(rank=0, cores=ids("0-1")),), "cannot claim core0 of rank 0: in use by another job"),
        ((Share(rank=1, cores=ids("0")), Share(rank=1, cores=ids("1"))), "cannot claim rank 1: named twice"),
    ],
)
def test_claim_refuses_what_is_not_there_and_takes_nothing(shares: tuple[Share, ...], why: str) -> None:
    pool = make_pool(4, 4)
    pool.claim(Allocation(shares=(Share(rank=0, cores=ids("0")),), nslots=1))
    before = pool.allocated()
    with pytest.raises(PoolError, match=why):
        pool.claim(Allocation(shares=shares, nslots=1))
    assert pool.allocated() == before


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request(nslots=8), None),
        (Request(nslots=9), "9 slot(s) of 1 core(s) are wanted, the nodes have room for 8"),
        (Request(nnodes=2, nslots=2, cores_per_slot=4), None),
        (Request(nnodes=2, nslots=2, cores_per_slot=5), "2 node(s) with 1 slot(s) of 5 core(s) are wanted"),
        (Request(nnodes=3, nslots=3, exclusive=True), "3 exclusive node(s) with"),
        (Request(gpus_per_slot=1), "1 slot(s) of 1 core(s) and 1 gpu(s) are wanted"),
        (
            Request(nnodes=2, nslots=2, constraint=parse_constraint({"properties": ["first"]})),
            "the instance has 1 that meet the constraint",
        ),
    ],
)
def test_unsatisfiable_is_said_whatever_is_up_or_free(request_: Request, why: str | None) -> None:
    pool = make_pool(4, 4, up=False)
    pool.claim(Allocation(shares=(Share(rank=0, cores=ids("0-3")),), nslots=4))
    said = pool.why_unsatisfiable(request_)
    assert said is None if why is None else said is not None and "unsatisfiable request: " in said and why in said


def test_constraints_choose_ranks_and_new_ranks_are_seen() -> None:
    pool = make_pool(4, 4)
    on_other = Request(constraint=parse_constraint({"properties": ["other"]}))
    assert shown(pool.allocate(on_other)) == ["1:0"]
    pool.set_down(ids("1"))
    assert pool.allocate(on_other) is None
    pool.add(Inventory(rank=2, host="host2", cores=ids("0-7"), properties=frozenset({"other"})))
    assert pool.allocate(on_other) is None
    pool.set_up(ids("2"))
    assert shown(pool.allocate(on_other)) == ["2:0"]
    with pytest.raises(PoolError, match="cannot add rank 2"):
        pool.add(Inventory(rank=2, host="host2", cores=ids("0")))


def test_remembered_constraints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_CACHED_CONSTRAINTS", 3)
    pool = make_pool(1, 1)
    for rank in range(10):
        pool.why_unsatisfiable(Request(constraint=parse_constraint({"ranks": [str(rank)]})))
    assert len(pool._eligible) <= 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"nslots": 0},
        {"nnodes": -1},
        {"cores_per_slot": 0},
        {"gpus_per_slot": -1},
        {"exclusive": True},
        {"nnodes": 2, "nslots": 3},
    ],
)
def test_requests_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot request resources"):
        dataclasses.replace(Request(), **wrong)  # type: ignore[arg-type]


def test_ids_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="65536 is above the largest id 65535"):
        Pool([Inventory(rank=0, host="a", cores=ids("65536"))])


REQUESTS = st.builds(
    lambda nnodes, each, cores, gpus, exclusive: Request(
        nnodes=nnodes,
        nslots=each * max(1, nnodes),
        cores_per_slot=cores,
        gpus_per_slot=gpus,
        exclusive=exclusive and nnodes > 0,
    ),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(REQUESTS, st.integers(0, 5)), max_size=30))
def test_nothing_is_given_twice_and_everything_comes_back(steps: list[tuple[Request, int]]) -> None:
    """Against a naive model: the set of (rank, core) pairs in use."""
    pool = make_pool(4, 2, 6, gpus=2)
    everything = {(rank, core) for rank, cores in enumerate((4, 2, 6)) for core in range(cores)}
    held: list[Allocation] = []
    for request, victim in steps:
        used = {(s.rank, core) for a in held for s in a.shares for core in s.cores}
        allocation = pool.allocate(request)
        if allocation is not None:
            given_now = [(s.rank, core) for s in allocation.shares for core in s.cores]
            assert used.isdisjoint(given_now)
            assert everything.issuperset(given_now)
            assert request.exclusive or len(given_now) == request.nslots * request.cores_per_slot
            assert not request.nnodes or len(allocation.shares) == request.nnodes
            held.append(allocation)
        elif not held:
            assert pool.why_unsatisfiable(request) is not None
        if victim < len(held):
            pool.release(held.pop(victim))
    restarted = make_pool(4, 2, 6, gpus=2)
    for allocation in held:
        restarted.claim(allocation)
    assert restarted.allocated() == pool.allocated()
    for allocation in held:
        pool.release(allocation)
    assert pool.allocated() == ()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set_up", "set_down", "drain", "undrain", "set_torpid", "set_lively", "replace", "take"]),
            st.integers(0, 3),
            st.integers(1, 5),
        ),
        max_size=40,
    )
)
def test_what_can_be_given_is_what_is_free_on_usable_ranks(steps: list[tuple[str, int, int]]) -> None:
    """Against a naive model, whatever comes and goes: a request for all that is free fits, one more slot does not."""
    pool = make_pool(2, 2, 2, up=False)
    cores, used = {0: 2, 1: 2, 2: 2}, {0: 0, 1: 0, 2: 0}
    up, drained, torpid = set[int](), set[int](), set[int]()
    sets = {"set_up": (up, True), "set_down": (up, False), "drain": (drained, True), "undrain": (drained, False)}
    sets |= {"set_torpid": (torpid, True), "set_lively": (torpid, False)}
    for what, rank, count in steps:
        if what in sets:
            getattr(pool, what)(IdSet([rank]))
            which, add = sets[what]
            which.update({rank}) if add and (what != "set_up" or rank in cores) else which.discard(rank)
        elif rank in cores and what == "replace":
            pool.replace(Inventory(rank=rank, host="h", cores=IdSet(range(count))))
            cores[rank] = count
        elif rank in cores and (rank in up - drained - torpid) and used[rank] < cores[rank]:
            assert pool.allocate(Request(constraint=parse_constraint({"ranks": [str(rank)]}))) is not None
            used[rank] += 1
        free = sum(max(0, cores[r] - used[r]) for r in up - drained - torpid)
        assert pool.allocate(Request(nslots=free + 1)) is None
        if free:
            everything = pool.allocate(Request(nslots=free))
            assert everything is not None
            pool.release(everything)


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({}, "0-3"),
        ({"properties": []}, "0-3"),
        ({"properties": ["ssd"]}, "0-1"),
        ({"properties": ["ssd", "big"]}, "1"),
        ({"properties": ["^ssd"]}, "2-3"),
        ({"properties": ["host3"]}, "3"),
        ({"hostlist": ["host[0-1]", "host3"]}, "0-1,3"),
        ({"ranks": ["0-1", "3"]}, "0-1,3"),
        ({"and": []}, "0-3"),
        ({"or": []}, "0-3"),
        ({"not": []}, ""),
        ({"not": [{"properties": ["ssd"]}]}, "2-3"),
        ({"not": [{"properties": ["ssd"]}, {"properties": ["big"]}]}, "0,2-3"),
        ({"or": [{"ranks": ["0"]}, {"properties": ["big"]}]}, "0-2"),
        ({"and": [{"hostlist": ["host[0-2]"]}, {"properties": ["big"]}]}, "1-2"),
    ],
)
def test_constraint_matching(constraint: dict[str, object], expected: str) -> None:
    parsed = parse_constraint(constraint)  # type: ignore[arg-type]
    having = [{"ssd"}, {"ssd", "big"}, {"big"}, set()]
    found = [rank for rank in range(4) if matches(parsed, rank, f"host{rank}", frozenset(having[rank]))]
    assert str(IdSet(found)) == expected
    assert hash(parsed) == hash(parse_constraint(constraint))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        ([], "expected an object, got \\[\\]"),
        ({"and": [{}, {"ranks": ["3-1"]}]}, r"and\[1\].ranks: cannot parse idset '3-1'"),
        ({"hostlist": ["a[0-"]}, "hostlist: cannot parse hostlist"),
        ({"properties": [1]}, "properties: expected strings, got 1"),
        ({"properties": ["a|b"]}, "'a|b' is no property"),
        ({"properties": ["^"]}, "'\\^' is no property"),
        ({"not": 3}, "not: expected a list, got 3"),
        ({"ranks": ["0"], "not": []}, "expected one operator, got 'not, ranks'"),
        ({"xor": []}, "xor: unknown operator, known are properties, hostlist, ranks, and, or, not"),
        ({"hostlist": [f"a[1-{MAX_CONSTRAINT_ITEMS - 1}]"] * 2}, "more than 131072 items"),
    ],
)
def test_constraint_errors_say_where(constraint: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_constraint(constraint)  # type: ignore[arg-type]


def test_constraint_depth_is_bounded() -> None:
    nested: dict[str, object] = {}
    for _ in range(MAX_CONSTRAINT_DEPTH - 1):
        nested = {"and": [nested]}
    assert parse_constraint(nested) != ANY_RANK  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nested deeper than"):
        parse_constraint({"and": [nested]})  # type: ignore[list-item]


def test_a_listener_hears_of_every_rank_that_changes_and_usage_tells_how() -> None:
    pool = Pool([Inventory(rank=rank, host=f"n{rank}", cores=IdSet(range(4)), gpus=IdSet([0])) for rank in range(2)])
    heard: list[int] = []
    pool.listen(heard.append)
    pool.set_up(IdSet([0, 1]))
    assert heard == [0, 1]
    taken = pool.allocate(Request(nslots=3, cores_per_slot=1))
    assert taken is not None
    assert heard[2:] == [*taken.ranks()]
    (rank,) = taken.ranks()
    assert pool.usage(rank) == Usage(cores=4, cores_used=3, gpus=1, gpus_used=0, torpid=False, usable=True)
    pool.set_torpid(IdSet([rank]))
    usage = pool.usage(rank)
    assert usage is not None
    assert (usage.torpid, usage.usable) == (True, False)
    pool.unlisten(heard.append)
    count = len(heard)
    pool.release(taken)
    assert len(heard) == count
    assert pool.usage(7) is None
