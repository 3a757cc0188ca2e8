"""One incarnation of a broker: a UUID, a nursery, and the services that live in it.

    incarnation nursery
    ├─ overlay: upstream link, a subtree scope for each child, heartbeat
    ├─ rank 0: the store's writer; kvs, job-*, resource, groups (`broker.leader`)
    ├─ every rank: attr, broker, event, exec, log, overlay, rexec, state-machine; stall meter
    ├─ presence: what rank 0 knows us by
    └─ local connector: one nursery a client

Whatever ends it ends all of it: leaving the nursery undoes what a panic must undo. A crash of anything in here, or the
loss of the parent, is a panic to the loop in `broker.loop`, which begins the next incarnation on the same statedir.

    join --parent says welcome--> init --services up, rank 0 knows us--> run --asked to--> shutdown
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from fluxres import __version__
from fluxres.base.idset import IdSet
from fluxres.broker import presence
from fluxres.broker.about import Facts, attributes
from fluxres.broker.attributes import Attributes
from fluxres.broker.config import Config
from fluxres.broker.health import StallMeter
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.platform import Clients, Platform
from fluxres.broker.rexec import Rexec
from fluxres.broker.selfservice import SelfService
from fluxres.broker.statedir import Identities, Identity
from fluxres.broker.watched import Watched
from fluxres.exec.shells import Shells
from fluxres.overlay.hello import PROTOCOL, Hello
from fluxres.overlay.overlay import Overlay
from fluxres.overlay.service import OverlayService
from fluxres.overlay.topology import Topology
from fluxres.rpc.events import Events
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service
from fluxres.status.board import Boards
from fluxres.status.endpoint import Attached, Endpoint
from fluxres.status.facts import BrokerFacts
from fluxres.status.mirror import Mirror

if TYPE_CHECKING:
    from fluxres.broker.leader import Leader
    from fluxres.kvs.kvs import Kvs

log = logging.getLogger("fluxres.broker")

CANCEL_GRACE: Final = 20.0
"""Seconds that the jobs of a temporary instance have to end at shutdown."""


class Incarnation:
    """One life of the broker of rank `rank`. `online` is called when it takes requests and children.

    `ending` is how the last life of this process ended that was online.
    """

    def __init__(
        self,
        *,
        config: Config,
        rank: int,
        topology: Topology,
        statedir: Identities,
        platform: Platform,
        logbuffer: LogBuffer,
        shutdown: trio.Event,
        online: Callable[[], None],
        watched: Watched,
        ending: presence.Ending | None = None,
    ) -> None:
        self.uuid = str(uuid.UUID(int=platform.random.getrandbits(128), version=4))
        self._config = config
        self._rank = rank
        self._statedir = statedir
        self._platform = platform
        self._identity: Identity = statedir.begin_incarnation(root=rank == 0)
        self._shutdown = shutdown
        self._online = online
        self._watched = watched
        self._ending = ending
        self._logbuffer = logbuffer
        self._started = platform.now()
        self._stalls = StallMeter()
        self._services: list[Service] = []
        self._leader: Leader | None = None
        self._clients: Clients | None = None
        self._ends_all = False
        self.router = Router(rank=rank, size=topology.size)
        self.handle = Handle(self.router, "broker", os.getuid())
        self.overlay = Overlay(
            hello=self._hello(topology),
            topology=topology,
            transport=platform.transport,
            router=self.router,
            settings=config.tbon_settings(),
            random=platform.random,
            torpid=self._torpid,
            shut_down=self._end_all,
        )
        self._self = SelfService(
            router=self.router,
            rank=rank,
            uuid=self.uuid,
            services=self._services,
            stalls=self._stalls,
            logbuffer=logbuffer,
            shutdown=self._end_all,
        )

    def _hello(self, topology: Topology) -> Hello:
        return Hello(
            rank=self._rank,
            uuid=self.uuid,
            protocol=PROTOCOL,
            software=__version__,
            instance=self._identity.instance,
            statedir=self._identity.id,
            incarnation=self._identity.incarnations,
            boot_id=self._platform.boot_id,
            host=self._platform.host,
            size=topology.size,
            topo=topology.digest,
            owner=os.getuid(),
        )

    # --- living

    async def run(self) -> None:
        """Live until shut down. Raises an exception group of whatever else ended it."""
        if self._rank == 0:
            async with self._platform.open_store() as kvs, trio.open_nursery() as store:
                await store.start(kvs.run)
                await self._live(kvs)
                store.cancel_scope.cancel()
        else:
            await self._live(None)

    def clean_up(self) -> None:
        """The broker is shut down, and no incarnation follows: leave nothing behind that nobody needs.

        Also where this incarnation took no clients yet: the socket that they look for may be from the one before it.
        """
        clients = self._clients or self._platform.clients(self.router)
        clients.remove()
        self._platform.clean_up()

    async def _live(self, kvs: Kvs | None) -> None:
        with self._watched.metrics.attached(self._facts()):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._await_shutdown, nursery.cancel_scope, name="shutdown")
                welcome = await nursery.start(self.overlay.run, name="overlay")
                if welcome is not None:
                    self._identity = self._statedir.adopt(self._identity, welcome.instance)
                self._self.state = "init"
                await self._bring_up(kvs, nursery)
                self.overlay.open(self._hello(self.overlay.topology))
                self._self.state = "run"
                self._online()

    async def _await_shutdown(self, scope: trio.CancelScope) -> None:
        """End in good order: the jobs of a temporary instance, the brokers below if all is to end, then ourselves."""
        await self._shutdown.wait()
        self._self.state = "shutdown"
        if self._leader is not None and self._config.broker.temporary:
            await self._leader.cancel_all(CANCEL_GRACE)
        if self._ends_all:
            await self.overlay.end_subtree()
        presence.say_goodbye(self.handle, self._rank, self.uuid)
        self.overlay.leave("it is shut down")
        scope.cancel()

    def _end_all(self) -> None:
        """Shut down, and everything below as well."""
        self._ends_all = True
        self._shutdown.set()

    async def _bring_up(self, kvs: Kvs | None, nursery: trio.Nursery) -> None:
        """Start everything, in the order in which it needs each other; clients are taken last."""
        host, settings = self._platform.shells(self._identity.instance)
        shells = Shells(
            router=self.router,
            handle=self.handle,
            host=host,
            local=settings,
            statedir_id=self._identity.id,
            instance=self._identity.instance,
        )
        events = Events(self.router, self.overlay.forward)
        facts = Facts(
            identity=self._identity,
            started=self._started,
            host=self._platform.host,
            pid=self._platform.pid,
            statedir=self._statedir.path,
        )
        told = attributes(facts, self._config, self.overlay, self.router)
        attrs = Attributes(self.router, {**told, "status.uri": lambda: self._watched.uri})
        rexec = Rexec(router=self.router, uri=settings.uri)
        if kvs is not None:
            from fluxres.broker.leader import Leader  # the largest part of all that is imported, for rank 0 only

            self._leader = await Leader.load(
                config=self._config,
                router=self.router,
                handle=self.handle,
                kvs=kvs,
                overlay=self.overlay,
                identity=self._identity,
                now=self._platform.now,
                log=self._logbuffer,
            )
            self._watched.metrics.lead(self._leader.facts)
        about_tree = OverlayService(self.overlay, self.router).service
        services = (*self._self.all, attrs.service, events.service, about_tree, rexec.service)
        for service in (*services, *(self._leader.services if self._leader else ())):
            self._services.append(service)
            await nursery.start(service.run, name=f"service {service.name}")
        self._services.append(shells.service)
        await nursery.start(shells.run)
        if self._leader is not None:
            await nursery.start(self._leader.run)
        await nursery.start(presence.keep, self.handle, self._presence(), self._ending)
        await shells.report()
        nursery.start_soon(self._stalls.run, name="stall meter")
        if self._watched.endpoint is not None:
            nursery.start_soon(self._show, self._watched.endpoint, name="status")
        self._clients = self._platform.clients(self.router)
        await nursery.start(self._clients.run)
        log.info("rank %d online: incarnation %d, %s", self._rank, self._identity.incarnations, self.uuid)

    def _facts(self) -> BrokerFacts:
        return BrokerFacts(
            router=self.router,
            handle=self.handle,
            overlay=self.overlay,
            services=self._services,
            stalls=self._stalls.late,
            state=lambda: self._self.state,
            instance=lambda: self._identity.instance,
            incarnations=self._identity.incarnations,
            started=self._started,
        )

    async def _show(self, endpoint: Endpoint) -> None:
        """Let people and programs watch, until cancelled: by rank 0's own feed, or by what it tells us."""
        async with trio.open_nursery() as nursery:
            if self._leader is not None:
                boards: Boards = self._leader.feed
            else:
                boards = mirror = Mirror(self.handle)
                await nursery.start(mirror.run)
            shown = Attached(
                rank=self._rank,
                size=self.overlay.topology.size,
                instance=self._identity.instance,
                handle=self.handle,
                boards=boards,
                state=lambda: self._self.state,
            )
            with endpoint.attached(shown):
                await trio.sleep_forever()

    def _presence(self) -> presence.Presence:
        inventory = self._platform.inventory()
        return presence.Presence(
            rank=self._rank,
            uuid=self.uuid,
            host=self._platform.host,
            statedir=self._identity.id,
            incarnation=self._identity.incarnations,
            boot_id=self._platform.boot_id,
            cores=str(inventory.cores),
            gpus=str(inventory.gpus),
            properties=sorted(inventory.properties),
        )

    def _torpid(self, rank: int, torpid: bool) -> None:
        """What is behind a torpid child is no better than the child."""
        below = str(IdSet(self.overlay.topology.subtree(rank)))
        self.handle.send("resource.torpid", {"ranks": below, "torpid": torpid}, nodeid=0)
