"""The overlay of one incarnation: the link to its parent, the links to its children, and what is known of them.

    overlay nursery
    ├─ upstream        its end is a SubtreePanic
    ├─ downstream      one subtree scope a child
    └─ heartbeat       says that we live, and notices who is silent

Whoever waits on a rank waits in `subtree(rank)`: the body is cancelled, and HostUnreachable raised, when the child that
leads there is lost. Losing a child touches nothing else; losing the parent ends everything here (DESIGN §4, §6).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Final

import trio

from fluxres.overlay.control import CREDIT, GOODBYE, HEARTBEAT, SHUTDOWN, STATUS, health_of
from fluxres.overlay.downstream import Child, Downstream
from fluxres.overlay.errors import HostUnreachable
from fluxres.overlay.health import Health, Subtree
from fluxres.overlay.hello import Hello, Welcome
from fluxres.overlay.link import Link
from fluxres.overlay.liveness import Change, Liveness
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.topology import Topology
from fluxres.overlay.traffic import Traffic
from fluxres.overlay.transport import Transport
from fluxres.overlay.upstream import Upstream
from fluxres.rpc.router import Router
from fluxres.wire.messages import Message, MessageType
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.overlay")

END_GRACE: Final = 15.0
"""Seconds that the brokers below have to shut down when the whole instance does."""


class Overlay:
    """This broker's place in the tree. `torpid` is told of children that become torpid or lively again; `shut_down`
    is called when the instance is to end."""

    def __init__(
        self,
        *,
        hello: Hello,
        topology: Topology,
        transport: Transport,
        router: Router,
        settings: TbonSettings,
        random: Random,
        torpid: Callable[[int, bool], None],
        shut_down: Callable[[], None],
    ) -> None:
        self.rank = hello.rank
        self.topology = topology
        self.hello = hello
        self._transport = transport
        self._router = router
        self._settings = settings
        self._torpid = torpid
        self._shut_down = shut_down
        self._liveness = Liveness(settings.torpid_min, settings.timeout)
        self._ranks: dict[str, int] = {}
        """The rank of each peer, by its uuid."""
        self._told: dict[str, int] = {}
        """How many messages each link had sent at the last heartbeat."""
        self.lost = 0
        """How often a child was lost."""
        self._past = Traffic()
        """What went over the links of children that are gone."""
        self.health = Subtree(topology.children(self.rank), trio.current_time())
        self.changed = trio.Event()
        """Set and replaced whenever a child's health, or presence, changes."""
        self.down = Downstream(
            hello=hello,
            children=frozenset(topology.children(self.rank)),
            settings=settings,
            joined=self._child_joined,
            left=self._child_left,
            take=self._take,
            is_endpoint=router.is_endpoint,
        )
        parent = topology.parent(self.rank)
        self.up: Upstream | None = None
        if parent is not None:
            self.up = Upstream(
                parent=parent,
                hello=hello,
                transport=transport,
                settings=settings,
                random=random,
                joined=self._parent_joined,
                left=self._parent_left,
                take=self._take,
            )
        router.use_overlay(None, self._next_hop)

    # --- running

    async def run(self, task_status: trio.TaskStatus[Welcome | None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join the parent, report its welcome (None at rank 0), and serve. Raises SubtreePanic, Refusal."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat, name="heartbeat")
            if self.topology.children(self.rank):
                nursery.start_soon(self.down.run, await self._transport.listen(), name="downstream")
            welcome: Welcome | None = None
            if self.up is not None:
                welcome = await nursery.start(self.up.run, name="upstream")
            task_status.started(welcome)

    def open(self, hello: Hello) -> None:
        """This broker is online, as `hello` says: let its children join."""
        self.hello = hello
        self.down.open(hello)

    @asynccontextmanager
    async def subtree(self, rank: int) -> AsyncIterator[None]:
        """Run the body in the scope of the child that leads to `rank`.

        Raises HostUnreachable when that child is lost, or is not there; at our own rank the body just runs.
        """
        if rank == self.rank:
            yield
            return
        hop = self.topology.next_hop(self.rank, rank)
        if hop is None:
            raise ValueError(f"cannot enter the scope of rank {rank}: it is not below rank {self.rank}")
        child = self._child_to(hop, rank)
        with trio.CancelScope() as scope:
            child.scopes.add(scope)
            try:
                yield
            finally:
                child.scopes.discard(scope)
        if scope.cancelled_caught:
            raise HostUnreachable(f"rank {rank} is not reachable: rank {hop} is lost: {child.why}")

    def forward(self, message: Message) -> None:
        """Send an event on to every child (`rpc.events`)."""
        for child in self.down.online.values():
            child.link.deliver(message)

    # --- ending

    def leave(self, why: str) -> None:
        """Say goodbye to the parent, and the kiss of death to the children: this broker shuts down."""
        self.down.say_goodbye(why)
        if self.up is not None and self.up.link is not None:
            self.up.link.control(GOODBYE)

    async def end_subtree(self) -> None:
        """Shut down every broker below, and wait until they are gone, for a while."""
        for child in self.down.online.values():
            child.link.control(SHUTDOWN)
        with trio.move_on_after(END_GRACE) as grace:
            while self.down.online:
                await self.changed.wait()
        if grace.cancelled_caught:
            log.warning("shutting down although ranks %s have not", sorted(self.down.online))

    # --- what the links tell

    def _parent_joined(self, link: Link) -> None:
        self._watch(link)
        self._router.use_overlay(link, self._next_hop)
        link.control(STATUS, self.health.status)

    def _parent_left(self, link: Link, why: str, told: str) -> None:
        """Take the subtree down with us, and answer what is under way upwards.

        In this order: children that read the kiss of death first say why they panic, not what came of it.
        """
        self._forget(link)
        self.down.say_goodbye(told)
        self._router.remove_endpoint(link, f"the parent of rank {self.rank} is lost: {why}")

    def _child_joined(self, child: Child) -> None:
        self._watch(child.link)
        partial = bool(self.topology.children(child.link.rank))
        self._set_health(child.link.rank, Health.PARTIAL if partial else Health.FULL)
        log.info("rank %d has joined (%s)", child.link.rank, child.link.connection.peer)

    def _child_left(self, child: Child) -> None:
        rank = child.link.rank
        self._forget(child.link)
        self._past.add(child.link)
        self.lost += not child.left
        log.log(logging.INFO if child.left else logging.WARNING, "rank %d is lost: %s", rank, child.why)
        self._router.remove_endpoint(child.link, f"rank {rank} is lost: {child.why}")
        self._set_health(rank, Health.OFFLINE if child.left else Health.LOST)

    def _watch(self, link: Link) -> None:
        self._ranks[link.id] = link.rank
        self._liveness.watch(link.id, trio.current_time())
        self._router.add_endpoint(link)

    def _forget(self, link: Link) -> None:
        self._liveness.forget(link.id)
        self._ranks.pop(link.id, None)
        self._told.pop(link.id, None)

    def _take(self, link: Link, message: Message) -> None:
        """A message of a neighbour. Only children tell of their health, and only the parent ends the instance."""
        self._liveness.heard(link.id, trio.current_time())
        is_parent = self.up is not None and link is self.up.link
        if message.type is not MessageType.CONTROL:
            self._router.receive(link, message)
        elif message.control == CREDIT:
            link.credit(message)
        elif message.control == STATUS and not is_parent:
            self._set_health(link.rank, health_of(message))
        elif message.control == SHUTDOWN and is_parent:
            self._shut_down()

    def _next_hop(self, rank: int) -> Link | None:
        """The link of the child that leads to `rank`; None where it is not below. Raises HostUnreachable."""
        hop = self.topology.next_hop(self.rank, rank)
        return None if hop is None else self._child_to(hop, rank).link

    def _child_to(self, hop: int, rank: int) -> Child:
        """The child `hop`, that leads to `rank`. Raises HostUnreachable where it is not here any more."""
        child = self.down.online.get(hop)
        if child is not None and not child.why:
            return child
        why = f"rank {hop} is not online" if child is None else f"rank {hop} is lost: {child.why}"
        raise HostUnreachable(f"rank {rank} is not reachable: {why}")

    # --- health

    def _set_health(self, rank: int, health: Health) -> None:
        changed = self.health.set(rank, health, trio.current_time())
        if changed and self.up is not None and self.up.link is not None:
            self.up.link.control(STATUS, self.health.status)
        self.changed.set()
        self.changed = trio.Event()

    def report(self) -> WireMap:
        """The answer to `overlay.health`: our own subtree's health and our children's, each with since when."""
        now = trio.current_time()
        children: list[WireMap] = []
        for rank, health, since in self.health.children():
            children.append({"rank": rank, "status": health.word, "duration": now - since})
        return {
            "rank": self.rank,
            "status": self.health.status.word,
            "duration": now - self.health.since,
            "children": [*children],
        }

    @property
    def torpid(self) -> int:
        """How many neighbours are torpid."""
        return self._liveness.torpid

    def traffic(self) -> tuple[Traffic, Traffic]:
        """What went over the links to the parent, and over those to children, in this incarnation."""
        up = [self.up.link] if self.up is not None and self.up.link is not None else []
        return Traffic().plus(up), self._past.plus(child.link for child in self.down.online.values())

    # --- heartbeats

    async def _beat(self) -> None:
        """Send heartbeats where nothing else was sent; judge who is silent. Until cancelled."""
        while True:
            await trio.sleep(min(self._settings.heartbeat, self._liveness.interval))
            self.down.keep_waiting()
            links = [child.link for child in self.down.online.values()]
            if self.up is not None and self.up.link is not None:
                links.append(self.up.link)
            for link in links:
                if link.sent == self._told.get(link.id):
                    link.control(HEARTBEAT)
                self._told[link.id] = link.sent
            for peer, change in self._liveness.tick(trio.current_time()):
                self._judge(self._ranks[peer], change)

    def _judge(self, rank: int, change: Change) -> None:
        if change is Change.LOST:
            why = f"it has been silent for {self._settings.timeout:g}s"
            if not self.down.disconnect(rank, why) and self.up is not None:
                self.up.lose(why)
            return
        log.warning("rank %d is %s", rank, "torpid" if change is Change.TORPID else "no longer torpid")
        if rank in self.down.online:
            self._torpid(rank, change is Change.TORPID)
