"""A client that comes back after its broker's death, so that waiting commands survive it.

A `Session` keeps what was begun over it. When the connection is lost it reconnects, and sends again each call
that has not ended: a plain call unchanged (so it must be idempotent), a stream with the `position` of the
last response that was taken, so that the service goes on right after it. Nothing is lost or repeated.

States of a session: CONNECTED -> (connection lost) -> AWAY -> (connected again, calls resent) -> CONNECTED.
In AWAY an attempt is made every `RECONNECT_EVERY` seconds, and given up after `RECONNECT_FOR`, or soon after
the socket's whole directory has gone: a temporary instance takes it along when it ends.

States of a call: SENT -> ENDED, or SENT -> (an error that only says "not now": the instance is stopping,
starting or panicking) -> WAITING -> (`RETRY_EVERY`) -> SENT.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, RpcError
from fluxres.client import CONNECT_TIMEOUT, CallTimeout, Client, Disconnected, resolve_uri, socket_path
from fluxres.rpc.calls import Reply
from fluxres.wire.messages import NODEID_ANY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from fluxres.wire.payload import WireMap

RECONNECT_EVERY: Final = 0.1
"""Seconds between attempts to reconnect."""
RECONNECT_FOR: Final = 3600.0
"""Seconds after which a session gives up on a broker that does not come back."""
GONE_FOR: Final = 5.0
"""Seconds for which the socket's directory may be missing before the instance counts as ended."""
RETRY_EVERY: Final = 0.2
"""Seconds until a call is sent again that the instance cannot take right now."""
NOT_NOW: Final = {errno.EHOSTUNREACH: RECONNECT_FOR, errno.ENOSYS: 60.0, errno.EAGAIN: 60.0}
"""Errors of an instance that starts, stops or panics; for how many seconds a call is sent again."""


class _Begun:
    """A call that has not ended."""

    __slots__ = ("matchtag", "nodeid", "payload", "resend", "retry_at", "streaming", "topic", "trying_since")

    def __init__(self, topic: str, payload: WireMap, nodeid: int, *, streaming: bool, resend: bool) -> None:
        self.topic = topic
        self.payload = payload
        self.nodeid = nodeid
        self.streaming = streaming
        self.resend = resend
        self.matchtag = 0  # 0: not sent over the current connection
        self.retry_at = 0.0
        self.trying_since: float | None = None


