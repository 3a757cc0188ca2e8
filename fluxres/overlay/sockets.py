"""The overlay's network: Unix sockets within one machine, TCP with TLS between machines.

    dialled or accepted --TLS--> --dialler: PREFACE--> --acceptor: WELCOME--> open --> ended
                          '------'---- ConnectError, in words for the log ---'

An acceptor speaks first after TLS only by its welcome: a dialler that it refuses learns so in the handshake, not later.
Who a Unix peer is comes from the kernel, and only our own user is one. Plain TCP is for tests: it is refused unless
both ends are loopback addresses, and there any user of the machine could dial it.

Strangers can hold no more than `MAX_PENDING` connections that have not finished their handshake, each for no longer
than `connect_timeout`, and `HURRY` where others wait.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import FluxresError, ProtocolError, Refusal
from fluxres.base.fsd import format_fsd
from fluxres.overlay import tcp
from fluxres.overlay.address import Addresses, TcpAddress, UnixAddress, host_port, is_loopback
from fluxres.overlay.errors import ConnectError
from fluxres.overlay.tls import Credentials, TlsStream, load_credentials
from fluxres.overlay.transport import OUTBOX_BOUND, OUTBOX_ROOM
from fluxres.rpc import unix
from fluxres.rpc.outbox import Outbox
from fluxres.wire.framing import FrameDecoder, frame

log = logging.getLogger("fluxres.overlay")

READ_SIZE: Final = 64 * 1024
PREFACE: Final = b"fluxres\n"
"""What a dialler says first, behind TLS where there is TLS."""
WELCOME: Final = b"\x00"
"""What the acceptor answers."""
MAX_PENDING: Final = 128
"""Connections accepted whose handshake is not finished."""
HURRY: Final = 1.0
"""Seconds for its handshake that the oldest of `MAX_PENDING` connections has when another one waits."""
MAX_DRAINED: Final = 16
"""Reads at a close: what is left unread would make the kernel drop what it has not delivered yet (tcp(7))."""
BACKLOG: Final = 1024
"""Connections that the kernel holds for us; more than a broker has children."""
_TLS_RECORDS: Final = range(0x14, 0x18)
"""First bytes of TLS records (RFC 8446 §5.1)."""
_TRANSIENT: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
    | {errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH}
    | {errno.EOPNOTSUPP, errno.ENETUNREACH, errno.EPERM}
)
"""Errors of accept(2) that are about this moment, or this connection."""
_LEFT: Final = "it closed the connection in the handshake; its log says why. Is bootstrap.cert set at both ends?"
_MAPPED: Final = "::ffff:"
"""How an IPv4 address looks at an IPv6 socket."""
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError)


class SocketConnection:
    """A `Connection` over a connected non-blocking stream socket, which it owns."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        accepts: bool,
        connect_timeout: float,
        credentials: Credentials | None = None,
        settled: Callable[[SocketConnection], None] | None = None,
    ) -> None:
        """`settled` is called when the handshake is over, or the connection."""
        self._sock = sock
        self._peer = peer
        self._accepts = accepts
        self._timeout = connect_timeout
        self._tls = None if credentials is None else TlsStream(credentials, accepts=accepts)
        self._settled = settled
        self._outbox = Outbox(sock, OUTBOX_ROOM)
        self._decoder = FrameDecoder()
        self._ahead = b""
        self._closed = False
        self.since = trio.current_time()

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""
        return self._peer

    @property
    def backlog(self) -> int:
        """Bytes sent here that the kernel has not taken yet."""
        return len(self._outbox)

    async def handshake(self) -> None:
        """Prove who both ends are. Raises ConnectError, the connection being closed then."""
        try:
            with trio.fail_after(self._timeout):
                await self._shake()
        except trio.TooSlowError as error:
            self.close()
            raise ConnectError(f"it did not finish the handshake within {format_fsd(self._timeout)}") from error
        except ProtocolError as error:
            self._put_outgoing()  # the alert says why to the peer
            self.close()
            raise ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._settle()

    def send(self, body: bytes) -> None:
        """Send one frame, at once as far as the socket takes it. Not before the handshake."""
        if self._closed:
            return
        self._write(frame(body))
        if len(self._outbox) > OUTBOX_BOUND:
            log.warning("closing %s: it does not read, and %d bytes wait for it", self._peer, len(self._outbox))
            self.close()

    async def room(self) -> None:
        """Return as soon as less than `OUTBOX_ROOM` bytes wait, or the connection has ended."""
        await self._outbox.room.wait()

    async def receive(self) -> list[bytes]:
        """The next frames; [] when the connection has ended. Raises ProtocolError."""
        said, self._ahead = self._ahead, b""
        while not (bodies := self._decoder.feed(said)):
            data = await self._read()
            if not data:
                return []
            said = self._plain(data)
        return bodies

    def close(self) -> None:
        """End the connection, after what the kernel still takes."""
        if self._closed:
            return
        self._closed = True
        self._outbox.close()
        with contextlib.suppress(OSError):  # not connected any more, or nothing left to read
            self._sock.shutdown(socket.SHUT_WR)
            for _ in range(MAX_DRAINED):
                if not self._sock.recv(READ_SIZE):
                    break
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        self._settle()

    async def run(self) -> None:
        """Write what `send` could not write at once, until the connection has ended; it ends with this."""
        try:
            await self._outbox.run()
        finally:
            self.close()

    async def _shake(self) -> None:
        """Raises ProtocolError, TooSlowError."""
        if self._tls is not None:
            data = b""
            while not self._tls.shake(data):
                self._put_outgoing()
                data = await self._read()
                if not data:
                    raise ProtocolError(_LEFT)
            self._put_outgoing()
        if self._accepts:
            said = await self._hear(PREFACE)
            self._write(WELCOME)
        else:
            self._write(PREFACE)
            said = await self._hear(WELCOME)
        self._ahead = said

    async def _hear(self, expected: bytes) -> bytes:
        """Wait for `expected`; returns what came with it. Raises ProtocolError."""
        said = self._plain(b"")
        while len(said) < len(expected):
            if not expected.startswith(said):
                break
            data = await self._read()
            if not data:
                raise ProtocolError(_LEFT)
            said += self._plain(data)
        if said.startswith(expected):
            return said[len(expected) :]
        if self._tls is None and said[0] in _TLS_RECORDS:
            raise ProtocolError("it speaks TLS: bootstrap.cert is set there and not here")
        raise ProtocolError(f"it is no broker: it began with {said[: len(PREFACE)]!r}")

    async def _read(self) -> bytes:
        """The next bytes of the socket; empty at the end of the connection."""
        while not self._closed:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                return self._sock.recv(READ_SIZE)
            except _WOULD_BLOCK:
                continue
            except (OSError, trio.ClosedResourceError):
                break
        await trio.lowlevel.checkpoint()
        return b""

    def _plain(self, data: bytes) -> bytes:
        """What the peer has said by `data`. Raises ProtocolError."""
        if self._tls is None:
            return data
        said = self._tls.decrypt(data)
        self._put_outgoing()
        return said

    def _write(self, data: bytes) -> None:
        self._outbox.put(data if self._tls is None else self._tls.encrypt(data))

    def _put_outgoing(self) -> None:
        if self._tls is not None and (data := self._tls.outgoing()):
            self._outbox.put(data)

    def _settle(self) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(self)


