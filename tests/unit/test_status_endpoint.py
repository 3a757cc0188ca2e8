"""The status endpoint over real loopback sockets: what it answers, how many it serves, and what it survives."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import ssl
from pathlib import Path

import pytest
import trio.testing
from endpointkit import DOCUMENTS, PATIENCE, Shown, ask, ask_over, dial, drain, make_endpoint, port_of, serving, until
from tlskit import make_cert

from fluxres.status import api, complaints, connection, endpoint, listener, static
from fluxres.status.complaints import Complaints
from fluxres.status.endpoint import connection_limit
from fluxres.status.http import Request
from fluxres.status.settings import make_settings
from fluxres.status.static import File


async def test_what_is_answered(tmp_path: Path) -> None:
    made, shown = make_endpoint(tmp_path), Shown()
    async with serving(made) as port:
        with made.attached(shown.attached):
            assert (await ask(port, "/healthz"))[::2] == (200, b"ok\n")
            assert (await ask(port, "/readyz"))[::2] == (200, b"ok\n")
            assert (await ask(port, "/api/access"))[::2] == (200, b'{"access":"ok"}\n')
            assert (await ask(port, "/metrics", ("Accept", "x")))[::2] == (200, b"metrics for x\n")
            status, headers, body = await ask(port, "/api/status")
            assert (status, headers["content-type"]) == (200, "application/json")
            found = json.loads(body)
            assert (found["position"], found["docs"]["jobs"]) == (["e", 1], DOCUMENTS["jobs"])
            status, headers, body = await ask(port, "/")
            assert (status, body[:15]) == (200, b"<!doctype html>")
            del headers["content-length"]
            known = ("If-None-Match", f'"x", W/{headers["etag"]}')
            assert await ask(port, "/", known) == (304, headers, b"")
            assert (await ask(port, "/static/app.js"))[1]["content-type"] == "text/javascript; charset=utf-8"
            assert (await ask(port, "/static/index.html"))[0] == (await ask(port, "/x"))[0] == 404
            assert (await ask(port, "/api/status", method="HEAD"))[::2] == (200, b"")
        assert shown.boards.opened == 0
    assert made.connections == 0


async def test_between_incarnations_it_is_healthy_and_not_ready(tmp_path: Path) -> None:
    made, shown = make_endpoint(tmp_path), Shown()
    async with serving(made) as port:
        for _ in range(2):
            assert (await ask(port, "/healthz"))[0] == 200
            assert (await ask(port, "/api/access"))[0] == 200
            for path in ("/readyz", "/api/status"):
                status, headers, body = await ask(port, path)
                assert (status, headers["retry-after"]) == (503, "1")
                assert b"between two incarnations" in body
            with made.attached(shown.attached):
                for state in ("join", "init"):
                    shown.state = state
                    assert f"state {state}".encode() in (await ask(port, "/readyz"))[2]
                    assert (await ask(port, "/api/status"))[0] == 503
                shown.state = "shutdown"
                assert ((await ask(port, "/readyz"))[0], (await ask(port, "/api/status"))[0]) == (503, 200)


async def test_documents_that_do_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not answer, or the incarnation ends meanwhile."""
    monkeypatch.setattr(api, "BEGIN_TIMEOUT", 0.05)
    made, shown = make_endpoint(tmp_path), Shown()
    shown.boards.board.begin("")
    async with serving(made) as port, trio.open_nursery() as nursery:
        with made.attached(shown.attached):
            assert b"rank 0 does not answer" in (await ask(port, "/api/status"))[2]
        monkeypatch.setattr(api, "BEGIN_TIMEOUT", PATIENCE)

        async def wait() -> None:
            assert b"between two incarnations" in (await ask(port, "/api/status"))[2]
            nursery.cancel_scope.cancel()

        with made.attached(shown.attached):
            nursery.start_soon(wait)
            await until(lambda: shown.boards.opened)


