"""An in-memory network between brokers: connections that behave like TCP's, with latency, loss, cuts and heals.

    the nodes of ranks ── Port: one life of a broker's process on it ── its listener and its end of each connection

Bytes are never lost from a connection, as in TCP: what `loss` takes is sent again after `RETRANSMIT`, and what a cut
holds back arrives when it is healed. What a peer does is seen late or, behind a cut, not at all: that is the point.

| what happens                  | what the other end sees                                                            |
|-------------------------------|------------------------------------------------------------------------------------|
| `close` of a connection       | all that was sent, then the end, each a latency later                              |
| its process is killed         | the same: the kernel ends the connections of a process that is gone                |
| its node loses its power      | nothing, until the node is up again and answers what is sent to it with a reset    |
| a cut                         | nothing; all of it when it is healed                                               |
| connecting to a node          | refused where no process listens; no answer where it is down or cut off: a timeout |

An end that was closed, or whose process was killed, sends nothing any more, whatever its code still tries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from random import Random
from typing import Final

import trio

from fluxres.overlay.errors import ConnectError
from fluxres.overlay.transport import OUTBOX_BOUND, OUTBOX_ROOM, Connection, Listener
from fluxres.rpc.gate import Gate
from fluxres.testing.timeline import Timeline

log = logging.getLogger("fluxres.testing")

RETRANSMIT: Final = 0.2
"""Seconds after which what was lost is sent again (RFC 6298's least is 1, Linux's 0.2)."""
BACKLOG: Final = 4096
"""Connections that wait to be accepted; the next one is refused."""
HEADER: Final = 4
"""Bytes of a frame beside its body."""
CONNECT_TIMEOUT: Final = 5.0


@dataclass(slots=True)
class Traffic:
    """What a rank has sent, in all its lives."""

    frames: int = 0
    bytes: int = 0


class Network:
    """All links of an instance. Times are in seconds of Trio's clock; `loss` is a probability a frame, below 1."""

    def __init__(
        self, timeline: Timeline, random: Random, *, latency: float = 0.0005, jitter: float = 0.0, loss: float = 0.0
    ) -> None:
        if latency < 0 or jitter < 0 or not 0 <= loss < 1:
            raise ValueError(f"cannot simulate a network of latency {latency}, jitter {jitter}, loss {loss}")
        self.latency = latency
        self.jitter = jitter
        self.loss = loss
        self.traffic: dict[int, Traffic] = {}
        self.timeline = timeline
        self._random = random
        self._ports: dict[int, Port] = {}
        """Who has a process on the network, by rank."""
        self._down: set[int] = set()
        self._cuts: set[tuple[int, int]] = set()
        self._held: dict[MemoryConnection, None] = {}
        """The ends that have something to send which a cut holds back."""
        self._changed = trio.Event()

    def delay(self) -> float:
        """How long the next frame takes, the time for what is lost and sent again included."""
        seconds = self.latency
        if self.jitter:
            seconds += self._random.uniform(0, self.jitter)
        while self.loss and self._random.random() < self.loss:
            seconds += RETRANSMIT
        return seconds

    # --- who is there

    def attach(self, rank: int, *, connect_timeout: float = CONNECT_TIMEOUT) -> Port:
        """A broker's process begins on the node of `rank`, which has none; the transport for it."""
        if rank in self._ports or rank in self._down:
            raise ValueError(f"cannot attach rank {rank}: it has a process already, or no power")
        port = self._ports[rank] = Port(self, rank, connect_timeout)
        return port

    def detach(self, port: Port) -> None:
        """The process is gone (its `Port.kill` calls this)."""
        if self._ports.get(port.rank) is port:
            del self._ports[port.rank]

    def port(self, rank: int) -> Port | None:
        """The process of `rank`, if it has one."""
        return self._ports.get(rank)

    # --- faults

    def cut(self, some: Iterable[int], others: Iterable[int], *, one_way: bool = False) -> None:
        """Let nothing through from `some` ranks to `others` (and back, unless `one_way`) until healed."""
        others = tuple(others)
        for one in some:
            for other in others:
                if one != other:
                    self._cuts.add((one, other))
                    if not one_way:
                        self._cuts.add((other, one))

    def heal(self) -> None:
        """Let everything through again; what was held back arrives a latency later."""
        self._cuts.clear()
        self._tell()
        held, self._held = self._held, {}
        for connection in held:
            connection.flush()

    def is_cut(self, sender: int, receiver: int) -> bool:
        """Whether nothing gets through from the one to the other."""
        return bool(self._cuts) and (sender, receiver) in self._cuts

    def hold(self, connection: MemoryConnection) -> None:
        """A cut holds something back that `connection` has to send."""
        self._held[connection] = None

    def power_off(self, rank: int) -> None:
        """The node of `rank` loses its power, whatever runs there: nobody hears of it."""
        self._down.add(rank)
        port = self._ports.get(rank)
        if port is not None:
            port.vanish()

    def power_on(self, rank: int) -> None:
        """The node of `rank` is up again."""
        self._down.discard(rank)
        self._tell()

    def is_down(self, rank: int) -> bool:
        """Whether the node of `rank` has no power."""
        return rank in self._down

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- connecting

    async def connect(self, port: Port, to: int, timeout: float) -> Connection:
        """A connection from a process to the listener of `to`. Raises ConnectError."""
        with trio.move_on_after(timeout):
            await trio.sleep(2 * self.delay())
            while self.is_down(to) or self.is_cut(port.rank, to) or self.is_cut(to, port.rank):
                await self._changed.wait()
                await trio.sleep(2 * self.delay())
            peer = self._ports.get(to)
            if peer is None or peer.listener is None:
                raise ConnectError(f"cannot connect to rank {to}: connection refused")
            ours, theirs = MemoryConnection(self, port, to), MemoryConnection(self, peer, port.rank)
            ours.peer_end, theirs.peer_end = theirs, ours
            if not peer.listener.offer(theirs):
                raise ConnectError(f"cannot connect to rank {to}: {BACKLOG} connections wait there")
            port.connections[ours] = peer.connections[theirs] = None
            return ours
        raise ConnectError(f"cannot connect to rank {to}: no answer within {timeout:g}s")


