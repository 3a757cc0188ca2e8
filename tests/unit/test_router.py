"""The router: where a request goes, how its response comes back, and what happens when a hop is lost."""

from __future__ import annotations

import errno

import pytest
from rpckit import STREAMING, Net, Peer, running

from fluxres.rpc.router import MAX_PAYLOAD, Router
from fluxres.rpc.server import Service
from fluxres.wire.codec import MAX_ROUTE
from fluxres.wire.messages import (
    NODEID_ANY,
    NODEID_UPSTREAM,
    Message,
    MessageFlag,
    MessageType,
    Role,
    request,
    response_to,
)
from fluxres.wire.payload import pack, unpack_map


@pytest.fixture
def router() -> Router:
    return Router(rank=0, size=4)


@pytest.fixture
def service(router: Router) -> Service:
    return Service("toy", router)


@pytest.mark.parametrize(
    ("nodeid", "topic", "flags", "where"),
    [
        (NODEID_ANY, "toy.ping", MessageFlag.NONE, "here"),
        (NODEID_ANY, "far.ping", MessageFlag.NONE, "parent"),
        (NODEID_ANY, "toy.ping", MessageFlag.UPSTREAM, "parent"),
        (NODEID_UPSTREAM, "toy.ping", MessageFlag.NONE, "parent"),
        (1, "toy.ping", MessageFlag.NONE, "here"),
        (1, "far.ping", MessageFlag.NONE, "ENOSYS"),
        (0, "toy.ping", MessageFlag.NONE, "parent"),
        (5, "toy.ping", MessageFlag.NONE, "parent"),
        (4, "toy.ping", MessageFlag.NONE, "EHOSTUNREACH"),
        (0, "toy.ping", MessageFlag.UPSTREAM, "here"),
        (1, "toy.ping", MessageFlag.UPSTREAM, "parent"),
        (2, "toy.ping", MessageFlag.NONE, "child"),
        (3, "toy.ping", MessageFlag.NONE, "child"),
        (6, "toy.ping", MessageFlag.NONE, "EHOSTUNREACH"),
    ],
)
async def test_where_a_request_goes(nodeid: int, topic: str, flags: int, where: str) -> None:
    net = Net()
    async with running(Service("toy", net.router)):
        net.client.send(topic, nodeid=nodeid, flags=flags)
        forwarded = [peer.id for peer in (net.parent, net.child) if peer.got]
        if where in ("parent", "child"):
            assert forwarded == [where]
            (message,) = net.parent.got or net.child.got
            assert message.route == ("client",)
            assert not message.flags & MessageFlag.UPSTREAM
            assert len(net.router.tracker) == 1
        else:
            expected = 0 if where == "here" else int(getattr(errno, where))
            assert (forwarded, net.client.errnums()) == ([], [expected])
            assert len(net.router.tracker) == 0


def forwarded(net: Net, flags: int = MessageFlag.NONE) -> Message:
    net.client.send("far.thing", nodeid=2, flags=flags)
    return net.child.got[-1]._replace(route=("client", "their-name-for-us"))


def back(asked: Message, errnum: int = 0) -> Message:
    """The response as the next hop sends it: it has taken its own step off the route."""
    return response_to(asked._replace(route=asked.route[:-1]), payload=pack({}), errnum=errnum)


def test_a_response_goes_back_and_a_late_one_is_dropped() -> None:
    net = Net()
    asked = forwarded(net)
    net.router.receive(net.parent, back(asked))  # not from there
    assert net.client.got == []
    net.router.receive(net.child, back(asked))
    assert net.client.answers() == [(1, 0, {})]
    assert net.client.got[0].route == ()
    net.router.receive(net.child, back(asked))
    assert len(net.client.got) == 1
    assert len(net.router.tracker) == 0


