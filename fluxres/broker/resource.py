"""The `resource` service and groups: which ranks there are, what they have, and who is online (RFC 20 R objects)."""

from __future__ import annotations

import errno
import os
from typing import cast

import msgspec

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.broker.config import Resource
from fluxres.job.resources import ResourceSet, Target, from_shares
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.sched.pool import Inventory, Pool
from fluxres.sched.service import Scheduler
from fluxres.wire.payload import WireMap


def local_inventory(rank: int, host: str, settings: Resource) -> Inventory:
    """What this rank has: the cores that this process may run on, unless the configuration says otherwise."""
    cores = IdSet(range(settings.cores)) if settings.cores else IdSet(os.sched_getaffinity(0))
    return Inventory(rank=rank, host=host, cores=cores, gpus=IdSet(range(settings.gpus)))


class _Group(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class ResourceService:
    """Serves `resource.*` and `groups.get` on rank 0."""

    def __init__(self, *, router: Router, pool: Pool, scheduler: Scheduler, size: int) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._size = size
        self.service = Service("resource", router)
        self.service.method("status", self._status)
        self.service.method("sched-status", self._sched_status)
        self.groups = Service("groups", router)
        self.groups.method("get", self._group)

    def _online(self) -> IdSet:
        return IdSet(inventory.rank for inventory in self._pool.inventory())

    def _status(self, request: Request) -> WireMap:
        online = self._online()
        return {
            "R": _encoded(self._all()),
            "drain": {},
            "online": str(online),
            "offline": str(IdSet(range(self._size)) - online),
            "exclude": "",
            "torpid": "",
        }

    def _sched_status(self, request: Request) -> WireMap:
        hosts = {inventory.rank: inventory.host for inventory in self._pool.inventory()}
        everything = self._all()
        return {
            "all": _encoded(everything),
            "down": _encoded(everything.only(self._pool.unusable_ranks())),
            "allocated": _encoded(from_shares(self._pool.allocated(), hosts)),
        }

    def _group(self, request: Request) -> WireMap:
        name = request.parse(_Group).name
        if name != "broker.online":
            raise RpcError(errno.ENOENT, f"there is no group {name!r}")
        return {"members": str(self._online())}

    def _all(self) -> ResourceSet:
        return ResourceSet(
            targets=tuple(Target(rank=i.rank, host=i.host, cores=i.cores, gpus=i.gpus) for i in self._pool.inventory())
        )


def _encoded(resources: ResourceSet) -> WireMap:
    return cast("WireMap", resources.encode())
