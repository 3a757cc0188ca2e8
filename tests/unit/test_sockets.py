"""The overlay's connections over real sockets: Unix, TCP and TLS; what comes over, what ends it, and who is let in."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from tlskit import make_cert

from fluxres.base.errors import ProtocolError, Refusal
from fluxres.overlay import sockets as module
from fluxres.overlay import tcp
from fluxres.overlay.address import Address, Addresses, TcpAddress, UnixAddress
from fluxres.overlay.errors import ConnectError
from fluxres.overlay.sockets import PREFACE, SocketConnection, SocketListener, SocketTransport
from fluxres.wire.framing import MAX_FRAME, frame

PATIENCE = 30.0
"""Seconds to wait for what must happen."""
CHUNK = bytes(64 * 1024)

settled = trio.testing.wait_all_tasks_blocked


class Network:
    """The address of one listening broker, and transports to and of it."""

    def __init__(self, address: Address, cert: str | None, timeout: float = PATIENCE) -> None:
        self.addresses = Addresses(bind=self._find, connect=self._find, connect_timeout=timeout, cert=cert)
        self._address = address

    def _find(self, rank: int) -> Address:
        return self._address

    def transport(self, cert: str | None = "") -> SocketTransport:
        return SocketTransport(self.addresses if cert == "" else replace(self.addresses, cert=cert), rank=0)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[SocketListener]:
        listener = await self.transport().listen()
        if isinstance(self._address, TcpAddress):
            self._address = TcpAddress(
                "localhost" if self._address.host == "*" else self._address.host, listener.address[1]
            )
        try:
            yield listener
        finally:
            listener.close()

    @property
    def address(self) -> Address:
        return self._address

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[SocketConnection, SocketConnection]]:
        """A dialler and its acceptor, both through their handshake and running."""
        async with self.listening() as listener, trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE):
                dialler = await self.transport().connect(0)
                acceptor = await listener.accept()
                for each in (dialler, acceptor):
                    nursery.start_soon(each.run)
                async with trio.open_nursery() as both:
                    both.start_soon(dialler.handshake)
                    both.start_soon(acceptor.handshake)
                yield dialler, acceptor
                dialler.close()
                acceptor.close()

    def stranger(self) -> socket.socket:
        """A raw connection."""
        if isinstance(self._address, UnixAddress):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self._address.path)
            return sock
        return socket.create_connection((self._address.host, self._address.port))


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6 here")


@pytest.fixture(scope="module")
def cert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cert(tmp_path_factory.mktemp("sockets") / "cert")


@pytest.fixture
def unix(tmp_path: Path) -> Network:
    return Network(UnixAddress(str(tmp_path / "tbon-0")), None)


@pytest.fixture
def plain() -> Network:
    return Network(TcpAddress("127.0.0.1", 0), None)


@pytest.fixture
def tls(cert: str) -> Network:
    return Network(TcpAddress("127.0.0.1", 0), cert)


@pytest.fixture(params=["unix", "plain", "tls"])
def network(request: pytest.FixtureRequest) -> Network:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Network)
    return found


async def gather(connection: SocketConnection, count: int) -> list[bytes]:
    bodies: list[bytes] = []
    while len(bodies) < count:
        more = await connection.receive()
        assert more, "the connection has ended"
        bodies += more
    return bodies


# -- frames


async def test_frames_come_over_whole_and_in_order(network: Network) -> None:
    bodies = [b"", b"x", os.urandom(100), os.urandom(300_000), bytes(MAX_FRAME), b"last"]
    async with network.pair() as pair:
        for one, other in (pair, pair[::-1]):
            for body in bodies:
                one.send(body)
            assert await gather(other, len(bodies)) == bodies


async def test_what_is_said_right_after_the_handshake_is_not_lost(network: Network) -> None:
    """The acceptor may speak before the dialler has read its welcome."""
    async with network.listening() as listener, trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            dialler = await network.transport().connect(0)
            acceptor = await listener.accept()

            async def accept() -> None:
                await acceptor.handshake()
                acceptor.send(b"first")
                acceptor.close()

            nursery.start_soon(accept)
            await dialler.handshake()
            assert await dialler.receive() == [b"first"]
            assert await dialler.receive() == []
            dialler.close()


async def test_a_small_frame_is_with_the_kernel_at_once(network: Network) -> None:
    """No task has to run for that: `send` itself writes."""
    async with network.pair() as (dialler, acceptor):
        dialler.send(b"now")
        assert dialler.backlog == 0
        assert await acceptor.receive() == [b"now"]


async def test_who_sends_much_waits_for_room(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTBOX_ROOM", len(CHUNK))
    async with network.pair() as (dialler, acceptor), trio.open_nursery() as nursery:
        count = 0
        while dialler.backlog < 2 * len(CHUNK):
            dialler.send(CHUNK)
            count += 1
        room = trio.Event()

        async def wait() -> None:
            await dialler.room()
            room.set()

        nursery.start_soon(wait)
        await settled()
        assert not room.is_set()
        assert await gather(acceptor, count) == [CHUNK] * count
        await room.wait()
        assert dialler.backlog < len(CHUNK)


async def test_a_peer_that_does_not_read_is_closed_at_the_bound(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "OUTBOX_BOUND", 4 * len(CHUNK))
    async with network.pair() as (dialler, acceptor):
        while "it does not read" not in caplog.text:
            dialler.send(CHUNK)
        dialler.send(CHUNK)
        assert dialler.backlog == 0
        assert await dialler.receive() == []
        await dialler.room()
        while await acceptor.receive():
            pass
    assert caplog.text.count("it does not read") == 1


async def test_a_malformed_frame(unix: Network) -> None:
    async with unix.listening() as listener:
        stranger = unix.stranger()
        acceptor = await listener.accept()
        stranger.sendall(PREFACE + frame(b"well") + b"\xff\xff\xff\xff")
        await acceptor.handshake()
        with pytest.raises(ProtocolError, match="cannot read a frame"), trio.fail_after(PATIENCE):
            while await acceptor.receive():
                pass
        acceptor.close()
        stranger.close()


# -- ends


async def test_what_was_sent_arrives_before_the_end(network: Network) -> None:
    """Also where the other end has sent what we never read."""
    async with network.pair() as (dialler, acceptor):
        acceptor.send(b"unheard")
        dialler.send(b"the kiss of death")
        dialler.close()
        assert await acceptor.receive() == [b"the kiss of death"]
        assert await acceptor.receive() == []


async def test_closing_wakes_whoever_waits(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTBOX_ROOM", len(CHUNK))
    async with network.pair() as (dialler, _acceptor):
        while dialler.backlog < 2 * len(CHUNK):
            dialler.send(CHUNK)
        heard: list[list[bytes]] = []

        async def receive() -> None:
            heard.append(await dialler.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler.room)
            nursery.start_soon(receive)
            await settled()
            dialler.close()
            dialler.close()
        assert heard == [[]]
        assert await dialler.receive() == []
        dialler.send(b"to nobody")
        assert dialler.backlog == 0
        await dialler.run()


async def test_sending_to_a_peer_that_is_gone_is_no_error(network: Network) -> None:
    async with network.pair() as (dialler, acceptor):
        acceptor.close()
        for _ in range(100):
            dialler.send(CHUNK)
            await trio.lowlevel.checkpoint()
        assert await dialler.receive() == []


async def test_the_end_of_its_task_is_the_end_of_the_connection(unix: Network) -> None:
    async with unix.listening() as listener:
        dialler = await unix.transport().connect(0)
        acceptor = await listener.accept()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.run)
            await settled()
            nursery.cancel_scope.cancel()
        with pytest.raises(ConnectError, match="it closed the connection in the handshake"), trio.fail_after(PATIENCE):
            await dialler.handshake()


# -- handshakes


async def shake(one: SocketConnection, other: SocketConnection) -> tuple[str, str]:
    """Both ends' words; empty for an end that is content."""
    words = {one: "", other: ""}

    async def side(connection: SocketConnection) -> None:
        try:
            await connection.handshake()
        except ConnectError as error:
            words[connection] = str(error)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, one)
            nursery.start_soon(side, other)
    one.close()
    other.close()
    return words[one], words[other]


