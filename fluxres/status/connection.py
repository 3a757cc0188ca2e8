"""One connection to the status endpoint, from its first byte to its last.

    [TLS handshake] --> head --> refused, or answered --> the client reads that --> closed
                                 /ws: a WebSocket     --> closed

The time for TLS and the head, and for reading the last words, is the endpoint's to bound. The endpoint imports this
module, and all that comes with it, when somebody asks for the first time.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import trio

from fluxres.overlay.address import ANY
from fluxres.status import api, static
from fluxres.status.access import Refused, Rules, judge, wants_uid
from fluxres.status.http import NEEDS, BadRequest, Exchange, Request, Response, Route, json, text
from fluxres.status.peer import peer_uid
from fluxres.status.stream import SEND_BUFFER, ConnectionStream, linger
from fluxres.status.websocket import serve_websocket

if TYPE_CHECKING:
    from fluxres.status.endpoint import Arrival, Endpoint
    from fluxres.status.listener import Listening

READ_SIZE: Final = 4096
ANSWER_TIMEOUT: Final = 60.0
"""Seconds for making an answer and sending it; WebSockets have times of their own."""
LINGER: Final = 1.0
"""Seconds that a client has to read its answer; meanwhile it gives way to others."""
MAX_WEBSOCKETS: Final = 1024
WEBSOCKET_RESERVE: Final = 64
"""Connections that WebSockets leave to others."""
_NEEDS_TOKEN: Final = ("WWW-Authenticate", "Bearer")
_METHODS: Final = ("Allow", "GET, HEAD")
_SPEAKS: Final = ("Upgrade", "websocket")


class Connection:
    """Serves one request."""

    def __init__(self, endpoint: Endpoint, arrival: Arrival, stream: trio.abc.Stream) -> None:
        self._endpoint = endpoint
        self._arrival = arrival
        self._stream = ConnectionStream(stream)
        self._exchange = Exchange()

    async def run(self) -> None:
        """Read the request and answer it. Raises BrokenResourceError, and what a fault of ours raises."""
        try:
            request = await self._read()
            if request is None:
                return
            self._arrival.heard()
            with trio.move_on_after(ANSWER_TIMEOUT) as patience:
                response = self._refusal(request)
                if response is None and request.route is Route.WEBSOCKET:
                    patience.deadline = float("inf")
                    response = await self._serve_websocket(request)
                elif response is None:
                    response = await self._answer(request)
                if response is not None:
                    await self._send(response)
        except BadRequest as error:
            self._endpoint.refused[str(error.status)] += 1
            await self._send(text(error.status, error.why, *_hints(error.status)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception:
            if not self._stream.has_sent:
                await self._send(text(500, "the broker failed here: its log says why"))
            raise

    async def _read(self) -> Request | None:
        """The request; None where the client goes before it is whole. Raises BadRequest."""
        while True:
            data = await self._stream.receive_some(READ_SIZE)
            request = self._exchange.feed(data)
            if request is not None or not data:
                return request

    async def _send(self, response: Response) -> None:
        for data in self._exchange.response(response):
            if data:
                await self._stream.send_all(data)

    # --- who may ask

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that is not allowed, and to the question whether it would be."""
        refused = self._judge(request)
        if request.route is Route.ACCESS:
            return api.access(refused)
        if refused is None:
            return None
        self._endpoint.refused[str(refused.status)] += 1
        self._endpoint.complaints.say("refused", f"status refused {request.path[:80]!r}: {refused.why}")
        return text(refused.status, refused.why, *_hints(refused.status))

    def _judge(self, request: Request) -> Refused | None:
        rules = self._rules()
        need = NEEDS[request.route]
        uid = peer_uid(self._arrival.sock) if wants_uid(request, need, rules) else None
        return judge(request, need, rules, uid=uid)

    def _rules(self) -> Rules:
        settings, listening = self._endpoint.settings, self._arrival.listening
        return Rules(
            local=settings.local,
            owner=self._endpoint.owner,
            token=listening.token,
            names=_names(listening, self._arrival.sock),
            origins=settings.origins,
        )

    # --- what is asked for

    async def _answer(self, request: Request) -> Response:
        route, endpoint = request.route, self._endpoint
        if route is Route.HEALTHZ:
            return api.healthz()
        if route is Route.READYZ:
            return api.readyz(endpoint.it)
        if route is Route.METRICS:
            return await api.metrics(endpoint, request)
        if route is Route.STATUS:
            return await self._status()
        return static.answer(request, await endpoint.files())

    async def _status(self) -> Response:
        it = self._endpoint.it
        why = api.not_showing(it)
        response = None
        if it is not None and not why:
            with self._endpoint.hanging_on(it):
                response = await api.status(it)
        if response is not None:
            return response
        return json(503, {"error": f"cannot show the instance: {why or api.not_showing(None)}"}, api.RETRY)

    async def _serve_websocket(self, request: Request) -> Response | None:
        """Be a WebSocket until it ends, or the answer why not. Raises BadRequest."""
        endpoint, it = self._endpoint, self._endpoint.it
        why = api.not_showing(it)
        if it is None or why:
            return text(503, f"cannot show the instance: {why}", api.RETRY)
        if endpoint.readers >= min(MAX_WEBSOCKETS, endpoint.limit - WEBSOCKET_RESERVE):
            endpoint.refused["503"] += 1
            endpoint.complaints.say("full", f"refusing a WebSocket: there are {endpoint.readers} already")
            return text(503, f"there are {endpoint.readers} WebSockets already", api.RETRY)
        endpoint.readers += 1
        try:
            await serve_websocket(endpoint, it, self._stream, request, self._exchange)
        finally:
            endpoint.readers -= 1
        return None


async def serve(endpoint: Endpoint, arrival: Arrival) -> None:
    """Serve one connection; its socket stays open, for the endpoint to close."""
    arrival.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    tcp = trio.SocketStream(trio.socket.from_stdlib_socket(arrival.sock))
    context = arrival.listening.tls
    try:
        if context is None:
            await Connection(endpoint, arrival, tcp).run()
        else:
            tls = trio.SSLStream(ConnectionStream(tcp), context, server_side=True)
            await tls.do_handshake()
            await Connection(endpoint, arrival, tls).run()
            await tls.aclose()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # the client is gone, or speaks no TLS
    arrival.ending(LINGER)
    await linger(arrival.sock)


def _names(listening: Listening, sock: socket.socket) -> frozenset[str]:
    """What a client may call this host, beside the names of the loopback."""
    at, *_ = sock.getsockname()
    names = {str(at).partition("%")[0], socket.gethostname().lower()}
    return frozenset(names if listening.host == ANY else names | {listening.host})


def _hints(status: int) -> tuple[tuple[str, str], ...]:
    """What an answer of this status tells besides."""
    return {401: (_NEEDS_TOKEN,), 405: (_METHODS,), 426: (_SPEAKS,)}.get(status, ())
