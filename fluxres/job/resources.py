"""R, the resource set of RFC 20 version 1, and how tasks are laid out on it (RFC 34).

`ResourceSet` is what a job has: its execution targets (ranks) with their cores and GPUs, hosts, and the
time it is valid. It is made from the scheduler's allocation, committed as JSON, and read back after a
restart, where `allocation()` says what to claim. Reading is strict: a wrong R is refused with the key.

Tasks are laid out in blocks: ranks in ascending order, each with consecutive task ids. How many a rank
gets is dealt out one at a time, in turn, while it has slots: 5 tasks on 4 nodes of 2 slots are 2,1,1,1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Final

import msgspec

from fluxres.base.errors import FluxresError
from fluxres.base.hostlist import Hostlist
from fluxres.base.idset import IdSet
from fluxres.sched.pool import NO_IDS, Allocation, Inventory, Share

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue

R_VERSION: Final = 1

MAX_TARGETS: Final = 1 << 16
"""The most ranks in one R."""


class ResourceSetError(FluxresError):
    """R is not what RFC 20 says, or does not hold what is to be laid out on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One execution target: a rank, its host, and what R has of it."""

    rank: int
    host: str
    cores: IdSet
    gpus: IdSet = NO_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSet:
    """An R: targets in ascending order of rank. Times are in seconds since the epoch, 0 for unset.

    `nslots` is 0 where R is no allocation. `properties` maps a property's name to the ranks that have it.
    """

    targets: tuple[Target, ...]
    nslots: int = 0
    properties: Mapping[str, IdSet] | None = None
    starttime: float = 0.0
    expiration: float = 0.0

    def ranks(self) -> IdSet:
        """The ranks of all targets."""
        return IdSet(target.rank for target in self.targets)

    def hosts(self) -> Hostlist:
        """The hosts of all targets, by rank."""
        return Hostlist(target.host for target in self.targets)

    def ncores(self) -> int:
        """How many cores it has in all."""
        return sum(len(target.cores) for target in self.targets)

    def target(self, rank: int) -> Target:
        """The target of one rank; raises KeyError when R does not have it."""
        for target in self.targets:
            if target.rank == rank:
                return target
        raise KeyError(rank)

    def only(self, ranks: IdSet) -> ResourceSet:
        """The part of it on `ranks`."""
        return replace(self, targets=tuple(t for t in self.targets if t.rank in ranks))

    def allocation(self) -> Allocation:
        """What the scheduler holds for it, to claim or to release."""
        shares = tuple(Share(rank=t.rank, cores=t.cores, gpus=t.gpus) for t in self.targets)
        return Allocation(shares=shares, nslots=max(1, self.nslots))

    def inventory(self) -> Iterator[Inventory]:
        """What the pool holds when this R describes the instance."""
        for t in self.targets:
            having = frozenset(name for name, ranks in (self.properties or {}).items() if t.rank in ranks)
            yield Inventory(rank=t.rank, host=t.host, cores=t.cores, gpus=t.gpus, properties=having)

    def encode(self) -> JsonObject:
        """R as JSON, neighbouring ranks with the same resources in one R_lite entry."""
        execution: JsonObject = {
            "R_lite": list(_r_lite(self.targets)),
            "starttime": self.starttime,
            "expiration": self.expiration,
            "nodelist": [str(self.hosts())] if self.targets else [],
        }
        if self.nslots:
            execution["nslots"] = self.nslots
        if self.properties:
            execution["properties"] = {name: str(ranks) for name, ranks in self.properties.items()}
        return {"version": R_VERSION, "execution": execution}


def from_shares(
    shares: Iterable[Share],
    hosts: Mapping[int, str],
    *,
    nslots: int = 0,
    starttime: float = 0.0,
    expiration: float = 0.0,
) -> ResourceSet:
    """The R of these shares of the pool; `hosts` names the host of each rank, else KeyError."""
    targets = (Target(rank=s.rank, host=hosts[s.rank], cores=s.cores, gpus=s.gpus) for s in shares)
    return ResourceSet(
        targets=tuple(sorted(targets, key=lambda target: target.rank)),
        nslots=nslots,
        starttime=starttime,
        expiration=expiration,
    )


def from_allocation(
    allocation: Allocation, hosts: Mapping[int, str], *, starttime: float, duration: float
) -> ResourceSet:
    """The R of a job that gets `allocation` at `starttime`, for `duration` seconds (0: without end)."""
    expiration = starttime + duration if duration else 0.0
    return from_shares(allocation.shares, hosts, nslots=allocation.nslots, starttime=starttime, expiration=expiration)


# -- reading R


class _Children(msgspec.Struct, frozen=True):
    core: str
    gpu: str = ""


class _RLite(msgspec.Struct, frozen=True):
    rank: str
    children: _Children


class _Execution(msgspec.Struct, frozen=True):
    R_lite: list[_RLite]
    nodelist: list[str]
    nslots: int = 0
    properties: dict[str, str] = {}
    starttime: float = 0.0
    expiration: float = 0.0


class _R(msgspec.Struct, frozen=True):
    version: int
    execution: _Execution


def parse_r(value: JsonValue) -> ResourceSet:
    """Read R from JSON; raises ResourceSetError naming the key that is wrong."""
    try:
        r = msgspec.convert(value, _R)
    except msgspec.ValidationError as error:
        raise ResourceSetError(f"cannot read R: {error}") from error
    if r.version != R_VERSION:
        raise ResourceSetError(f"cannot read R: version: expected {R_VERSION}, got {r.version}")
    execution = r.execution
    if execution.starttime and 0 < execution.expiration <= execution.starttime:
        raise ResourceSetError(f"cannot read R: expiration {execution.expiration} is not after the start time")
    properties = {name: _ids(text, f"properties.{name}") for name, text in execution.properties.items()}
    return ResourceSet(
        targets=_targets(execution),
        nslots=execution.nslots,
        properties=properties or None,
        starttime=execution.starttime,
        expiration=execution.expiration,
    )


def _targets(execution: _Execution) -> tuple[Target, ...]:
    """The targets of R_lite by rank, each with its host."""
    resources: dict[int, tuple[IdSet, IdSet]] = {}
    for index, entry in enumerate(execution.R_lite):
        path = f"R_lite[{index}]"
        both = (
            _ids(entry.children.core, f"{path}.children.core"),
            _ids(entry.children.gpu, f"{path}.children.gpu"),
        )
        for rank in _ids(entry.rank, f"{path}.rank"):
            if rank in resources:
                raise ResourceSetError(f"cannot read R: {path}.rank: rank {rank} is named twice")
            resources[rank] = both
        if len(resources) > MAX_TARGETS:
            raise ResourceSetError(f"cannot read R: more than {MAX_TARGETS} ranks")
    try:
        hosts = Hostlist.parse(",".join(execution.nodelist))
    except ValueError as error:
        raise ResourceSetError(f"cannot read R: nodelist: {error}") from error
    if len(hosts) != len(resources):
        raise ResourceSetError(f"cannot read R: nodelist: {len(hosts)} hosts for {len(resources)} ranks")
    return tuple(
        Target(rank=rank, host=host, cores=resources[rank][0], gpus=resources[rank][1])
        for rank, host in zip(sorted(resources), hosts, strict=True)
    )


def _ids(text: str, path: str) -> IdSet:
    try:
        return IdSet.parse(text)
    except ValueError as error:
        raise ResourceSetError(f"cannot read R: {path}: {error}") from error


def _r_lite(targets: Sequence[Target]) -> Iterator[JsonObject]:
    for (cores, gpus), group in groupby(targets, key=lambda target: (target.cores, target.gpus)):
        children: JsonObject = {"core": str(cores)}
        if gpus:
            children["gpu"] = str(gpus)
        yield {"rank": str(IdSet(target.rank for target in group)), "children": children}


# -- laying out tasks


@dataclass(frozen=True, slots=True)
class TaskRange:
    """The tasks of one rank: `count` of them, with ids from `first` on."""

    rank: int
    first: int
    count: int


def slots_per_target(r: ResourceSet, cores_per_slot: int, gpus_per_slot: int) -> list[int]:
    """How many slots each target holds, in order of rank."""
    slots = [len(target.cores) // cores_per_slot for target in r.targets]
    if gpus_per_slot:
        slots = [min(n, len(t.gpus) // gpus_per_slot) for n, t in zip(slots, r.targets, strict=True)]
    return slots


def deal(ntasks: int, slots: Sequence[int]) -> list[int]:
    """How many of `ntasks` each place gets, dealt out one at a time while it has slots.

    Raises ResourceSetError when there are fewer slots than tasks.
    """
    if sum(slots) < ntasks:
        raise ResourceSetError(f"cannot lay out {ntasks} tasks: R has room for {sum(slots)}")
    counts = [0] * len(slots)
    missing = ntasks
    while missing:
        open_places = [i for i, slot in enumerate(slots) if slot > counts[i]]
        room = min(slots[i] - counts[i] for i in open_places)
        rounds = max(1, min(room, missing // len(open_places)))  # many rounds at once: ntasks may be large
        for i in open_places[:missing]:
            counts[i] += rounds
            missing -= rounds
    return counts


def blocks(r: ResourceSet, counts: Sequence[int]) -> tuple[TaskRange, ...]:
    """Consecutive task ids for every rank, `counts` saying how many each has."""
    ranges = []
    first = 0
    for target, count in zip(r.targets, counts, strict=True):
        ranges.append(TaskRange(target.rank, first, count))
        first += count
    return tuple(ranges)


def taskmap(counts: Sequence[int]) -> list[list[int]]:
    """The RFC 34 map of a block layout: [nodeid, nnodes, tasks per node, repeat] for each run of equals."""
    encoded = []
    nodeid = 0
    for count, group in groupby(counts):
        nnodes = len(list(group))
        if count:
            encoded.append([nodeid, nnodes, count, 1])
        nodeid += nnodes
    return encoded
