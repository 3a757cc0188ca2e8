"""Asking a broker's status endpoint as a client would: plain HTTP, WebSockets, and bytes that no client would send."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self, cast
from urllib.parse import urlsplit

import jsonschema
from kit import PATIENCE, Instance, eventually
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from fluxres.base.json import JsonObject, JsonValue

SUBPROTOCOL: Final = "fluxres.status.v1"
SCHEMA: Final = json.loads((Path(__file__).parents[2] / "docs" / "status.schema.json").read_text(encoding="utf-8"))
MESSAGE: Final = jsonschema.Draft202012Validator({"$ref": "#/$defs/serverMessage", "$defs": SCHEMA["$defs"]})
"""What every message of the broker is held against."""
STATUS: Final = jsonschema.Draft202012Validator({"$ref": "#/$defs/status", "$defs": SCHEMA["$defs"]})
"""And what `/api/status` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> JsonObject:
        """The body as a JSON object."""
        return cast("JsonObject", json.loads(self.body))


def uri_of(instance: Instance) -> str:
    """Where the instance serves its status."""
    return eventually(lambda: cast("str", instance.rpc("attr.get", {"name": "status.uri"})["value"]), what="a URI")


def address_of(uri: str) -> tuple[str, int]:
    """The host and port of a URI."""
    parts = urlsplit(uri)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def ask(
    uri: str, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, cert: str | None = None
) -> Answer:
    """One request; TLS where the URI says so, trusting `cert`."""
    host, port = address_of(uri)
    if uri.startswith("https:"):
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=PATIENCE, context=trusting(cert)
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(status=response.status, headers=dict(response.getheaders()), body=response.read())


def trusting(cert: str | None) -> ssl.SSLContext:
    """A client's TLS that trusts one certificate, whatever name it has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if cert is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cert)
    return context


def dial(uri: str) -> socket.socket:
    """A TCP connection, nothing said yet."""
    sock = socket.create_connection(address_of(uri), timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def talk(uri: str, data: bytes) -> bytes:
    """Send bytes; all that comes until the end of the connection, however that ends."""
    with dial(uri) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
        return drain(sock)


def drain(sock: socket.socket) -> bytes:
    """All that comes until the end of the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65_536):
            received += data
    return received


def bearer(token: str) -> str:
    """The subprotocol that carries a token."""
    return "fluxres.bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


class Refused(Exception):
    """The handshake was refused."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body.decode(errors='replace')}")
        self.status = status
        self.body = body


class Closed(Exception):
    """The broker has closed the WebSocket, with this code; 1006 where it did not say one."""

    def __init__(self, code: int, reason: str | None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class Reader:
    """A WebSocket client. Raises Refused, and Closed where the broker closes."""

    def __init__(
        self, uri: str, *, protocols: Sequence[str] = (SUBPROTOCOL,), headers: Mapping[str, str] | None = None
    ) -> None:
        self.sock = dial(uri)
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._text = ""
        host, port = address_of(uri)
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        opening = Request(host=f"{host}:{port}", target="/ws", subprotocols=list(protocols), extra_headers=extra)
        self.send_event(opening)
        self._events = self._read()
        try:
            self.subprotocol = self._open()
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def _open(self) -> str | None:
        refusal: RejectConnection | None = None
        body = b""
        for event in self._events:
            if isinstance(event, AcceptConnection):
                return event.subprotocol
            if isinstance(event, RejectConnection):
                refusal = event
            if isinstance(event, RejectData):
                body += event.data
                if event.body_finished:
                    break
        raise Refused(refusal.status_code if refusal else 0, body)

    def _read(self) -> Iterator[Event]:
        while True:
            yield from self._protocol.events()
            try:
                data = self.sock.recv(65_536)
            except ConnectionError:
                data = b""
            if not data:
                return
            self._protocol.receive_data(data)

    def send_event(self, event: Event) -> None:
        """Send an event of wsproto."""
        self.sock.sendall(self._protocol.send(event))

    def say(self, **message: JsonValue) -> None:
        """Send a message."""
        self.send_event(TextMessage(data=json.dumps(message)))

    def hear(self) -> JsonObject:
        """The next message. Raises Closed."""
        for event in self._events:
            if isinstance(event, Ping):
                self.send_event(event.response())
            elif isinstance(event, CloseConnection):
                with contextlib.suppress(OSError):
                    self.send_event(event.response())
                raise Closed(event.code, event.reason)
            elif isinstance(event, Message):
                self._text += cast("str", event.data)
                if event.message_finished:
                    text, self._text = self._text, ""
                    message = json.loads(text)
                    MESSAGE.validate(message)
                    return cast("JsonObject", message)
        raise Closed(1006, None)

    def hear_type(self, *types: str) -> JsonObject:
        """The next message, which has one of these types."""
        message = self.hear()
        assert message["type"] in types, message
        return message


class Hears(Protocol):
    """Where messages come from."""

    def hear(self) -> JsonObject:
        """The next message."""


class Picture:
    """What a reader knows by its messages: applies snapshots and deltas, once their parts are complete."""

    def __init__(self) -> None:
        self.position: list[JsonValue] | None = None
        self.documents: dict[str, dict[str, JsonObject]] = {}
        self.why = ""
        self._parts: list[JsonObject] = []

    def take(self, message: JsonObject) -> bool:
        """Apply a message; returns whether the picture is that of a position now."""
        assert message["type"] in ("snapshot", "delta"), message
        if message["part"] == 0:
            self._parts = []
        self._parts.append(message)
        if message["more"]:
            return False
        if message["type"] == "snapshot":
            self.documents, self.why = {}, cast("str", message["why"])
        else:
            assert self.position is not None
            assert message["prev"] == self.position[1], (message, self.position)
        for part in self._parts:
            self._apply(part)
        self.position = cast("list[JsonValue]", message["position"])
        return True

    def _apply(self, part: JsonObject) -> None:
        put = cast("dict[str, dict[str, JsonObject]]", part.get("docs", part.get("set")))
        for topic, documents in put.items():
            self.documents.setdefault(topic, {}).update(documents)
        for topic, keys in cast("dict[str, list[str]]", part.get("delete", {})).items():
            for key in keys:
                self.documents.get(topic, {}).pop(key, None)

    def follow(self, reader: Hears, until: str, key: str, what: str = "", value: JsonValue = None) -> JsonObject:
        """Take messages until the document `key` of topic `until` has `what` = `value`; that document."""
        deadline = time.monotonic() + PATIENCE
        while True:
            document = self.documents.get(until, {}).get(key)
            if document is not None and (not what or document.get(what) == value):
                return document
            assert time.monotonic() < deadline, f"{until}/{key} never had {what}={value!r}: {document}"
            self.take(reader.hear())
