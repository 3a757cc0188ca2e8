"""R (RFC 20): reading, writing, and laying out tasks on it (RFC 34)."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.hostlist import Hostlist
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.job.resources import (
    ResourceSet,
    ResourceSetError,
    Target,
    TaskRange,
    blocks,
    deal,
    from_allocation,
    from_shares,
    parse_r,
    slots_per_target,
    taskmap,
)
from fluxres.sched.pool import Allocation, Pool, Share
from fluxres.sched.request import Request

RFC_EXAMPLE: JsonObject = {
    "version": 1,
    "execution": {
        "R_lite": [{"rank": "19-22", "children": {"core": "0-47", "gpu": "0-7"}}],
        "nodelist": ["node[186-189]"],
        "nslots": 32,
        "starttime": 1676560542,
        "expiration": 1676562342,
    },
}


def r_of(*cores: int, gpus: int = 0) -> ResourceSet:
    return ResourceSet(
        targets=tuple(
            Target(rank=rank, host=f"host{rank}", cores=IdSet(range(count)), gpus=IdSet(range(gpus)))
            for rank, count in enumerate(cores)
        )
    )


def test_the_example_of_the_rfc() -> None:
    r = parse_r(RFC_EXAMPLE)
    assert str(r.ranks()) == "19-22"
    assert str(r.hosts()) == "node[186-189]"
    assert (r.ncores(), r.nslots, r.starttime, r.expiration) == (4 * 48, 32, 1676560542.0, 1676562342.0)
    assert r.target(20) == Target(rank=20, host="node187", cores=IdSet(range(48)), gpus=IdSet(range(8)))
    assert r.encode() == RFC_EXAMPLE
    assert parse_r(r.encode()) == r
    with pytest.raises(KeyError):
        r.target(1)


def test_hosts_go_with_sorted_ranks_whatever_the_order_of_entries() -> None:
    value: JsonObject = {
        "version": 1,
        "execution": {
            "R_lite": [
                {"rank": "2", "children": {"core": "0"}},
                {"rank": "0-1", "children": {"core": "0-1"}},
            ],
            "nodelist": ["a", "b[7-8]"],
            "properties": {"big": "0-1"},
        },
    }
    r = parse_r(value)
    assert [(t.rank, t.host, str(t.cores)) for t in r.targets] == [
        (0, "a", "0-1"),
        (1, "b7", "0-1"),
        (2, "b8", "0"),
    ]
    assert [sorted(each.properties) for each in r.inventory()] == [["big"], ["big"], []]
    assert parse_r(r.encode()) == r
    assert str(r.only(IdSet([1, 2])).hosts()) == "b[7-8]"


def broken(**execution: object) -> object:
    value = copy.deepcopy(RFC_EXAMPLE)
    inner = value["execution"]
    assert isinstance(inner, dict)
    inner.update(execution)  # type: ignore[arg-type]
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "cannot read R: "),
        ({"version": 2, "execution": RFC_EXAMPLE["execution"]}, "version: expected 1, got 2"),
        ({"version": 1}, "execution"),
        (broken(R_lite="x"), "R_lite"),
        (
            broken(R_lite=[{"rank": "0-", "children": {"core": "0"}}]),
            r"R_lite\[0\].rank: cannot parse idset '0-'",
        ),
        (broken(R_lite=[{"rank": "0", "children": {}}]), "core"),
        (broken(R_lite=[{"rank": "0", "children": {"core": "x"}}]), r"R_lite\[0\].children.core"),
        (broken(R_lite=[{"rank": "0", "children": {"core": "0"}}] * 2), "rank 0 is named twice"),
        (broken(R_lite=[{"rank": "0-65536", "children": {"core": "0"}}]), "more than 65536 ranks"),
        (broken(nodelist=["a"]), "nodelist: 1 hosts for 4 ranks"),
        (broken(nodelist=["a[0-"]), "nodelist: cannot parse hostlist"),
        (broken(properties={"p": "x"}), "properties.p"),
        (broken(expiration=5), "expiration 5.0 is not after the start time"),
    ],
)
def test_a_wrong_r_is_refused_with_the_key(value: object, why: str) -> None:
    with pytest.raises(ResourceSetError, match=why):
        parse_r(value)  # type: ignore[arg-type]


def test_from_an_allocation_and_back_to_a_claim() -> None:
    pool = Pool(r_of(4, 4, gpus=1).inventory())
    pool.set_up(IdSet([0, 1]))
    allocation = pool.allocate(Request(nnodes=2, nslots=2, gpus_per_slot=1))
    assert allocation is not None
    r = from_allocation(allocation, {0: "a", 1: "b"}, starttime=100.0, duration=60.0)
    assert r.encode() == {
        "version": 1,
        "execution": {
            "R_lite": [{"rank": "0-1", "children": {"core": "0", "gpu": "0"}}],
            "nodelist": ["a,b"],
            "nslots": 2,
            "starttime": 100.0,
            "expiration": 160.0,
        },
    }
    again = parse_r(json.loads(json.dumps(r.encode()))).allocation()
    assert again == allocation
    pool.release(again)
    assert pool.allocated() == ()
    assert from_allocation(allocation, {0: "a", 1: "b"}, starttime=100.0, duration=0.0).expiration == 0.0


def test_an_empty_r_is_what_nothing_allocated_looks_like() -> None:
    r = from_shares((), {})
    assert r.encode()["execution"] == {"R_lite": [], "nodelist": [], "starttime": 0.0, "expiration": 0.0}
    assert parse_r(r.encode()) == r


def test_hosts_may_repeat() -> None:
    shares = [Share(rank=rank, cores=IdSet([0])) for rank in (1, 0, 2)]
    r = from_shares(shares, dict.fromkeys(range(3), "box1"))
    assert r.hosts() == Hostlist(["box1"] * 3)
    assert parse_r(r.encode()) == r


RESOURCE_SETS = st.builds(
    lambda entries: ResourceSet(
        targets=tuple(
            Target(rank=rank, host=f"n{rank % 3}", cores=IdSet(cores), gpus=IdSet(gpus))
            for rank, (cores, gpus) in sorted(entries.items())
        )
    ),
    st.dictionaries(
        st.integers(0, 40),
        st.tuples(st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(0, 2))),
        max_size=12,
    ),
)


@settings(deadline=None)
@given(RESOURCE_SETS)
def test_encode_and_parse_are_inverse(r: ResourceSet) -> None:
    assert parse_r(json.loads(json.dumps(r.encode()))) == r


@pytest.mark.parametrize(
    ("ntasks", "slots", "counts"),
    [
        (0, [], []),
        (4, [4], [4]),
        (5, [2, 2, 2, 2], [2, 1, 1, 1]),
        (4, [3, 1], [3, 1]),
        (6, [1, 4, 2], [1, 3, 2]),
        (7, [1, 4, 2], [1, 4, 2]),
        (2, [16, 16], [1, 1]),
        (3, [0, 5, 0], [0, 3, 0]),
    ],
)
def test_deal(ntasks: int, slots: list[int], counts: list[int]) -> None:
    assert deal(ntasks, slots) == counts


def test_deal_refuses_more_tasks_than_slots() -> None:
    with pytest.raises(ResourceSetError, match="cannot lay out 4 tasks: R has room for 3"):
        deal(4, [1, 2])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_deal_is_one_at_a_time_in_turn(slots: list[int], data: st.DataObject) -> None:
    ntasks = data.draw(st.integers(0, sum(slots)))
    naive = [0] * len(slots)
    left = ntasks
    while left:
        for place, slot in enumerate(slots):
            if left and naive[place] < slot:
                naive[place] += 1
                left -= 1
    assert deal(ntasks, slots) == naive


def test_dealing_a_million_tasks_takes_few_rounds() -> None:
    assert deal(1 << 20, [1 << 18] * 8) == [1 << 17] * 8


def test_slots_are_bounded_by_gpus_too() -> None:
    assert slots_per_target(r_of(4, 7, gpus=2), 2, 0) == [2, 3]
    assert slots_per_target(r_of(4, 7, gpus=2), 2, 1) == [2, 2]


def test_blocks() -> None:
    assert blocks(r_of(2, 2, 2), [2, 0, 1]) == (TaskRange(0, 0, 2), TaskRange(1, 2, 0), TaskRange(2, 2, 1))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], []),
        ([1], [[0, 1, 1, 1]]),
        ([1, 1], [[0, 2, 1, 1]]),
        ([2], [[0, 1, 2, 1]]),
        ([4, 4, 4, 4], [[0, 4, 4, 1]]),
        ([2, 2, 2, 2, 4, 4], [[0, 4, 2, 1], [4, 2, 4, 1]]),
        ([2, 0, 2], [[0, 1, 2, 1], [2, 1, 2, 1]]),
        ([256] * 4096, [[0, 4096, 256, 1]]),
    ],
)
def test_taskmap_vectors_of_the_rfc(counts: list[int], expected: list[list[int]]) -> None:
    assert taskmap(counts) == expected


def test_allocation_of_an_inventory_has_a_slot() -> None:
    assert r_of(1).allocation() == Allocation(shares=(Share(rank=0, cores=IdSet([0])),), nslots=1)
