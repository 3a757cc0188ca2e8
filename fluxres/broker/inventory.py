"""What every rank ever seen has: one durable record each, `resource.rank.<N>` in the KVS.

They are what a restart of rank 0 builds the resource pool from, so that what jobs hold on ranks that are away can be
claimed; and they say by which statedir a rank was last known. A rank that joins with something else replaces its
record, durably, before it may be given jobs.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable, KeysView
from typing import Final

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.base.hostlist import Hostlist
from fluxres.base.idset import IdSet
from fluxres.exec.ranks import Presence
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY
from fluxres.overlay.topology import MAX_SIZE
from fluxres.sched.node import MAX_LOCAL_ID
from fluxres.sched.pool import Inventory

log = logging.getLogger("fluxres.resource")

RANK_DIR: Final = "resource.rank"
"""The directory of the records, in the primary namespace."""
LOAD_CHUNK: Final = 256
"""Records that are read before other tasks get their turn."""
_LIKE_IDSET: Final = re.compile(r"[-\d,\[\]]+")
"""What is meant to be an idset, though it may be none: hosts have names."""
UNKNOWN_HOST: Final = "(unknown)"
"""Stands in lists of hosts for a rank that was never seen."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank has, the id of its statedir, and the boot that it was last seen in (empty: not known).

    `cores` and `gpus` are idsets as text.
    """

    host: str
    cores: str
    gpus: str
    properties: tuple[str, ...]
    statedir: str
    boot_id: str = ""

    def inventory(self, rank: int) -> Inventory:
        """As the pool takes it; raises ValueError for what is malformed."""
        cores, gpus = IdSet.parse(self.cores), IdSet.parse(self.gpus)
        for name, ids in (("core", cores), ("gpu", gpus)):
            if any(high > MAX_LOCAL_ID for _, high in ids.ranges()):
                raise ValueError(f"cannot use {name} ids {ids}: the largest id is {MAX_LOCAL_ID}")
        Hostlist([self.host])
        return Inventory(rank=rank, host=self.host, cores=cores, gpus=gpus, properties=frozenset(self.properties))


def record_of(presence: Presence) -> Record:
    """The record of a rank that joins; raises ValueError for what is malformed."""
    record = Record(
        host=presence.host,
        cores=str(IdSet.parse(presence.cores)),
        gpus=str(IdSet.parse(presence.gpus)),
        properties=tuple(sorted(presence.properties)),
        statedir=presence.statedir,
        boot_id=presence.boot_id,
    )
    record.inventory(presence.rank)
    return record


def rank_key(rank: int) -> str:
    """The key of a rank's record."""
    return f"{RANK_DIR}.{rank}"


def changes(old: Record, new: Record) -> str:
    """What is different for jobs, for people: `cores 0-7 became 0-3`; empty where nothing is."""
    pairs = (
        ("host", old.host, new.host),
        ("cores", old.cores, new.cores),
        ("gpus", old.gpus, new.gpus),
        ("properties", ",".join(old.properties), ",".join(new.properties)),
    )
    return ", ".join(f"{what} {was or 'none'} became {now or 'none'}" for what, was, now in pairs if was != now)


class Records:
    """The records of all ranks ever seen, and who is on which host."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._on: dict[str, set[int]] = {}

    def ranks(self) -> KeysView[int]:
        """The ranks that there is a record of."""
        return self._records.keys()

    def get(self, rank: int) -> Record | None:
        """The record of `rank`; None if it was never seen."""
        return self._records.get(rank)

    def put(self, rank: int, record: Record) -> None:
        """Set the record of `rank`."""
        old = self._records.get(rank)
        if old is not None:
            self._on[old.host].discard(rank)
        self._records[rank] = record
        self._on.setdefault(record.host, set()).add(rank)

    def hosts(self, ranks: Iterable[int]) -> Hostlist:
        """The hosts of these ranks, in their order."""
        records = (self._records.get(rank) for rank in ranks)
        return Hostlist(UNKNOWN_HOST if record is None else record.host for record in records)

    def resolve(self, targets: str, size: int) -> IdSet:
        """The ranks that `targets` names: an idset, or a hostlist, each host of which means all ranks on it.

        Raises RpcError EINVAL where it is neither, names nobody, or somebody who is not there.
        """
        try:
            ranks = IdSet.parse(targets)
        except ValueError as error:
            if _LIKE_IDSET.fullmatch(targets):
                raise RpcError(errno.EINVAL, str(error)) from error
            ranks = self._by_host(targets)
        if not ranks:
            raise RpcError(errno.EINVAL, "no targets are named: an idset of ranks or a hostlist is needed")
        above = IdSet(rank for rank in ranks if rank >= size)
        if above:
            raise RpcError(errno.EINVAL, f"there is no rank {above}: the instance has {size} ranks, from 0 on")
        return ranks

    def _by_host(self, targets: str) -> IdSet:
        try:
            hosts = Hostlist.parse(targets)
        except ValueError as error:
            raise RpcError(errno.EINVAL, f"{targets!r:.100} is neither an idset of ranks nor a hostlist") from error
        unknown = [host for host in hosts if not self._on.get(host)]
        if unknown:
            raise RpcError(errno.EINVAL, f"no rank is known to be on host {Hostlist(unknown)}")
        return IdSet({rank for host in hosts for rank in self._on[host]})


async def load_records(kvs: Kvs) -> tuple[Records, dict[int, str]]:
    """Read all records; and for the ranks whose record cannot be read, why."""
    records = Records()
    unreadable: dict[int, str] = {}
    for index, name in enumerate(kvs.list_range(PRIMARY, RANK_DIR, limit=MAX_SIZE)):
        if index % LOAD_CHUNK == 0:
            await trio.lowlevel.checkpoint()
        rank = int(name)
        try:
            record = msgspec.json.decode(kvs.get(PRIMARY, rank_key(rank)) or b"", type=Record)
            record.inventory(rank)
        except ValueError as error:
            log.error("cannot read %s: %s", rank_key(rank), error)
            unreadable[rank] = str(error)
        else:
            records.put(rank, record)
    return records, unreadable