@pytest.mark.parametrize(
    ("dials", "accepts", "dialler", "acceptor"),
    [
        ("ours", "ours", "", ""),
        ("none", "none", "", ""),
        ("theirs", "ours", "it shows a certificate that is not this", "it does not take our certificate"),
        ("none", "ours", "it closed the connection in the handshake; its log says why", "it does not speak TLS"),
        ("ours", "none", "it closed the connection", "it speaks TLS: bootstrap.cert is set there and not here"),
    ],
)
async def test_who_is_let_in(cert: str, tmp_path: Path, dials: str, accepts: str, dialler: str, acceptor: str) -> None:
    certs = {"ours": cert, "theirs": make_cert(tmp_path / "theirs"), "none": None}
    network = Network(TcpAddress("127.0.0.1", 0), certs[accepts])
    async with network.listening() as listener:
        one = await network.transport(certs[dials]).connect(0)
        words = await shake(one, await listener.accept())
    for said, expected in zip(words, (dialler, acceptor), strict=True):
        assert said.startswith(expected)
        assert bool(said) == bool(expected)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"fluxres?", b"\0", b"f\n"])
async def test_strangers_are_turned_away(network: Network, said: bytes) -> None:
    async with network.listening() as listener:
        with network.stranger() as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            acceptor = await listener.accept()
            with pytest.raises(ConnectError, match=r"^it (is no broker|does not speak TLS|closed)|^TLS failed"):
                await acceptor.handshake()
            assert await acceptor.receive() == []


