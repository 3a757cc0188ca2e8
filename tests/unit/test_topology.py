"""The shape of the tree, against one that is built in the most naive way."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.overlay.topology import MAX_SIZE, NO_PARENT, Topology, parse_topo


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of a random tree: each rank hangs below one that is in the tree already, in any order of ranks."""
    ranks = draw(st.permutations(range(1, draw(st.integers(1, 40)))))
    parents = [NO_PARENT] * (len(ranks) + 1)
    placed = [0]
    for rank in ranks:
        parents[rank] = draw(st.sampled_from(placed))
        placed.append(rank)
    return parents


def path(parents: Sequence[int], rank: int) -> list[int]:
    """From the root down to `rank`."""
    up = [rank]
    while up[-1]:
        up.append(parents[up[-1]])
    return up[::-1]


def preorder(parents: Sequence[int], rank: int) -> list[int]:
    below = [child for child, parent in enumerate(parents) if parent == rank]
    return [rank, *(found for child in below for found in preorder(parents, child))]


@given(trees())
def test_against_a_naive_tree(parents: list[int]) -> None:
    tree = Topology.custom(parents)
    assert (tree.size, list(tree.parents), str(tree)) == (len(parents), parents, "custom")
    assert tree.maxlevel == max(len(path(parents, rank)) for rank in range(tree.size)) - 1
    for rank in range(tree.size):
        assert tree.parent(rank) == (parents[rank] if rank else None)
        assert tree.children(rank) == tuple(each for each in range(tree.size) if parents[each] == rank)
        assert tree.level(rank) == len(path(parents, rank)) - 1
        assert list(tree.subtree(rank)) == preorder(parents, rank)
        for to in range(-1, tree.size + 2):
            way = path(parents, to) if 0 <= to < tree.size else []
            below = way[way.index(rank) + 1 :] if rank in way else []
            assert tree.next_hop(rank, to) == (below[0] if below else None)


@given(st.integers(1, 300), st.integers(1, 40))
def test_kary(size: int, k: int) -> None:
    tree = Topology.kary(size, k)
    assert str(tree) == tree.digest == f"kary:{k}"
    assert parse_topo(f"kary:{k}", size) == tree
    assert next(tree.subtree(0)) == 0
    assert sorted(tree.subtree(0)) == list(range(size))
    for rank in range(size):
        assert tree.children(rank) == tuple(range(rank * k + 1, rank * k + k + 1))[: max(0, size - rank * k - 1)]
    assert [tree.level(rank) for rank in range(size)] == sorted(tree.level(rank) for rank in range(size))


def test_the_tree_of_the_manual() -> None:
    tree = parse_topo("kary:2", 16)
    assert [tree.children(rank) for rank in (0, 1, 7, 8)] == [(1, 2), (3, 4), (15,), ()]
    assert [tree.next_hop(0, to) for to in (0, 2, 12, 15, 16)] == [None, 2, 2, 1, None]
    assert (tree.next_hop(1, 15), tree.next_hop(2, 15), tree.next_hop(15, 1)) == (3, None, None)
    assert list(tree.subtree(3)) == [3, 7, 15, 8]
    assert tree.maxlevel == 4


def test_who_agrees_with_whom() -> None:
    assert Topology.kary(4, 2) == Topology.kary(4, 2)
    assert hash(Topology.kary(4, 2)) == hash(Topology.kary(4, 2))
    assert Topology.kary(4, 2) != Topology.kary(5, 2)
    assert Topology.kary(4, 2) != Topology.kary(4, 3)
    one, other = Topology.custom([NO_PARENT, 0, 0, 1]), Topology.custom([NO_PARENT, 0, 0, 2])
    assert one == Topology.custom((NO_PARENT, 0, 0, 1))
    assert one != other
    assert one.digest != other.digest
    assert repr(one) == f"Topology(size=4, digest={one.digest!r})"


def test_the_largest_tree_is_small_and_deep_ones_work() -> None:
    tree = Topology.kary(MAX_SIZE, 2)
    assert tree.next_hop(0, MAX_SIZE - 1) == 1
    arrays = (tree.parents, tree._levels, tree._first, tree._below)
    assert sum(map(sys.getsizeof, arrays)) < 20 * MAX_SIZE
    chain = Topology.kary(MAX_SIZE, 1)
    assert chain.maxlevel == MAX_SIZE - 1
    assert chain.next_hop(0, MAX_SIZE - 1) == 1
    assert sum(1 for _ in chain.subtree(1)) == MAX_SIZE - 1


@pytest.mark.parametrize(
    ("parents", "why"),
    [
        ([], "0 ranks"),
        ([0], "rank 0 is its root"),
        ([1, NO_PARENT], "rank 0 is its root"),
        ([NO_PARENT, NO_PARENT], "rank 1 has the parent -1"),
        ([NO_PARENT, 0, 3], "rank 2 has the parent 3, the ranks are 0 to 2"),
        ([NO_PARENT, 1], "rank 1 is its own ancestor, by the parents 1 -> 1$"),
        ([NO_PARENT, 0, 3, 4, 2], "by the parents 2 -> 3 -> 4 -> 2$"),
        ([NO_PARENT, 2, 3, 2], "by the parents 2 -> 3 -> 2$"),
        ([NO_PARENT, *range(2, 30), 1], "by the parents 1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7 -> 8 -> …$"),
    ],
)
def test_refused_parents(parents: list[int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Topology.custom(parents)


def test_refused_sizes() -> None:
    for size in (-1, 0, MAX_SIZE + 1):
        with pytest.raises(ValueError, match=f"a tree of {size} ranks"):
            Topology.kary(size, 2)
    with pytest.raises(ValueError, match="a tree of 3 ranks from 2 parents"):
        Topology(3, [NO_PARENT, 0])


@pytest.mark.parametrize("text", ["", "kary", "kary:", "kary:-1", "kary:0", "kary:x", "kary:²", "custom", "binomial"])
def test_refused_texts(text: str) -> None:
    with pytest.raises(ValueError, match="cannot"):
        parse_topo(text, 4)


@pytest.mark.parametrize("rank", [-1, 4])
def test_no_such_rank(rank: int) -> None:
    tree = Topology.kary(4, 2)
    for ask in (
        tree.parent,
        tree.children,
        tree.level,
        lambda rank: tree.next_hop(rank, 1),
        lambda r: [*tree.subtree(r)],
    ):
        with pytest.raises(ValueError, match=f"cannot find rank {rank}: the instance has ranks 0 to 3"):
            ask(rank)
