"""The local connector over a real Unix socket: who may come in, what a bad or slow client does to itself, and to nobody
else."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fluxres.base.errors import FluxresError
from fluxres.broker import connector as module
from fluxres.broker.connector import Connector
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import Message, MessageFlag, MessageType, Role, request
from fluxres.wire.payload import WireMap, pack, unpack_map

PATIENCE = 30.0
"""Seconds to wait for what must happen."""
POLL = 0.001
MANY = 300
"""Responses of a stream that is more than a socket and `ROOM` hold."""
CHUNK = bytes(16 * 1024)
ROOM = 64 * 1024

settled = trio.testing.wait_all_tasks_blocked


class Client:
    """One connection, its welcome byte read."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.welcome = b""
        self._decoder = FrameDecoder()
        self._frames: list[bytes] = []

    async def send(
        self, topic: str, payload: WireMap | None = None, *, tag: int = 1, flags: int = MessageFlag.NONE
    ) -> None:
        await self.raw(frame(encode(asked(topic, payload, tag=tag, flags=flags))))

    async def raw(self, data: bytes) -> None:
        with trio.fail_after(PATIENCE):
            while data:
                data = data[await self.sock.send(data) :]

    async def next(self) -> Message | None:
        """The next message, None at the end of the connection."""
        with trio.fail_after(PATIENCE):
            while not self._frames:
                try:
                    data = await self.sock.recv(65536)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self._frames += self._decoder.feed(data)
        return decode(self._frames.pop(0))

    async def call(self, topic: str, payload: WireMap | None = None) -> WireMap:
        await self.send(topic, payload)
        answer = await self.next()
        assert answer is not None
        assert answer.errnum == 0
        return unpack_map(answer.payload)


def asked(topic: str, payload: WireMap | None = None, *, tag: int = 1, flags: int = MessageFlag.NONE) -> Message:
    return request(topic, None if payload is None else pack(payload), matchtag=tag, flags=flags)


class Broker:
    """A router with the connector and a service `toy`."""

    def __init__(self, path: Path, *, owner: int | None = None, guests: bool = False) -> None:
        self.path = path
        self.router = Router(rank=0, size=1)
        self.toy = Service("toy", self.router)
        self.connector = Connector(str(path), self.router, owner=os.getuid() if owner is None else owner, guests=guests)
        self.produced = 0
        self.cancelled = trio.Event()
        self._clients = AsyncExitStack()
        self.toy.method("who", _who)
        self.toy.method("big", self._big)
        self.toy.task("flood", self._flood)
        self.toy.task("wait", self._wait)

    def _big(self, request: Request) -> WireMap:
        self.produced += 1
        return {"data": CHUNK}

    async def _flood(self, request: Request) -> None:
        for _ in range(MANY):
            self.produced += 1
            await request.stream({"data": CHUNK})

    async def _wait(self, request: Request) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()

    @property
    def endpoints(self) -> int:
        return len(self.router._endpoints)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Broker]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.toy.run)
            await nursery.start(self.connector.run)
            async with self._clients:
                yield self
            nursery.cancel_scope.cancel()

    async def connect(self) -> Client:
        """A new client; closed when the broker is."""
        sock = trio.socket.socket(socket.AF_UNIX)
        self._clients.callback(sock.close)
        directory = os.open(self.path.parent, os.O_PATH)
        try:
            await sock.connect(f"/proc/self/fd/{directory}/{self.path.name}")
        finally:
            os.close(directory)
        client = Client(sock)
        with trio.fail_after(PATIENCE):
            client.welcome = await sock.recv(1)
        return client


def _who(request: Request) -> WireMap:
    message = request.message
    return {"userid": message.userid, "rolemask": message.rolemask, "route": list(message.route)}


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return Broker(tmp_path / "run" / "local-0")


async def until(condition: Callable[[], bool]) -> None:
    """Poll, with a bound."""
    for _ in range(int(PATIENCE / POLL)):
        if condition():
            return
        await trio.sleep(POLL)
    raise AssertionError("what must happen has not")


async def gone(client: Client) -> bool:
    return await client.next() is None


# -- who may come in


