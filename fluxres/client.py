"""The blocking client of a broker: one Unix socket, RPCs over it (RFC 3, RFC 6), no event loop.

The command line is built on this. It imports little, because a command's start is most of its run time.

- `Client` is one connection. Calls may overlap: what arrives for a call that nobody is waiting for right now
  is held, up to `MAX_HELD` bytes, until it is asked for. Sending never deadlocks with a broker that is
  sending too: while the socket takes no more, what arrives is read.
- `fluxres.session.Session` is a client that comes back after its broker's death.

Connecting: the server first sends one byte, 0 for welcome or else an errno. Then frames go both ways. A lost
connection is `Disconnected`, whatever the kernel called it; an error response is `RpcError`. A broker that has just
been killed is waited for, for `RESTART_GAP` seconds; where no socket is there, connecting fails at once.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, ProtocolError, RpcError
from fluxres.rpc.calls import Calls, Reply
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import NODEID_ANY, Message, request
from fluxres.wire.payload import pack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from fluxres.wire.payload import WireMap

CONNECT_TIMEOUT: Final = 10.0
"""Seconds that connecting may take, welcome included."""
CONNECT_RETRY: Final = 0.02
"""Seconds between attempts while the server's backlog is full, or its broker is about to be restarted."""
RESTART_GAP: Final = 3.0
"""Seconds for which connecting is tried again where a socket is there but nobody listens: a killed broker leaves
it behind, and whoever supervises the broker starts the next one."""
MAX_HELD: Final = 64 * 1024 * 1024
"""Bytes of responses that are held for calls that nobody is waiting for; beyond it the client gives up."""
READ_SIZE: Final = 256 * 1024
SUN_PATH_MAX: Final = 107
"""Bytes that a Unix socket's address can hold, its final NUL apart; longer paths go through /proc/self/fd."""
SCHEME: Final = "local://"
SYSTEM_SOCKET: Final = "/run/fluxres/local-0"
_PEER: Final = struct.Struct("3i")
"""SO_PEERCRED: pid, uid, gid."""


class Disconnected(FluxresError):
    """The connection to the broker is lost."""


class CallTimeout(FluxresError):
    """A call was not answered within the time that its caller gave it."""