async def test_a_stranger_that_says_nothing_has_its_time(network: Network) -> None:
    network.addresses = replace(network.addresses, connect_timeout=0.05)
    async with network.listening() as listener:
        with network.stranger() as stranger:
            acceptor = await listener.accept()
            with pytest.raises(ConnectError, match=r"it did not finish the handshake within 50ms"):
                await acceptor.handshake()
            stranger.setblocking(False)
            await trio.lowlevel.wait_readable(stranger)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


async def test_strangers_keep_nobody_out(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent connections, more than may be pending, and a child behind them."""
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    monkeypatch.setattr(module, "HURRY", 0.01)
    joined = trio.Event()

    async def serve(connection: SocketConnection) -> None:
        with contextlib.suppress(ConnectError):
            await connection.handshake()
            joined.set()
        connection.close()

    async def accept(listener: SocketListener, nursery: trio.Nursery) -> None:
        while True:
            nursery.start_soon(serve, await listener.accept())

    async with network.listening() as listener, trio.open_nursery() as nursery:
        with contextlib.ExitStack() as stack, trio.fail_after(PATIENCE):
            for _ in range(5):
                stack.enter_context(network.stranger())
            dialler = await network.transport().connect(0)
            nursery.start_soon(accept, listener, nursery)
            await dialler.handshake()
            await joined.wait()
            dialler.close()
        nursery.cancel_scope.cancel()
    assert caplog.text.count("it is slow in its handshake") >= 4


async def test_a_connection_that_is_done_makes_room(unix: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 1)
    monkeypatch.setattr(module, "HURRY", PATIENCE)
    async with unix.listening() as listener, trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            for _ in range(3):
                dialler = await unix.transport().connect(0)
                acceptor = await listener.accept()
                nursery.start_soon(acceptor.handshake)
                await dialler.handshake()
                nursery.start_soon(dialler.run)
                nursery.start_soon(acceptor.run)
        nursery.cancel_scope.cancel()


async def test_without_descriptors_a_connection_waits(unix: Network) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with unix.listening() as listener:
        dialler = await unix.transport().connect(0)
        await trio.lowlevel.wait_readable(listener.fileno())
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(ConnectError, match="cannot accept a connection now: Too many open files"):
                await listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await shake(dialler, await listener.accept()) == ("", "")


# -- Unix sockets


async def test_the_peer_of_a_unix_socket_is_a_process(unix: Network) -> None:
    async with unix.pair() as pair:
        assert [each.peer for each in pair] == [f"unix:pid {os.getpid()}"] * 2


async def test_a_path_of_any_length(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 200)
    network = Network(UnixAddress(str(directory / "tbon-0")), None)
    async with network.pair() as (dialler, acceptor):
        dialler.send(b"hello")
        assert await acceptor.receive() == [b"hello"]
    assert os.listdir(directory) == ["tbon-0"]
    assert stat.S_IMODE((directory / "tbon-0").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_the_name_stays_for_the_next_incarnation(unix: Network, tmp_path: Path) -> None:
    for _ in range(2):
        async with unix.pair():
            assert os.listdir(tmp_path) == ["tbon-0"]
    unix.transport().remove()
    unix.transport().remove()
    assert os.listdir(tmp_path) == []


async def test_a_name_that_is_taken(unix: Network) -> None:
    async with unix.listening():
        with pytest.raises(Refusal, match="another broker does"):
            await unix.transport().listen()


async def test_other_users_are_refused(
    unix: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = os.geteuid()
    async with unix.listening() as listener, trio.open_nursery() as nursery:
        with unix.stranger() as stranger:
            monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
            with pytest.raises(ConnectError, match=f"belongs to user {ours}, and we to {ours + 1}"):
                await unix.transport().connect(0)
            nursery.start_soon(listener.accept)
            stranger.setblocking(False)
            with trio.fail_after(PATIENCE):
                await trio.lowlevel.wait_readable(stranger)
            assert stranger.recv(1) == b""
        nursery.cancel_scope.cancel()
    assert f"refusing a connection: unix:pid {os.getpid()} belongs to user {ours}" in caplog.text


@pytest.mark.parametrize("left", [False, True])
async def test_nobody_listens_at_a_path(unix: Network, tmp_path: Path, left: bool) -> None:
    if left:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "tbon-0"))
    with pytest.raises(ConnectError, match=r"^cannot connect to /.*/tbon-0: (No such file|Connection refused)"):
        await unix.transport().connect(0)


# -- TCP


async def test_the_peer_of_a_tcp_socket_is_an_address(plain: Network) -> None:
    async with plain.pair() as (dialler, acceptor):
        assert isinstance(plain.address, TcpAddress)
        assert dialler.peer == f"127.0.0.1:{plain.address.port}"
        assert acceptor.peer.startswith("127.0.0.1:")


@pytest.mark.parametrize("host", ["*", "localhost", "lo", pytest.param("::1", marks=needs_ipv6)])
async def test_where_to_listen(host: str, cert: str) -> None:
    network = Network(TcpAddress(host, 0), cert)
    if host == "lo":
        async with network.listening() as listener:
            assert listener.address[0] == "127.0.0.1"
        return
    async with network.pair() as (dialler, acceptor):
        dialler.send(b"hello")
        assert await acceptor.receive() == [b"hello"]
        assert acceptor.peer.startswith("[::1]:" if ":" in host else ("127.0.0.1:", "[::1]:"))


async def test_an_address_that_is_taken(plain: Network) -> None:
    async with plain.listening():
        with pytest.raises(Refusal, match=r"^cannot listen on tcp://127.0.0.1:\d+: Address already in use"):
            await plain.transport().listen()


async def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConnectError, match=r"^cannot listen on tcp://192.0.2.1:8050: Cannot assign requested address"):
        await Network(TcpAddress("192.0.2.1", 8050), None).transport().listen()


async def test_nobody_listens_at_a_port(plain: Network) -> None:
    async with plain.listening():
        pass
    with pytest.raises(ConnectError, match=r"^cannot connect to tcp://127.0.0.1:\d+: Connection refused"):
        await plain.transport().connect(0)


async def test_a_name_that_is_none() -> None:
    with pytest.raises(ConnectError, match=r"^cannot connect to tcp://no.such.host.invalid:8050: "):
        await Network(TcpAddress("no.such.host.invalid", 8050), None).transport().connect(0)


async def test_plain_tcp_is_for_loopback_only(
    plain: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it looks where a name of the configuration turns out to be elsewhere."""
    async with plain.listening() as listener, trio.open_nursery() as nursery:
        with plain.stranger() as stranger:
            monkeypatch.setattr(module, "is_loopback", lambda host: False)
            with pytest.raises(ConnectError, match=r"without bootstrap.cert nothing would be encrypted"):
                await plain.transport().connect(0)
            nursery.start_soon(listener.accept)
            stranger.setblocking(False)
            with trio.fail_after(PATIENCE):
                await trio.lowlevel.wait_readable(stranger)
            assert stranger.recv(1) == b""
        nursery.cancel_scope.cancel()
    assert "refusing a connection: 127.0.0.1:" in caplog.text


async def test_a_host_that_does_not_answer(plain: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its addresses gets its share of the time."""
    asked: list[object] = []

    async def silent(sock: socket.socket, where: object) -> None:
        asked.append(where)
        await trio.sleep_forever()

    async def found(*args: object, **kwargs: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", port)) for port in (1, 2)]

    monkeypatch.setattr("fluxres.overlay.tcp._connect", silent)
    monkeypatch.setattr(trio.socket, "getaddrinfo", found)
    plain.addresses = replace(plain.addresses, connect_timeout=0.05)
    with pytest.raises(ConnectError, match="no answer in 50ms"):
        await plain.transport().connect(0)
    assert asked == [("192.0.2.1", 1), ("192.0.2.1", 2)]


async def test_a_socket_that_reached_itself_reached_nobody() -> None:
    """The kernel may choose, of all ports, the one that is dialled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sock = socket.socket()
    sock.bind(("127.0.0.1", port))
    with sock, pytest.raises(OSError, match="refused") as caught:
        await tcp._connect(sock, ("127.0.0.1", port))
    assert caught.value.errno == errno.ECONNREFUSED