class Port:
    """What one life of a broker's process has on the network: a `Transport`, until the process is gone."""

    def __init__(self, network: Network, rank: int, connect_timeout: float) -> None:
        self.rank = rank
        self.connections: dict[MemoryConnection, None] = {}
        self.listener: MemoryListener | None = None
        self.alive = True
        self._network = network
        self._timeout = connect_timeout

    async def connect(self, rank: int) -> Connection:
        """A connection to the broker of `rank`. Raises ConnectError."""
        self._check()
        return await self._network.connect(self, rank, self._timeout)

    async def listen(self) -> Listener:
        """Begin to accept children. Raises ConnectError where this process does already."""
        await trio.lowlevel.checkpoint()
        self._check()
        if self.listener is not None:
            raise ConnectError(f"cannot listen as rank {self.rank}: this broker does already")
        self.listener = MemoryListener(self)
        return self.listener

    def _check(self) -> None:
        if not self.alive:
            raise ConnectError(f"cannot use the network as rank {self.rank}: the process is gone")

    def kill(self) -> None:
        """The process is gone: its kernel ends its connections, and nothing that it still tries has any effect."""
        self._leave()
        if self.listener is not None:
            self.listener.close()
        for connection in list(self.connections):
            connection.close()

    def vanish(self) -> None:
        """The node loses its power: the same, but nobody is told."""
        self._leave()
        for connection in list(self.connections):
            connection.vanish()

    def _leave(self) -> None:
        self.alive = False
        self._network.detach(self)


