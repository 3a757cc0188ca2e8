"""The status endpoint of one broker process: it listens, decides how many connections there may be, and serves them.

It lives as long as the process, not as an incarnation: `/healthz` answers while rank 0 replays, or a rank waits for its
parent. An incarnation *attaches* to it and is what it shows; when that ends, what hangs on it is told so (WebSocket
close code 1012), and clients come again.

    off, or not this rank's --> nothing to do
    not listening --> listening; --cannot, or the files are unusable--> again in BIND_PAUSE, for ever; never fatal
    a connection: silent --its request is whole--> heard --> served --> closed, silent again, until its last words are
    read; who is silent gives way to others, oldest first, and has HEAD_TIMEOUT

What serves a connection (h11, WebSockets, the page) is imported when the first of them says something: starting a
broker takes no longer for it. A connection that breaks is closed and logged, and touches nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import resource
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from fluxres.base.errors import FluxresError
from fluxres.status.complaints import Complaints
from fluxres.status.listener import Listening, listen
from fluxres.status.pace import Readers
from fluxres.status.settings import StatusSettings

if TYPE_CHECKING:
    from fluxres.rpc.handle import Handle
    from fluxres.status.board import Boards
    from fluxres.status.messages import Encoder
    from fluxres.status.static import File

log = logging.getLogger("fluxres.status")

BIND_PAUSE: Final = 5.0
"""Seconds after which listening is tried again."""
HEAD_TIMEOUT: Final = 10.0
"""Seconds that a connection has for its whole request, TLS handshake included."""
MAX_CONNECTIONS: Final = 2048
"""Connections at a time; fewer where the process may open few files, see `connection_limit`."""
FILES_SHARE: Final = 0.625
"""The part of the process's file descriptors that connections may take."""
MAX_SILENT: Final = 256
"""Connections at a time that have not sent a whole request; the oldest of them gives way to a new one."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds after which a connection is accepted that found no descriptor or no memory."""
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BUSY: Final = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 5\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """What an incarnation shows. `state` tells "join", "init", "run" or "shutdown"."""

    rank: int
    size: int
    instance: str
    handle: Handle
    boards: Boards
    state: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One connection to serve, whose socket is closed by the endpoint.

    `heard` is called when its request is whole, `ending` when it has its answer and only has to read it.
    """

    sock: socket.socket
    listening: Listening
    heard: Callable[[], None]
    ending: Callable[[float], None]


Serve: TypeAlias = "Callable[[Endpoint, Arrival], Awaitable[None]]"


class Endpoint:
    """Serves the status of one rank.

    `owner` is the instance owner's uid, `port_file` keeps the port where any may be taken, and `scrape(accept)` makes
    the metrics: the body and its content type.
    """

    def __init__(
        self,
        settings: StatusSettings,
        *,
        rank: int,
        owner: int,
        port_file: Path,
        scrape: Callable[[str], tuple[bytes, str]],
    ) -> None:
        self.settings = settings
        self.rank = rank
        self.owner = owner
        self.scrape = scrape
        self.complaints = Complaints()
        self.it: Attached | None = None
        """The incarnation that is attached."""
        self.readers = 0
        """WebSockets at this moment."""
        self.follows = 0
        """Jobs that they follow at this moment."""
        self.refused: Counter[str] = Counter()
        """Requests that were refused, by HTTP status."""
        self.limit = connection_limit()
        """How many connections there may be."""
        self.pace = Readers()
        """Those that are told of changes."""
        self._hanging: set[trio.CancelScope] = set()
        self._port_file = port_file
        self._listening: Listening | None = None
        self._connections = 0
        self._silent: dict[trio.CancelScope, None] = {}
        self._loading = trio.Lock()
        self._loaded: Serve | None = None
        self._files: Mapping[str, File] | None = None

    @property
    def uri(self) -> str:
        """Its address for browsers; "" while it does not listen."""
        return self._listening.uri if self._listening else ""

    @property
    def connections(self) -> int:
        """How many connections there are, WebSockets among them."""
        return self._connections

    @contextlib.contextmanager
    def attached(self, it: Attached) -> Iterator[None]:
        """Show `it` meanwhile. On leaving, what hangs on it is cancelled."""
        self.it = it
        try:
            yield
        finally:
            self.it = None
            for scope in tuple(self._hanging):
                scope.cancel()

    @contextlib.contextmanager
    def hanging_on(self, it: Attached) -> Iterator[None]:
        """A scope that is cancelled as soon as `it` is not attached any more."""
        with trio.CancelScope() as scope:
            if self.it is not it:
                scope.cancel()
            self._hanging.add(scope)
            try:
                yield
            finally:
                self._hanging.discard(scope)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Encodes for all readers."""
        from fluxres.status.messages import Encoder

        return Encoder()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started as soon as listening has been tried. Returns at once where there is nothing
        to do. What stands in the way of listening is logged, and tried again.
        """
        if not self.settings.serves(self.rank):
            task_status.started()
            return
        await self._try_to_listen()
        task_status.started()
        while True:
            if self._listening is not None:
                await self._accept(self._listening)
            await trio.sleep(BIND_PAUSE)
            await self._try_to_listen()

    async def _try_to_listen(self) -> None:
        try:
            self._listening = await listen(self.settings, self._port_file)
        except (OSError, FluxresError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self.complaints.say("listen", f"cannot serve status on {self.settings.address}: {why}; trying again")
        else:
            log.info("status is served at %s", self.uri)

    # --- connections

    async def _accept(self, listening: Listening) -> None:
        """Accept connections, and serve them, until the listening socket fails."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listening.sock)
                    await self._accept_one(listening, nursery)
        except* OSError as error:
            self.complaints.say("listen", f"cannot listen for status any more: {error.exceptions[0]}; trying again")
        finally:
            self._listening = None
            listening.sock.close()

    async def _accept_one(self, listening: Listening, nursery: trio.Nursery) -> None:
        try:
            sock, _ = listening.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.complaints.say("accept", f"cannot accept a connection for status now: {error.strerror}")
            self._give_way()
            await trio.sleep(ACCEPT_PAUSE)
        else:
            sock.setblocking(False)
            self._admit(sock, listening, nursery)

    def _admit(self, sock: socket.socket, listening: Listening, nursery: trio.Nursery) -> None:
        full = self._connections >= self.limit
        if full and not self._silent:
            self.refused["503"] += 1
            self.complaints.say("full", f"refusing a connection for status: there are {self._connections} already")
            with sock, contextlib.suppress(OSError):
                sock.send(_BUSY)
            return
        if full or len(self._silent) >= MAX_SILENT:
            self._give_way()
        scope = trio.CancelScope(deadline=trio.current_time() + HEAD_TIMEOUT)
        self._silent[scope] = None
        self._connections += 1
        nursery.start_soon(self._serve, sock, scope, listening, name="status connection")

    def _give_way(self) -> None:
        """End the connection that has been silent for longest."""
        for scope in self._silent:
            del self._silent[scope]
            scope.cancel()
            return

    async def _serve(self, sock: socket.socket, scope: trio.CancelScope, listening: Listening) -> None:
        def heard() -> None:
            self._silent.pop(scope, None)
            scope.deadline = math.inf

        def ending(seconds: float) -> None:
            self._silent[scope] = None
            scope.deadline = trio.current_time() + seconds

        try:
            with scope:
                await trio.lowlevel.wait_readable(sock)
                serve = await self._load()
                await serve(self, Arrival(sock=sock, listening=listening, heard=heard, ending=ending))
        except Exception as error:  # whatever it is, it is this connection's: the others are served
            self.complaints.say("fault", f"status connection ended by {error!r}", error=error)
        finally:
            self._silent.pop(scope, None)
            self._connections -= 1
            trio.lowlevel.notify_closing(sock)
            sock.close()

    async def _load(self) -> Serve:
        """What serves a connection; imported in a thread the first time, for that takes longer than the loop may
        stand still.
        """
        async with self._loading:
            if self._loaded is None:
                self._loaded = await trio.to_thread.run_sync(_import_serve)
            return self._loaded

    async def files(self) -> Mapping[str, File]:
        """The files of the page; read in a thread the first time."""
        async with self._loading:
            if self._files is None:
                self._files = await trio.to_thread.run_sync(_load_files)
            return self._files


def _load_files() -> Mapping[str, File]:
    from fluxres.status.static import load

    return load()


def _import_serve() -> Serve:
    from fluxres.status.connection import serve

    return serve


def connection_limit() -> int:
    """How many connections there may be: `MAX_CONNECTIONS`, or `FILES_SHARE` of what the process may open."""
    files, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, int(files * FILES_SHARE))
