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
import uuid
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import ProtocolError
from fluxres.rpc import unix
from fluxres.rpc.outbox import Outbox
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
LAST_WORDS: Final = 0.5
"""Seconds that a client has to take what it was answered before the broker ends the connection: at a panic, that all it
asked for beyond the parent has ended."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds after which a connection is accepted that found no descriptor or no memory."""
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class LocalClient:
    """One connected client: an endpoint of the router."""

    def __init__(self, sock: socket.socket, router: Router, *, userid: int, owner: int) -> None:
        self.id = str(uuid.uuid4())
        self._sock = sock
        self._router = router
        self._userid = userid
        self._rolemask = Role.LOCAL | (Role.OWNER if userid == owner else Role.USER)
        self._decoder = FrameDecoder()
        self._outbox = Outbox(sock, OUTBOX_ROOM)
        self._closing = False
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve the client until it goes."""
        self._router.add_endpoint(self)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._outbox.run)
                    await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._router.remove_endpoint(self, "the client is gone")
            with trio.move_on_after(LAST_WORDS) as last_words:
                last_words.shield = True
                await self._outbox.emptied()
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    # --- the endpoint

    @property
    def hop(self) -> None:
        """A client leads to no other broker."""

    def deliver(self, message: Message) -> None:
        """Send `message` now as far as the socket takes it, the rest as soon as it can."""
        if self._closing:
            return
        self._outbox.put(frame(encode(message)))
        if len(self._outbox) > OUTBOX_BOUND:
            log.warning("closing client %s: it does not read, and %d bytes wait for it", self.id, len(self._outbox))
            self._closing = True
            self._outbox.close()
            self._scope.cancel()

    async def drained(self, asked: Message) -> None:
        """Return as soon as less than `OUTBOX_ROOM` bytes wait for the client."""
        await self._outbox.room.wait()

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        """Call `callback` once: as soon as less than `OUTBOX_ROOM` bytes wait for the client."""
        self._outbox.room.on_open(callback)

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
        self._outbox.cork()
        try:
            for body in self._decoder.feed(data):
                message = decode(body)
                if message.type is not MessageType.REQUEST:
                    raise ProtocolError(f"cannot take a {message.type.name.lower()} from a client")
                self._router.receive(self, message._replace(userid=self._userid, rolemask=self._rolemask, route=()))
                if self._closing:
                    return
        finally:
            self._outbox.uncork()


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
        listener = unix.listen(self._path, mode=0o666 if self._guests else 0o600, backlog=BACKLOG)
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

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        sock.setblocking(False)
        _pid, userid = unix.peer(sock)
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
