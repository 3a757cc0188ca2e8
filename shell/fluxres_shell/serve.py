"""Serving brokers: accepts connections, checks what they ask, and streams the journal to the one that is
attached.

What a request means is decided by `state`, through the `Owner`; this module only keeps the connections. A
newer attach ends the older one (the state says so). A connection that breaks the protocol is told why, and
closed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Final, Protocol

from fluxres.base.errors import ProtocolError
from fluxres_shell import find, protocol
from fluxres_shell.attach import MAX_CONNECTIONS, Connection, ConnectionEnded, peer_allowed
from fluxres_shell.feed import StdinFeed
from fluxres_shell.journal import JournalWriter
from fluxres_shell.poller import Poller
from fluxres_shell.protocol import RECORDS_BYTES, Ack, Attach, BarrierDone, Kill, Release, Request, Stdin
from fluxres_shell.segments import SegmentReader, StopKind, Stored
from fluxres_shell.stdin import STDIN_BUFFER

MAX_ACCEPTS: Final = 16
"""Connections accepted in one round."""


class Owner(Protocol):
    """Who decides: the shell's loop."""

    def attached(self, connection: int, from_seq: int) -> None:
        """A connection with the right nonce wants records."""

    def lost(self, connection: int) -> None:
        """A connection has ended."""

    def acked(self, seq: int) -> None:
        """The attached broker has records up to `seq`."""

    def kill(self, signum: int) -> None:
        """The attached broker wants the tasks signalled."""

    def released(self, connection: int) -> None:
        """The attached broker wants nothing more."""

    def barrier_done(self, name: str, seq: int) -> None:
        """Every shell of the job has entered the barrier."""


