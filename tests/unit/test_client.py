"""fluxres.client: calls, streams, errors, and how a broker is found."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fakebroker import FakeBroker

from fluxres.base.errors import FluxresError, RpcError
from fluxres.client import CallTimeout, Client, Disconnected, resolve_uri
from fluxres.wire.framing import frame
from fluxres.wire.messages import USERID_UNKNOWN


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(tmp_path / "local-0") as made:
        yield made


@pytest.fixture
def client(broker: FakeBroker) -> Iterator[Client]:
    with Client.connect(broker.uri) as made:
        yield made


def test_call(broker: FakeBroker, client: Client) -> None:
    broker.on("attr.get", {"value": "4", "flags": 1})
    assert client.call("attr.get", {"name": "size"}, nodeid=3) == {"value": "4", "flags": 1}
    assert broker.seen == [("attr.get", {"name": "size"})]
    asked = broker.messages[0]
    assert (asked.nodeid, asked.userid, asked.rolemask) == (3, USERID_UNKNOWN, 0)


def test_error_response(broker: FakeBroker, client: Client) -> None:
    broker.on("attr.get", (errno.ENOENT, "no attribute 'x'"))
    with pytest.raises(RpcError) as caught:
        client.call("attr.get", {"name": "x"})
    assert (caught.value.errnum, caught.value.text) == (errno.ENOENT, "no attribute 'x'")


def test_stream_ends_at_enodata(broker: FakeBroker, client: Client) -> None:
    broker.on("log.dmesg", {"line": "a"}, {"line": "b"}, errno.ENODATA)
    assert [each["line"] for each in client.stream("log.dmesg", {})] == ["a", "b"]
    assert broker.messages[0].is_streaming


def test_stream_raises_other_errors(broker: FakeBroker, client: Client) -> None:
    broker.on("log.dmesg", {"line": "a"}, (errno.EPERM, "no"))
    stream = client.stream("log.dmesg", {})
    assert next(stream) == {"line": "a"}
    with pytest.raises(RpcError, match="no"):
        next(stream)


def test_leaving_a_stream_cancels_it(broker: FakeBroker, client: Client) -> None:
    broker.on("kvs-watch.lookup", {"val": 1})
    broker.on("attr.get", {"value": "x"})
    stream = client.stream("kvs-watch.lookup", {"key": "a"})
    next(stream)
    assert isinstance(stream, Generator)
    stream.close()
    client.call("attr.get", {})
    assert [topic for topic, _ in broker.seen] == ["kvs-watch.lookup", "kvs-watch.cancel", "attr.get"]
    assert broker.seen[1][1] == {"matchtag": broker.messages[0].matchtag}


def test_replies_of_other_calls_are_held(broker: FakeBroker, client: Client) -> None:
    broker.on("log.dmesg", {"line": "a"}, {"line": "b"}, errno.ENODATA)
    broker.on("attr.get", {"value": "x"})
    stream = client.open("log.dmesg", {})
    assert client.call("attr.get", {}) == {"value": "x"}
    got = [client.receive(10) for _ in range(3)]
    assert [each and (each.matchtag, each.payload.get("line"), each.last) for each in got] == [
        (stream, "a", False),
        (stream, "b", False),
        (stream, None, True),
    ]
    assert client.receive(0) is None


def test_cancel_drops_what_is_held(broker: FakeBroker, client: Client) -> None:
    broker.on("log.dmesg", {"line": "a"}, {"line": "b"})
    broker.on("attr.get", {"value": "x"})
    stream = client.open("log.dmesg", {})
    client.call("attr.get", {})
    client.cancel(stream)
    assert client.receive(0) is None


def test_too_much_held_is_an_error(broker: FakeBroker, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.client.MAX_HELD", 1000)
    broker.on("log.dmesg", {"line": "x" * 600}, {"line": "x" * 600})
    broker.on("attr.get", {"value": "x"})
    client.open("log.dmesg", {})
    with pytest.raises(Disconnected, match="more than 1000 bytes"):
        client.call("attr.get", {})


def test_timeout_cancels_the_call(broker: FakeBroker, client: Client) -> None:
    broker.on("slow.call")
    broker.on("attr.get", {"value": "x"})
    with pytest.raises(CallTimeout, match=r"cannot finish slow\.call: no answer within 0\.01s"):
        client.call("slow.call", timeout=0.01)
    client.call("attr.get", {})
    assert ("slow.cancel", {"matchtag": broker.messages[0].matchtag}) in broker.seen


def test_loss_is_disconnected_after_what_was_received(broker: FakeBroker, client: Client) -> None:
    broker.on("log.dmesg", {"line": "a"})
    client.open("log.dmesg", {})
    first = client.receive(10)
    assert first is not None
    broker.cut()
    with pytest.raises(Disconnected, match="cannot reach the broker at local://"):
        client.receive(10)
    with pytest.raises(Disconnected):
        client.call("attr.get", {})
    client.cancel(first.matchtag)


def test_large_requests_and_responses_do_not_deadlock(broker: FakeBroker, client: Client) -> None:
    broker.handlers["echo.echo"] = lambda _message, payload: [payload]
    data = "x" * 1_000_000
    tags = [client.open("echo.echo", {"n": n, "data": data}, streaming=False) for n in range(8)]
    replies = [client.receive(30) for _ in tags]
    assert [each and each.payload["n"] for each in replies] == list(range(8))


def test_malformed_answers_end_the_connection(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with pytest.raises(Disconnected, match="cannot decode a message"):
            _speak(server, tmp_path, frame(b"\xff"))


def _speak(server: socket.socket, directory: Path, data: bytes) -> None:
    server.settimeout(10)
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(str(directory / "s"))
        here, _ = server.accept()
        with here, Client(there, "local:///s") as client:
            there.setblocking(False)
            here.sendall(data)
            client.receive(10)


# --- connecting


def test_refusal_is_the_errno_of_the_welcome(broker: FakeBroker) -> None:
    broker.welcome = bytes([errno.EPERM])
    with pytest.raises(FluxresError, match=r"cannot connect to local://.*: Operation not permitted"):
        Client.connect(broker.uri)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FluxresError, match=r"cannot connect to local://.*/none: No such file or directory"):
        Client.connect(f"local://{tmp_path}/none")


def test_a_broker_that_is_about_to_be_restarted_is_waited_for(broker: FakeBroker) -> None:
    broker.on("attr.get", {"value": "x"})
    broker.stop()
    assert broker.path.is_socket()
    refused = threading.Event()

    def restart() -> None:
        assert refused.wait(10)
        broker.start()

    thread = threading.Thread(target=restart)
    thread.start()
    with pytest.raises(FluxresError, match=r"refused \(its broker is not online: it has ended, or waits for"):
        Client.connect(broker.uri, restart_gap=0)
    refused.set()
    with Client.connect(broker.uri) as client:
        assert client.call("attr.get") == {"value": "x"}
    thread.join()


def test_a_broker_that_dies_before_its_welcome_is_waited_for(broker: FakeBroker) -> None:
    broker.on("attr.get", {"value": "x"})
    with socket.socket(socket.AF_UNIX) as doomed:
        doomed.bind(f"{broker.path}.new")
        doomed.listen()
        broker.stop()
        os.rename(f"{broker.path}.new", broker.path)

        def die() -> None:
            doomed.accept()[0].close()
            broker.start()

        thread = threading.Thread(target=die)
        thread.start()
        with Client.connect(broker.uri) as client:
            assert client.call("attr.get") == {"value": "x"}
        thread.join()


def test_a_broker_is_not_waited_for_for_ever(broker: FakeBroker) -> None:
    broker.stop()
    with pytest.raises(FluxresError, match="Connection refused"):
        Client.connect(broker.uri, restart_gap=0.05)
    with pytest.raises(FluxresError, match="Connection refused"):
        Client.connect(broker.uri, timeout=0.05)


def test_no_welcome_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with pytest.raises(FluxresError, match=r"no answer within 0\.05s"):
            Client.connect(f"local://{tmp_path}/s", timeout=0.05)


def test_full_backlog_is_waited_for_in_vain(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        waiting = []
        with pytest.raises(FluxresError, match="no answer within"):
            for _ in range(10):
                each = socket.socket(socket.AF_UNIX)
                waiting.append(each)
                each.setblocking(False)
                each.connect_ex(path)
            Client.connect(f"local://{path}", timeout=0.05)
        for each in waiting:
            each.close()


def test_path_longer_than_an_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    here = os.open(directory, os.O_PATH)
    try:
        broker = FakeBroker(Path(f"/proc/self/fd/{here}/local-0"))
        with broker, Client.connect(f"local://{directory}/local-0") as client:
            broker.on("attr.get", {"value": "x"})
            assert client.call("attr.get") == {"value": "x"}
    finally:
        os.close(here)


@pytest.mark.parametrize("uri", ["ssh://host/path", "relative/path", "local://relative"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(FluxresError, match=r"a URI is local:///path/to/socket"):
        resolve_uri(uri)


def test_resolve_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUXRES_URI", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("fluxres.client.SYSTEM_SOCKET", str(tmp_path / "system"))
    with pytest.raises(FluxresError, match="cannot find an instance: FLUXRES_URI is not set"):
        resolve_uri()
    with FakeBroker(tmp_path / "system") as system:
        assert resolve_uri() == system.uri
        (tmp_path / "fluxres").mkdir()
        with FakeBroker(tmp_path / "fluxres" / "local-0") as own:
            assert resolve_uri() == own.uri
            monkeypatch.setenv("FLUXRES_URI", "local:///env")
            assert resolve_uri() == "local:///env"
            assert resolve_uri("/bare/path") == "local:///bare/path"
