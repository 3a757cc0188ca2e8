"""What the status endpoint is given by those who mean it no good: the broker does not care.

After each of them the broker answers RPCs, runs a job, serves the next reader, and has no more files open than before.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Expect, Instance, check_job, eventually
from statuskit import Closed, Reader, Refused, address_of, ask, bearer, dial, drain, talk, uri_of

TOKEN: Final = "tell-nobody-this-token"
KEY: Final = b"dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE: Final = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY + b"\r\n"
)
HALF_OPEN: Final = 10_000
AT_A_TIME: Final = 4000
"""Connections that the test holds at a time."""
SPARE: Final = 500
"""Files that it needs for other things."""
ROOM: Final = 64 * 1024 * 1024
"""Bytes by which the broker may grow by all that."""
FEW: Final = 16
"""Files that a broker may have open more than before, for what it does besides."""


def files_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_of(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def masked(first: int, payload: bytes) -> bytes:
    """A frame of a client, its mask being zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([first]) + length + bytes(4) + payload


def well(instance: Instance, uri: str) -> None:
    """The broker answers, runs a job, and shows it to a reader."""
    job = instance.submit(instance.job("print('well')"))
    with Reader(uri) as reader:
        reader.hear_type("hello")
        reader.say(type="subscribe", id=1, topics=["jobs"])
        reader.hear_type("snapshot")
    instance.wait_inactive(job)
    check_job(instance, job, Expect(output=b"well\n"))


@pytest.fixture
def uri(instance: Instance) -> Iterator[str]:
    """Where an instance serves its status; in the end it is well, and nothing of it is left open."""
    found = uri_of(instance)
    well(instance, found)
    before = files_of(instance.pid)
    yield found
    well(instance, found)
    eventually(lambda: files_of(instance.pid) <= before + FEW, what="the end of all connections")


def wire(uri: str, frames: bytes) -> tuple[int, str]:
    """The close code and reason after these bytes on an open WebSocket; 1006 where it just ended."""
    with Reader(uri) as reader:
        reader.hear_type("hello")
        reader.sock.sendall(frames)
        try:
            while True:
                reader.hear_type("error")
        except Closed as closed:
            return closed.code, closed.reason or ""


FRAMES: Final = {
    "not masked": (b"\x81\x05hello", 1002),
    "an opcode that does not exist": (masked(0x83, b"x"), 1002),
    "reserved bits": (masked(0xF1, b"x"), 1002),
    "a continuation of nothing": (masked(0x80, b"x"), 1002),
    "a message in a message": (masked(0x01, b"{") + masked(0x81, b"}"), 1002),
    "a ping in parts": (masked(0x09, b"x"), 1002),
    "a ping that is too long": (masked(0x89, b"x" * 126), 1002),
    "a length with a sign": (b"\x81\xff" + b"\xff" * 8 + bytes(4), 1002),
    "no UTF-8": (masked(0x81, b"\xff\xfe"), 1007),
    "half a close code": (masked(0x88, b"\x00"), 1002),
    "a close code that does not exist": (masked(0x88, b"\x03\xe7x"), 1002),
    "too long": (masked(0x81, b"x" * 16_385), 1009),
    "too long in parts": (masked(0x01, b"x" * 9000) + masked(0x80, b"x" * 9000), 1009),
    "a terabyte": (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + bytes(4) + b"x" * 20_000, 1009),
    "binary": (masked(0x82, b"x"), 1003),
    "nonsense, again and again": (masked(0x81, b"x") * 17, 1008),
}
"""What is no message -> how the WebSocket is closed."""


def test_frames_that_are_none(uri: str) -> None:
    closed = {name: wire(uri, frames)[0] for name, (frames, _) in FRAMES.items()}
    assert closed == {name: code for name, (_, code) in FRAMES.items()}


def test_random_frames(uri: str) -> None:
    for size in (1, 2, 3, 10, 100, 1000, 10_000, 100_000):
        wire(uri, os.urandom(size) + b"\x81\x05ended")


