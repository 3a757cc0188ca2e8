"""Services where something is wrong or too much: bugs in handlers, bounds, and what waits how long."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
import trio.testing
from rpckit import STREAMING, Peer, running, settled

from fluxres.base.errors import IllegalTransition
from fluxres.rpc import server
from fluxres.rpc.router import MAX_PAYLOAD, Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap


@pytest.fixture
def router() -> Router:
    return Router(rank=0, size=4)


@pytest.fixture
def service(router: Router) -> Service:
    return Service("toy", router)


@pytest.fixture
def client(router: Router) -> Peer:
    return Peer(router, "client")


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
    big = bytes(MAX_PAYLOAD)

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
    """A stream waits until its first response; after that it has been answered, however long it goes on."""
    begun = trio.Event()

    async def stream(request: Request) -> None:
        await begun.wait()
        await request.stream({})
        await trio.sleep_forever()

    service.deferred("keep", lambda request: None)
    service.task("stream", stream)
    async with running(service):
        begin = trio.current_time()
        assert (service.queue(), service.waiting()) == ((0, begin), [])
        client.send("toy.stream", tag=3, flags=STREAMING)
        await trio.sleep(5)
        client.send("toy.keep", tag=1)
        client.send("toy.keep", tag=2)
        await settled()
        assert service.queue() == (3, begin)
        first, second, third = service.waiting()
        assert [waiting.message.matchtag for waiting in (first, second, third)] == [3, 1, 2]
        assert first.task is not None
        assert first.task.name == "toy.stream"
        assert second.task is third.task is None
        begun.set()
        await settled()
        assert service.queue() == (2, begin + 5)


async def test_what_answers_at_once_is_served_when_too_many_wait(
    monkeypatch: pytest.MonkeyPatch, service: Service, client: Peer
) -> None:
    monkeypatch.setattr(server, "MAX_OPEN", 1)
    service.deferred("keep", lambda request: None)
    async with running(service):
        client.send("toy.keep", tag=1)
        client.send("toy.ping", tag=2)
        client.send("toy.ping", tag=1)
        assert client.answers() == [(2, 0, {}), (1, errno.EAGAIN, "cannot take toy.ping: its matchtag is in use")]
