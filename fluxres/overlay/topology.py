"""The shape of the tree: who is whose parent. Pure, and fixed while the instance runs.

Sources: flux-broker-attributes(7) for `tbon.topo` (`kary:K`, `custom`), RFC 3 for routing by rank.

    kary:K    rank r > 0 has the parent (r - 1) div K: the tree is filled level by level
    custom    the parents named one by one in the configuration

Refused with a ValueError: no rank or more than `MAX_SIZE`, a root with a parent, a parent that is no rank of the
instance, and ranks that are their own ancestors.

All brokers of a process may share one topology: it is held in four flat arrays, 16 bytes a rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

MAX_SIZE: Final = 65_536
"""Ranks in an instance."""
NO_PARENT: Final = -1
"""The parent of rank 0 in a list of parents."""
MAX_SHOWN_RANKS: Final = 8
"""How many ranks of a cycle an error names."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A tree of `size` ranks with rank 0 as its root; `parents` has one entry a rank, the first `NO_PARENT`.

    `digest` tells apart trees of one size: brokers that are to be one instance must agree on it.
    Two topologies are equal when their sizes and digests are. Methods raise ValueError for a rank not in the tree.
    """

    size: int
    parents: Sequence[int] = field(compare=False, repr=False)
    digest: str = ""
    maxlevel: int = field(init=False, compare=False, repr=False)
    """The level of the deepest rank."""
    _levels: array[int] = field(init=False, compare=False, repr=False)
    _first: array[int] = field(init=False, compare=False, repr=False)
    _below: array[int] = field(init=False, compare=False, repr=False)
    """The children of rank r are `_below[_first[r]:_first[r + 1]]`."""

    def __post_init__(self) -> None:
        parents = _checked(self.size, self.parents)
        first, below = _children_of_all(parents)
        levels = _levels_of_all(parents, first, below)
        digest = self.digest or f"custom:{sha256(repr(parents.tolist()).encode()).hexdigest()[:16]}"
        for name, value in (
            *(("parents", parents), ("digest", digest), ("maxlevel", max(levels))),
            *(("_levels", levels), ("_first", first), ("_below", below)),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def kary(cls, size: int, k: int) -> Topology:
        """The tree in which every rank has `k` children while there are ranks left. Raises ValueError."""
        if k < 1:
            raise ValueError(f"cannot build a tree of fanout {k}: a rank needs room for one child at least")
        _check_size(size)
        return cls(size, array("i", (NO_PARENT, *((rank - 1) // k for rank in range(1, size)))), f"kary:{k}")

    @classmethod
    def custom(cls, parents: Sequence[int]) -> Topology:
        """The tree in which rank r has the parent `parents[r]`, and rank 0 `NO_PARENT`. Raises ValueError."""
        return cls(len(parents), parents)

    def parent(self, rank: int) -> int | None:
        """The parent of `rank`; None for the root."""
        self._check(rank)
        return self.parents[rank] if rank else None

    def children(self, rank: int) -> tuple[int, ...]:
        """The children of `rank` in ascending order."""
        self._check(rank)
        return tuple(self._below[self._first[rank] : self._first[rank + 1]])

    def level(self, rank: int) -> int:
        """How many hops `rank` is from the root."""
        self._check(rank)
        return self._levels[rank]

    def next_hop(self, frm: int, to: int) -> int | None:
        """The child of `frm` that leads to `to`; None where `to` is not strictly below `frm`, or no rank at all."""
        self._check(frm)
        if not 0 < to < self.size:
            return None
        for _ in range(self._levels[to] - self._levels[frm]):
            parent = self.parents[to]
            if parent == frm:
                return to
            to = parent
        return None

    def subtree(self, rank: int) -> Iterator[int]:
        """`rank` and all ranks below it, each before its children, siblings in ascending order."""
        self._check(rank)
        todo = [rank]
        while todo:
            rank = todo.pop()
            yield rank
            todo.extend(reversed(self.children(rank)))

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"cannot find rank {rank}: the instance has ranks 0 to {self.size - 1}")

    def __str__(self) -> str:
        """The value of the attribute `tbon.topo`: `kary:K` or `custom`."""
        return self.digest if self.digest.startswith("kary:") else "custom"


def parse_topo(text: str, size: int) -> Topology:
    """The tree that `kary:K` names, for `size` ranks. Raises ValueError."""
    kind, _, fanout = text.partition(":")
    if kind != "kary" or not (fanout.isascii() and fanout.isdigit()):
        raise ValueError(f"cannot use the topology {text!r}: give kary:K with a whole number K, such as kary:2")
    return Topology.kary(size, int(fanout))


def _check_size(size: int) -> None:
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"cannot build a tree of {size} ranks: give 1 to {MAX_SIZE}")


def _checked(size: int, parents: Sequence[int]) -> array[int]:
    """`parents` as an array; every entry names a rank, the first none."""
    _check_size(size)
    if len(parents) != size:
        raise ValueError(f"cannot build a tree of {size} ranks from {len(parents)} parents: give one a rank")
    if parents[0] != NO_PARENT:
        raise ValueError(f"cannot build the tree: rank 0 is its root, and cannot have rank {parents[0]} as its parent")
    for rank in range(1, size):
        if not 0 <= parents[rank] < size:
            raise ValueError(
                f"cannot build the tree: rank {rank} has the parent {parents[rank]}, the ranks are 0 to {size - 1}"
            )
    return array("i", parents)


def _children_of_all(parents: array[int]) -> tuple[array[int], array[int]]:
    """The ranks sorted by parent, and where each rank's children begin among them."""
    below = sorted(range(1, len(parents)), key=parents.__getitem__)
    counts = [0] * len(parents)
    for rank in below:
        counts[parents[rank]] += 1
    first = array("i", [0])
    for count in counts:
        first.append(first[-1] + count)
    return first, array("i", below)


def _levels_of_all(parents: array[int], first: array[int], below: array[int]) -> array[int]:
    """Each rank's distance from the root. Raises ValueError where the root does not lead to all of them."""
    levels = array("i", [-1]) * len(parents)
    levels[0] = 0
    reached = [0]
    for rank in reached:
        children = below[first[rank] : first[rank + 1]]
        for child in children:
            levels[child] = levels[rank] + 1
        reached.extend(children)
    if len(reached) < len(parents):
        raise ValueError(f"cannot build the tree: {_cycle(parents, levels.index(-1))}")
    return levels


def _cycle(parents: array[int], rank: int) -> str:
    """Name the cycle above `rank`, which the root does not lead to."""
    path: dict[int, None] = {}
    while rank not in path:
        path[rank] = None
        rank = parents[rank]
    ranks = list(path)
    cycle = [*ranks[ranks.index(rank) :], rank]
    shown = [str(each) for each in cycle[:MAX_SHOWN_RANKS]]
    if len(cycle) > MAX_SHOWN_RANKS:
        shown.append("…")
    return f"rank {rank} is its own ancestor, by the parents {' -> '.join(shown)}"
