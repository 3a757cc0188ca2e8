"""Services: what answers, what a cancel and a disconnect do, and that each request ends once."""

from __future__ import annotations

import errno

import msgspec
import pytest
import trio
import trio.testing
from rpckit import OWNER, Net, Peer, Slow, running, settled

from fluxres.base.errors import IllegalTransition, RpcError
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.messages import NODEID_ANY, MessageFlag, Role, request
from fluxres.wire.payload import WireMap, pack


@pytest.fixture
def router() -> Router:
    return Router(rank=0, size=4)


@pytest.fixture
def service(router: Router) -> Service:
    return Service("toy", router)


@pytest.fixture
def client(router: Router) -> Peer:
    return Peer(router, "client")


@pytest.fixture
def handle(router: Router) -> Handle:
    return Handle(router, "test", OWNER)


# -- methods


async def test_a_method_answers_at_once(service: Service, client: Peer) -> None:
    service.method("double", lambda request: {"n": 2 * int(str(request.payload["n"]))})
    service.method("nothing", lambda request: None)
    async with running(service):
        client.send("toy.double", {"n": 4}, tag=7)
        client.send("toy.nothing", tag=8)
        client.send("toy.ping", {"seq": 1}, tag=9)
        assert client.answers() == [(7, 0, {"n": 8}), (8, 0, {}), (9, 0, {"seq": 1})]
        assert service.queue()[0] == 0


class _Ask(msgspec.Struct):
    n: int


async def test_how_a_handler_says_no(service: Service, client: Peer) -> None:
    def refuse(request: Request) -> WireMap:
        raise RpcError(errno.ENOENT, "no such thing")

    def owned(request: Request) -> WireMap:
        request.require_owner()
        return {}

    service.method("refuse", refuse)
    service.method("owned", owned)
    service.method("parse", lambda request: {"n": request.parse(_Ask).n})
    async with running(service):
        client.send("toy.refuse")
        client.send("toy.owned", role=Role.USER)
        client.send("toy.parse", {"n": "x"})
        client.send("toy.parse")
        client.send("toy.unheard")
        client.send("other.thing")
        client.send("nodot")
        assert client.answers() == [
            (1, errno.ENOENT, "no such thing"),
            (1, errno.EPERM, "toy.owned is for the instance owner"),
            (1, errno.EPROTO, "cannot take this toy.parse request: Expected `int`, got `str` - at `$.n`"),
            (1, errno.EPROTO, "cannot take this toy.parse request: Object missing required field `n`"),
            (1, errno.ENOSYS, "service toy has no method 'unheard'"),
            (1, errno.ENOSYS, "no service matches 'other.thing'"),
            (1, errno.ENOSYS, "no service matches 'nodot'"),
        ]


async def test_a_payload_that_is_no_map_is_refused(router: Router, service: Service, client: Peer) -> None:
    service.method("echo", lambda request: request.payload)
    async with running(service):
        for payload in (b"\xff", pack([1]), b"\xd8\x1c\x81\xd8\x1d\x00"):
            router.receive(client, request("toy.echo", payload, matchtag=1))
        assert client.errnums() == [errno.EPROTO] * 3


async def test_what_wants_no_response_gets_none(service: Service, client: Peer) -> None:
    seen = []

    async def task(request: Request) -> None:
        seen.append("task")

    service.method("note", lambda request: seen.append("method"))
    service.task("task", task)
    service.deferred("fail", lambda request: request.fail(errno.EINVAL))
    async with running(service):
        for topic in ("toy.note", "toy.fail", "toy.task", "toy.none", "none.none"):
            client.send(topic, tag=0)
        await settled()
        assert sorted(seen) == ["method", "task"]
        assert client.got == []
        assert service.queue()[0] == 0


# -- deferred


