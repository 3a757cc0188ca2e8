"""One rank of the resource pool: what it has, and what of it is free. Ids are bits of integers here. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fluxres.base.idset import IdSet

if TYPE_CHECKING:
    from fluxres.sched.request import Request

MAX_LOCAL_ID: Final = (1 << 16) - 1
"""The largest core or GPU id of one rank: an id is a bit of an integer here."""
NO_IDS: Final = IdSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What one rank has: `cores` and `gpus` are its logical ids; `properties` as RFC 20 has them."""

    rank: int
    host: str
    cores: IdSet
    gpus: IdSet = NO_IDS
    properties: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How much of one rank is in use. What jobs hold of what it no longer has counts as used."""

    cores: int
    cores_used: int
    gpus: int
    gpus_used: int
    torpid: bool
    usable: bool
    """Whether it is given to jobs: it is up, not drained and not torpid."""

    @property
    def cores_idle(self) -> int:
        """Cores that no job holds."""
        return max(0, self.cores - self.cores_used)

    @property
    def gpus_idle(self) -> int:
        """GPUs that no job holds."""
        return max(0, self.gpus - self.gpus_used)


class Node:
    """One rank of the pool; ids are bits. Free ones are always among its own, used ones need not be."""

    __slots__ = ("cores", "free_cores", "free_gpus", "gpus", "inventory", "used_cores", "used_gpus")

    def __init__(self, inventory: Inventory) -> None:
        self.used_cores = self.used_gpus = 0
        self.define(inventory)

    def define(self, inventory: Inventory) -> None:
        """What the rank has now; what is in use stays so."""
        cores = bits_of(inventory.cores, f"rank {inventory.rank} cores")
        gpus = bits_of(inventory.gpus, f"rank {inventory.rank} gpus")
        self.inventory, self.cores, self.gpus = inventory, cores, gpus
        self.use(0, 0)

    def use(self, cores: int, gpus: int) -> None:
        """These are in use."""
        self.used_cores |= cores
        self.used_gpus |= gpus
        self.free_cores = self.cores & ~self.used_cores
        self.free_gpus = self.gpus & ~self.used_gpus

    def give_back(self, cores: int, gpus: int) -> None:
        """These are no longer in use."""
        self.used_cores &= ~cores
        self.used_gpus &= ~gpus
        self.use(0, 0)

    def slots(self, request: Request, cores: int, gpus: int) -> int:
        """How many of the request's slots these cores and GPUs hold."""
        slots = cores.bit_count() // request.cores_per_slot
        if request.gpus_per_slot:
            slots = min(slots, gpus.bit_count() // request.gpus_per_slot)
        return slots


def lowest(bits: int, count: int) -> int:
    """The `count` lowest bits that are set in `bits`."""
    taken = 0
    for _ in range(count):
        bit = bits & -bits
        taken |= bit
        bits ^= bit
    return taken


def bits_of(ids: IdSet, what: str) -> int:
    """The ids as bits; raises ValueError naming `what` when one is too large."""
    bits = 0
    for low, high in ids.ranges():
        if high > MAX_LOCAL_ID:
            raise ValueError(f"cannot use {what}: {high} is above the largest id {MAX_LOCAL_ID}")
        bits |= ((1 << (high - low + 1)) - 1) << low
    return bits


def ids_of(bits: int) -> IdSet:
    """The ids that these bits stand for."""
    ids = []
    while bits:
        bit = bits & -bits
        ids.append(bit.bit_length() - 1)
        bits ^= bit
    return IdSet(ids)


def shown(cores: int, gpus: int) -> str:
    """Cores and GPUs for an error text, as `core0-3,gpu1`."""
    parts = [f"{name}{ids_of(bits)}" for name, bits in (("core", cores), ("gpu", gpus)) if bits]
    return ",".join(parts)