async def test_who_may_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_endpoint(tmp_path)
    monkeypatch.setattr(connection, "peer_uid", lambda sock: 12_345)
    made.owner = 1000
    async with serving(made) as port:
        assert (await ask(port, "/api/status"))[0] == 403
        assert json.loads((await ask(port, "/api/access"))[2])["why"].startswith(
            "this is for the instance owner (uid 1000)"
        )
        assert (await ask(port, "/", ("Origin", "http://evil.example")))[0] == 403
        async with await dial(port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert (await drain(stream)).startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert made.refused == {"403": 3}, "a question whether one may is no try"
    assert len(caplog.records) == 1, "the others are not said one by one"


async def test_a_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    made = make_endpoint(tmp_path, make_settings(token_file=str(token)))
    proxied = ("X-Forwarded-For", "x")
    async with serving(made) as port:
        status, headers, body = await ask(port, "/metrics", proxied)
        assert (status, headers["www-authenticate"], body) == (401, "Bearer", b"this needs the token\n")
        assert json.loads((await ask(port, "/api/access", proxied))[2]) == {
            "why": "this needs the token",
            "needs": "token",
        }
        right = ("Authorization", "Bearer 0123456789abcdef")
        assert (await ask(port, "/metrics", proxied, right))[0] == 200


async def test_tls(tmp_path: Path) -> None:
    cert = make_cert(tmp_path / "cert")
    made = make_endpoint(tmp_path, make_settings(cert=cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cert)
    async with serving(made) as port:
        assert made.uri == f"https://127.0.0.1:{port}/"
        stream = trio.SSLStream(await dial(port), context)
        async with stream:
            assert (await ask_over(stream, "/healthz"))[::2] == (200, b"ok\n")  # and the end is said: no truncation
        async with await dial(port) as plain:
            await plain.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" not in await drain(plain)


# -- how many there may be


async def test_the_oldest_that_is_silent_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_SILENT", 2)
    made = make_endpoint(tmp_path)
    async with serving(made) as port:
        streams = []
        for _ in range(4):
            streams.append(await dial(port))
            await trio.testing.wait_all_tasks_blocked(0.02)
        assert made.connections == 2
        assert [await drain(stream) for stream in streams[:2]] == [b"", b""]
        await streams[2].send_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await drain(streams[2])).startswith(b"HTTP/1.1 200")
        for stream in streams:
            await stream.aclose()


async def test_when_all_are_busy_the_next_is_refused(tmp_path: Path) -> None:
    made, shown = make_endpoint(tmp_path), Shown()
    made.limit = 1
    shown.boards.board.begin("")  # so that who asks waits
    async with serving(made) as port, trio.open_nursery() as nursery:
        with made.attached(shown.attached):
            nursery.start_soon(ask, port, "/api/status")
            await until(lambda: shown.boards.opened)
            async with await dial(port) as stream:
                assert (await drain(stream)).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert made.refused == {"503": 1}
        await until(lambda: not made.connections)  # the one that waited has its answer
        assert (await ask(port, "/healthz"))[0] == 200


async def test_who_never_ends_its_request_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "HEAD_TIMEOUT", 0.1)
    made = make_endpoint(tmp_path)
    async with serving(made) as port:
        for sent in (b"", b"GET / HTTP/1.1\r\n"):
            async with await dial(port) as stream:
                if sent:
                    await stream.send_all(sent)
                assert await drain(stream) == b""


async def test_who_does_not_take_its_answer_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.status.stream.STUCK", 0.1)
    made, shown = make_endpoint(tmp_path), Shown()
    shown.boards.board.begin("e", {"jobs": {str(n): {"text": "x" * 10_000} for n in range(3000)}})
    async with serving(made) as port:
        with made.attached(shown.attached):
            async with await dial(port) as stream:
                await stream.send_all(b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await until(lambda: made.connections)
                await until(lambda: not made.connections)


def test_the_limit_leaves_files_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr("resource.getrlimit", lambda what: limits["now"])
    assert connection_limit() == 640
    limits["now"] = (1 << 20, 1 << 20)
    assert connection_limit() == endpoint.MAX_CONNECTIONS
    limits["now"] = (-1, -1)
    assert connection_limit() == endpoint.MAX_CONNECTIONS


# -- what it survives


async def test_a_fault_of_ours_ends_one_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_endpoint(tmp_path)

    def fail(accept: str) -> tuple[bytes, str]:
        raise RuntimeError("no such counter")

    made.scrape = fail
    async with serving(made) as port:
        status, _, body = await ask(port, "/metrics")
        assert (status, body) == (500, b"the broker failed here: its log says why\n")
        assert (await ask(port, "/healthz"))[0] == 200
    assert "no such counter" in caplog.text
    assert "Traceback" in caplog.text


async def test_an_address_that_is_taken_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoint, "BIND_PAUSE", 0.02)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        made = make_endpoint(tmp_path, make_settings(bind=f"127.0.0.1:{sock.getsockname()[1]}"))
        async with trio.open_nursery() as nursery:
            await nursery.start(made.run)
            assert made.uri == ""
            sock.close()
            await until(lambda: made.uri)
            assert (await ask(port_of(made), "/healthz"))[0] == 200
            nursery.cancel_scope.cancel()
    assert len([record for record in caplog.records if "cannot serve status on" in record.getMessage()]) == 1
    assert "Address already in use" in caplog.text


