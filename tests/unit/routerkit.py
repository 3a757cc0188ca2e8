"""A whole tree of routers in memory, joined by links that deliver when they are told to, and a naive model beside it.

The model keeps each request as a record: who asked, which rank has to answer it, and what came back. Whatever is cut,
noticed late, cancelled or gone, a request of a client that lives has exactly one terminal response (invariant I5), and
at the end nothing is under way in any tracker.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fluxres.base.errors import RpcError
from fluxres.overlay.topology import Topology
from fluxres.rpc.router import Endpoint, Router
from fluxres.rpc.tracker import came_through, error_response, is_terminal
from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag, request, response_to
from fluxres.wire.payload import pack, unpack_map

TOPOLOGY = Topology.kary(7, 2)
SERVICES = {"root": frozenset({0}), "inner": frozenset({0, 1, 2}), "all": frozenset(range(7))}
"""The ranks that have each service."""


@dataclass(slots=True, eq=False)
class Record:
    """A request in the model."""

    service: str
    nodeid: int
    server: int | None
    """The rank that has to answer; None where there is none."""
    flags: int
    parts: int = 0
    terminals: int = 0
    cancelled: bool = False
    excused: bool = False
    """Its client has said that it is gone, or wanted no response."""


class LinkEnd:
    """One end of a link: an endpoint of the router at this end. What it is given waits at the other end."""

    def __init__(self, node: Node, peer: Node) -> None:
        self.id = peer.uuid
        self.node = node
        self.rank = peer.rank
        self.other: LinkEnd | None = None
        self.inbox: deque[Message] = deque()
        self.cut = False

    @property
    def hop(self) -> LinkEnd:
        return self

    def deliver(self, message: Message) -> None:
        if self.other is not None and not self.cut:
            self.other.inbox.append(message)

    async def drained(self, asked: Message) -> None:
        raise AssertionError("nobody waits in this test")

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        callback()

    def received_response(self, response: Message, onward: Endpoint | None) -> None:
        assert self.node.alive

    def pump(self) -> None:
        """Take one message."""
        self.node.router.receive(self, self.inbox.popleft())

    def sever(self) -> None:
        """Lose what is on its way, in both directions, and all that follows."""
        for end in (self, self.other):
            if end is not None:
                end.cut = True
                end.inbox.clear()


class Client:
    """A client of one broker, which checks what it gets against its records."""

    def __init__(self, node: Node, name: str) -> None:
        self.id = name
        self.node = node
        self.records: dict[int, Record] = {}
        """By matchtag: those that have not ended. A matchtag is used again as soon as it may be."""
        node.router.add_endpoint(self)

    @property
    def hop(self) -> None:
        return None

    async def drained(self, asked: Message) -> None:
        raise AssertionError("nobody waits in this test")

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        callback()

    def deliver(self, message: Message) -> None:
        record = self.records[message.matchtag]
        assert message.route == ()
        assert not record.flags & MessageFlag.NORESPONSE
        assert record.terminals == 0
        if not is_terminal(message):
            record.parts += 1
            return
        record.terminals += 1
        if record.server is None:
            assert message.errnum in (errno.ENOSYS, errno.EHOSTUNREACH)
        if not record.excused:
            del self.records[message.matchtag]

    def ask(self, record: Record) -> None:
        tag = 0
        if record.flags & MessageFlag.NORESPONSE:
            record.excused = True
        else:
            tag = next(tag for tag in range(1, 1000) if tag not in self.records)
            self.records[tag] = record
        payload = pack({"server": record.server})
        message = request(f"{record.service}.do", payload, matchtag=tag, nodeid=record.nodeid, flags=record.flags)
        self.node.router.receive(self, message)

    def tell(self, topic: str, record: Record, payload: bytes | None = None) -> None:
        flags = record.flags & MessageFlag.UPSTREAM
        self.node.router.receive(self, request(topic, payload, nodeid=record.nodeid, flags=flags))

    def cancel(self, tag: int) -> None:
        record = self.records[tag]
        record.cancelled = True
        self.tell(f"{record.service}.cancel", record, pack({"matchtag": tag}))

    def disconnect(self, service: str) -> None:
        """Tell `service`, wherever it is asked for something, that we are gone."""
        going = [record for record in self.records.values() if record.service == service]
        for record in going:
            record.excused = True
        for record in going:
            self.tell(f"{service}.disconnect", record)


class Server:
    """All services of one broker: keeps what it is asked until it is told to answer."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.open: dict[tuple[tuple[str, ...], int], Message] = {}
        self.cancelled: set[tuple[tuple[str, ...], int]] = set()

    def dispatch(self, message: Message) -> None:
        if message.method == "cancel":
            key = (message.route, int(str(unpack_map(message.payload)["matchtag"])))
            if key in self.open:
                self.cancelled.add(key)
        elif message.method == "disconnect":
            self.disconnected(message.route, message.service)
        else:
            assert unpack_map(message.payload) == {"server": self.node.rank}
            if message.wants_response:
                key = (message.route, message.matchtag)
                assert key not in self.open
                self.open[key] = message

    def disconnected(self, route: tuple[str, ...], service: str | None = None) -> None:
        for key in [key for key in self.open if came_through(key[0], route)]:
            if service in (None, self.open[key].service):
                del self.open[key]
                self.cancelled.discard(key)

    def answer(self, number: int, *, last: bool) -> None:
        key = sorted(self.open)[number % len(self.open)]
        asked = self.open[key]
        if last or not asked.is_streaming:
            del self.open[key]
            self.cancelled.discard(key)
            ends = error_response(asked, errno.ENODATA, "") if asked.is_streaming else response_to(asked)
            self.node.router.response(ends)
        else:
            self.node.router.response(response_to(asked))