def test_what_comes_before_the_handshake_is_answered(uri: str) -> None:
    """Frames right behind the head are the client's right."""
    with dial(uri) as sock:
        sock.sendall(HANDSHAKE + b"\r\n" + masked(0x89, b"now") + masked(0x81, b"x") + masked(0x88, b"\x03\xe8"))
        received = drain(sock)
        assert b"\x8a\x03now" in received
        assert received.endswith(b"\x88\x02\x03\xe8")


MESSAGES: Final = {
    '"x"': "Expected `object`",
    "{}": "type",
    "[" * 10_000: "cannot take",
    '{"type":"cancel","id":1}': "cancel",
    '{"type":"subscribe","id":1,"topics":["nothing"]}': "'nothing'",
    '{"type":"subscribe","id":-1,"topics":["jobs"]}': ">= 0",
    '{"type":"subscribe","id":1,"topics":["jobs"],"jobs":{"or":3}}': "or",
    '{"type":"follow","id":1,"job":"nonsense"}': "nonsense",
    '{"type":"follow","id":1,"job":"ƒ1"}': "ƒ1",
}
"""What makes no sense -> what is in the answer."""


def test_messages_that_make_no_sense(uri: str) -> None:
    with Reader(uri) as reader:
        reader.hear_type("hello")
        for message, error in MESSAGES.items():
            reader.sock.sendall(masked(0x81, message.encode()))
            assert error in str(reader.hear_type("error")["error"]), message[:80]
        reader.say(type="subscribe", id=5, topics=["instance"])
        assert reader.hear_type("snapshot")["id"] == 5


def test_more_than_is_allowed(uri: str) -> None:
    with Reader(uri) as reader:
        reader.hear_type("hello")
        for number in range(9):
            reader.say(type="subscribe", id=number, topics=["queue" if number > 8 else "events"])
        answers = [reader.hear_type("snapshot", "error") for _ in range(9)]
        assert [answer["id"] for answer in answers if answer["type"] == "error"] == [8]
        reader.say(type="subscribe", id=1, topics=["jobs"])
        assert "in use" in str(reader.hear_type("error")["error"])