class Client:
    """One connection to a broker. A context manager; leaving it closes the connection."""

    def __init__(self, connected: socket.socket, uri: str) -> None:
        """Take a connected, non-blocking socket whose welcome byte has been read (`connect` makes one)."""
        self.uri = uri
        self._socket = connected
        self._frames = FrameDecoder()
        self._calls = Calls()
        self._output = bytearray()
        self._replies: deque[tuple[Reply, int]] = deque()
        self._held = 0

    @classmethod
    def connect(
        cls, uri: str | None = None, timeout: float = CONNECT_TIMEOUT, *, restart_gap: float = RESTART_GAP
    ) -> Client:
        """Connect to `uri`, else as `resolve_uri` says. Raises FluxresError: `cannot connect to …`.

        `timeout` bounds all of it. A socket at which nobody listens is tried again for `restart_gap` seconds; 0 is for
        callers that only look whether a broker is there, or have a rhythm of their own.
        """
        uri = resolve_uri(uri)
        try:
            connected = _connect_when_up(socket_path(uri), timeout, restart_gap)
        except TimeoutError as error:
            raise FluxresError(f"cannot connect to {uri}: no answer within {timeout:g}s") from error
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            if isinstance(error, ConnectionRefusedError):
                why += " (its broker is not online: it has ended, or waits for its parent)"
            raise FluxresError(f"cannot connect to {uri}: {why}") from error
        return cls(connected, uri)

    # --- calls

    def call(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        nodeid: int = NODEID_ANY,
        timeout: float | None = None,
    ) -> WireMap:
        """Call `topic` and return the response's payload.

        Raises RpcError for an error response, CallTimeout after `timeout` seconds (the call is then
        cancelled; None waits for ever, which is safe: the broker answers for a peer that is lost),
        Disconnected.
        """
        matchtag = self.open(topic, payload, nodeid=nodeid, streaming=False)
        reply = self.receive_for(matchtag, timeout)
        if reply is None:
            self.cancel(matchtag)
            raise CallTimeout(f"cannot finish {topic}: no answer within {timeout:g}s")
        if reply.error is not None:
            raise reply.error
        return reply.payload

    def stream(self, topic: str, payload: WireMap | None = None, *, nodeid: int = NODEID_ANY) -> Iterator[WireMap]:
        """Call `topic` as a stream and yield its responses until ENODATA; closing the iterator cancels it.

        Raises RpcError for any other error, Disconnected.
        """
        matchtag = self.open(topic, payload, nodeid=nodeid)
        try:
            while (reply := self.receive_for(matchtag, None)) is not None:
                if reply.error is None:
                    yield reply.payload
                elif reply.error.errnum == errno.ENODATA:
                    return
                else:
                    raise reply.error
        finally:
            self.cancel(matchtag)

    def open(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        nodeid: int = NODEID_ANY,
        streaming: bool = True,
    ) -> int:
        """Send a request and return its matchtag; `receive` gives its replies. Raises Disconnected."""
        asked = self._calls.open(topic, payload, nodeid=nodeid, streaming=streaming)
        self._send(asked)
        return asked.matchtag

    def send(self, topic: str, payload: WireMap | None = None, *, nodeid: int = NODEID_ANY) -> None:
        """Send a request that wants no response. Raises Disconnected."""
        self._send(request(topic, None if payload is None else pack(payload), nodeid=nodeid))

    def cancel(self, matchtag: int) -> None:
        """Stop waiting for `matchtag`: what is held of it is dropped, and its service is told.

        Does nothing for a call that has ended; a connection lost meanwhile is found by whatever comes next.
        """
        self._replies = deque(held for held in self._replies if held[0].matchtag != matchtag)
        self._held = sum(size for _reply, size in self._replies)
        message = self._calls.abandon(matchtag)
        if message is not None and self._socket.fileno() >= 0:
            self._output += frame(encode(message))
            self._write()

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply of any call, in order of arrival; None when `timeout` seconds have brought none.

        Replies may be held here while nothing is left to read from the socket: before polling `fileno`, call
        `receive(0)` until it returns None. Raises Disconnected once nothing is held any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._replies:
            if not self._progress(deadline):
                return None
        reply, size = self._replies.popleft()
        self._held -= size
        return reply

    def receive_for(self, matchtag: int, timeout: float | None = None) -> Reply | None:
        """The next reply of one call, as `receive` gives it; those of other calls are held."""
        deadline = None if timeout is None else time.monotonic() + timeout
        seen = 0
        while True:
            for index in range(seen, len(self._replies)):
                reply, size = self._replies[index]
                if reply.matchtag == matchtag:
                    del self._replies[index]
                    self._held -= size
                    return reply
            seen = len(self._replies)
            if not self._progress(deadline):
                return None

    # --- the connection

    def fileno(self) -> int:
        """The socket's descriptor, for polling; -1 once closed."""
        return self._socket.fileno()

    def broker_pidfd(self) -> int:
        """A new pidfd of the broker's process, to wait for its end by; -1 where that is not seen from here, or ours."""
        pid, _uid, _gid = _PEER.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        try:
            return -1 if pid in (0, os.getpid()) else os.pidfd_open(pid)  # 0: it is in a pid namespace beside ours
        except ProcessLookupError:
            return -1

    def close(self) -> None:
        """Close the connection; the broker cancels what was under way."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: Message) -> None:
        self._output += frame(encode(message))
        self._write()
        while self._output:
            self._progress(None)

    def _progress(self, deadline: float | None) -> bool:
        """Wait until the socket takes output or has input, and do what it can; False at the deadline."""
        if self._socket.fileno() < 0:
            raise self._lost("the connection is closed")
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._output else 0))
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        events = poller.poll(wait)
        if not events:
            return False
        if self._output and events[0][1] & select.POLLOUT:
            self._write()
        if events[0][1] & ~select.POLLOUT:
            self._read()
        return True

    def _write(self) -> None:
        try:
            del self._output[: self._socket.send(self._output)]
        except BlockingIOError:
            return
        except OSError as error:
            # What the broker still said before it went is read first; the loss itself shows at the end of it.
            self._output.clear()
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise self._lost(os.strerror(error.errno or errno.EIO)) from error

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost(os.strerror(error.errno or errno.EIO)) from error
        if not data:
            raise self._lost("the broker is gone")
        try:
            for body in self._frames.feed(data):
                self._take(body)
        except ProtocolError as error:
            raise self._lost(str(error)) from error

    def _take(self, body: bytes) -> None:
        reply = self._calls.receive(decode(body))
        if reply is None:
            return
        self._held += len(body)
        self._replies.append((reply, len(body)))
        if self._held > MAX_HELD:
            raise self._lost(f"more than {MAX_HELD} bytes of responses wait to be taken")

    def _lost(self, why: str) -> Disconnected:
        self.close()
        self._calls.lost(RpcError(errno.ECONNRESET))
        return Disconnected(f"cannot reach the broker at {self.uri}: {why}")


def wait_ended(pidfd: int, timeout: float | None) -> bool:
    """Wait up to `timeout` seconds for the end of the process of `pidfd` (-1: it has none); False if it lives on."""
    if pidfd < 0:
        return True
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


# --- where the broker is


def resolve_uri(uri: str | None = None) -> str:
    """The URI to connect to: `uri`, else FLUXRES_URI, else the user's default instance, else the system
    instance.

    Raises FluxresError where there is none, and for a URI of another kind than `local://`.
    """
    uri = uri or os.environ.get("FLUXRES_URI")
    if uri:
        return SCHEME + socket_path(uri)
    base = os.environ.get("XDG_RUNTIME_DIR")
    own = f"{base}/fluxres/local-0" if base else f"/tmp/fluxres-{os.getuid()}/local-0"
    if _is_socket(own, os.getuid()):
        return SCHEME + own
    if _is_socket(SYSTEM_SOCKET, None):
        return SCHEME + SYSTEM_SOCKET
    raise FluxresError(
        f"cannot find an instance: FLUXRES_URI is not set, and neither {own} nor {SYSTEM_SOCKET} is there "
        "(fluxres start begins one)"
    )


def socket_path(uri: str) -> str:
    """The path in a `local://` URI; a bare absolute path will do. Raises FluxresError for anything else."""
    path = uri.removeprefix(SCHEME)
    if not path.startswith("/"):
        raise FluxresError(f"cannot connect to {uri!r}: a URI is {SCHEME}/path/to/socket")
    return path


def _is_socket(path: str, owner: int | None) -> bool:
    """Whether `path` is a socket, and `owner`'s where one is given (anyone may create names in /tmp)."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and owner in (None, found.st_uid)


