"""The resource pool: which cores and GPUs of which ranks are free, and which of them a request gets.

Pure and synchronous. A rank can be used while it is *up* and not *drained*; losing either takes nothing
away from allocations that it already carries. `generation` counts the changes that can make a request fit
that did not fit before, so that a policy need not try again while it stays the same.

Ranks are taken worst fit: the most free cores first, then the lowest rank. A slot never spans ranks.

Inside, ids are bits of integers, because counting and taking the lowest is what allocation does all day;
outside they are IdSets. Sources: RFC 20 (R), RFC 27 (alloc and free), flux-core's sched-simple for what
requests mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.sched.constraint import ANY_RANK, Constraint, matches

MAX_LOCAL_ID: Final = (1 << 16) - 1
"""The largest core or GPU id of one rank: an id is a bit of an integer here."""

MAX_CACHED_CONSTRAINTS: Final = 64
"""How many constraints the pool remembers the eligible ranks of."""

NO_IDS: Final = IdSet()


class PoolError(FluxresError):
    """A claim or release that does not agree with what the pool holds; nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What one rank has: `cores` and `gpus` are its logical ids; `properties` as RFC 20 has them."""

    rank: int
    host: str
    cores: IdSet
    gpus: IdSet = NO_IDS
    properties: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job wants: `nslots` slots in all, spread evenly over `nnodes` nodes, or over any number of
    them if 0.

    `exclusive` takes whole nodes and needs `nnodes`. Raises ValueError for counts that make no sense.
    """

    nnodes: int = 0
    nslots: int = 1
    cores_per_slot: int = 1
    gpus_per_slot: int = 0
    exclusive: bool = False
    constraint: Constraint = ANY_RANK

    def __post_init__(self) -> None:
        in_range = min(self.nnodes, self.gpus_per_slot) >= 0 and min(self.nslots, self.cores_per_slot) >= 1
        uneven = self.nnodes and self.nslots % self.nnodes
        if not in_range or uneven or (self.exclusive and not self.nnodes):
            raise ValueError(f"cannot request resources: the counts do not fit together in {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of an allocation on one rank."""

    rank: int
    cores: IdSet
    gpus: IdSet = NO_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Resources given to one job: shares in ascending order of rank, and how many slots they make up."""

    shares: tuple[Share, ...]
    nslots: int

    def ranks(self) -> IdSet:
        """The ranks that it has a share of."""
        return IdSet(share.rank for share in self.shares)

    def only(self, ranks: IdSet) -> Allocation:
        """The part of it on `ranks`, as for a partial release; `nslots` stays that of the whole."""
        return Allocation(shares=tuple(s for s in self.shares if s.rank in ranks), nslots=self.nslots)


class _Node:
    """One rank of the pool; ids are bits, and free ones are always among its own."""

    __slots__ = ("cores", "free_cores", "free_gpus", "gpus", "inventory")

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.cores = self.free_cores = _bits(inventory.cores, f"rank {inventory.rank} cores")
        self.gpus = self.free_gpus = _bits(inventory.gpus, f"rank {inventory.rank} gpus")

    def slots(self, request: Request, cores: int, gpus: int) -> int:
        """How many of the request's slots these cores and GPUs hold."""
        slots = cores.bit_count() // request.cores_per_slot
        if request.gpus_per_slot:
            slots = min(slots, gpus.bit_count() // request.gpus_per_slot)
        return slots


class Pool:
    """The resources of the instance. Every rank starts *down*."""

    def __init__(self, inventory: Iterable[Inventory] = ()) -> None:
        self.generation = 0
        self._nodes: dict[int, _Node] = {}
        self._up: set[int] = set()
        self._drained: set[int] = set()
        self._eligible: dict[Constraint, tuple[_Node, ...]] = {}
        for each in inventory:
            self.add(each)

    def add(self, inventory: Inventory) -> None:
        """Take in one more rank, down; raises PoolError if it is there, ValueError for ids too large."""
        if inventory.rank in self._nodes:
            raise PoolError(f"cannot add rank {inventory.rank} to the resource pool: it is there")
        self._nodes[inventory.rank] = _Node(inventory)
        self._eligible.clear()

    # -- what may be used

    def set_up(self, ranks: IdSet) -> None:
        """These ranks are online. Ranks that the pool does not have are ignored, here and below."""
        self._up.update(self._known(ranks))
        self.generation += 1

    def set_down(self, ranks: IdSet) -> None:
        """These ranks are not online: they keep their allocations and get no new ones."""
        self._up.difference_update(ranks)

    def drain(self, ranks: IdSet) -> None:
        """Give these ranks no new allocations until they are undrained."""
        self._drained.update(self._known(ranks))

    def undrain(self, ranks: IdSet) -> None:
        """End the drain of these ranks."""
        self._drained.difference_update(ranks)
        self.generation += 1

    # -- taking and giving back

    def allocate(self, request: Request) -> Allocation | None:
        """Take what `request` wants; None, and nothing taken, when it does not fit now."""
        chosen = self._choose_nodes(request) if request.nnodes else self._choose_slots(request)
        if chosen is None:
            return None
        shares = []
        for node, cores, gpus in sorted(chosen, key=lambda choice: choice[0].inventory.rank):
            node.free_cores &= ~cores
            node.free_gpus &= ~gpus
            shares.append(Share(rank=node.inventory.rank, cores=_ids(cores), gpus=_ids(gpus)))
        return Allocation(shares=tuple(shares), nslots=request.nslots)

    def claim(self, allocation: Allocation) -> None:
        """Take exactly this, up or not: how a restart takes up what running jobs have.

        Raises PoolError, with nothing taken, when some of it is not in the pool or not free.
        """
        wanted = self._located(allocation, "claim")
        for node, cores, gpus in wanted:
            if cores & ~node.free_cores or gpus & ~node.free_gpus:
                taken = _shown(cores & ~node.free_cores, gpus & ~node.free_gpus)
                raise PoolError(f"cannot claim {taken} of rank {node.inventory.rank}: in use by another job")
        for node, cores, gpus in wanted:
            node.free_cores &= ~cores
            node.free_gpus &= ~gpus

    def release(self, allocation: Allocation) -> None:
        """Give back an allocation, or a part of one.

        Raises PoolError, with nothing given back, when some of it is not in the pool or is free.
        """
        returned = self._located(allocation, "release")
        for node, cores, gpus in returned:
            if cores & node.free_cores or gpus & node.free_gpus:
                free = _shown(cores & node.free_cores, gpus & node.free_gpus)
                raise PoolError(f"cannot release {free} of rank {node.inventory.rank}: not in use")
        for node, cores, gpus in returned:
            node.free_cores |= cores
            node.free_gpus |= gpus
        self.generation += 1

    # -- questions

    def why_unsatisfiable(self, request: Request) -> str | None:
        """Why `request` could not be met even with every rank up and free; None when it could be."""
        eligible = self._nodes_for(request.constraint)
        where = "" if request.constraint == ANY_RANK else " that meet the constraint"
        slot = f"{request.cores_per_slot} core(s)"
        if request.gpus_per_slot:
            slot += f" and {request.gpus_per_slot} gpu(s)"
        if request.nnodes:
            each = request.nslots // request.nnodes
            enough = sum(node.slots(request, node.cores, node.gpus) >= each for node in eligible)
            if enough < request.nnodes:
                kind = "exclusive node(s)" if request.exclusive else "node(s)"
                return (
                    f"unsatisfiable request: {request.nnodes} {kind} with {each} slot(s) of {slot} "
                    f"are wanted, the instance has {enough}{where}"
                )
            return None
        total = sum(node.slots(request, node.cores, node.gpus) for node in eligible)
        if total < request.nslots:
            return (
                f"unsatisfiable request: {request.nslots} slot(s) of {slot} are wanted, "
                f"the nodes{where} have room for {total}"
            )
        return None

    def inventory(self) -> tuple[Inventory, ...]:
        """Everything in the pool, by rank."""
        return tuple(self._nodes[rank].inventory for rank in sorted(self._nodes))

    def usable_ranks(self) -> IdSet:
        """The ranks that are up and not drained."""
        return IdSet(self._up - self._drained)

    def unusable_ranks(self) -> IdSet:
        """The ranks that are down or drained."""
        return IdSet(self._nodes.keys() - (self._up - self._drained))

    def drained_ranks(self) -> IdSet:
        """The ranks that are drained."""
        return IdSet(self._drained)

    def allocated(self) -> tuple[Share, ...]:
        """All that is in use, by rank; ranks with nothing in use are left out."""
        # what is free is always among what is there, so that XOR leaves what is in use
        return tuple(
            Share(rank=rank, cores=_ids(node.cores ^ node.free_cores), gpus=_ids(node.gpus ^ node.free_gpus))
            for rank, node in sorted(self._nodes.items())
            if node.cores != node.free_cores or node.gpus != node.free_gpus
        )

    # -- inside

    def _known(self, ranks: IdSet) -> Iterable[int]:
        return (rank for rank in ranks if rank in self._nodes)

    def _nodes_for(self, constraint: Constraint) -> tuple[_Node, ...]:
        """The nodes that satisfy a constraint, by rank: remembered, since many jobs have the same."""
        found = self._eligible.get(constraint)
        if found is None:
            if len(self._eligible) >= MAX_CACHED_CONSTRAINTS:
                self._eligible.clear()
            found = tuple(
                node
                for rank, node in sorted(self._nodes.items())
                if matches(constraint, rank, node.inventory.host, node.inventory.properties)
            )
            self._eligible[constraint] = found
        return found

    def _worst_fit(self, request: Request) -> list[tuple[int, int, _Node]]:
        """The usable, eligible nodes with a free core, as a heap: most free cores first, then lowest rank."""
        usable = self._up - self._drained
        heap = [
            (-node.free_cores.bit_count(), node.inventory.rank, node)
            for node in self._nodes_for(request.constraint)
            if node.free_cores and node.inventory.rank in usable
        ]
        heapq.heapify(heap)
        return heap

    def _choose_nodes(self, request: Request) -> list[tuple[_Node, int, int]] | None:
        """`nnodes` nodes and what to take of each, as (node, cores, gpus); None when too few have it."""
        each = request.nslots // request.nnodes
        heap = self._worst_fit(request)
        chosen: list[tuple[_Node, int, int]] = []
        while heap and len(chosen) < request.nnodes:
            _, _, node = heapq.heappop(heap)
            if node.slots(request, node.free_cores, node.free_gpus) < each:
                continue
            if not request.exclusive:
                chosen.append(_take(node, request, each))
            elif node.free_cores == node.cores and node.free_gpus == node.gpus:
                chosen.append((node, node.cores, node.gpus))
        return chosen if len(chosen) == request.nnodes else None

    def _choose_slots(self, request: Request) -> list[tuple[_Node, int, int]] | None:
        """Any nodes that hold `nslots` together, as (node, cores, gpus); None when they cannot."""
        heap = self._worst_fit(request)
        chosen: list[tuple[_Node, int, int]] = []
        missing = request.nslots
        while heap and missing:
            _, _, node = heapq.heappop(heap)
            slots = min(missing, node.slots(request, node.free_cores, node.free_gpus))
            if slots:
                chosen.append(_take(node, request, slots))
                missing -= slots
        return None if missing else chosen

    def _located(self, allocation: Allocation, verb: str) -> list[tuple[_Node, int, int]]:
        """The nodes and bits of an allocation; raises PoolError for what the pool does not have."""
        located = []
        seen: set[int] = set()
        for share in allocation.shares:
            node = self._nodes.get(share.rank)
            if node is None or share.rank in seen:
                why = "not in the resource pool" if node is None else "named twice"
                raise PoolError(f"cannot {verb} rank {share.rank}: {why}")
            seen.add(share.rank)
            cores = _bits(share.cores, f"rank {share.rank} cores")
            gpus = _bits(share.gpus, f"rank {share.rank} gpus")
            if cores & ~node.cores or gpus & ~node.gpus:
                missing = _shown(cores & ~node.cores, gpus & ~node.gpus)
                raise PoolError(f"cannot {verb} {missing} of rank {share.rank}: not in the resource pool")
            located.append((node, cores, gpus))
        return located


def _take(node: _Node, request: Request, slots: int) -> tuple[_Node, int, int]:
    """The lowest free ids of `node` for so many slots; the caller has seen that they are there."""
    cores = _lowest(node.free_cores, slots * request.cores_per_slot)
    return node, cores, _lowest(node.free_gpus, slots * request.gpus_per_slot)


def _lowest(bits: int, count: int) -> int:
    """The `count` lowest bits that are set in `bits`."""
    taken = 0
    for _ in range(count):
        lowest = bits & -bits
        taken |= lowest
        bits ^= lowest
    return taken


def _bits(ids: IdSet, what: str) -> int:
    bits = 0
    for low, high in ids.ranges():
        if high > MAX_LOCAL_ID:
            raise ValueError(f"cannot use {what}: {high} is above the largest id {MAX_LOCAL_ID}")
        bits |= ((1 << (high - low + 1)) - 1) << low
    return bits


def _ids(bits: int) -> IdSet:
    ids = []
    while bits:
        lowest = bits & -bits
        ids.append(lowest.bit_length() - 1)
        bits ^= lowest
    return IdSet(ids)


def _shown(cores: int, gpus: int) -> str:
    """Cores and GPUs for an error text, as `core0-3,gpu1`."""
    parts = [f"{name}{_ids(bits)}" for name, bits in (("core", cores), ("gpu", gpus)) if bits]
    return ",".join(parts)
