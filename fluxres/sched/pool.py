"""The resource pool: which cores and GPUs of which ranks are free, and which of them a request gets.

Pure and synchronous. A rank can be used while it is *up*, not *drained* and not *torpid*; losing any of these takes
nothing away from allocations that it already carries. `generation` counts the changes that can make a request fit
that did not fit before, so that a policy need not try again while it stays the same.

What a rank has may change from one of its lives to the next (`replace`), and jobs may hold what it no longer has:
that stays claimed, can be given back, and is not given out again.

Ranks are taken worst fit: the most free cores first, then the lowest rank. A slot never spans ranks.

Inside, ids are bits of integers, because counting and taking the lowest is what allocation does all day;
outside they are IdSets. Sources: RFC 20 (R), RFC 27 (alloc and free), flux-core's sched-simple for what
requests mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.sched.constraint import ANY_RANK, Constraint, matches
from fluxres.sched.node import NO_IDS as NO_IDS
from fluxres.sched.node import Inventory as Inventory
from fluxres.sched.node import Node, bits_of, ids_of, lowest, shown
from fluxres.sched.node import Usage as Usage
from fluxres.sched.request import Request

MAX_CACHED_CONSTRAINTS: Final = 64
"""How many constraints the pool remembers the eligible ranks of."""
MAX_REMEMBERED: Final = 1024
"""Of how many requests the pool remembers whether they could ever be met."""


class PoolError(FluxresError):
    """A claim or release that does not agree with what the pool holds; nothing has changed."""


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


class Pool:
    """The resources of the instance, of `size` ranks in all. Every rank starts *down*.

    What the ranks have that were never added is not known: a request that may fit on them is not unsatisfiable.
    """

    def __init__(self, inventory: Iterable[Inventory] = (), *, size: int = 0) -> None:
        self.generation = 0
        self._size = size
        self._nodes: dict[int, Node] = {}
        self._up: set[int] = set()
        self._drained: set[int] = set()
        self._torpid: set[int] = set()
        self._usable: set[int] = set()
        self._free: dict[int, int] = {}
        """How many cores are free on each rank that can be used and has one free."""
        self._free_cores = 0
        """The sum of them."""
        self._unsatisfiable: dict[Request, str | None] = {}
        self._eligible: dict[Constraint, tuple[Node, ...]] = {}
        self._listeners: list[Callable[[int], None]] = []
        for each in inventory:
            self.add(each)

    def add(self, inventory: Inventory) -> None:
        """Take in one more rank, down; raises PoolError if it is there, ValueError for ids too large."""
        if inventory.rank in self._nodes:
            raise PoolError(f"cannot add rank {inventory.rank} to the resource pool: it is there")
        self._nodes[inventory.rank] = Node(inventory)
        self._changed(inventory.rank)

    def replace(self, inventory: Inventory) -> None:
        """A rank of the pool has this now; what is in use stays so.

        Raises PoolError if the rank is not there, ValueError for ids too large.
        """
        node = self._nodes.get(inventory.rank)
        if node is None:
            raise PoolError(f"cannot replace rank {inventory.rank} in the resource pool: it is not there")
        node.define(inventory)
        self._changed(inventory.rank)

    def listen(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with each rank whose inventory or use may have changed, until `unlisten`."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[int], None]) -> None:
        """Do not call `listener` any more. Raises ValueError where it does not listen."""
        self._listeners.remove(listener)

    def _changed(self, rank: int) -> None:
        self._eligible.clear()
        self._unsatisfiable.clear()
        self._refresh(rank)
        self.generation += 1

    # -- what may be used

    def set_up(self, ranks: IdSet) -> None:
        """These ranks are online. Ranks that the pool does not have are ignored."""
        self._up.update(rank for rank in ranks if rank in self._nodes)
        self._sort(ranks)
        self.generation += 1

    def set_down(self, ranks: IdSet) -> None:
        """These ranks are not online: they keep their allocations and get no new ones."""
        self._up.difference_update(ranks)
        self._sort(ranks)

    def drain(self, ranks: IdSet) -> None:
        """Give these ranks, in the pool already or not, no new allocations until they are undrained."""
        self._drained.update(ranks)
        self._sort(ranks)

    def undrain(self, ranks: IdSet) -> None:
        """End the drain of these ranks."""
        self._drained.difference_update(ranks)
        self._sort(ranks)
        self.generation += 1

    def set_torpid(self, ranks: IdSet) -> None:
        """Give these ranks no new allocations for now: nothing is heard of them."""
        self._torpid.update(ranks)
        self._sort(ranks)

    def set_lively(self, ranks: IdSet) -> None:
        """These ranks are no longer torpid."""
        self._torpid.difference_update(ranks)
        self._sort(ranks)
        self.generation += 1

    def _sort(self, ranks: IdSet) -> None:
        """Bring what is known of these ranks' use up to date."""
        for rank in ranks:
            if rank in self._up and rank not in self._drained and rank not in self._torpid:
                self._usable.add(rank)
            else:
                self._usable.discard(rank)
            self._refresh(rank)

    def _refresh(self, rank: int) -> None:
        """Bring the count of a rank's free cores up to date."""
        free = self._nodes[rank].free_cores.bit_count() if rank in self._usable else 0
        self._free_cores += free - self._free.get(rank, 0)
        if free:
            self._free[rank] = free
        else:
            self._free.pop(rank, None)
        for listener in self._listeners:
            listener(rank)

    # -- taking and giving back

    def allocate(self, request: Request) -> Allocation | None:
        """Take what `request` wants; None, and nothing taken, when it does not fit now."""
        if request.nnodes > len(self._free) or request.nslots * request.cores_per_slot > self._free_cores:
            return None
        chosen = self._choose_nodes(request) if request.nnodes else self._choose_slots(request)
        if chosen is None:
            return None
        shares = []
        for node, cores, gpus in sorted(chosen, key=lambda choice: choice[0].inventory.rank):
            node.use(cores, gpus)
            self._refresh(node.inventory.rank)
            shares.append(Share(rank=node.inventory.rank, cores=ids_of(cores), gpus=ids_of(gpus)))
        return Allocation(shares=tuple(shares), nslots=request.nslots)

    def claim(self, allocation: Allocation) -> None:
        """Take exactly this, up or not: how a restart takes up what running jobs have.

        Cores and GPUs that a rank has no longer are taken as well. Raises PoolError, with nothing taken, when a rank is
        not in the pool or some of it is in use.
        """
        wanted = self._located(allocation, "claim")
        for node, cores, gpus in wanted:
            if cores & node.used_cores or gpus & node.used_gpus:
                taken = shown(cores & node.used_cores, gpus & node.used_gpus)
                raise PoolError(f"cannot claim {taken} of rank {node.inventory.rank}: in use by another job")
        for node, cores, gpus in wanted:
            node.use(cores, gpus)
            self._refresh(node.inventory.rank)

    def release(self, allocation: Allocation) -> None:
        """Give back an allocation, or a part of one.

        Raises PoolError, with nothing given back, when a rank is not in the pool or some of it is not in use.
        """
        returned = self._located(allocation, "release")
        for node, cores, gpus in returned:
            if cores & ~node.used_cores or gpus & ~node.used_gpus:
                free = shown(cores & ~node.used_cores, gpus & ~node.used_gpus)
                raise PoolError(f"cannot release {free} of rank {node.inventory.rank}: not in use")
        for node, cores, gpus in returned:
            node.give_back(cores, gpus)
            self._refresh(node.inventory.rank)
        self.generation += 1

    # -- questions

    def why_unsatisfiable(self, request: Request) -> str | None:
        """Why `request` could not be met even with every rank up and free; None when it could be.

        Ranks that were never seen count as having whatever is wanted, constraints included.
        """
        if request not in self._unsatisfiable:
            if len(self._unsatisfiable) >= MAX_REMEMBERED:
                self._unsatisfiable.clear()
            self._unsatisfiable[request] = self._why_unsatisfiable(request)
        return self._unsatisfiable[request]

    def _why_unsatisfiable(self, request: Request) -> str | None:
        unseen = max(0, self._size - len(self._nodes))
        if unseen and not request.nnodes:
            return None
        eligible = self._nodes_for(request.constraint)
        where = "" if request.constraint == ANY_RANK else " that meet the constraint"
        slot = f"{request.cores_per_slot} core(s)"
        if request.gpus_per_slot:
            slot += f" and {request.gpus_per_slot} gpu(s)"
        if request.nnodes:
            each = request.nslots // request.nnodes
            enough = sum(node.slots(request, node.cores, node.gpus) >= each for node in eligible)
            if enough + unseen < request.nnodes:
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

    def find(self, rank: int) -> Inventory | None:
        """What `rank` has; None where it is not in the pool."""
        node = self._nodes.get(rank)
        return None if node is None else node.inventory

    def in_use(self, rank: int) -> bool:
        """Whether `rank` carries an allocation."""
        node = self._nodes.get(rank)
        return node is not None and bool(node.used_cores or node.used_gpus)

    def usage(self, rank: int) -> Usage | None:
        """How much of `rank` is in use; None where it is not in the pool."""
        node = self._nodes.get(rank)
        if node is None:
            return None
        return Usage(
            cores=node.cores.bit_count(),
            cores_used=node.used_cores.bit_count(),
            gpus=node.gpus.bit_count(),
            gpus_used=node.used_gpus.bit_count(),
            torpid=rank in self._torpid,
            usable=rank in self._usable,
        )

    def usable_ranks(self) -> IdSet:
        """The ranks that are up, not drained and not torpid."""
        return IdSet(self._usable)

    def unusable_ranks(self) -> IdSet:
        """The ranks of the pool that are down, drained or torpid."""
        return IdSet(self._nodes.keys() - self._usable)

    def drained_ranks(self) -> IdSet:
        """The ranks that are drained."""
        return IdSet(self._drained)

    def torpid_ranks(self) -> IdSet:
        """The ranks that are torpid."""
        return IdSet(self._torpid)

    def allocated(self) -> tuple[Share, ...]:
        """All that is in use, by rank; ranks with nothing in use are left out."""
        return tuple(
            Share(rank=rank, cores=ids_of(node.used_cores), gpus=ids_of(node.used_gpus))
            for rank, node in sorted(self._nodes.items())
            if node.used_cores or node.used_gpus
        )

    # -- inside

    def _nodes_for(self, constraint: Constraint) -> tuple[Node, ...]:
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

    def _worst_fit(self, request: Request) -> list[tuple[int, int, Node]]:
        """The usable, eligible nodes with a free core, as a heap: most free cores first, then lowest rank."""
        if request.constraint == ANY_RANK:
            heap = [(-free, rank, self._nodes[rank]) for rank, free in self._free.items()]
        else:
            eligible = ((node.inventory.rank, node) for node in self._nodes_for(request.constraint))
            heap = [(-self._free[rank], rank, node) for rank, node in eligible if rank in self._free]
        heapq.heapify(heap)
        return heap

    def _choose_nodes(self, request: Request) -> list[tuple[Node, int, int]] | None:
        """`nnodes` nodes and what to take of each, as (node, cores, gpus); None when too few have it."""
        each = request.nslots // request.nnodes
        heap = self._worst_fit(request)
        chosen: list[tuple[Node, int, int]] = []
        while heap and len(chosen) < request.nnodes:
            _, _, node = heapq.heappop(heap)
            if node.slots(request, node.free_cores, node.free_gpus) < each:
                continue
            if not request.exclusive:
                chosen.append(_take(node, request, each))
            elif not node.used_cores and not node.used_gpus:
                chosen.append((node, node.cores, node.gpus))
        return chosen if len(chosen) == request.nnodes else None

    def _choose_slots(self, request: Request) -> list[tuple[Node, int, int]] | None:
        """Any nodes that hold `nslots` together, as (node, cores, gpus); None when they cannot."""
        heap = self._worst_fit(request)
        chosen: list[tuple[Node, int, int]] = []
        missing = request.nslots
        while heap and missing:
            _, _, node = heapq.heappop(heap)
            slots = min(missing, node.slots(request, node.free_cores, node.free_gpus))
            if slots:
                chosen.append(_take(node, request, slots))
                missing -= slots
        return None if missing else chosen

    def _located(self, allocation: Allocation, verb: str) -> list[tuple[Node, int, int]]:
        """The nodes and bits of an allocation; raises PoolError for ranks that the pool does not have."""
        located = []
        seen: set[int] = set()
        for share in allocation.shares:
            node = self._nodes.get(share.rank)
            if node is None or share.rank in seen:
                why = "not in the resource pool" if node is None else "named twice"
                raise PoolError(f"cannot {verb} rank {share.rank}: {why}")
            seen.add(share.rank)
            cores = bits_of(share.cores, f"rank {share.rank} cores")
            gpus = bits_of(share.gpus, f"rank {share.rank} gpus")
            located.append((node, cores, gpus))
        return located


def _take(node: Node, request: Request, slots: int) -> tuple[Node, int, int]:
    """The lowest free ids of `node` for so many slots; the caller has seen that they are there."""
    cores = lowest(node.free_cores, slots * request.cores_per_slot)
    return node, cores, lowest(node.free_gpus, slots * request.gpus_per_slot)
