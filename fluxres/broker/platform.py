"""The world around a broker: its clock, chance, network, store, processes and clients.

An incarnation runs the same code whatever is behind this. `LocalPlatform` is a node of Linux; `fluxres.testing` has
another, in which thousands of brokers live in one process on a virtual clock.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fluxres.base.idset import IdSet
from fluxres.broker.cgroups import parent_cgroup, remove_parent
from fluxres.broker.config import Config
from fluxres.broker.connector import Connector
from fluxres.broker.statedir import Statedir
from fluxres.exec.host import ShellHost
from fluxres.exec.launcher import Launcher
from fluxres.exec.shelldir import LocalShellHost
from fluxres.exec.spec import LocalSettings
from fluxres.overlay.sockets import SocketTransport
from fluxres.overlay.transport import Transport
from fluxres.rpc.router import Router
from fluxres.sched.node import Inventory
from fluxres.status.endpoint import Endpoint

if TYPE_CHECKING:
    from fluxres.kvs.kvs import Kvs

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
STATUS_PORT: Final = "status-port"
"""The file in the statedir that keeps the port of the status endpoint."""

Scrape = Callable[[str], tuple[bytes, str]]
"""Makes the metrics for an `Accept` header: the body, and its content type."""


class Clients(Protocol):
    """How local clients reach the broker."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients until cancelled."""

    def remove(self) -> None:
        """The broker is shut down, and no other incarnation follows."""


class Platform(Protocol):
    """What an incarnation needs of the world."""

    @property
    def random(self) -> Random:
        """Chance, for back-off."""

    @property
    def transport(self) -> Transport:
        """The way to other brokers."""

    @property
    def host(self) -> str:
        """The name of this node."""

    @property
    def boot_id(self) -> str:
        """Names the life of this node's kernel."""

    @property
    def pid(self) -> int:
        """The broker's process."""

    def now(self) -> float:
        """Seconds since 1970."""

    def open_store(self) -> AbstractAsyncContextManager[Kvs]:
        """The store of rank 0."""

    def inventory(self) -> Inventory:
        """What this rank has."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own what outlives incarnations, until cancelled; shells outlive that too."""

    def shells(self, instance: str) -> tuple[ShellHost, LocalSettings]:
        """Where shells live, and what their specs lack."""

    def clients(self, router: Router) -> Clients:
        """The local connector."""

    def endpoint(self, scrape: Scrape) -> Endpoint | None:
        """Where the status of this process is served; None for nowhere. `scrape` makes the metrics."""

    def clean_up(self) -> None:
        """The broker is shut down: leave nothing behind that nobody needs."""


class LocalPlatform:
    """A node of Linux, and the files of one rank on it."""

    def __init__(self, config: Config, rank: int, statedir: Statedir) -> None:
        self._config = config
        self._rank = rank
        self._statedir = statedir
        self._launcher = Launcher()
        self.random = Random()
        self.host = config.host_of(rank) or socket.gethostname()
        self.boot_id = Path(BOOT_ID).read_text(encoding="ascii").strip()
        self.pid = os.getpid()
        self.now: Callable[[], float] = time.time
        self.transport = SocketTransport(config.addresses(), rank=rank)
        self.socket = os.path.join(os.path.abspath(config.broker.rundir), f"local-{rank}")

    def open_store(self) -> AbstractAsyncContextManager[Kvs]:
        """SQLite in the statedir."""
        from fluxres.kvs.kvs import Kvs  # only rank 0 needs it, and all of them are to start fast

        return Kvs.open(Path(self._statedir.store), owner=os.getuid())

    def inventory(self) -> Inventory:
        """The cores that this process may run on, unless the configuration says otherwise."""
        settings = self._config.resource
        cores = IdSet(range(settings.cores)) if settings.cores else IdSet(os.sched_getaffinity(0))
        return Inventory(rank=self._rank, host=self.host, cores=cores, gpus=IdSet(range(settings.gpus)))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the launcher: starting another takes longer than everything else after a panic."""
        await self._launcher.run(task_status)

    def shells(self, instance: str) -> tuple[ShellHost, LocalSettings]:
        """Real processes, started by the launcher, in cgroups where there are any."""
        table = self._config.exec
        self._launcher.cgroup = parent_cgroup(table.cgroup, f"fluxres-{instance[:8]}-{self._rank}")
        settings = LocalSettings(
            uri=f"local://{self.socket}",
            tmpdir_base=table.tmpdir,
            cgroup_parent=self._launcher.cgroup,
            bind=self._config.resource.cores is None,
            journal_limit=table.journal_limit,
            segment_size=table.segment_size,
        )
        return LocalShellHost(self._statedir.path, self._rank, self._launcher), settings

    def clients(self, router: Router) -> Connector:
        """A Unix socket in the rundir."""
        guests = self._config.access.allow_guest_user
        return Connector(self.socket, router, owner=os.getuid(), guests=guests)

    def endpoint(self, scrape: Scrape) -> Endpoint | None:
        """As `[status]` says; a port that was chosen is kept in the statedir."""
        settings = self._config.status_settings()
        if not settings.serves(self._rank):
            return None
        return Endpoint(
            settings,
            rank=self._rank,
            owner=os.getuid(),
            port_file=Path(self._statedir.path) / STATUS_PORT,
            scrape=scrape,
        )

    def clean_up(self) -> None:
        """Remove the socket for children, and the cgroup unless shells live in it."""
        self.transport.remove()
        remove_parent(self._launcher.cgroup)