class Session:
    """Calls that survive the connection. A context manager; leaving it closes the connection.

    `on_lost` is told each time that the connection is lost, with the reason.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        timeout: float = CONNECT_TIMEOUT,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """Connect as `Client.connect` does: FluxresError where no instance is there to begin with."""
        self.uri = resolve_uri(uri)
        self._client: Client | None = Client.connect(self.uri, timeout)
        self._on_lost = on_lost
        self._lost_at = 0.0
        self._there_at = 0.0
        self._reconnect_at = 0.0
        self._begun: dict[int, _Begun] = {}
        self._handles: dict[int, int] = {}
        self._failed: deque[Reply] = deque()
        self._next = 1

    # --- calls

    def begin(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        nodeid: int = NODEID_ANY,
        streaming: bool = False,
        resend: bool = True,
    ) -> int:
        """Begin a call and return its handle, which stands in `Reply.matchtag` of what `receive` returns for
        it.

        With `resend` false the loss of the connection ends it with ECONNRESET: for calls that are not
        idempotent, and for streams whose responses carry no `position`.
        """
        handle = self._next
        self._next += 1
        begun = _Begun(topic, payload or {}, nodeid, streaming=streaming, resend=resend)
        self._begun[handle] = begun
        if self._client is not None:
            self._send(handle, begun, self._client)
        return handle

    def end(self, handle: int) -> None:
        """Stop waiting for a call; does nothing for one that has ended."""
        begun = self._begun.pop(handle, None)
        if begun is not None and begun.matchtag:
            del self._handles[begun.matchtag]
            if self._client is not None:
                self._client.cancel(begun.matchtag)

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply of any call; None when `timeout` seconds have brought none. Reconnects where
        necessary.

        Raises FluxresError when the broker does not come back.
        """
        return self._receive(None, None if timeout is None else time.monotonic() + timeout)

    def call(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        nodeid: int = NODEID_ANY,
        idempotent: bool = False,
        timeout: float | None = None,
    ) -> WireMap:
        """Call `topic` and return the response's payload; an `idempotent` call is sent again after a loss.

        Raises RpcError (ECONNRESET: the connection was lost, and the call is not idempotent), CallTimeout,
        and FluxresError when the broker does not come back.
        """
        handle = self.begin(topic, payload, nodeid=nodeid, resend=idempotent)
        reply = self._receive(handle, None if timeout is None else time.monotonic() + timeout)
        if reply is None:
            self.end(handle)
            raise CallTimeout(f"cannot finish {topic}: no answer within {timeout:g}s")
        if reply.error is not None:
            raise reply.error
        return reply.payload

    def follow(self, topic: str, payload: WireMap, *, nodeid: int = NODEID_ANY) -> Iterator[WireMap]:
        """Yield a stream's responses until ENODATA; it is resumed by `position`. Raises as `call` does."""
        handle = self.begin(topic, payload, nodeid=nodeid, streaming=True)
        try:
            while (reply := self._receive(handle, None)) is not None:
                if reply.error is None:
                    yield reply.payload
                elif reply.error.errnum == errno.ENODATA:
                    return
                else:
                    raise reply.error
        finally:
            self.end(handle)

    # --- the connection

    def fileno(self) -> int:
        """The descriptor to poll, -1 (which poll(2) ignores) while there is no connection.

        As with `Client`, call `receive(0)` until it returns None before polling, and for no longer than
        `poll_timeout` says.
        """
        return -1 if self._client is None else self._client.fileno()

    def poll_timeout(self) -> float | None:
        """Seconds until `receive(0)` must be called though `fileno` is not readable; None: never."""
        due = self._due()
        return None if due is None else max(0.0, due - time.monotonic())

    def close(self) -> None:
        """Close the connection; the broker cancels what was under way."""
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, handle: int | None, deadline: float | None) -> Reply | None:
        """The next reply of `handle`, or of any call; None at the deadline."""
        while True:
            for failed in self._failed:
                if handle in (None, failed.matchtag):
                    self._failed.remove(failed)
                    return failed
            now = time.monotonic()
            client = self._client or self._reconnect(now)
            if client is None:
                if deadline is not None and now >= deadline:
                    return None
                time.sleep(_until(now, self._reconnect_at, deadline) or 0.0)
                continue
            self._send_due(client, now)
            try:
                wait = _until(now, self._due(), deadline)
                if handle is None:
                    reply = client.receive(wait)
                else:
                    reply = client.receive_for(self._begun[handle].matchtag, wait)
            except Disconnected as error:
                self._lose(str(error))
                continue
            if reply is None:
                if deadline is not None and time.monotonic() >= deadline:
                    return None
            elif (taken := self._take(reply)) is not None:
                return taken

    def _take(self, reply: Reply) -> Reply | None:
        """Turn a reply of the connection into one of the session; None where the call is to be sent again."""
        handle = self._handles.get(reply.matchtag)
        if handle is None:
            return None
        begun = self._begun[handle]
        if reply.error is not None and begun.resend and self._again(begun, reply.error.errnum):
            del self._handles[reply.matchtag]
            begun.matchtag = 0
            return None
        if reply.error is None:
            begun.trying_since = None
        if reply.last:
            del self._handles[reply.matchtag], self._begun[handle]
        elif "position" in reply.payload:
            begun.payload = {**begun.payload, "position": reply.payload["position"]}
        return reply._replace(matchtag=handle)

    def _again(self, begun: _Begun, errnum: int) -> bool:
        """Whether an error means only that the call has to be sent again later."""
        if errnum not in NOT_NOW:
            return False
        now = time.monotonic()
        if begun.trying_since is None:
            begun.trying_since = now
        begun.retry_at = now + RETRY_EVERY
        return now - begun.trying_since < NOT_NOW[errnum]

    def _due(self) -> float | None:
        """When something has to be done although nothing has arrived."""
        if self._client is None:
            return self._reconnect_at
        return min((b.retry_at for b in self._begun.values() if not b.matchtag), default=None)

    def _send_due(self, client: Client, now: float) -> None:
        for handle, begun in list(self._begun.items()):
            if not begun.matchtag and begun.retry_at <= now:
                self._send(handle, begun, client)

    def _send(self, handle: int, begun: _Begun, client: Client) -> None:
        try:
            begun.matchtag = client.open(begun.topic, begun.payload, nodeid=begun.nodeid, streaming=begun.streaming)
        except Disconnected:
            return  # the next receive finds the connection lost, and sends this over the next one
        self._handles[begun.matchtag] = handle

    def _lose(self, why: str) -> None:
        """The connection is gone: CONNECTED -> AWAY."""
        self._client = None
        self._handles.clear()
        self._lost_at = self._there_at = self._reconnect_at = time.monotonic()
        for handle, begun in list(self._begun.items()):
            begun.matchtag = 0
            begun.retry_at = 0.0
            begun.trying_since = None
            if not begun.resend:
                del self._begun[handle]
                error = RpcError(errno.ECONNRESET, f"the connection was lost before {begun.topic} was answered")
                self._failed.append(Reply(handle, {}, error, last=True))
        if self._on_lost is not None:
            self._on_lost(why)

    def _reconnect(self, now: float) -> Client | None:
        """Try to connect when it is time to: AWAY -> CONNECTED. Raises FluxresError when it gives up."""
        if now < self._reconnect_at:
            return None
        self._reconnect_at = now + RECONNECT_EVERY
        try:
            self._client = Client.connect(self.uri, restart_gap=0)
        except FluxresError as error:
            if os.path.isdir(os.path.dirname(socket_path(self.uri))):
                self._there_at = now
            if now - self._there_at > GONE_FOR:
                raise FluxresError(f"cannot reconnect to {self.uri}: its directory is gone") from error
            if now - self._lost_at > RECONNECT_FOR:
                raise FluxresError(f"{error} (given up after {RECONNECT_FOR:g}s)") from error
        return self._client


def _until(now: float, *times: float | None) -> float | None:
    """Seconds from `now` to the first of `times`; None where there is none."""
    first = min((each for each in times if each is not None), default=None)
    return None if first is None else max(0.0, first - now)