class Server:
    """The listening socket in the directory `dirfd` and its connections."""

    def __init__(
        self,
        owner: Owner,
        poller: Poller,
        stdin: StdinFeed,
        journal: JournalWriter,
        *,
        dirfd: int,
        nonce: str,
    ) -> None:
        self._owner = owner
        self._poller = poller
        self._stdin = stdin
        self._journal = journal
        self._dirfd = dirfd
        self._nonce = nonce
        self._listener: socket.socket | None = None
        self._connections: dict[int, Connection] = {}
        self._attached: Connection | None = None
        self._stdin_acked = 0
        self._last_ident = 0

    def bind(self) -> bool:
        """Listen on the directory's socket, anew where that was done before; whether it worked."""
        try:
            listener = find.bind(self._dirfd)
        except OSError:
            return False
        self._accept(0)  # whoever dialled the old one in time: its path is gone by now
        self.unbind()
        self._listener = listener
        self._poller.watch(listener.fileno(), self._accept)
        return True

    def unbind(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._poller.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self, _revents: int) -> None:
        for _ in range(MAX_ACCEPTS):
            if self._listener is None:
                return
            try:
                sock, _address = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._end_oldest()
                return
            if not peer_allowed(sock):
                sock.close()
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                self._end_oldest()
            sock.setblocking(False)
            self._last_ident += 1
            self._connections[self._last_ident] = Connection(sock, self._last_ident)
            self._watch(self._connections[self._last_ident])

    def _end_oldest(self) -> None:
        for connection in list(self._connections.values()):
            if connection is not self._attached:
                self._drop(connection)
                return

    def _watch(self, connection: Connection) -> None:
        mask = 0 if connection.closing else select.POLLIN
        mask |= select.POLLOUT if connection.unsent else 0
        self._poller.watch(connection.sock.fileno(), lambda revents: self._ready(connection, revents), mask)

    def _ready(self, connection: Connection, revents: int) -> None:
        try:
            if revents & select.POLLOUT:
                connection.flush()
            if connection.closing:
                if not connection.unsent or revents & (select.POLLHUP | select.POLLERR):
                    self._drop(connection)
                return
            if revents & ~select.POLLOUT:
                for request in connection.receive():
                    self._handle(connection, request)
                    if connection.closing or connection.ident not in self._connections:
                        return
            self._watch(connection)
        except ConnectionEnded:
            self._drop(connection)
        except ProtocolError as error:
            self._refuse(connection, errno.EPROTO, str(error))

    def _handle(self, connection: Connection, request: Request) -> None:
        if isinstance(request, Attach):
            self._attach(connection, request)
            return
        if connection is not self._attached:
            raise ProtocolError("cannot take a message before `attach`")
        match request:
            case Ack(seq=seq):
                if not connection.ack(seq):
                    raise ProtocolError(f"cannot take an ack of record {seq}: {connection.sent} was the last one sent")
                self._owner.acked(seq)
            case Kill(signum=signum):
                self._owner.kill(signum)
            case Stdin(task=task, offset=offset, data=data, eof=eof):
                self._stdin.feed(task, offset, data, eof)
            case Release():
                self._owner.released(connection.ident)
            case BarrierDone(name=name, seq=seq):
                self._owner.barrier_done(name, seq)

    def _attach(self, connection: Connection, request: Attach) -> None:
        if request.nonce != self._nonce:
            self._refuse(connection, errno.EPERM, "cannot attach: this shell is another job's (the nonce differs)")
        elif connection is self._attached:
            raise ProtocolError("cannot attach twice on one connection")
        elif request.from_seq > self._journal.last + 1:
            text = f"cannot attach from record {request.from_seq}: the last one is {self._journal.last}"
            self._refuse(connection, errno.EINVAL, text)
        else:
            self._owner.attached(connection.ident, request.from_seq)

    # What the state decided.

    def serve(self, ident: int, from_seq: int) -> None:
        """Accept the attach of a connection and send records from `from_seq` on."""
        connection = self._connections[ident]
        self._attached = connection
        connection.sent = connection.acked = max(from_seq, self._journal.first) - 1
        stream = self._stdin.stream
        self._stdin_acked = stream.consumed
        frame = protocol.attached(
            first=self._journal.first,
            last=self._journal.last,
            pid=os.getpid(),
            stdin={"offset": stream.received, "eof": stream.eof, "window": STDIN_BUFFER},
        )
        self._send(connection, frame)

    def barrier(self, ident: int, name: str, seq: int) -> None:
        """Tell an attached connection of a barrier, after the records that there are now."""
        connection = self._connections.get(ident)
        if connection is not None:  # not lost while it was being served
            connection.barrier = (self._journal.last, protocol.barrier(name, seq))

    def end(self, ident: int, why: str) -> None:
        """End a connection, saying why."""
        connection = self._connections.get(ident)
        if connection is not None:
            self._refuse(connection, errno.ECANCELED, why)

    def _refuse(self, connection: Connection, errnum: int, why: str) -> None:
        """Say why, and close as soon as that is sent."""
        was_attached = connection is self._attached
        if was_attached:
            self._attached = None
        connection.closing = True
        self._send(connection, protocol.error(errnum, why))
        if connection.ident in self._connections and not connection.unsent:
            self._close(connection)
        if was_attached:
            self._owner.lost(connection.ident)

    def _send(self, connection: Connection, frame: bytes) -> None:
        try:
            connection.send(frame)
        except ConnectionEnded:
            self._drop(connection)
            return
        self._watch(connection)

    def _drop(self, connection: Connection) -> None:
        if connection.ident not in self._connections:
            return
        self._close(connection)
        if connection is self._attached:
            self._attached = None
            self._owner.lost(connection.ident)

    def _close(self, connection: Connection) -> None:
        del self._connections[connection.ident]
        self._poller.forget(connection.sock.fileno())
        connection.close()

    # Sending.

    def pump(self) -> None:
        """Send the attached broker what there is, as far as the window goes."""
        connection = self._attached
        if connection is None:
            return
        try:
            while connection.room and not connection.unsent and (batch := self._next_records(connection)):
                connection.send_records(batch)
            if connection.barrier is not None and connection.sent >= connection.barrier[0]:
                framed, connection.barrier = connection.barrier[1], None
                connection.send(framed)
            consumed = self._stdin.stream.consumed
            if consumed > self._stdin_acked:
                self._stdin_acked = consumed
                connection.send(protocol.stdin_ack(consumed))
        except ConnectionEnded:
            self._drop(connection)
            return
        except OSError as error:  # of the journal: sent or not, it is not this shell's to invent
            self._refuse(connection, errno.EIO, str(error))
            return
        if connection.ident in self._connections:
            self._watch(connection)

    def _next_records(self, connection: Connection) -> list[Stored]:
        """The records after the last one sent: from the journal, or what it could not take from memory."""
        size = min(connection.room, RECORDS_BYTES)
        journal = self._journal
        if connection.sent >= journal.written:
            return journal.queued(connection.sent + 1, size) if journal.stuck is not None else []
        reader = connection.reader
        if reader is None or reader.next_seq != connection.sent + 1:
            if reader is not None:
                reader.close()
            reader = connection.reader = SegmentReader(self._dirfd, connection.sent + 1)
        batch = reader.read(size)
        if batch or reader.stop is None or reader.stop.kind is StopKind.END:
            return batch
        if reader.stop.kind is StopKind.GAP:
            connection.sent = reader.stop.resume - 1
            return self._next_records(connection)
        raise OSError(errno.EIO, f"cannot read the journal: {reader.stop}")