REQUESTS: Final = {
    "POST": (b"POST /api/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", 405),
    "DELETE": (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "CONNECT": (b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "another host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a proxy's request": (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a long path": (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
    "a huge head": (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 9000 + b"\r\n", 431),
    "a long line": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 9, 400),
    "zeros": (b"\x00" * 64 + b"\r\n\r\n", 400),
    "upwards": (b"GET /static/../settings.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "quoted upwards": (b"GET /static/%2e%2e/settings.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "from the root": (b"GET /static//etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a page of another site": (HANDSHAKE + b"Origin: http://evil.example\r\n\r\n", 403),
    "a page of nowhere": (HANDSHAKE + b"Origin: null\r\n\r\n", 403),
    "through a proxy": (HANDSHAKE + b"X-Forwarded-For: 10.0.0.1\r\n\r\n", 403),
    "rebound": (HANDSHAKE.replace(b"localhost", b"evil.example") + b"\r\n", 403),
    "another subprotocol": (HANDSHAKE + b"Sec-WebSocket-Protocol: chat\r\n\r\n", 400),
    "an old version": (HANDSHAKE.replace(b": 13", b": 7") + b"\r\n", 426),
    "a bad key": (HANDSHAKE.replace(KEY, b"x") + b"\r\n", 400),
    "a body": (HANDSHAKE + b"Content-Length: 9\r\n\r\n", 413),
}
"""What is refused -> with which status."""


def test_requests_that_are_refused(uri: str) -> None:
    answered = {name: talk(uri, request)[:13].decode() for name, (request, _) in REQUESTS.items()}
    assert answered == {name: f"HTTP/1.1 {status} " for name, (_, status) in REQUESTS.items()}


def test_who_never_ends_its_request_is_closed(uri: str) -> None:
    """Nor does it help to send a byte now and then (slowloris): the time is for the whole request."""
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(uri)) for _ in range(3)]
        slow = stack.enter_context(dial(uri))
        silent[1].sendall(b"GE")
        silent[2].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        head = iter(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 1000)
        slow.settimeout(0.25)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < PATIENCE:
                slow.send(bytes([next(head)]))
                with contextlib.suppress(TimeoutError):
                    if not slow.recv(1):
                        break
        assert [drain(sock) for sock in silent] == [b"", b"", b""]
    assert time.monotonic() - begun < PATIENCE


@pytest.fixture
def guarded(make_instance: MakeInstance, tmp_path: Path) -> tuple[Instance, str]:
    """An instance with a token, and a proxy's way to it: it does not go by uid there."""
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    instance = make_instance(settings={"status": {"token-file": str(path)}})
    instance.start()
    return instance, uri_of(instance)


RIGHT: Final = {"Authorization": f"Bearer {TOKEN}"}
TOKENS: Final[Sequence[tuple[dict[str, str], int]]] = (
    ({}, 401),
    ({"Authorization": "Bearer wrong"}, 401),
    ({"Authorization": f"Basic {TOKEN}"}, 401),
    (RIGHT, 200),
    ({**RIGHT, "Origin": "https://evil.example"}, 403),
)


def test_tokens(guarded: tuple[Instance, str]) -> None:
    _, uri = guarded
    for headers, status in TOKENS:
        proxied = {"X-Forwarded-For": "10.0.0.1", **headers}
        for path in ("/api/status", "/metrics", "/api/access"):
            assert ask(uri, path, headers=proxied).status == status, (path, headers)
        if status == 200:
            Reader(uri, headers=proxied).sock.close()
        else:
            with pytest.raises(Refused) as refused:
                Reader(uri, headers=proxied)
            assert refused.value.status == status


def test_a_token_as_a_subprotocol(guarded: tuple[Instance, str]) -> None:
    _, uri = guarded
    proxied = {"X-Forwarded-For": "10.0.0.1"}
    with Reader(uri, protocols=["fluxres.status.v1", bearer(TOKEN)], headers=proxied) as reader:
        assert reader.subprotocol == "fluxres.status.v1"
        reader.hear_type("hello")
    with pytest.raises(Refused, match="401: this is not the token"):
        Reader(uri, protocols=["fluxres.status.v1", bearer("wrong")], headers=proxied)
    assert TOKEN not in guarded[0].log


# -- very many of them


def half_open(uri: str, number: int) -> list[socket.socket]:
    """So many connections that say nothing, or only the beginning of something."""
    socks = []
    address = address_of(uri)
    for index in range(number):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        socks.append(sock)
        if index % 3 == 0:
            with contextlib.suppress(OSError):
                sock.send(b"GET / HTTP/1.1\r\nHost: ")
    return socks


def close(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def test_ten_thousand_half_open_connections(instance: Instance, uri: str) -> None:
    """At most so many are held as the endpoint allows; who says something is served in spite of them, and jobs run."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wave = min(AT_A_TIME, files - SPARE)
    before, memory = files_of(instance.pid), memory_of(instance.pid)
    opened, most = 0, 0
    while opened < HALF_OPEN:
        socks = half_open(uri, min(wave, HALF_OPEN - opened))
        opened += len(socks)
        try:
            job = instance.submit(instance.job("print('ran')"))
            assert instance.rpc("attr.get", {"name": "rank"})["value"] == "0"
            assert eventually(lambda: ask(uri, "/healthz").body == b"ok\n", what="health")
            most = max(most, files_of(instance.pid) - before)
            instance.wait_inactive(job)
            check_job(instance, job, Expect(output=b"ran\n"))
        finally:
            close(socks)
    assert most <= 256 + FEW, f"the broker held {most} connections"
    eventually(lambda: files_of(instance.pid) <= before + FEW, what="the end of all connections")
    assert memory_of(instance.pid) - memory < ROOM
