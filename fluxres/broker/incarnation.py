"""One incarnation of a broker: a UUID, a nursery, and the services that live in it.

    incarnation nursery
    ├─ kvs writer, launcher, stall meter
    ├─ services: attr, log, broker, state-machine, kvs, job-*, exec, resource, groups
    └─ local connector: one nursery a client

Whatever ends it ends all of it: leaving the nursery undoes what a panic must undo. A crash of anything in here is a
panic to the loop in `broker.main`, which begins the next incarnation on the same statedir.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fluxres import __version__
from fluxres.broker.attributes import Attributes
from fluxres.broker.cgroups import remove_parent
from fluxres.broker.config import Config
from fluxres.broker.connector import Connector
from fluxres.broker.health import StallMeter
from fluxres.broker.leader import Leader
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.selfservice import SelfService
from fluxres.broker.statedir import Identity, Statedir
from fluxres.exec.launcher import Launcher
from fluxres.exec.shells import Shells
from fluxres.kvs.kvs import Kvs
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service

log = logging.getLogger("fluxres.broker")

CANCEL_GRACE: Final = 20.0
"""Seconds that the jobs of a temporary instance have to end at shutdown."""


class Incarnation:
    """One life of the broker of rank `rank`. `online` is called when it takes requests and schedules."""

    def __init__(
        self,
        *,
        config: Config,
        rank: int,
        statedir: Statedir,
        identity: Identity,
        logbuffer: LogBuffer,
        shutdown: trio.Event,
        online: Callable[[], None],
    ) -> None:
        self.uuid = str(uuid.uuid4())
        self._config = config
        self._rank = rank
        self._statedir = statedir
        self._identity = identity
        self._shutdown = shutdown
        self._online = online
        self._owner = os.getuid()
        self._started = time.time()
        self._socket = os.path.join(os.path.abspath(config.broker.rundir), f"local-{rank}")
        self._stalls = StallMeter()
        self._services: list[Service] = []
        self.router = Router(rank=rank, size=config.bootstrap.size)
        self.handle = Handle(self.router, "broker", self._owner)
        self._self = SelfService(
            router=self.router,
            rank=rank,
            uuid=self.uuid,
            services=self._services,
            stalls=self._stalls,
            logbuffer=logbuffer,
            shutdown=shutdown,
        )

    async def run(self) -> None:
        """Live until shut down. Raises an exception group of whatever else ended it."""
        async with Kvs.open(Path(self._statedir.store), owner=self._owner) as kvs, trio.open_nursery() as kvs_scope:
            await kvs_scope.start(kvs.run)
            async with trio.open_nursery() as services:
                leader = await Leader.load(
                    config=self._config,
                    router=self.router,
                    handle=self.handle,
                    kvs=kvs,
                    identity=self._identity,
                    uri=f"local://{self._socket}",
                )
                connector = await self._bring_up(leader, services)
                await self._shutdown.wait()
                self._self.state = "shutdown"
                if self._config.broker.temporary:
                    await leader.cancel_all(CANCEL_GRACE)
                services.cancel_scope.cancel()
            kvs_scope.cancel_scope.cancel()
        connector.remove()
        remove_parent(leader.cgroup)

    async def _bring_up(self, leader: Leader, nursery: trio.Nursery) -> Connector:
        """Start everything, in the order in which it needs each other; requests are taken last."""
        launcher = Launcher(leader.cgroup)
        shells = Shells(
            router=self.router,
            handle=self.handle,
            launcher=launcher,
            statedir=self._statedir.path,
            statedir_id=self._identity.id,
            instance=self._identity.instance,
        )
        attributes = Attributes(self.router, self._attributes())
        for service in (*self._self.all, attributes.service, *leader.services):
            self._services.append(service)
            await nursery.start(service.run, name=f"service {service.name}")
        self._services.append(shells.service)
        await nursery.start(launcher.run)
        await nursery.start(shells.run)
        await nursery.start(leader.manager.run)
        leader.take_up()
        await shells.report()
        nursery.start_soon(self._stalls.run, name="stall meter")
        guests = self._config.access.allow_guest_user
        connector = Connector(self._socket, self.router, owner=self._owner, guests=guests)
        await nursery.start(connector.run)
        self._self.state = "run"
        log.info(
            "rank %d online: incarnation %d, %d jobs active, %d quarantined",
            self._rank,
            self._identity.incarnations,
            len(leader.replayed.jobs),
            len(leader.replayed.quarantined),
        )
        self._online()
        return connector

    def _attributes(self) -> dict[str, Callable[[], str]]:
        fixed = {
            "rank": str(self._rank),
            "size": str(self._config.bootstrap.size),
            "hostname": socket.gethostname(),
            "hostlist": socket.gethostname(),
            "uuid": self.uuid,
            "broker.pid": str(os.getpid()),
            "broker.boot-count": str(self._identity.incarnations),
            "broker.starttime": f"{self._started:.6f}",
            "tbon.topo": f"kary:{self._config.bootstrap.fanout}",
            "tbon.level": "0",
            "tbon.parent": "",
            "statedir": self._statedir.path,
            "rundir": os.path.dirname(self._socket),
            "local-uri": f"local://{self._socket}",
            "version": __version__,
            "instance-id": self._identity.instance,
            "instance-level": "0",
            "security.owner": str(self._owner),
        }
        attributes = {name: partial(str, value) for name, value in fixed.items()}
        return {**attributes, "rpc.tracked": lambda: str(len(self.router.tracker))}