async def test_a_deferred_request_is_answered_later_and_once(service: Service, client: Peer) -> None:
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    async with running(service):
        client.send("toy.keep")
        assert service.queue()[0] == 1
        assert client.got == []
        kept[0].respond({"ok": True})
        assert client.answers() == [(1, 0, {"ok": True})]
        with pytest.raises(IllegalTransition, match=r"request toy\.keep"):
            kept[0].respond()
        with pytest.raises(IllegalTransition, match=r"request toy\.keep"):
            kept[0].fail(errno.EIO)
        assert len(client.got) == 1


async def test_a_cancel_reaches_a_deferred_request_once(service: Service, client: Peer) -> None:
    cancelled = []
    kept: list[Request] = []

    def keep(request: Request) -> None:
        kept.append(request)
        request.on_cancel = lambda: cancelled.append(request.message.matchtag)

    service.deferred("keep", keep)
    async with running(service):
        client.send("toy.keep", tag=5)
        client.send("toy.cancel", {"matchtag": 6}, tag=0)
        assert cancelled == []
        client.send("toy.cancel", {"matchtag": 5}, tag=0)
        client.send("toy.keep-cancel", {"matchtag": 5}, tag=0)
        assert cancelled == [5]
        kept[0].fail(errno.ECANCELED)
        assert client.errnums() == [errno.ECANCELED]


# -- tasks


async def test_a_task_answers_with_what_it_returns(service: Service, handle: Handle) -> None:
    async def slow(request: Request) -> WireMap:
        await trio.lowlevel.checkpoint()
        return {"slow": True}

    async def refuse(request: Request) -> WireMap:
        await trio.lowlevel.checkpoint()
        raise RpcError(errno.ENOSPC, "full")

    async def refuse_in_nursery(request: Request) -> WireMap:
        async with trio.open_nursery():
            raise RpcError(errno.EAGAIN, "later")

    service.task("slow", slow)
    service.task("refuse", refuse)
    service.task("nursery", refuse_in_nursery)
    async with running(service):
        assert await handle.call("toy.slow") == {"slow": True}
        for topic, errnum in (("toy.refuse", errno.ENOSPC), ("toy.nursery", errno.EAGAIN)):
            with pytest.raises(RpcError) as caught:
                await handle.call(topic)
            assert caught.value.errnum == errnum


async def test_cancelling_the_awaiting_scope_cancels_the_task(service: Service, handle: Handle) -> None:
    slow = Slow(service)
    async with running(service), trio.open_nursery() as nursery:
        nursery.start_soon(handle.call, "toy.wait")
        await slow.started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await slow.cancelled.wait()
    assert service.queue()[0] == 0


async def test_a_cancel_is_answered_with_ecanceled(service: Service, client: Peer) -> None:
    slow = Slow(service)
    async with running(service):
        client.send("toy.wait", tag=3)
        await slow.started.wait()
        client.send("toy.cancel", {"matchtag": 3}, tag=0)
        await settled()
        assert client.answers() == [(3, errno.ECANCELED, "toy.wait was cancelled")]


async def test_a_cancel_right_behind_its_request_is_not_lost(service: Service, client: Peer) -> None:
    """Both may come in one read, before the task has run at all."""
    slow = Slow(service)
    async with running(service):
        client.send("toy.wait", tag=3)
        client.send("toy.cancel", {"matchtag": 3}, tag=0)
        await settled()
        assert client.errnums() == [errno.ECANCELED]
        assert not slow.started.is_set() or slow.cancelled.is_set()


async def test_nobody_cancels_the_request_of_another(router: Router, service: Service, client: Peer) -> None:
    slow = Slow(service)
    other = Peer(router, "other")
    async with running(service):
        client.send("toy.wait", tag=3)
        await slow.started.wait()
        other.send("toy.cancel", {"matchtag": 3}, tag=0)
        other.send("toy.disconnect", tag=0)
        other.send("toy.cancel", {"matchtag": "x"}, tag=0)
        other.send("toy.cancel", tag=0)
        await settled()
        assert service.queue()[0] == 1
        assert client.got == []