def _connect_when_up(path: str, timeout: float, restart_gap: float) -> socket.socket:
    """Connect, and try again while the broker of the socket is gone. Raises as `_connect` does."""
    begun = time.monotonic()
    while True:
        try:
            return _connect(path, begun + timeout)
        except (ConnectionRefusedError, ConnectionResetError):
            # refused: the socket is a killed broker's; reset: the broker was killed before its welcome
            if time.monotonic() >= begun + min(timeout, restart_gap):
                raise
        time.sleep(CONNECT_RETRY)


def _connect(path: str, deadline: float) -> socket.socket:
    """Connect and read the welcome byte. Raises OSError, TimeoutError at the deadline."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)  # a blocking connect would wait for room in the backlog without a bound
        _connect_path(connecting, path, deadline)
        connecting.settimeout(max(CONNECT_RETRY, deadline - time.monotonic()))
        welcome = connecting.recv(1)
        if not welcome:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if welcome[0]:
            raise OSError(welcome[0], os.strerror(welcome[0]))
        connecting.setblocking(False)
    except BaseException:
        connecting.close()
        raise
    return connecting


def _connect_path(connecting: socket.socket, path: str, deadline: float) -> None:
    """Connect to `path`, however long it is, waiting for room in a full backlog."""
    directory = -1
    address = path
    if len(os.fsencode(path)) > SUN_PATH_MAX:
        parent, name = os.path.split(path)
        directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        address = f"/proc/self/fd/{directory}/{name}"
    try:
        while True:
            try:
                connecting.connect(address)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(CONNECT_RETRY)
            else:
                return
    finally:
        if directory >= 0:
            os.close(directory)