class SocketListener:
    """A `Listener` on a bound socket, which it owns."""

    def __init__(self, sock: socket.socket, *, connect_timeout: float, credentials: Credentials | None) -> None:
        self._sock = sock
        self._timeout = connect_timeout
        self._credentials = credentials
        self._pending: dict[SocketConnection, None] = {}
        self._fewer = trio.Event()

    @property
    def address(self) -> tuple[str, int]:
        """The number and port of a TCP listener."""
        host, port, *_rest = self._sock.getsockname()
        return host, port

    def fileno(self) -> int:
        """The descriptor of the listening socket."""
        return self._sock.fileno()

    async def accept(self) -> SocketConnection:
        """The next connection, before its handshake. Raises ConnectError where it cannot be taken now."""
        while True:
            await self._make_room()
            await trio.lowlevel.wait_readable(self._sock)
            try:
                sock, _address = self._sock.accept()
            except (*_WOULD_BLOCK, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                raise ConnectError(f"cannot accept a connection now: {error.strerror}") from error
            try:
                peer = _prepare(sock, encrypted=self._credentials is not None)
            except ConnectError as error:
                sock.close()
                log.warning("refusing a connection: %s", error)
                continue
            return self._take(sock, peer)

    def close(self) -> None:
        """Take no more connections."""
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    def _take(self, sock: socket.socket, peer: str) -> SocketConnection:
        connection = SocketConnection(
            sock,
            peer,
            accepts=True,
            connect_timeout=self._timeout,
            credentials=self._credentials,
            settled=self._settled,
        )
        self._pending[connection] = None
        return connection

    def _settled(self, connection: SocketConnection) -> None:
        self._pending.pop(connection, None)
        self._fewer.set()

    async def _make_room(self) -> None:
        """Wait until there is room for a handshake more: the oldest one does not keep it for long."""
        while len(self._pending) >= MAX_PENDING:
            oldest = next(iter(self._pending))
            self._fewer = trio.Event()
            with trio.move_on_at(oldest.since + HURRY) as hurry:
                await self._fewer.wait()
            if hurry.cancelled_caught:
                log.warning("closing %s: it is slow in its handshake, and others wait", oldest.peer)
                oldest.close()


class SocketTransport:
    """A `Transport` over sockets for the broker of `rank`: the children dial its address, it dials its parent's."""

    def __init__(self, addresses: Addresses, *, rank: int) -> None:
        """Raises CertError where the certificate cannot be used."""
        self._addresses = addresses
        self._bind = addresses.bind(rank)
        self._timeout = addresses.connect_timeout
        self._credentials = None if addresses.cert is None else load_credentials(addresses.cert)

    async def connect(self, rank: int) -> SocketConnection:
        """A connection to the broker of `rank`, before its handshake. Raises ConnectError."""
        address = self._addresses.connect(rank)
        try:
            if isinstance(address, UnixAddress):
                sock = unix.dial(address.path)
                await trio.lowlevel.checkpoint()
            else:
                sock = await tcp.dial(address, self._timeout)
        except OSError as error:
            raise ConnectError(f"cannot connect to {address}: {error.strerror}") from error
        credentials = self._credentials if isinstance(address, TcpAddress) else None
        try:
            peer = _prepare(sock, encrypted=credentials is not None)
        except ConnectError as error:
            sock.close()
            raise ConnectError(f"cannot connect to {address}: {error}") from error
        return SocketConnection(sock, peer, accepts=False, connect_timeout=self._timeout, credentials=credentials)

    async def listen(self) -> SocketListener:
        """Begin to accept children. Raises Refusal where somebody else listens there, else ConnectError."""
        address = self._bind
        try:
            if isinstance(address, UnixAddress):
                sock = unix.listen(address.path, mode=0o600, backlog=BACKLOG)
                return SocketListener(sock, connect_timeout=self._timeout, credentials=None)
            sock = await tcp.listen(address, BACKLOG)
        except Refusal:
            raise
        except FluxresError as error:
            raise ConnectError(str(error)) from error
        except OSError as error:
            kind = Refusal if error.errno == errno.EADDRINUSE else ConnectError
            raise kind(f"cannot listen on {address}: {error.strerror}") from error
        return SocketListener(sock, connect_timeout=self._timeout, credentials=self._credentials)

    def remove(self) -> None:
        """Remove the name of the Unix socket, if it is one: this broker is shut down, and no incarnation follows."""
        if isinstance(self._bind, UnixAddress):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._bind.path)


def _prepare(sock: socket.socket, *, encrypted: bool) -> str:
    """Make a connected socket ready, and return its peer for people. Raises ConnectError where it must not be used."""
    sock.setblocking(False)
    try:
        if sock.family == socket.AF_UNIX:
            pid, userid = unix.peer(sock)
            if userid != os.geteuid():
                raise ConnectError(f"unix:pid {pid} belongs to user {userid}, and we to {os.geteuid()}")
            return f"unix:pid {pid}"
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours, (host, port, *_rest) = sock.getsockname()[0], sock.getpeername()
    except OSError as error:
        raise ConnectError(f"it is gone again: {error.strerror}") from error
    peer = host_port(host.removeprefix(_MAPPED), port)
    if not (encrypted or (is_loopback(host) and is_loopback(ours))):
        raise ConnectError(f"{peer} is not on this machine, and without bootstrap.cert nothing would be encrypted")
    return peer
