"""Routers of a whole tree against a naive model (see `routerkit`), and the larger cases of tracking one by one."""

from __future__ import annotations

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from routerkit import SERVICES, TOPOLOGY, Client, Tree

from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag

RANKS = st.integers(0, TOPOLOGY.size - 1)
NUMBERS = st.integers(0, 1000)


class RouterTree(RuleBasedStateMachine):
    """Seven brokers, two clients each; any rule at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()

    def clients(self) -> list[Client]:
        return [client for node in self.tree.nodes.values() for client in node.clients]

    @rule(
        which=NUMBERS,
        service=st.sampled_from(sorted(SERVICES)),
        nodeid=st.one_of(st.just(NODEID_ANY), RANKS),
        flags=st.sampled_from([MessageFlag.NONE, MessageFlag.STREAMING, MessageFlag.UPSTREAM, MessageFlag.NORESPONSE]),
        times=st.integers(1, 3),
    )
    def ask(self, which: int, service: str, nodeid: int, flags: int, times: int) -> None:
        clients = self.clients()
        if flags == MessageFlag.UPSTREAM:
            nodeid = NODEID_ANY
        if clients:
            for _ in range(times):
                self.tree.ask(clients[which % len(clients)], service, nodeid, flags)

    @rule(which=NUMBERS, times=st.integers(1, 20))
    def pump(self, which: int, times: int) -> None:
        for number in range(times):
            waiting = [end for end in self.tree.ends() if end.inbox]
            if waiting:
                waiting[(which + number) % len(waiting)].pump()

    @rule(rank=RANKS, number=NUMBERS, last=st.booleans())
    def answer(self, rank: int, number: int, last: bool) -> None:
        node = self.tree.nodes.get(rank)
        if node is not None and node.server.open:
            node.server.answer(number, last=last)

    @rule(which=NUMBERS)
    def cancel(self, which: int) -> None:
        open_calls = [(client, tag) for client in self.clients() for tag in client.records]
        if open_calls:
            client, tag = open_calls[which % len(open_calls)]
            client.cancel(tag)

    @rule(which=NUMBERS, service=st.sampled_from(sorted(SERVICES)))
    def disconnect(self, which: int, service: str) -> None:
        clients = [client for client in self.clients() if client.records]
        if clients:
            clients[which % len(clients)].disconnect(service)

    @rule(which=NUMBERS)
    def client_goes(self, which: int) -> None:
        clients = self.clients()
        if clients:
            client = clients[which % len(clients)]
            client.node.clients.remove(client)
            client.node.router.remove_endpoint(client, "the client is gone")

    @rule(rank=RANKS)
    def client_comes(self, rank: int) -> None:
        node = self.tree.nodes.get(rank)
        if node is not None:
            node.clients.append(Client(node, self.tree.name("client")))

    @rule(which=NUMBERS)
    def cut(self, which: int) -> None:
        whole = [end for end in self.tree.ends() if not end.cut]
        if whole:
            whole[which % len(whole)].sever()

    @rule(which=NUMBERS)
    def notice(self, which: int) -> None:
        cut = [end for end in self.tree.ends() if end.cut]
        if cut:
            self.tree.notice(cut[which % len(cut)])

    @precondition(lambda self: len(self.tree.nodes) < TOPOLOGY.size)
    @rule(which=NUMBERS)
    def rejoin(self, which: int) -> None:
        able = [rank for rank in range(TOPOLOGY.size) if self.tree.can_join(rank)]
        if able:
            self.tree.join(able[which % len(able)])

    def teardown(self) -> None:
        self.tree.finish()


RouterTree.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestRouterTree = RouterTree.TestCase


def test_a_thousand_requests_each_way_end_once_when_an_inner_broker_is_lost() -> None:
    tree = Tree()
    up, down = tree.nodes[3].clients[0], tree.nodes[0].clients[0]
    for _ in range(900):
        tree.ask(down, "all", 3, MessageFlag.NONE)
    for _ in range(900):
        tree.ask(tree.nodes[2].clients[0], "all", 4, MessageFlag.STREAMING)
        tree.ask(up, "root", NODEID_ANY, MessageFlag.NONE)
    tree.settle()
    assert {rank: len(node.router.tracker) for rank, node in tree.nodes.items()} == {
        0: 1800,
        1: 2700,
        2: 900,
        3: 900,
        **dict.fromkeys((4, 5, 6), 0),
    }
    link = tree.nodes[0].children[1]
    link.sever()
    tree.notice(link)
    assert [record.terminals for client, record in tree.records if client is down] == [1] * 900
    tree.finish()
    assert sorted(tree.nodes) == [0, 2, 5, 6]


def test_many_presences_at_rank_0_and_one_child_is_lost() -> None:
    """Long-lived streams of all ranks: only those of the lost subtree end."""
    tree = Tree()
    for node in list(tree.nodes.values()):
        for _ in range(300):
            tree.ask(node.clients[0], "root", NODEID_ANY, MessageFlag.STREAMING)
    tree.settle()
    root = tree.nodes[0].server
    assert len(root.open) == 7 * 300
    link = tree.nodes[0].children[2]
    link.sever()
    tree.notice(link)
    assert len(root.open) == 4 * 300
    tree.settle()
    for rank in (2, 5, 6):
        tree.join(rank)
    tree.ask(tree.nodes[6].clients[0], "root", NODEID_ANY, MessageFlag.STREAMING)
    tree.finish()


def test_a_request_to_a_rank_that_is_away_ends_at_once() -> None:
    tree = Tree()
    link = tree.nodes[1].children[3]
    link.sever()
    tree.notice(link)
    got: list[int] = []
    client = tree.nodes[5].clients[0]
    deliver = client.deliver

    def noting(message: Message) -> None:
        got.append(message.errnum)
        deliver(message)

    client.deliver = noting  # type: ignore[method-assign]
    tree.ask(client, "all", 3, MessageFlag.NONE)
    tree.settle()
    assert got == [errno.EHOSTUNREACH]
    tree.finish()