@dataclass(eq=False)
class Node:
    """One incarnation of a broker."""

    rank: int
    uuid: str
    alive: bool = True
    parent: LinkEnd | None = None
    children: dict[int, LinkEnd] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Router(rank=self.rank, size=TOPOLOGY.size)
        self.server = Server(self)
        for service, ranks in SERVICES.items():
            if self.rank in ranks:
                self.router.add_service(service, self.server)
        self.router.use_overlay(None, self.next_hop)

    def next_hop(self, rank: int) -> Endpoint | None:
        child = TOPOLOGY.next_hop(self.rank, rank)
        if child is None:
            return None
        if child not in self.children:
            raise RpcError(errno.EHOSTUNREACH, f"rank {child} is lost")
        return self.children[child]


class Tree:
    """The living nodes, by rank, and all records."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.records: list[tuple[Client, Record]] = []
        self._names = 0
        for rank in range(TOPOLOGY.size):
            self.join(rank)

    def name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    # --- brokers

    def can_join(self, rank: int) -> bool:
        """Whether a rank is away, and its parent there and aware of that."""
        parent = TOPOLOGY.parent(rank)
        above = None if parent is None else self.nodes.get(parent)
        return rank not in self.nodes and (parent is None or (above is not None and rank not in above.children))

    def join(self, rank: int) -> None:
        """Begin the next incarnation of `rank`."""
        node = self.nodes[rank] = Node(rank, self.name(f"uuid{rank}-"))
        parent = TOPOLOGY.parent(rank)
        if parent is not None:
            above = self.nodes[parent]
            node.parent, above.children[rank] = LinkEnd(node, above), LinkEnd(above, node)
            node.parent.other, above.children[rank].other = above.children[rank], node.parent
            node.router.add_endpoint(node.parent)
            above.router.add_endpoint(above.children[rank])
            node.router.use_overlay(node.parent, node.next_hop)
        node.clients = [Client(node, self.name("client")) for _ in range(2)]

    def ends(self) -> list[LinkEnd]:
        """All link ends of living nodes."""
        return [
            end for node in self.nodes.values() for end in (node.parent, *node.children.values()) if end is not None
        ]

    def notice(self, end: LinkEnd) -> None:
        """A broker notices that a link of its is cut: the parent of it drops the child, the child panics."""
        node = end.node
        node.router.remove_endpoint(end, f"rank {end.rank} is lost")
        if end is node.parent:
            self.panic(node)
        else:
            del node.children[end.rank]

    def panic(self, node: Node) -> None:
        """An incarnation ends, and all connections to it."""
        for client in node.clients:
            node.router.remove_endpoint(client, "gone")
        for child in node.children.values():
            child.sever()
        node.alive = False
        del self.nodes[node.rank]

    # --- the model

    def expected_server(self, rank: int, service: str, nodeid: int, flags: int) -> int | None:
        """Which rank has to answer."""
        if nodeid != NODEID_ANY:
            return nodeid if nodeid in SERVICES[service] else None
        at = TOPOLOGY.parent(rank) if flags & MessageFlag.UPSTREAM else rank
        while at is not None and at not in SERVICES[service]:
            at = TOPOLOGY.parent(at)
        return at

    def ask(self, client: Client, service: str, nodeid: int, flags: int) -> None:
        server = self.expected_server(client.node.rank, service, nodeid, flags)
        record = Record(service, nodeid, server, flags)
        self.records.append((client, record))
        client.ask(record)

    # --- the end

    def settle(self) -> None:
        """Notice all cuts, and deliver everything."""
        while True:
            cut = [end for end in self.ends() if end.cut]
            waiting = [end for end in self.ends() if end.inbox]
            for end in cut:
                if end.node.alive:
                    self.notice(end)
            for end in waiting:
                if end.inbox and end.node.alive:
                    end.pump()
            if not cut and not waiting:
                return

    def check_cancelled(self) -> None:
        """Whatever nobody waits for any more has been cancelled wherever it is open."""
        clients = {client.id: client for node in self.nodes.values() for client in node.clients}
        for node in self.nodes.values():
            for (route, tag), asked in node.server.open.items():
                client = clients.get(route[0])
                record = None if client is None else client.records.get(tag)
                if record is None or record.cancelled or record.excused:
                    assert (route, tag) in node.server.cancelled, f"{asked.topic} from {route} is still open"

    def finish(self) -> None:
        """Answer everything; then each request has ended once, and nothing is left."""
        self.settle()
        self.check_cancelled()
        for node in self.nodes.values():
            while node.server.open:
                node.server.answer(0, last=True)
        self.settle()
        for client, record in self.records:
            if client.node.alive and client in client.node.clients and not record.excused:
                assert record.terminals == 1
        assert {node.rank: len(node.router.tracker) for node in self.nodes.values() if len(node.router.tracker)} == {}
