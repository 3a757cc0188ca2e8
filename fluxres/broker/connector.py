"""The local connector: clients of this broker over its Unix socket, each in a nursery of its own.

A connection begins with one byte from the broker: 0 is a welcome, anything else the errno of a refusal. Then
frames go both ways. Who a client is comes from the kernel (SO_PEERCRED, unix(7)): the instance owner, or a guest
where guests are allowed; it is stamped on every request, whatever the client wrote there. A malformed frame closes
that connection, with a logged reason, and touches nothing else. When a client goes, its requests are cancelled.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import uuid
from typing import Final

import trio

from fluxres.base.errors import FluxresError, ProtocolError, Refusal
from fluxres.rpc.router import Router
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import Message, MessageType, Role

log = logging.getLogger("fluxres.connector")

BACKLOG: Final = 128
MAX_CLIENTS: Final = 4096
"""Clients that may be connected at a time."""
READ_SIZE: Final = 64 * 1024
OUTBOX_ROOM: Final = 1024 * 1024
"""Bytes waiting to be sent to a client from which on producers of streams wait."""
OUTBOX_BOUND: Final = 64 * 1024 * 1024
"""Bytes waiting to be sent at which a client that does not read is closed."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds after which a connection is accepted that found no descriptor or no memory."""
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CREDENTIALS: Final = struct.Struct("iII")


class LocalClient:
    """One connected client: an endpoint of the router."""

    def __init__(self, sock: socket.socket, router: Router, *, userid: int, owner: int) -> None:
        self.id = str(uuid.uuid4())
        self._sock = sock
        self._router = router
        self._userid = userid
        self._rolemask = Role.LOCAL | (Role.OWNER if userid == owner else Role.USER)
        self._decoder = FrameDecoder()
        self._outbox = bytearray()
        self._corked = False
        self._closing = False
        self._wake = trio.Event()
        self._room = trio.Event()
        self._room.set()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve the client until it goes."""
        self._router.add_endpoint(self)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._router.remove_endpoint(self, "the client is gone")
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    # --- the endpoint

    def deliver(self, message: Message) -> None:
        """Send `message` now as far as the socket takes it, the rest as soon as it can."""
        if self._closing:
            return
        self._outbox += frame(encode(message))
        if len(self._outbox) > OUTBOX_BOUND:
            log.warning("closing client %s: it does not read, and %d bytes wait for it", self.id, len(self._outbox))
            self._closing = True
            self._outbox.clear()
            self._scope.cancel()
        elif not self._corked:
            self._flush()

    async def drained(self, matchtag: int) -> None:
        """Return as soon as less than `OUTBOX_ROOM` bytes wait for the client."""
        if len(self._outbox) < OUTBOX_ROOM:
            await trio.lowlevel.checkpoint()
            return
        if self._room.is_set():  # else others wait for this very event
            self._room = trio.Event()
        await self._room.wait()

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._outbox) if self._outbox else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._outbox.clear()  # the reader will see the end of the connection
            sent = 0
        if sent:
            del self._outbox[:sent]
        if self._outbox:
            self._wake.set()
        if len(self._outbox) < OUTBOX_ROOM:
            self._room.set()

    async def _write(self) -> None:
        """Send what the socket did not take at once."""
        while True:
            await self._wake.wait()
            while self._outbox:
                await trio.lowlevel.wait_writable(self._sock)
                self._flush()
            self._wake = trio.Event()

    async def _read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(READ_SIZE)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                return
            if not data:
                return
            try:
                self._take(data)
            except ProtocolError as error:
                log.warning("closing client %s (uid %d): %s", self.id, self._userid, error)
                return

    def _take(self, data: bytes) -> None:
        self._corked = True
        try:
            for body in self._decoder.feed(data):
                message = decode(body)
                if message.type is not MessageType.REQUEST:
                    raise ProtocolError(f"cannot take a {message.type.name.lower()} from a client")
                self._router.receive(self, message._replace(userid=self._userid, rolemask=self._rolemask, route=()))
                if self._closing:
                    return
        finally:
            self._corked = False
            self._flush()


class Connector:
    """Listens on the broker's socket."""

    def __init__(self, path: str, router: Router, *, owner: int, guests: bool) -> None:
        self._path = path
        self._router = router
        self._owner = owner
        self._guests = guests
        self._clients = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept clients until cancelled. Raises FluxresError.

        The socket's name stays: commands that find nobody listening on it wait for the next incarnation.
        """
        listener = self._listen()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    await self._accept(listener, nursery)
        finally:
            listener.close()

    def remove(self) -> None:
        """Remove the socket: the broker is shut down, and no other incarnation follows."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            log.warning("cannot accept a client now: %s", error.strerror)
            await trio.sleep(ACCEPT_PAUSE)
        else:
            self._admit(sock, nursery)

    def _listen(self) -> socket.socket:
        """Bind under a new name and rename: clients find the old socket or this one, never none."""
        directory, name = os.path.split(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _somebody_listens(f"/proc/self/fd/{dirfd}/{name}"):
                    raise Refusal(f"cannot listen on {self._path}: another broker does; give this one its own rundir")
                new = f".{name}.new"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=dirfd)
                listener.bind(f"/proc/self/fd/{dirfd}/{new}")
                os.chmod(new, 0o666 if self._guests else 0o600, dir_fd=dirfd)
                listener.listen(BACKLOG)
                os.rename(new, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
            finally:
                os.close(dirfd)
        except OSError as error:
            listener.close()
            raise FluxresError(f"cannot listen on {self._path}: {error.strerror}") from error
        except FluxresError:
            listener.close()
            raise
        return listener

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        sock.setblocking(False)
        _pid, userid, _gid = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        refusal = 0
        if userid != self._owner and not self._guests:
            refusal = errno.EPERM
        elif self._clients >= MAX_CLIENTS:
            refusal = errno.EAGAIN
        with contextlib.suppress(OSError):
            sock.send(bytes([refusal]))
        if refusal:
            log.warning("refusing a client of uid %d: %s", userid, os.strerror(refusal))
            sock.close()
        else:
            nursery.start_soon(self._serve, LocalClient(sock, self._router, userid=userid, owner=self._owner))

    async def _serve(self, client: LocalClient) -> None:
        self._clients += 1
        try:
            await client.run()
        finally:
            self._clients -= 1


def _somebody_listens(path: str) -> bool:
    """Whether a living process listens on the socket `path`: what a killed broker left behind refuses connections."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)
        try:
            caller.connect(path)
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True
