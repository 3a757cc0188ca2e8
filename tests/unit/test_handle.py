"""Handles: calls and streams inside a broker."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing
from rpckit import OWNER, STREAMING, Net, Peer, Slow, counting, running, settled

from fluxres.base.errors import RpcError
from fluxres.rpc.handle import STREAM_BUFFER, Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.messages import (
    MessageFlag,
    response_to,
)
from fluxres.wire.payload import WireMap, unpack_map


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


# -- streams


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


# -- handles


async def test_a_handle_calls(service: Service, handle: Handle) -> None:
    def who(request: Request) -> WireMap:
        request.require_owner()
        return {"userid": request.userid, "route": list(request.message.route)}

    service.method("who", who)
    async with running(service):
        assert await handle.call("toy.who") == {"userid": OWNER, "route": ["test@0"]}


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