@pytest.mark.parametrize("topic", ["toy.cancel", "toy.wait-cancel", "toy.disconnect"])
async def test_even_a_cancel_that_wants_a_response_gets_one(service: Service, client: Peer, topic: str) -> None:
    async with running(service):
        client.send(topic, {"matchtag": 3})
        assert client.errnums() == [errno.EPROTO]


async def test_a_requester_that_goes_has_its_requests_cancelled(
    router: Router, service: Service, client: Peer, handle: Handle
) -> None:
    slow = Slow(service)
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    async with running(service):
        client.send("toy.wait", tag=3)
        client.send("toy.keep", tag=4)
        await slow.started.wait()
        router.remove_endpoint(client, "gone")
        await slow.cancelled.wait()
        assert service.queue()[0] == 0
        kept[0].respond({})  # nobody is there to hear it
        assert client.got == []
        router.remove_endpoint(client, "gone")


async def test_a_lost_child_takes_the_requests_of_its_subtree_along(router: Router, service: Service) -> None:
    slow = Slow(service)
    child = Peer(router, "child")
    async with running(service):
        child.send("toy.wait", tag=3, route=("grandchild-client", "grandchild"))
        await slow.started.wait()
        router.remove_endpoint(child, "lost")
        await slow.cancelled.wait()
        assert service.queue()[0] == 0


async def test_a_service_that_stops_lets_its_requesters_go(service: Service, client: Peer) -> None:
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    async with running(service):
        client.send("toy.keep")
    assert client.got == []
    kept[0].respond({})
    kept[0].fail(errno.EIO)
    assert client.got == []
    client.send("toy.ping", tag=2)
    assert client.errnums() == [errno.ENOSYS]


async def test_a_task_that_is_woken_as_its_service_stops(service: Service, client: Peer) -> None:
    """It returns into a service that has gone: no error, and no answer."""
    event = trio.Event()

    async def wait(request: Request) -> WireMap:
        await event.wait()
        return {}

    service.task("wait", wait)
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        client.send("toy.wait")
        await settled()
        event.set()
        nursery.cancel_scope.cancel()
    assert client.errnums() in ([], [0])


async def test_a_method_of_rank_0_is_answered_there(service: Service, client: Peer) -> None:
    """The other ranks have the service as well, and send these requests on, whoever they are from."""
    net = Net()
    below = Service("toy", net.router)
    for each in (service, below):
        each.upstream("note")
        each.method("note", lambda request: {"user": request.userid})
    async with running(service, below):
        client.send("toy.note")
        assert client.answers() == [(1, 0, {"user": OWNER})]
        for source in (net.client, net.child):
            source.send("toy.note", tag=5, nodeid=1)
            source.send("toy.cancel", {"matchtag": 5}, tag=0, nodeid=1)
        assert [(m.topic, m.nodeid, m.flags, m.route) for m in net.parent.got] == [
            ("toy.note", NODEID_ANY, MessageFlag.NONE, ("client",)),
            ("toy.cancel", NODEID_ANY, MessageFlag.NORESPONSE, ("client",)),
            ("toy.note", NODEID_ANY, MessageFlag.NONE, ("child",)),
            ("toy.cancel", NODEID_ANY, MessageFlag.NORESPONSE, ("child",)),
        ]
        assert len(net.router.tracker) == 2
        assert below.waiting() == []


async def test_what_a_cancelled_request_answers_for_another_is_no_trouble(
    router: Router, service: Service, client: Peer
) -> None:
    kept: list[Request] = []

    def fail_all() -> None:
        for other in kept:
            if other.ended is None:
                other.fail(errno.ECANCELED)

    def keep(request: Request) -> None:
        kept.append(request)
        request.on_cancel = fail_all

    service.deferred("keep", keep)
    async with running(service):
        client.send("toy.keep", tag=1)
        client.send("toy.keep", tag=2)
        router.remove_endpoint(client, "gone")
        assert service.queue()[0] == 0
