"""One life of a broker's process in a simulated instance: the real loop of incarnations in a world of memory.

`kill` is SIGKILL. All its tasks are cancelled, and in the same step it is cut off from the world: its kernel ends its
connections, its shells are detached, its store keeps what was committed, its clients are disconnected. So nothing that
its code does while it unwinds (goodbyes, cancels, answers) is ever seen by anybody.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from random import Random
from typing import Final

import msgspec
import trio

from fluxres.base.idset import IdSet
from fluxres.broker.config import Config
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.loop import BrokerLoop
from fluxres.broker.platform import Clients, Scrape
from fluxres.broker.statedir import Identity
from fluxres.exec.host import ShellHost
from fluxres.exec.spec import LocalSettings
from fluxres.kvs.kvs import Kvs
from fluxres.overlay.topology import Topology
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.sched.pool import Inventory
from fluxres.testing.network import Network, Port
from fluxres.testing.processes import MemoryShellHost, Node
from fluxres.testing.store import MemoryStore

current: Final[ContextVar[BrokerProcess | None]] = ContextVar("current", default=None)
"""The process that a Trio task belongs to; None for the simulation's own."""

OnOpen = Callable[[int, bool], None]
"""Told of a rank that takes clients from now on, or no longer does."""


class BrokerProcess:
    """The broker of one node, from its start to its end.

    `on_open` is told when it comes online, and when that ends; `on_end` when the process has ended.
    """

    def __init__(
        self,
        *,
        config: Config,
        topology: Topology,
        node: Node,
        network: Network,
        store: MemoryStore,
        logbuffer: LogBuffer,
        random: Random,
        on_open: OnOpen,
        on_end: Callable[[BrokerProcess], None],
    ) -> None:
        self.rank = node.rank
        self.node = node
        self.pid = node.world.pid()
        self.alive = True
        self.ended = trio.Event()
        self.status: int | None = None
        """How it ended by itself; None where it runs, or was killed."""
        self.clients: MemoryClients | None = None
        """The local connector of the incarnation that is online."""
        self._port = network.attach(self.rank, connect_timeout=config.tbon_settings().connect_timeout)
        self._store = store
        self._on_open = on_open
        self._on_end = on_end
        self._scope = trio.CancelScope()
        self._shells: MemoryShellHost | None = None
        self._platform = MemoryPlatform(self, config, self._port, random)
        self.loop = BrokerLoop(
            config=config,
            rank=self.rank,
            topology=topology,
            statedir=MemoryStatedir(self),
            platform=self._platform,
            logbuffer=logbuffer,
            notify=lambda _state: None,
        )

    @property
    def uuid(self) -> str:
        """The incarnation that it is, or was last."""
        return "" if self.loop.incarnation is None else self.loop.incarnation.uuid

    async def run(self) -> None:
        """Run to its end."""
        current.set(self)
        try:
            with self._scope:
                self.status = await self.loop.run()
        except* Exception:
            if self.alive:
                raise  # else it unwinds, and nobody is there to hear of it
        finally:
            if self.alive:
                self._leave()
            self.ended.set()
            self._on_end(self)

    def kill(self) -> None:
        """SIGKILL."""
        self._scope.cancel()
        if self.alive:
            self._port.kill()
            self._leave()

    def lose_power(self) -> None:
        """The node has no power any more (`Network.power_off` has seen to the network)."""
        self._scope.cancel()
        if self.alive:
            self._leave()

    def _leave(self) -> None:
        """From here on it is nothing to the world."""
        self.alive = False
        if self._shells is not None:
            self._shells.sever()
        if self.clients is not None:
            self.clients.disconnect()
        if self.rank == 0:
            self._store.crash()
        self._port.kill()

    # --- for its platform

    def new_shells(self) -> MemoryShellHost:
        """The shells, for the next incarnation."""
        self._shells = MemoryShellHost(self.node)
        return self._shells

    def open_store(self) -> AbstractAsyncContextManager[Kvs]:
        """The store of the instance."""
        return self._store.open()

    def opened(self, clients: MemoryClients) -> None:
        """An incarnation takes clients."""
        if self.alive:
            self.clients = clients
            self._on_open(self.rank, True)

    def closed(self, clients: MemoryClients) -> None:
        """It does so no longer."""
        if self.clients is clients:
            self.clients = None
            self._on_open(self.rank, False)


