"""The HTTP/1.1 of the status endpoint without I/O: one request is read, one response is written, and that is all.

Only GET and HEAD exist, and no request has a body: there is nothing here to change. What a request asks for, and what
that needs (`Need`), is a table. A response always closes the connection, and carries what keeps browsers from doing
more with it than the page does.

    reading --head whole--> Request
            --malformed, too long, with a body--> BadRequest, which is an answer as well

Sources: RFC 9110, RFC 9112 (through h11), RFC 6455 §4.2 for the handshake of WebSockets.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Final

import h11
import msgspec

from fluxres.base.json import JsonValue

MAX_HEAD: Final = 16 * 1024
"""Bytes of a request's head."""
MAX_SHOWN: Final = 80
"""Characters of a request that an answer or the log shows."""
VERSIONS: Final = (b"1.0", b"1.1")
METHODS: Final = (b"GET", b"HEAD")
"""All there are: no verb changes anything."""
HTML: Final = "text/html; charset=utf-8"
TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
KEY_SIZE: Final = 16
"""Bytes of a `Sec-WebSocket-Key`."""
WEBSOCKET_VERSION: Final = "13"
STATIC: Final = "/static/"
SECURITY: Final = (
    (
        "Content-Security-Policy",
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
"""What every response says to browsers."""
_LISTS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "if-none-match", "sec-websocket-protocol", "upgrade"}
)
"""Headers that are lists, so that there may be several of a name."""
_ONCE: Final = frozenset({"authorization", "origin", "sec-fetch-site", "sec-websocket-key", "sec-websocket-version"})
"""Headers of which two would be two answers to one question."""


class Route(Enum):
    """What can be asked for."""

    PAGE = "/"
    STATIC = "/static/…"
    WEBSOCKET = "/ws"
    METRICS = "/metrics"
    HEALTHZ = "/healthz"
    READYZ = "/readyz"
    STATUS = "/api/status"
    ACCESS = "/api/access"
    NOTHING = "anything else"


class Need(Enum):
    """What whoever asks has to be."""

    REACH = "reach"
    """Anything that reaches this address, under whatever name: probes."""
    OPEN = "open"
    """Anybody, under a right name."""
    LOCAL = "local"
    """Any user of this machine; from elsewhere, a reader."""
    READER = "reader"
    """The instance owner, root, or who has the token."""


_ROUTES: Final[Mapping[str, Route]] = {
    route.value: route for route in Route if route not in (Route.STATIC, Route.NOTHING)
}
NEEDS: Final[Mapping[Route, Need]] = {
    Route.PAGE: Need.OPEN,
    Route.STATIC: Need.OPEN,
    Route.WEBSOCKET: Need.READER,
    Route.METRICS: Need.LOCAL,
    Route.HEALTHZ: Need.REACH,
    Route.READYZ: Need.REACH,
    Route.STATUS: Need.READER,
    Route.ACCESS: Need.READER,
    Route.NOTHING: Need.OPEN,
}


class BadRequest(Exception):
    """A request that is answered with `status` and `why`, whoever asks."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request without a body. The names of `headers` are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def route(self) -> Route:
        """What it asks for."""
        return Route.STATIC if self.path.startswith(STATIC) else _ROUTES.get(self.path, Route.NOTHING)

    def words(self, name: str) -> tuple[str, ...]:
        """The elements of a header that is a list."""
        elements = (element.strip() for element in self.headers.get(name, "").split(","))
        return tuple(element for element in elements if element)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer; `pieces` go after `body`, of whatever length they come to."""

    status: int = 200
    content_type: str = TEXT
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Cache-Control", "no-store"),)
    pieces: Iterator[bytes] | None = None


def text(status: int, said: str, *headers: tuple[str, str]) -> Response:
    """A line of text for people and probes."""
    return Response(status=status, body=f"{said}\n".encode(), headers=(("Cache-Control", "no-store"), *headers))