async def test_files_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_endpoint(tmp_path, make_settings(token_file=str(tmp_path / "none")))
    async with serving(made):
        assert made.uri == ""
    assert "status.token-file: cannot read" in caplog.text


async def test_no_descriptors_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits, and accepts when there are some again."""
    made = make_endpoint(tmp_path)
    full = [3]
    accept = socket.socket.accept

    def refuse(sock: socket.socket) -> tuple[socket.socket, object]:
        if full[0]:
            full[0] -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(sock)

    async with serving(made) as port:
        monkeypatch.setattr(socket.socket, "accept", refuse)
        assert (await ask(port, "/healthz"))[0] == 200
    assert full == [0]


async def test_a_rank_that_does_not_serve(tmp_path: Path) -> None:
    for made in (make_endpoint(tmp_path, rank=1), make_endpoint(tmp_path, make_settings(bind="off"))):
        with trio.fail_after(PATIENCE):
            await made.run()
        assert made.uri == ""


async def test_a_port_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "KEPT_PAUSE", 0.001)
    async with serving(make_endpoint(tmp_path)) as port:
        assert (tmp_path / "port").read_text() == f"{port}\n"
    async with serving(make_endpoint(tmp_path)) as again:
        assert again == port
        async with serving(make_endpoint(tmp_path)) as other:
            assert other != port


async def test_ipv6(tmp_path: Path) -> None:
    made = make_endpoint(tmp_path, make_settings(bind="[::1]:0"))
    async with serving(made) as port:
        assert made.uri == f"http://[::1]:{port}/"
        async with await trio.open_tcp_stream("::1", port) as stream:
            assert (await ask_over(stream, "/api/access"))[0] == 200


# -- small parts


async def test_complaints_are_few(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    said = Complaints()
    monkeypatch.setattr(complaints, "PAUSE", 0.05)
    for _ in range(5):
        said.say("a", "again")
    said.say("b", "other")
    await trio.sleep(0.06)
    said.say("a", "again")
    assert [record.getMessage() for record in caplog.records] == ["again", "other", "again (and 4 more like it before)"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_the_page_is_in_the_package() -> None:
    files = static.load()
    assert files["/"].content_type.startswith("text/html")
    assert all(path == "/" or path.startswith("/static/") for path in files)
    assert len({file.etag for file in files.values()}) == len({file.body for file in files.values()})


def test_static_files_are_asked_for_by_name() -> None:
    files = {"/static/a.js": File(content_type="x", body=b"y", etag='"z"')}

    def status(path: str, tag: str = "") -> int:
        return static.answer(Request(method="GET", path=path, headers={"if-none-match": tag}), files).status

    assert status("/static/a.js") == status("/static/a.js", '"y"') == 200
    assert status("/static/a.js", '"y", "z"') == status("/static/a.js", "*") == 304
    assert status("/static/../a.js") == status("/static/") == status("/static/a.js/") == 404


async def test_a_burst_of_websockets_does_not_pass_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.status.connection.MAX_WEBSOCKETS", 2)
    made, shown = make_endpoint(tmp_path), Shown()
    head = (
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    answers: list[bytes] = []

    async def open_one(port: int) -> None:
        async with await dial(port) as stream:
            await stream.send_all(head)
            answers.append((await stream.receive_some())[:12])
            await until(lambda: len(answers) == 8)

    async with serving(made) as port:
        with made.attached(shown.attached):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(open_one, port)
    assert sorted(answers) == [b"HTTP/1.1 101", b"HTTP/1.1 101", *[b"HTTP/1.1 503"] * 6]