class MemoryPlatform:
    """The world around a simulated broker (`fluxres.broker.platform.Platform`)."""

    def __init__(self, process: BrokerProcess, config: Config, port: Port, random: Random) -> None:
        self._process = process
        self._config = config
        self.random = random
        self.transport = port
        self.host = process.node.host
        self.boot_id = process.node.boot_id
        self.pid = process.pid
        self.now = process.node.world.now

    def open_store(self) -> AbstractAsyncContextManager[Kvs]:
        """The store of rank 0."""
        return self._process.open_store()

    def inventory(self) -> Inventory:
        """As many cores as the configuration says, one where it does not."""
        table = self._config.resource
        cores, gpus = IdSet(range(table.cores or 1)), IdSet(range(table.gpus))
        return Inventory(rank=self._process.rank, host=self.host, cores=cores, gpus=gpus)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """There is nothing to run: the node starts its shells itself."""
        await trio.lowlevel.checkpoint()
        task_status.started()

    def shells(self, instance: str) -> tuple[ShellHost, LocalSettings]:
        """The node's."""
        table = self._config.exec
        settings = LocalSettings(
            uri=f"memory:///{self._process.rank}",
            bind=False,
            journal_limit=table.journal_limit,
            segment_size=table.segment_size,
        )
        return self._process.new_shells(), settings

    def clients(self, router: Router) -> Clients:
        """The simulation's own handles."""
        return MemoryClients(self._process, router)

    def endpoint(self, scrape: Scrape) -> None:
        """A simulation has no browsers."""

    def clean_up(self) -> None:
        """There is nothing to be left behind."""


class MemoryClients:
    """Clients of one incarnation: handles on its router, which end with it."""

    def __init__(self, process: BrokerProcess, router: Router) -> None:
        self._process = process
        self._router = router
        self._handles: dict[Handle, None] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take clients until cancelled."""
        self._process.opened(self)
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.disconnect()

    def connect(self) -> Handle:
        """A client, as the instance owner."""
        handle = Handle(self._router, f"client-{self._process.node.world.pid()}", os.getuid())
        self._handles[handle] = None
        return handle

    def disconnect(self) -> None:
        """All clients lose their connections: who waits for an answer gets ECONNRESET."""
        self._process.closed(self)
        handles, self._handles = self._handles, {}
        for handle in handles:
            handle.close()

    def remove(self) -> None:
        """There is no socket to be removed."""


class MemoryStatedir:
    """The statedir's identity, on the disk of the node (`fluxres.broker.statedir.Identities`)."""

    def __init__(self, process: BrokerProcess) -> None:
        self._process = process
        self.path = f"/simulated/{process.rank}"

    def begin_incarnation(self, *, root: bool) -> Identity:
        """Count one more."""
        node = self._process.node
        old = node.identity
        fresh = Identity(
            id=old.id if old else node.world.uuid(),
            instance=(old.instance if old else "") or (node.world.uuid() if root else ""),
            incarnations=old.incarnations + 1 if old else 1,
            epoch_ms=old.epoch_ms if old else int(node.world.now() * 1000) - 1,
        )
        return self._write(fresh)

    def adopt(self, identity: Identity, instance: str) -> Identity:
        """Belong to an instance."""
        return self._write(msgspec.structs.replace(identity, instance=instance))

    def _write(self, identity: Identity) -> Identity:
        if self._process.alive:
            self._process.node.identity = identity
        return identity