def test_a_lost_hop_answers_for_what_went_over_it() -> None:
    net = Net()
    asked = forwarded(net, flags=STREAMING)
    net.router.receive(net.child, back(asked))
    net.router.remove_endpoint(net.child, "rank 2 is lost")
    net.router.receive(net.child, back(asked))
    assert net.client.answers() == [(1, 0, {}), (1, errno.EHOSTUNREACH, "rank 2 is lost")]


def test_a_requester_that_goes_is_told_to_the_next_hop() -> None:
    net = Net()
    asked = forwarded(net)
    net.router.remove_endpoint(net.client, "gone")
    cancel = net.child.got[-1]
    assert (cancel.topic, cancel.nodeid, cancel.route) == ("far.cancel", 2, ("client",))
    assert unpack_map(cancel.payload) == {"matchtag": asked.matchtag}
    net.router.receive(net.child, back(asked, errno.ECANCELED))
    assert net.client.got == []


def test_a_request_never_goes_back_to_where_it_came_from() -> None:
    """Whatever the neighbours think of the tree: they would send it to and fro for ever."""
    net = Net()
    net.parent.send("toy.ping", nodeid=5, route=("far-client",))
    assert net.parent.answers() == [
        (1, errno.EHOSTUNREACH, "rank 5 is not reachable: it would go back to where it came from")
    ]
    assert net.parent.got[0].route == ("far-client",)
    net.child.send("toy.ping", nodeid=3)
    assert net.child.errnums() == [errno.EHOSTUNREACH]
    assert len(net.router.tracker) == 0


def test_who_is_not_reachable_is_told_why() -> None:
    net = Net()
    orphan = Router(rank=1, size=4)
    alone = Peer(orphan, "client")
    net.client.send("toy.ping", nodeid=4, tag=1)
    net.client.send("toy.ping", nodeid=6, tag=2)
    alone.send("toy.ping", nodeid=0, tag=3)
    alone.send("toy.ping", tag=4)
    assert (*net.client.answers(), *alone.answers()) == (
        (1, errno.EHOSTUNREACH, "rank 4 is not reachable: it is lost"),
        (2, errno.EHOSTUNREACH, "rank 6 is not reachable: the instance has 6 ranks"),
        (3, errno.EHOSTUNREACH, "rank 0 is not reachable: rank 1 has no connection to the next broker"),
        (4, errno.EHOSTUNREACH, "toy.ping is not reachable: rank 1 has no connection to the next broker"),
    )


@pytest.mark.parametrize("nodeid", [NODEID_ANY, 0, 2])
def test_a_hop_that_is_gone_takes_no_request(nodeid: int) -> None:
    """The overlay may still name it: nothing would ever answer."""
    net = Net()
    net.router.remove_endpoint(net.parent, "lost")
    net.router.remove_endpoint(net.child, "lost")
    net.client.send("far.thing", nodeid=nodeid)
    assert net.client.errnums() == [errno.EHOSTUNREACH]
    assert (net.parent.got, net.child.got, len(net.router.tracker)) == ([], [], 0)


async def test_what_comes_from_another_broker_is_not_local() -> None:
    net = Net()
    seen: list[int] = []
    service = Service("toy", net.router)
    service.method("role", lambda request: seen.append(request.message.rolemask))
    async with running(service):
        for source in (net.client, net.child, net.parent):
            source.send("toy.role", role=Role.LOCAL | Role.USER)
    assert seen == [Role.LOCAL | Role.USER, Role.USER, Role.USER]


def test_a_matchtag_that_is_under_way_is_refused() -> None:
    net = Net()
    net.client.send("far.thing", tag=7, nodeid=2)
    net.client.send("far.thing", tag=7, nodeid=0)
    assert net.client.answers() == [(7, errno.EAGAIN, "cannot send far.thing: its matchtag is in use")]
    assert (len(net.child.got), len(net.parent.got)) == (1, 0)


def test_what_no_frame_would_hold_at_the_next_hop_is_refused() -> None:
    net = Net()
    net.router.receive(net.client, request("far.thing", bytes(MAX_PAYLOAD + 1), matchtag=1, nodeid=2))
    assert net.client.errnums() == [errno.EMSGSIZE]
    net.router.receive(net.client, request("far.thing", bytes(MAX_PAYLOAD), matchtag=1, nodeid=2))
    assert len(net.child.got) == 1


