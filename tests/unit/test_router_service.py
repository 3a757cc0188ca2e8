"""Router, services and handles together: who answers, what a failing handler does, and that each request ends once."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from fluxres.base.errors import IllegalTransition, RpcError
from fluxres.rpc import server
from fluxres.rpc.handle import STREAM_BUFFER, Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
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
from fluxres.wire.payload import WireMap, pack, unpack_map

OWNER = 1000
STREAMING = MessageFlag.STREAMING


class Peer:
    """An endpoint that keeps what it is given: a client, or another broker."""

    def __init__(self, router: Router, name: str) -> None:
        self.id = name
        self.got: list[Message] = []
        self._router = router
        router.add_endpoint(self)

    def deliver(self, message: Message) -> None:
        self.got.append(message)

    async def drained(self, matchtag: int) -> None:
        await trio.lowlevel.checkpoint()

    def send(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        tag: int = 1,
        flags: int = MessageFlag.NONE,
        nodeid: int = NODEID_ANY,
        role: int = Role.OWNER,
        route: tuple[str, ...] = (),
    ) -> Message:
        asked = request(
            topic,
            None if payload is None else pack(payload),
            matchtag=tag,
            flags=flags,
            nodeid=nodeid,
            userid=OWNER,
            rolemask=role,
        )._replace(route=route)
        self._router.receive(self, asked)
        return asked

    def answers(self) -> list[tuple[int, int, WireMap | str]]:
        """The responses so far: matchtag, errnum, payload or text."""
        return [
            (m.matchtag, m.errnum, (m.payload or b"").decode() if m.errnum else unpack_map(m.payload)) for m in self.got
        ]

    def errnums(self) -> list[int]:
        return [message.errnum for message in self.got]


@asynccontextmanager
async def running(*services: Service) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for service in services:
            await nursery.start(service.run)
        yield
        nursery.cancel_scope.cancel()


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


settled = trio.testing.wait_all_tasks_blocked


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


async def test_a_handle_calls(service: Service, handle: Handle) -> None:
    def who(request: Request) -> WireMap:
        request.require_owner()
        return {"userid": request.userid, "route": list(request.message.route)}

    service.method("who", who)
    async with running(service):
        assert await handle.call("toy.who") == {"userid": OWNER, "route": ["test@0"]}


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


class Slow:
    """A task that waits, and tells how it ended."""

    def __init__(self, service: Service) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        service.task("wait", self._wait)

    async def _wait(self, request: Request) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


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


# -- bugs in handlers


def _fails(request: Request) -> WireMap:
    raise ZeroDivisionError("a bug")


async def _fails_in_task(request: Request) -> WireMap:
    await trio.lowlevel.checkpoint()
    return _fails(request)


async def _fails_in_nursery(request: Request) -> WireMap:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fails_in_task, request)
    return {}


@pytest.mark.parametrize(
    "register",
    [
        lambda service: service.method("bug", _fails),
        lambda service: service.deferred("bug", _fails),
        lambda service: service.task("bug", _fails_in_task),
        lambda service: service.task("bug", _fails_in_nursery),
    ],
)
async def test_a_bug_answers_its_request_and_ends_the_service(
    service: Service, client: Peer, register: Callable[[Service], None]
) -> None:
    register(service)
    with pytest.raises(ExceptionGroup) as caught:
        async with running(service):
            client.send("toy.bug")
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError, match="a bug")
    assert client.errnums() == [errno.ENOTRECOVERABLE]
    assert service.queue()[0] == 0


async def test_a_response_that_is_sent_twice_is_a_bug(service: Service, client: Peer) -> None:
    def twice(request: Request) -> None:
        request.respond({})
        request.respond({})

    service.deferred("twice", twice)
    with pytest.raises(ExceptionGroup) as caught:
        async with running(service):
            client.send("toy.twice")
            await trio.sleep_forever()
    assert caught.value.split(IllegalTransition)[1] is None
    assert client.errnums() == [0]


# -- streams


def counting(service: Service, upto: int) -> list[int]:
    """A stream of numbers; the list has those that were produced."""
    produced: list[int] = []

    async def count(request: Request) -> None:
        for number in range(upto):
            produced.append(number)
            await request.stream({"n": number})

    service.task("count", count)
    return produced


async def test_a_stream_ends_with_enodata(service: Service, handle: Handle) -> None:
    counting(service, 3 * STREAM_BUFFER)
    async with running(service), handle.stream("toy.count") as stream:
        assert [reply["n"] async for reply in stream] == list(range(3 * STREAM_BUFFER))
        assert [reply async for reply in stream] == []


async def test_a_slow_reader_holds_its_producer_up(service: Service, handle: Handle) -> None:
    produced = counting(service, 10 * STREAM_BUFFER)
    async with running(service):
        async with handle.stream("toy.count") as stream:
            await settled()
            assert len(produced) == STREAM_BUFFER
            await anext(stream)
            await settled()
            assert len(produced) == STREAM_BUFFER + 1
        await settled()
        assert len(produced) <= STREAM_BUFFER + 2
        assert service.queue()[0] == 0


async def test_leaving_a_stream_cancels_it(service: Service, handle: Handle) -> None:
    slow = Slow(service)
    async with running(service):
        async with handle.stream("toy.wait"):
            await slow.started.wait()
        await slow.cancelled.wait()


async def test_a_stream_that_fails_raises_for_its_reader(service: Service, handle: Handle) -> None:
    async def fail(request: Request) -> None:
        await request.stream({"n": 1})
        raise RpcError(errno.EIO, "torn")

    service.task("fail", fail)
    async with running(service), handle.stream("toy.fail") as stream:
        assert (await anext(stream))["n"] == 1
        for _ in range(2):
            with pytest.raises(RpcError, match="torn"):
                await anext(stream)


async def test_a_stream_wants_a_streaming_request(service: Service, client: Peer) -> None:
    produced = counting(service, 1000)
    async with running(service):
        client.send("toy.count", tag=4)
        client.send("toy.count", tag=0, flags=STREAMING | MessageFlag.NORESPONSE)
        await settled()
        assert client.answers() == [(4, errno.EPROTO, "toy.count wants a streaming request")]
        assert produced == [0, 0]


async def test_tasks_that_nobody_waits_for_are_bounded_and_end_with_their_requester(
    router: Router, service: Service, client: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_SILENT", 3)
    running_now: list[int] = []

    async def wait(request: Request) -> None:
        running_now.append(1)
        try:
            await trio.sleep_forever()
        finally:
            running_now.pop()

    service.task("wait", wait)
    async with running(service):
        other = Peer(router, "other")
        other.send("toy.wait", tag=0)
        for _ in range(4):
            client.send("toy.wait", tag=0)
        await settled()
        assert len(running_now) == 3
        router.remove_endpoint(client, "gone")
        await settled()
        assert len(running_now) == 1
        for _ in range(3):
            other.send("toy.wait", tag=0)
        await settled()
        assert len(running_now) == 3


async def test_a_streaming_request_ends_whatever_its_handler_is(service: Service, client: Peer) -> None:
    async def task(request: Request) -> WireMap:
        await trio.lowlevel.checkpoint()
        return {"kind": "task"}

    service.method("method", lambda request: {"kind": "method"})
    service.deferred("deferred", lambda request: request.respond({"kind": "deferred"}))
    service.task("task", task)
    async with running(service):
        for kind in ("method", "deferred", "task"):
            client.got.clear()
            client.send(f"toy.{kind}", flags=STREAMING)
            await settled()
            assert client.answers() == [(1, 0, {"kind": kind}), (1, errno.ENODATA, "")]
        assert not service._open


# -- bounds


async def test_open_requests_are_bounded(monkeypatch: pytest.MonkeyPatch, service: Service, client: Peer) -> None:
    monkeypatch.setattr(server, "MAX_OPEN", 2)
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    async with running(service):
        for tag in (1, 2, 3):
            client.send("toy.keep", tag=tag)
        assert client.answers() == [(3, errno.EAGAIN, "cannot take toy.keep: 2 requests are waiting")]
        kept[0].respond()
        client.send("toy.keep", tag=3)
        assert service.queue()[0] == 2


async def test_a_matchtag_in_use_is_refused(service: Service, client: Peer) -> None:
    kept: list[Request] = []
    service.deferred("keep", kept.append)
    async with running(service):
        client.send("toy.keep", tag=1)
        client.send("toy.keep", tag=1)
        assert client.answers() == [(1, errno.EAGAIN, "cannot take toy.keep: its matchtag is in use")]
        assert len(kept) == 1


async def test_a_response_that_no_frame_holds_is_an_error(service: Service, client: Peer) -> None:
    big = bytes(server.MAX_PAYLOAD)

    async def stream(request: Request) -> None:
        await request.stream({"ok": 1})
        await request.stream({"big": big})

    service.method("method", lambda request: {"big": big})
    service.deferred("deferred", lambda request: request.respond({"big": big}))
    service.task("stream", stream)
    async with running(service):
        client.send("toy.method")
        client.send("toy.deferred")
        client.send("toy.stream", flags=STREAMING)
        await settled()
        assert client.errnums() == [errno.EMSGSIZE, errno.EMSGSIZE, 0, errno.EMSGSIZE]
        assert "the bound is" in str(client.answers()[0][2])


async def test_the_oldest_request_is_known(
    autojump_clock: trio.testing.MockClock, service: Service, client: Peer
) -> None:
    service.deferred("keep", lambda request: None)
    async with running(service):
        begin = trio.current_time()
        client.send("toy.keep", tag=1)
        await trio.sleep(5)
        client.send("toy.keep", tag=2)
        client.send("toy.keep", tag=3, flags=STREAMING)
        assert service.queue() == (2, begin)


# -- routing


class Net:
    """A router of rank 1 with a parent and one child, of ranks 2 and 3."""

    def __init__(self) -> None:
        self.router = Router(rank=1, size=5)
        self.parent = Peer(self.router, "parent")
        self.child = Peer(self.router, "child")
        self.client = Peer(self.router, "client")
        self.below: dict[int, Peer] = {2: self.child, 3: self.child}
        self.router.use_overlay(self.parent, self.below.get)


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
        (4, "toy.ping", MessageFlag.NONE, "parent"),
        (2, "toy.ping", MessageFlag.NONE, "child"),
        (3, "toy.ping", MessageFlag.NONE, "child"),
        (5, "toy.ping", MessageFlag.NONE, "EHOSTUNREACH"),
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
    """Rank 3 is lost here, and the parent does not know yet: the two would send it to and fro."""
    net = Net()
    del net.below[3]
    net.parent.send("toy.ping", nodeid=3, route=("far-client",))
    assert net.parent.answers() == [(1, errno.EHOSTUNREACH, "rank 3 is not reachable")]
    assert net.parent.got[0].route == ("far-client",)
    assert net.child.got == []


def test_a_route_that_is_too_long_is_refused_with_an_answer() -> None:
    net = Net()
    net.child.send("toy.ping", route=("x",) * (MAX_ROUTE - 1))
    assert len(net.parent.got[0].route) == MAX_ROUTE
    net.child.send("toy.ping", route=("x",) * MAX_ROUTE)
    assert len(net.parent.got) == 1
    assert net.child.errnums() == [errno.EPROTO]
    assert len(net.child.got[0].route) == MAX_ROUTE


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


async def test_a_call_to_a_lost_rank_ends_without_a_timeout() -> None:
    net = Net()
    handle = Handle(net.router, "h", OWNER)
    async with trio.open_nursery() as nursery:

        async def lose() -> None:
            await settled()
            net.router.remove_endpoint(net.child, "rank 2 is lost")

        nursery.start_soon(lose)
        with pytest.raises(RpcError, match="rank 2 is lost") as caught:
            await handle.call("far.thing", nodeid=2)
        assert caught.value.errnum == errno.EHOSTUNREACH
    assert len(net.router.tracker) == 0


async def test_a_cancelled_call_over_a_hop_ends_when_the_hop_says_so() -> None:
    net = Net()
    handle = Handle(net.router, "h", OWNER)
    with trio.move_on_after(0):
        await handle.call("far.thing", nodeid=2)
    asked, cancel = net.child.got
    assert (cancel.topic, unpack_map(cancel.payload)) == ("far.cancel", {"matchtag": asked.matchtag})
    assert len(net.router.tracker) == 1
    net.router.receive(net.child, response_to(asked, errnum=errno.ECANCELED))
    assert len(net.router.tracker) == 0


async def test_a_handle_that_is_closed_ends_its_calls(service: Service, handle: Handle) -> None:
    slow = Slow(service)
    errors: list[int] = []

    async def call() -> None:
        with pytest.raises(RpcError, match="the handle is closed") as caught:
            await handle.call("toy.wait")
        errors.append(caught.value.errnum)

    async with running(service):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await slow.started.wait()
            handle.close()
            await slow.cancelled.wait()
        await call()
    assert errors == [errno.ECONNRESET] * 2
