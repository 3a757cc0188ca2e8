"""HTTP without I/O: what is a request here, what is refused whoever asks, and what a response looks like."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.status.http import (
    MAX_HEAD,
    NEEDS,
    SECURITY,
    BadRequest,
    Exchange,
    Need,
    Request,
    Response,
    Route,
    handshake,
    json,
    text,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = {
    "connection": "keep-alive, Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": KEY,
}


def request(path: str = "/", method: str = "GET", **headers: str) -> Request:
    return Request(method=method, path=path, headers={name.replace("_", "-"): v for name, v in headers.items()})


def read(data: bytes) -> Request:
    found = Exchange().feed(data)
    assert found is not None
    return found


def refusal(data: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        Exchange().feed(data)
    return caught.value


@pytest.mark.parametrize(
    ("path", "route", "need"),
    [
        ("/", Route.PAGE, Need.OPEN),
        ("/static/app.js", Route.STATIC, Need.OPEN),
        ("/static/../../etc/passwd", Route.STATIC, Need.OPEN),
        ("/static", Route.NOTHING, Need.OPEN),
        ("/healthz", Route.HEALTHZ, Need.REACH),
        ("/readyz", Route.READYZ, Need.REACH),
        ("/metrics", Route.METRICS, Need.LOCAL),
        ("/ws", Route.WEBSOCKET, Need.READER),
        ("/api/status", Route.STATUS, Need.READER),
        ("/api/access", Route.ACCESS, Need.READER),
        ("/API/status", Route.NOTHING, Need.OPEN),
        ("/api/status/", Route.NOTHING, Need.OPEN),
        ("/api%2fstatus", Route.NOTHING, Need.OPEN),
        ("//api/status", Route.NOTHING, Need.OPEN),
        ("anything else", Route.NOTHING, Need.OPEN),
    ],
)
def test_routes(path: str, route: Route, need: Need) -> None:
    assert (request(path).route, NEEDS[request(path).route]) == (route, need)


def test_every_route_needs_something() -> None:
    assert set(NEEDS) == set(Route)


def test_a_request_is_read() -> None:
    found = read(
        b"GET /api/status?x=1 HTTP/1.1\r\nHost: a:1\r\nAccept: x\r\nACCEPT: y\r\nOrigin: http://a:1\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    assert found == Request(
        method="GET",
        path="/api/status",
        headers={"host": "a:1", "accept": "x, y", "origin": "http://a:1", "content-length": "0"},
    )
    assert found.words("accept") == ("x", "y")
    assert found.words("nothing") == ()


@given(st.integers(1, 60))
def test_a_request_may_come_in_pieces(size: int) -> None:
    data = b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nMORE"
    exchange = Exchange()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    found = None
    while found is None:
        found = exchange.feed(pieces.pop(0))
    assert found.path == "/ws"
    assert exchange.trailing + b"".join(pieces) == b"MORE"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\nOrigin: http://b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: x\r\nAuthorization: y\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS, spoken to a port without
        (b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n", 0),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 5\r\n\r\nabc", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET /" + b"a" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * (MAX_HEAD // 6 + 1), 431),
    ],
)
def test_what_is_no_request(data: bytes, status: int) -> None:
    if not status:  # an obsolete form that h11 reads, as RFC 9112 §5.2 allows
        assert read(data).headers["host"] == "a folded: x"
        return
    assert refusal(data).status == status


@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    exchange = Exchange()
    response = text(200, "ok")
    try:
        found = exchange.feed(data)
    except BadRequest as error:
        response = text(error.status, error.why)
    else:
        assert found is None or found.path.startswith("/")
        if found is None:
            return
    assert b"".join(exchange.response(response)).startswith(b"HTTP/1.1 %d " % response.status)


# -- responses


def answered(response: Response, head: bytes = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") -> tuple[h11.Response, bytes]:
    """What a client reads."""
    exchange = Exchange()
    assert exchange.feed(head) is not None
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=head.split()[0], target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    for data in exchange.response(response):
        if data:
            client.receive_data(data)
    client.receive_data(b"")
    got = client.next_event()
    assert isinstance(got, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    return got, body


def test_a_response_says_what_browsers_may_do_and_closes() -> None:
    got, body = answered(text(404, "none"))
    headers = {name.decode(): value.decode() for name, value in got.headers}
    assert (got.status_code, got.reason, body) == (404, b"Not Found", b"none\n")
    assert headers["connection"] == "close"
    assert headers["content-length"] == "5"
    assert headers["cache-control"] == "no-store"
    assert {(name.lower(), value) for name, value in SECURITY} <= set(headers.items())
    assert "'unsafe" not in headers["content-security-policy"]


def test_a_response_in_pieces() -> None:
    response = Response(body=b"a", pieces=iter((b"b", b"c")))
    assert answered(response)[1] == b"abc"
    assert answered(response, b"GET / HTTP/1.0\r\n\r\n")[1] == b"a"  # the pieces are spent


@pytest.mark.parametrize("response", [text(200, "ok"), Response(body=b"a", pieces=iter((b"b",)))])
def test_head_has_no_body(response: Response) -> None:
    got, body = answered(response, b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (got.status_code, body) == (200, b"")


def test_not_modified_has_no_body() -> None:
    assert answered(Response(status=304))[1] == b""


def test_json() -> None:
    got, body = answered(json(503, {"error": "x"}, ("Retry-After", "1")))
    assert (body, dict(got.headers.raw_items())[b"Retry-After"]) == (b'{"error":"x"}\n', b"1")


# -- the handshake


def test_the_handshake_is_of_our_own_making() -> None:
    asked = request(
        "/ws", **{**UPGRADE, "sec-websocket-protocol": "a,b", "sec-websocket-extensions": "permessage-deflate"}
    )
    assert handshake(asked) == (
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Protocol: a, b\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"upgrade": "h2c"}, 426),
        ({"connection": "close"}, 400),
        ({"sec-websocket-version": "8"}, 426),
        ({"sec-websocket-key": "x"}, 400),
        ({"sec-websocket-key": "dGhl\xe9"}, 400),
        ({"sec-websocket-key": ""}, 400),
    ],
)
def test_what_is_no_handshake(changed: dict[str, str], status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        handshake(request("/ws", **{**UPGRADE, **changed}))
    assert caught.value.status == status


def test_the_handshake_is_a_get() -> None:
    with pytest.raises(BadRequest):
        handshake(request("/ws", "HEAD", **UPGRADE))