def test_a_disconnect_travels_as_cancels() -> None:
    """So that the requests it ends are ended at every hop; those to other services go on."""
    net = Net()
    for tag, topic, nodeid in ((1, "far.thing", 2), (2, "far.other", 2), (3, "near.thing", 2), (4, "far.thing", 0)):
        net.client.send(topic, tag=tag, nodeid=nodeid)
    net.child.got.clear()
    net.client.send("far.disconnect", tag=0, nodeid=2)
    assert [message.topic for message in net.child.got] == ["far.cancel", "far.cancel"]
    assert [message.topic for message in net.parent.got] == ["far.thing", "far.cancel"]
    assert len(net.router.tracker) == 1
    net.client.send("far.disconnect", tag=5, nodeid=2)
    assert net.client.answers() == [(5, errno.EPROTO, "disconnect has no response")]


def test_a_hop_learns_what_became_of_its_responses() -> None:
    net = Net()
    asked = forwarded(net, flags=STREAMING)
    net.router.receive(net.child, back(asked))
    net.router.remove_endpoint(net.client, "gone")
    net.router.receive(net.child, back(asked))
    assert [(message.route, onward) for message, onward in net.child.passed] == [
        (("client",), net.client),
        (("client",), None),
    ]


def test_events_come_from_the_parent_only() -> None:
    net = Net()
    taken: list[Message] = []

    class Sink:
        def receive(self, message: Message) -> None:
            taken.append(message)

    net.router.use_events(Sink())
    for source in (net.client, net.child, net.parent):
        net.router.receive(source, Message(MessageType.EVENT, source.id))
    assert [message.topic for message in taken] == ["parent"]


def test_an_endpoint_is_added_once_and_its_successor_is_left_alone() -> None:
    net = Net()
    with pytest.raises(ValueError, match="'client': there is one"):
        Peer(net.router, "client")
    net.router.remove_endpoint(net.client, "gone")
    successor = Peer(net.router, "client")
    net.router.remove_endpoint(net.client, "gone")
    successor.send("toy.ping", nodeid=1)
    assert successor.errnums() == [errno.ENOSYS]


def test_a_route_that_is_too_long_is_refused_with_an_answer() -> None:
    net = Net()
    net.child.send("toy.ping", route=("x",) * (MAX_ROUTE - 1))
    assert len(net.parent.got[0].route) == MAX_ROUTE
    net.child.send("toy.ping", route=("x",) * MAX_ROUTE)
    assert len(net.parent.got) == 1
    assert net.child.errnums() == [errno.EPROTO]
    assert len(net.child.got[0].route) == MAX_ROUTE


def test_what_is_under_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.rpc.router.MAX_TRACKED", 2)
    net = Net()
    for tag in (1, 2, 3):
        net.client.send("toy.ping", tag=tag, nodeid=2)
    assert (len(net.child.got), net.client.errnums()) == (2, [errno.EAGAIN])
    net.client.send("toy.ping", nodeid=2, flags=MessageFlag.NORESPONSE)
    assert len(net.child.got) == 3


def test_other_messages_are_dropped() -> None:
    net = Net()
    for kind in (MessageType.EVENT, MessageType.CONTROL):
        net.router.receive(net.child, Message(kind, "x.y"))
    net.router.response(Message(MessageType.RESPONSE, "x.y"))
    net.router.response(Message(MessageType.RESPONSE, "x.y", route=("nobody",)))
    assert net.parent.got == net.child.got == net.client.got == []


async def test_a_service_is_registered_once(router: Router, service: Service) -> None:
    async with running(service):
        assert router.services == ["toy"]
        with pytest.raises(ValueError, match="'toy': it is registered already"):
            router.add_service("toy", service)
    assert router.services == []