class MemoryListener:
    """Where the children of one broker connect to."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._send, self._receive = trio.open_memory_channel[MemoryConnection](BACKLOG)

    def offer(self, connection: MemoryConnection) -> bool:
        """A child connects; False where too many wait."""
        try:
            self._send.send_nowait(connection)
        except trio.WouldBlock:
            return False
        return True

    async def accept(self) -> Connection:
        """The next connection."""
        return await self._receive.receive()

    def close(self) -> None:
        """Take no more connections; those that nobody has taken end."""
        if self._port.listener is not self:
            return
        self._port.listener = None
        while self._receive.statistics().current_buffer_used:
            self._receive.receive_nowait().close()
        self._receive.close()


class MemoryConnection:
    """One end of a connection: what the process of `port` holds."""

    __slots__ = (
        *("_arrives", "_closed", "_ended", "_held", "_inbox", "_network", "_port", "_room", "_sent", "_wake"),
        *("backlog", "local", "peer", "peer_end", "remote"),
    )

    def __init__(self, network: Network, port: Port, remote: int) -> None:
        self.local = port.rank
        self.remote = remote
        self.peer = f"memory:rank {remote}"
        self.peer_end: MemoryConnection | None = None
        self.backlog = 0
        """Bytes sent that the other process has not taken yet."""
        self._network = network
        self._port = port
        self._held: list[tuple[int, bytes | None]] = []
        """What a cut holds back, each with its number; None is the end."""
        self._sent = 0
        """The number of the last thing sent."""
        self._arrives = 0.0
        """When the last thing sent arrives: nothing overtakes it."""
        self._inbox: list[bytes] = []
        self._ended = False
        """Whether the other end has ended it, or its node does not know of it."""
        self._closed = False
        self._wake = trio.Event()
        self._room = Gate()

    async def handshake(self) -> None:
        """There is none."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """There is nothing to run: the network delivers."""
        await trio.lowlevel.checkpoint()

    def send(self, body: bytes) -> None:
        """Send a frame; it arrives later, or when a cut is healed."""
        if self._closed or self._ended:
            return
        traffic = self._network.traffic.setdefault(self.local, Traffic())
        traffic.frames += 1
        traffic.bytes += len(body) + HEADER
        self.backlog += len(body)
        if self.backlog > OUTBOX_BOUND:
            log.warning("closing %s: it does not read, and %d bytes wait for it", self.peer, self.backlog)
            self.close()
            return
        if self.backlog >= OUTBOX_ROOM:
            self._room.shut()
        self._push(body)

    async def room(self) -> None:
        """Return as soon as less than `OUTBOX_ROOM` bytes are on their way, or the connection has ended."""
        await self._room.wait()

    async def receive(self) -> list[bytes]:
        """The frames that have arrived; [] when the connection has ended."""
        if self._inbox or self._ended or self._closed:
            await trio.lowlevel.checkpoint()
        while not self._inbox and not self._ended and not self._closed:
            self._wake = trio.Event()
            await self._wake.wait()
        frames, self._inbox = self._inbox, []
        if frames and self.peer_end is not None:
            self.peer_end.taken(sum(map(len, frames)))
        return frames

    def taken(self, size: int) -> None:
        """The other process has taken so many bytes."""
        self.backlog -= size
        if self.backlog < OUTBOX_ROOM:
            self._room.open()

    def close(self) -> None:
        """End the connection: the other end learns of it when that arrives there."""
        if not self._closed:
            self._push(None)
            self._end()

    def vanish(self) -> None:
        """End without a word: what is held back is lost with the node."""
        self._held.clear()
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._inbox.clear()
        self._port.connections.pop(self, None)
        self._wake.set()
        self._room.open()

    def flush(self) -> None:
        """Send on what a cut has held back; a kernel does so for processes that are gone, too."""
        held, self._held = self._held, []
        for _, item in sorted(held, key=itemgetter(0)):
            self._push(item)

    # --- under way

    def _push(self, item: bytes | None) -> None:
        """Send something, or the end."""
        self._sent += 1
        number = self._sent
        if self._network.is_cut(self.local, self.remote):
            self._hold(number, item)
            return
        self._arrives = max(self._arrives, trio.current_time() + self._network.delay())
        self._network.timeline.at(self._arrives, lambda: self._arrive(number, item))

    def _hold(self, number: int, item: bytes | None) -> None:
        self._held.append((number, item))
        self._network.hold(self)

    def _arrive(self, number: int, item: bytes | None) -> None:
        """Something is at the other end, unless it was cut off on the way, or nobody is there any more."""
        if self._network.is_cut(self.local, self.remote):
            self._hold(number, item)
        elif not self._network.is_down(self.remote) and self.peer_end is not None:
            self.peer_end.take(item)

    def take(self, item: bytes | None) -> None:
        """Something has arrived here. What is no process's any more is answered with a reset."""
        if not self._closed:
            if item is None:
                self._ended = True
                self._room.open()
            else:
                self._inbox.append(item)
            self._wake.set()
        elif item is not None:
            self._push(None)