def json(status: int, value: JsonValue, *headers: tuple[str, str]) -> Response:
    """A JSON document."""
    body = msgspec.json.encode(value) + b"\n"
    return Response(status=status, content_type=JSON, body=body, headers=(("Cache-Control", "no-store"), *headers))


class Exchange:
    """One request and its response, for one connection."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._bodiless = False

    def feed(self, data: bytes) -> Request | None:
        """Take bytes of the client, b"" at its end; the request as soon as it is whole. Raises BadRequest."""
        try:
            self._h11.receive_data(data)
            event = self._h11.next_event()
            if isinstance(event, h11.Request):
                self._bodiless = event.method == b"HEAD"
                _check(event)
                return _read(event)
        except h11.RemoteProtocolError as error:
            raise BadRequest(error.error_status_hint, f"cannot read the request: {error}") from error
        return None

    @property
    def trailing(self) -> bytes:
        """What the client has sent beyond its request."""
        self._h11.next_event()  # the end of a message without a body
        return self._h11.trailing_data[0]

    def response(self, response: Response) -> Iterator[bytes]:
        """The bytes of a response."""
        headers = [
            ("Content-Type", response.content_type),
            *response.headers,
            *SECURITY,
            ("Connection", "close"),
        ]
        if response.pieces is None and response.status != HTTPStatus.NOT_MODIFIED:
            headers.append(("Content-Length", str(len(response.body))))
        reason = HTTPStatus(response.status).phrase
        start = h11.Response(status_code=response.status, headers=headers, reason=reason)
        yield (self._h11.send(start) or b"") + self._data(response.body)
        for piece in response.pieces or ():
            yield self._data(piece)
        yield self._h11.send(h11.EndOfMessage()) or b""

    def _data(self, data: bytes) -> bytes:
        return b"" if self._bodiless else self._h11.send(h11.Data(data=data)) or b""


def _check(event: h11.Request) -> None:
    """Refuse what no request has here."""
    if event.http_version not in VERSIONS:
        raise BadRequest(505, "what is spoken here is HTTP/1.1")
    if event.method not in METHODS:
        method = event.method.decode("ascii")[:MAX_SHOWN]
        raise BadRequest(405, f"there is no {method} here: nothing can be changed")
    for name, value in event.headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            raise BadRequest(413, "no request has a body here")


def _read(event: h11.Request) -> Request:
    target = event.target.decode("ascii")
    if not target.startswith("/"):
        raise BadRequest(400, f"cannot read the request: {target[:MAX_SHOWN]!r} is no path")
    headers: dict[str, str] = {}
    for raw_name, raw_value in event.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        if name in _ONCE and name in headers:
            raise BadRequest(400, f"cannot read the request: there are two {name}")
        headers[name] = f"{headers[name]}, {value}" if name in _LISTS and name in headers else value
    return Request(method=event.method.decode("ascii"), path=target.partition("?")[0], headers=headers)


def handshake(request: Request) -> bytes:
    """The head of a WebSocket handshake that says what `request` does, and only that. Raises BadRequest."""
    key = request.headers.get("sec-websocket-key", "")
    if request.method != "GET" or "websocket" not in (word.lower() for word in request.words("upgrade")):
        raise BadRequest(426, "this address is for WebSockets (RFC 6455)")
    if "upgrade" not in (word.lower() for word in request.words("connection")):
        raise BadRequest(400, "cannot open a WebSocket: there is no Connection: Upgrade")
    if request.headers.get("sec-websocket-version") != WEBSOCKET_VERSION:
        raise BadRequest(426, f"cannot open a WebSocket: its version is not {WEBSOCKET_VERSION}")
    if not _is_key(key):
        raise BadRequest(400, "cannot open a WebSocket: Sec-WebSocket-Key is not 16 bytes in base64")
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Version: {WEBSOCKET_VERSION}",
        f"Sec-WebSocket-Key: {key}",
    ]
    if protocols := request.words("sec-websocket-protocol"):
        lines.append(f"Sec-WebSocket-Protocol: {', '.join(protocols)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == KEY_SIZE
    except (binascii.Error, ValueError):
        return False