async def test_a_client_is_who_the_kernel_says(broker: Broker) -> None:
    async with broker.running():
        client = await broker.connect()
        assert client.welcome == b"\0"
        claimed = asked("toy.who")._replace(userid=0xBAD, rolemask=0xFF, route=("someone", "else"))
        await client.raw(frame(encode(claimed)))
        answer = await client.next()
        assert answer is not None
        told = unpack_map(answer.payload)
        assert (told["userid"], told["rolemask"]) == (os.getuid(), Role.OWNER | Role.LOCAL)
        assert isinstance(told["route"], list)
        assert len(told["route"]) == 1
        assert answer.route == ()
        assert stat.S_IMODE(broker.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(broker.path.parent.stat().st_mode) == 0o700


async def test_another_user_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Broker(tmp_path / "sock", owner=os.getuid() + 1).running() as broker:
        client = await broker.connect()
        assert client.welcome == bytes([errno.EPERM])
        assert await gone(client)
        assert broker.endpoints == 0
    assert f"refusing a client of uid {os.getuid()}: Operation not permitted" in caplog.text


async def test_a_guest_comes_in_where_guests_may(tmp_path: Path) -> None:
    async with Broker(tmp_path / "sock", owner=os.getuid() + 1, guests=True).running() as broker:
        client = await broker.connect()
        assert client.welcome == b"\0"
        assert (await client.call("toy.who"))["rolemask"] == Role.USER | Role.LOCAL
        assert stat.S_IMODE(broker.path.stat().st_mode) == 0o666


async def test_clients_are_bounded(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLIENTS", 1)
    async with broker.running():
        first = await broker.connect()
        await first.call("toy.ping")
        second = await broker.connect()
        assert second.welcome == bytes([errno.EAGAIN])
        assert await gone(second)
        first.sock.close()
        await until(lambda: not broker.endpoints)
        assert (await broker.connect()).welcome == b"\0"


async def test_no_descriptor_left_is_not_the_end(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """The client waits in the backlog until there is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sock = trio.socket.socket(socket.AF_UNIX)
    with caplog.at_level(logging.WARNING, "fluxres.connector"):
        async with broker.running():
            probe = os.dup(0)
            os.close(probe)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
                await sock.connect(str(broker.path))
                await until(lambda: "cannot accept a client now" in caplog.text)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with trio.fail_after(PATIENCE):
                assert await sock.recv(1) == b"\0"
            sock.close()


# -- messages


async def test_requests_may_come_byte_by_byte(broker: Broker) -> None:
    async with broker.running():
        client = await broker.connect()
        for byte in frame(encode(asked("toy.ping", {"n": 1}))):
            await client.raw(bytes([byte]))
        answer = await client.next()
        assert answer is not None
        assert unpack_map(answer.payload) == {"n": 1}


async def test_many_requests_in_one_read(broker: Broker) -> None:
    async with broker.running():
        client = await broker.connect()
        await client.raw(b"".join(frame(encode(asked("toy.ping", {"n": tag}, tag=tag))) for tag in range(1, 500)))
        for tag in range(1, 500):
            answer = await client.next()
            assert answer is not None
            assert (answer.matchtag, unpack_map(answer.payload)) == (tag, {"n": tag})


GARBAGE = [
    (b"GET / HTTP/1.1\r\n\r\n", "cannot read a frame of 1195725856 bytes"),
    (struct.pack(">I", 1 << 30), "cannot read a frame of 1073741824 bytes"),
    (frame(b""), "cannot decode a message of 0 bytes"),
    (frame(b"\xff" * 100), "cannot decode a message of 100 bytes"),
    (frame(encode(asked("toy.ping")) + b"\0"), "it ends at byte"),
    (frame(encode(Message(MessageType.RESPONSE, "toy.ping"))), "cannot take a response from a client"),
    (frame(encode(Message(MessageType.EVENT, "toy.ping"))), "cannot take a event from a client"),
    (frame(encode(Message(MessageType.CONTROL))), "cannot take a control from a client"),
]


@pytest.mark.parametrize(("data", "why"), GARBAGE)
async def test_garbage_closes_its_connection_and_no_other(
    broker: Broker, caplog: pytest.LogCaptureFixture, data: bytes, why: str
) -> None:
    async with broker.running():
        good, bad = await broker.connect(), await broker.connect()
        await bad.raw(data)
        assert await gone(bad)
        assert (await good.call("toy.ping", {"n": 1})) == {"n": 1}
        assert broker.endpoints == 1
    assert why in caplog.text


async def test_what_came_before_the_garbage_is_answered(broker: Broker) -> None:
    async with broker.running():
        client = await broker.connect()
        await client.raw(frame(encode(asked("toy.ping", {"n": 1}))) + frame(b"\xff"))
        answer = await client.next()
        assert answer is not None
        assert answer.errnum == 0
        assert await gone(client)


async def test_a_payload_of_nonsense_is_the_senders_error_only(broker: Broker) -> None:
    """One that contains itself, say: it comes as an opaque byte string and fails where it is decoded."""
    async with broker.running():
        client = await broker.connect()
        await client.raw(frame(encode(asked("toy.ping")._replace(payload=b"\xd8\x1c\x81\xd8\x1d\x00"))))
        answer = await client.next()
        assert answer is not None
        assert answer.errnum == errno.EPROTO
        assert await client.call("toy.ping") == {}


# -- clients that go


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR, None])
async def test_a_disconnect_cancels(broker: Broker, how: int | None) -> None:
    async with broker.running():
        client = await broker.connect()
        await client.send("toy.wait")
        await client.send("toy.ping", tag=2)
        assert await client.next() is not None
        if how is None:
            client.sock.close()
        else:
            client.sock.shutdown(how)
        with trio.fail_after(PATIENCE):
            await broker.cancelled.wait()
        await until(lambda: not broker.endpoints)
        assert broker.toy.queue()[0] == 0


async def test_a_cancel_from_a_client(broker: Broker) -> None:
    async with broker.running():
        client = await broker.connect()
        await client.raw(
            frame(encode(asked("toy.wait", tag=7))) + frame(encode(asked("toy.cancel", {"matchtag": 7}, tag=0)))
        )
        answer = await client.next()
        assert answer is not None
        assert (answer.matchtag, answer.errnum) == (7, errno.ECANCELED)


# -- clients that do not read


async def test_a_client_that_does_not_read_is_closed_at_the_bound(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "OUTBOX_BOUND", 4 * ROOM)
    async with broker.running():
        other = await broker.connect()
        client = await broker.connect()
        # All in one read: nothing else runs until they are dealt with, and still the bound holds.
        await client.raw(b"".join(frame(encode(asked("toy.big", tag=tag))) for tag in range(1, 1000)))
        await until(lambda: broker.endpoints == 1)
        assert 4 * ROOM / len(CHUNK) <= broker.produced < 8 * ROOM / len(CHUNK) + _socket_room()
        while await client.next() is not None:
            pass
        assert await other.call("toy.ping") == {}
    assert caplog.text.count("it does not read") == 1


def _socket_room() -> float:
    """About how many chunks the socket itself holds."""
    with socket.socket(socket.AF_UNIX) as sock:
        return 4 * sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) / len(CHUNK)


async def test_the_producers_of_streams_wait_for_a_slow_reader(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them: each goes on when there is room again."""
    monkeypatch.setattr(module, "OUTBOX_ROOM", ROOM)
    streams = 3
    async with broker.running():
        client = await broker.connect()
        for tag in range(1, streams + 1):
            await client.send("toy.flood", tag=tag, flags=MessageFlag.STREAMING)
        await until(lambda: len(broker.toy._open) == streams)
        await settled()
        assert broker.produced < ROOM / len(CHUNK) + _socket_room() + streams < MANY
        counts = dict.fromkeys(range(1, streams + 1), 0)
        ended = 0
        while ended < streams:
            answer = await client.next()
            assert answer is not None
            if answer.errnum:
                assert answer.errnum == errno.ENODATA
                ended += 1
            else:
                counts[answer.matchtag] += 1
        assert counts == dict.fromkeys(counts, MANY)
        assert not broker.toy._open


async def test_a_slow_reader_that_goes_ends_its_streams(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTBOX_ROOM", ROOM)
    async with broker.running():
        client = await broker.connect()
        await client.send("toy.flood", flags=MessageFlag.STREAMING)
        await until(lambda: broker.produced > 0)
        await settled()
        client.sock.close()
        await until(lambda: not broker.toy._open and not broker.endpoints)
        assert broker.produced < MANY


# -- the end of an incarnation


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does not read"])
async def test_a_client_has_its_answers_before_the_broker_ends(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    """All that it was answered is more than the socket holds; one that does not read is not waited for."""
    monkeypatch.setattr(module, "LAST_WORDS", PATIENCE if reads else POLL)
    heard: list[int] = []

    async def read(client: Client) -> None:
        while (answer := await client.next()) is not None:
            heard.append(answer.matchtag)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as reader, trio.open_nursery() as incarnation:
            await incarnation.start(broker.toy.run)
            await incarnation.start(broker.connector.run)
            client = await broker.connect()
            await client.raw(b"".join(frame(encode(asked("toy.big", tag=tag))) for tag in range(1, MANY + 1)))
            await until(lambda: broker.produced == MANY)
            if reads:
                reader.start_soon(read, client)
            incarnation.cancel_scope.cancel()
        assert broker.endpoints == 0
        await read(client)
    client.sock.close()
    assert heard == list(range(1, len(heard) + 1))
    assert (len(heard) == MANY) is reads


# -- the socket


async def test_the_socket_stays_for_the_next_incarnation_until_it_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    for _ in range(2):
        made = Broker(path)
        async with made.running() as broker:
            client = await broker.connect()
            assert await client.call("toy.ping") == {}
        assert os.listdir(tmp_path) == ["sock"]
    made.connector.remove()
    assert os.listdir(tmp_path) == []


async def test_the_socket_of_a_killed_broker_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    for name in (path, tmp_path / ".sock.new"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(name))
    async with Broker(path).running() as broker:
        assert (await broker.connect()).welcome == b"\0"


async def test_a_path_may_be_long(tmp_path: Path) -> None:
    async with Broker(tmp_path / ("d" * 120) / "sock").running() as broker:
        assert (await broker.connect()).welcome == b"\0"


async def test_a_socket_that_cannot_be_made_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    connector = Connector(str(tmp_path / "file" / "sock"), Router(rank=0, size=1), owner=0, guests=False)
    with pytest.raises(FluxresError, match=r"cannot listen on .*/file/sock: File exists"):
        await connector.run()
