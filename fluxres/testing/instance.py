"""A whole instance in one process: its nodes, its network, its brokers, and what can be done to them.

    async with Instance(50, fanout=4, seed=1) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("sleep", "10", nodes=3)
        instance.kill(0)
        await instance.restart(0)
        await instance.jobs.wait(jobid)

It needs a run of Trio with `MockClock(autojump_threshold=0)`: times then are virtual, and pass when nothing else can
happen. Brokers run the real code of every room; only the outermost adapters are of `fluxres.testing`. All chance comes
from `seed`, that of Trio's own scheduler excepted.

A broker that hangs (SIGSTOP) is not simulated, as its timers could not be stopped; to others it looks like
`cut([rank], everybody)`, which is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager
from random import Random
from types import TracebackType
from typing import Final

import trio

from fluxres.base.json import JsonValue
from fluxres.broker.config import Config, parse
from fluxres.overlay.topology import Topology
from fluxres.rpc.handle import Handle
from fluxres.testing.jobs import Jobs
from fluxres.testing.log import SimulatedLog
from fluxres.testing.network import Network
from fluxres.testing.process import BrokerProcess
from fluxres.testing.processes import Node
from fluxres.testing.programs import PROGRAMS, Program
from fluxres.testing.store import MemoryStore
from fluxres.testing.timeline import Timeline
from fluxres.testing.world import World
from fluxres.wire.messages import NODEID_ANY
from fluxres.wire.payload import WireMap

TIME_LIMIT: Final = 600.0
"""Seconds of virtual time that a simulation may take. Brokers always have something to do: nothing else ends a wait."""
LOG_TAIL: Final = 200
"""Lines of the log that are printed where something goes wrong."""
CORES: Final = 4
"""Cores of each node, where nothing else is said."""
POWER_OFF: Final = 2.0
"""Seconds that a reboot takes."""


class Instance:
    """An instance of `size` brokers in a `kary:FANOUT` tree, none of which runs yet.

    `latency`, `jitter` (seconds) and `loss` (a probability) are the network's. `settings` are tables of the
    configuration; `log_level` is what the brokers' log takes. `time_limit` is in seconds of virtual time.
    """

    def __init__(
        self,
        size: int,
        *,
        fanout: int = 32,
        seed: int = 0,
        latency: float = 0.0005,
        jitter: float = 0.0,
        loss: float = 0.0,
        cores: int = CORES,
        settings: Mapping[str, JsonValue] | None = None,
        log_level: int = logging.INFO,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        tables: dict[str, JsonValue] = {
            "bootstrap": {"size": size, "fanout": fanout},
            "resource": {"cores": cores},
            **(settings or {}),
        }
        self.size = size
        self.seed = seed
        self.config: Config = parse(tables, "of the simulation")
        self.topology: Topology = self.config.topology()
        self.programs: dict[str, Program] = dict(PROGRAMS)
        """What tasks can run, by the first word of their command; to be added to."""
        self.store = MemoryStore()
        self.timeline = Timeline()
        self.network = Network(self.timeline, Random(f"network {seed}"), latency=latency, jitter=jitter, loss=loss)
        self.jobs = Jobs(self)
        self.processes: dict[int, BrokerProcess] = {}
        """The process of each rank that has one, or had one last."""
        self.nodes: list[Node] = []
        self._lives = 0
        self._restart_after: float | None = None
        self._opened: dict[int, int] = {}
        """The ranks that take clients, each with a number that tells in which order they began to."""
        self._openings = 0
        self._changed = trio.Event()
        self._level = log_level
        self._time_limit = time_limit
        self._stack = ExitStack()
        self._manager = trio.open_nursery()

    async def __aenter__(self) -> Instance:
        self._nursery = await self._manager.__aenter__()
        self.world = World(timeline=self.timeline, nursery=self._nursery, random=Random(f"world {self.seed}"))
        self.log = SimulatedLog(self.world.now)
        self._stack.enter_context(self.log.listening(self._level))
        self.nodes = [Node(self.world, rank, self.programs) for rank in range(self.size)]
        await self._nursery.start(self.timeline.run)
        self._nursery.start_soon(self._watch)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Kill everything. Raises AssertionError for tracebacks in the log."""
        if error is not None:
            print("\n".join(self.log.lines[-LOG_TAIL:]), file=sys.stderr)
        for process in self.processes.values():
            process.kill()
        self._nursery.cancel_scope.cancel()
        # An error of the block leaves it as it is; one in the background, which cancels the block, in a group.
        ours = error is None or (isinstance(error, Exception) and not isinstance(error, BaseExceptionGroup))
        try:
            if ours:
                await self._manager.__aexit__(None, None, None)
            elif await self._manager.__aexit__(kind, error, trace):
                return True
        finally:
            self._stack.close()
            self.store.close()
        if error is None and self.log.bugs:
            raise AssertionError("the log has tracebacks:\n" + "\n".join(self.log.bugs))
        return None

    async def _watch(self) -> None:
        await trio.sleep(self._time_limit)
        raise trio.TooSlowError(f"the simulation has not ended within {self._time_limit:g}s of its time")

    # --- brokers

    def launch(self, ranks: Iterable[int] | None = None) -> None:
        """Start the broker processes of these ranks (all, where nothing is said), and do not wait for them."""
        for rank in range(self.size) if ranks is None else ranks:
            if (process := self.processes.get(rank)) is not None and process.alive:
                raise ValueError(f"cannot start rank {rank}: it runs")
            self._lives += 1
            process = self.processes[rank] = BrokerProcess(
                config=self.config,
                topology=self.topology,
                node=self.nodes[rank],
                network=self.network,
                store=self.store,
                logbuffer=self.log,
                random=Random(f"broker {self.seed} {rank} {self._lives}"),
                on_open=self._on_open,
                on_end=self._on_end,
            )
            self._nursery.start_soon(process.run, name=f"rank {rank}")

    async def start(self, ranks: Iterable[int] | None = None) -> None:
        """Start broker processes, and wait until they are online."""
        chosen = list(range(self.size) if ranks is None else ranks)
        self.launch(chosen)
        await self.online(chosen)

    def kill(self, *ranks: int) -> None:
        """SIGKILL to the brokers of these ranks, at the same instant."""
        for rank in ranks:
            self.processes[rank].kill()

    async def restart(self, *ranks: int) -> None:
        """Start brokers that were killed or stopped; does not wait until they are online."""
        for rank in ranks:
            await self.processes[rank].ended.wait()
        self.launch(ranks)

    def supervise(self, seconds: float) -> None:
        """From now on start every broker again, so many seconds after it died, as `fluxres start` and systemd do."""
        self._restart_after = seconds

    def _on_end(self, process: BrokerProcess) -> None:
        def restart() -> None:
            if self.processes[process.rank] is process and not self.network.is_down(process.rank):
                self.launch([process.rank])

        if self._restart_after is not None and process.status is None:
            self.timeline.after(self._restart_after, restart)

    async def stop(self, rank: int) -> int | None:
        """Shut a broker down cleanly; returns its exit status."""
        process = self.processes[rank]
        process.loop.shutdown.set()
        await process.ended.wait()
        return process.status

    async def reboot(self, rank: int, seconds: float = POWER_OFF) -> None:
        """The node of `rank` loses its power, and is up again after so many seconds, without a broker."""
        self.network.power_off(rank)
        if (process := self.processes.get(rank)) is not None:
            process.lose_power()
        self.nodes[rank].lose_power()
        await trio.sleep(seconds)
        self.network.power_on(rank)
        self.nodes[rank].boot()

    # --- the network

    def cut(self, some: Iterable[int], others: Iterable[int] | None = None, *, one_way: bool = False) -> None:
        """Let nothing through between `some` ranks and `others` (everybody else, where nothing is said)."""
        some = list(some)
        rest = [rank for rank in range(self.size) if rank not in some] if others is None else others
        self.network.cut(some, rest, one_way=one_way)

    def heal(self) -> None:
        """Let everything through again."""
        self.network.heal()

    # --- who is there

    def uuids(self) -> dict[int, str]:
        """The incarnation of every rank that has a process."""
        return {rank: process.uuid for rank, process in self.processes.items() if process.alive}

    def is_online(self, rank: int) -> bool:
        """Whether a rank and all above it are online, each having joined after the one above it."""
        own = self._opened.get(rank)
        while own is not None and rank:
            rank = self.topology.parents[rank]
            above = self._opened.get(rank)
            if above is None or above > own:
                return False
            own = above
        return own is not None

    async def online(self, ranks: Iterable[int] | None = None) -> None:
        """Return as soon as these ranks (all, where nothing is said) are online."""
        wanted = list(range(self.size) if ranks is None else ranks)
        await trio.lowlevel.checkpoint()
        while len(self._opened) < len(wanted) or not all(map(self.is_online, wanted)):
            await self._changed.wait()

    def _on_open(self, rank: int, is_open: bool) -> None:
        if is_open:
            self._openings += 1
            self._opened[rank] = self._openings
        else:
            self._opened.pop(rank, None)
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def client(self, rank: int = 0) -> AsyncIterator[Handle]:
        """A client of a rank, as the instance owner, as soon as that is online.

        When the broker dies, or panics, its calls end with RpcError ECONNRESET.
        """
        await trio.lowlevel.checkpoint()
        while (process := self.processes.get(rank)) is None or process.clients is None:
            await self._changed.wait()
        handle = process.clients.connect()
        try:
            yield handle
        finally:
            handle.close()

    async def call(
        self, topic: str, payload: WireMap | None = None, *, rank: int = 0, nodeid: int | None = None
    ) -> WireMap:
        """One call by a client of `rank`, as soon as that is online. Raises RpcError."""
        async with self.client(rank) as handle:
            return await handle.call(topic, payload, nodeid=NODEID_ANY if nodeid is None else nodeid)
