"""WebSockets of the status endpoint over real loopback sockets: conversations, limits, and how they end."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from endpointkit import DOCUMENTS, PATIENCE, Shown, ask, dial, drain, make_endpoint, serving, until
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
)
from wsproto.utilities import LocalProtocolError

from fluxres.base.errors import RpcError
from fluxres.base.json import JsonObject
from fluxres.rpc.server import Request
from fluxres.status import conversation, follow, pace, stream, websocket
from fluxres.status.asks import FOLLOWED
from fluxres.status.endpoint import Endpoint
from fluxres.status.websocket import choose, close_frame

SUBPROTOCOL = "fluxres.status.v1"
LINE = '{"timestamp":1.0,"name":"%s"}\n'


class Client:
    """A WebSocket client, and what it has heard."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self.socket = socket

    async def say(self, **message: object) -> None:
        await self.socket.send_message(json.dumps(message))

    async def hear(self, *types: str) -> JsonObject:
        """The next message, which has one of these types."""
        with trio.fail_after(PATIENCE):
            message = cast("JsonObject", json.loads(await self.socket.get_message()))
        assert not types or message["type"] in types, message
        return message

    async def closed(self) -> CloseReason:
        """Why the other end closes, whatever it says before."""
        with trio.fail_after(PATIENCE):
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    await self.socket.get_message()
        assert closed.value.reason is not None
        return closed.value.reason


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Client]:
    """A client; its TCP connection is closed in any case, which trio-websocket does not do."""
    tcp = await dial(port)
    try:
        async with trio.open_nursery() as nursery:
            socket = await wrap_client_stream(nursery, tcp, "localhost", "/ws", subprotocols=[SUBPROTOCOL])
            yield Client(socket)
            with trio.move_on_after(PATIENCE):
                await socket.aclose()
            nursery.cancel_scope.cancel()
    except* LocalProtocolError:
        pass  # the library answers a ping that comes while it closes
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(tcp)


async def rejection(port: int) -> int:
    """The status with which a WebSocket is refused."""
    with pytest.RaisesGroup(ConnectionRejected, allow_unwrapped=True, flatten_subgroups=True) as rejected:
        async with client_of(port):
            pass
    found = rejected.value
    error = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found
    assert isinstance(error, ConnectionRejected)
    return error.status_code


@asynccontextmanager
async def talking(tmp_path: Path) -> AsyncIterator[tuple[Client, Shown, Endpoint]]:
    """A client that has been welcomed, and what it looks at."""
    made, shown = make_endpoint(tmp_path), Shown()
    async with serving(made) as port, trio.open_nursery() as nursery:
        await nursery.start(shown.job_info.run)
        with made.attached(shown.attached):
            async with client_of(port) as client:
                assert client.socket.subprotocol == SUBPROTOCOL
                hello = await client.hear("hello")
                assert (hello["version"], hello["instance"], hello["rank"], hello["size"]) == (1, "i", 0, 1)
                yield client, shown, made
        nursery.cancel_scope.cancel()
    assert (made.connections, made.readers, made.follows, made.pace.count, shown.boards.opened) == (0, 0, 0, 0, 0)


# -- documents


async def test_a_snapshot_and_what_changes(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        await client.say(type="subscribe", id=1, topics=["jobs"])
        snapshot = await client.hear("snapshot")
        assert (snapshot["id"], snapshot["docs"], snapshot["position"]) == (1, {"jobs": DOCUMENTS["jobs"]}, ["e", 1])
        shown.boards.board.change({"jobs": {"3": {"state": "RUN"}}}, {"jobs": ["1"]})
        delta = await client.hear("delta")
        assert (delta["prev"], delta["position"]) == (1, ["e", 2])
        assert (delta["set"], delta["delete"]) == ({"jobs": {"3": {"state": "RUN"}}}, {"jobs": ["1"]})


async def test_what_comes_fast_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MIN_INTERVAL", 0.3)
    async with talking(tmp_path) as (client, shown, _):
        await client.say(type="subscribe", id=1, topics=["jobs"])
        await client.hear("snapshot")
        for number in range(20):
            shown.boards.board.change({"jobs": {str(number): {"n": number}}})
            await trio.testing.wait_all_tasks_blocked()
        delta = await client.hear("delta")
        assert (delta["prev"], delta["position"]) == (1, ["e", 21])


async def test_a_filter_and_a_position(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        await client.say(type="subscribe", id=1, topics=["jobs"], jobs={"states": ["running"]}, position=["e", 1])
        assert (await client.hear("delta"))["set"] == {}
        await client.say(type="subscribe", id=2, topics=["jobs"], position=["d", 9])
        assert (await client.hear("snapshot"))["why"] == "restarted"
        shown.boards.board.change({"jobs": {"1": {"dec": "1", "state": "INACTIVE"}}})
        deltas = [await client.hear("delta") for _ in range(2)]
        assert {delta["id"]: delta["delete"] for delta in deltas} == {1: {"jobs": ["1"]}, 2: {}}


async def test_a_reader_is_told_the_position_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing changes, so that it knows that there is somebody."""
    monkeypatch.setattr(conversation, "IDLE", 0.02)
    async with talking(tmp_path) as (client, shown, _):
        await client.say(type="subscribe", id=1, topics=["jobs"])
        await client.hear("snapshot")
        for _ in range(2):
            delta = await client.hear("delta")
            assert (delta["prev"], delta["position"], delta["set"]) == (1, ["e", 1], {})
        shown.boards.board.change({"log": {"1": {"line": "not for it"}}})
        while (delta := await client.hear("delta"))["position"] == ["e", 1]:
            pass
        assert (delta["prev"], delta["position"], delta["set"]) == (1, ["e", 2], {})


async def test_a_board_that_begins_later(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        shown.boards.board.begin("")
        await client.say(type="subscribe", id=1, topics=["instance"])
        await until(lambda: shown.boards.opened)
        shown.boards.board.begin("f", DOCUMENTS)
        assert (await client.hear("snapshot"))["position"] == ["f", 0]


async def test_a_large_snapshot_comes_in_parts(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        shown.boards.board.begin("f", {"jobs": {str(n): {"text": "x" * 1000} for n in range(500)}})
        await client.say(type="subscribe", id=1, topics=["jobs"])
        found: dict[str, object] = {}
        while (part := await client.hear("snapshot"))["more"]:
            found |= cast("dict[str, dict[str, object]]", part["docs"])["jobs"]
        found |= cast("dict[str, dict[str, object]]", part["docs"])["jobs"]
        assert found.keys() == shown.boards.board.view.documents("jobs").keys()
        assert cast("int", part["part"]) > 5


async def test_an_end_frees_the_number_at_once(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        for _ in range(20):  # more than there may be at a time
            await client.say(type="subscribe", id=1, topics=["jobs"])
            await client.say(type="unsubscribe", id=1)
        await client.say(type="unsubscribe", id=99)
        await client.say(type="subscribe", id=2, topics=["instance"])
        while (await client.hear("snapshot"))["id"] != 2:
            pass
        assert shown.boards.opened == 1
        shown.boards.board.change({"jobs": {"9": {}}, "instance": {"queue": {}}})
        assert (await client.hear("delta"))["id"] == 2


async def test_there_are_so_many_subscriptions(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, _, _):
        for number in range(conversation.MAX_SUBSCRIPTIONS + 1):
            await client.say(type="subscribe", id=number, topics=["instance"])
        answers = [await client.hear("snapshot", "error") for _ in range(conversation.MAX_SUBSCRIPTIONS + 1)]
        (error,) = [answer for answer in answers if answer["type"] == "error"]
        assert (error["id"], error["error"]) == (8, "cannot subscribe to more: 8 at a time are allowed")
        await client.say(type="subscribe", id=3, topics=["instance"])
        assert (await client.hear("error"))["error"] == "cannot subscribe: number 3 is in use"


async def test_nonsense_is_answered_and_in_the_end_closed(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, _, _):
        for _ in range(conversation.MAX_ERRORS):
            await client.say(type="shutdown", id=4)
            assert (await client.hear("error"))["id"] == 4
        await client.socket.send_message("{")
        assert (await client.closed()).code == 1008


# -- jobs


class Logs:
    """The eventlogs of a job, as `job-info` would stream them: path -> lines; and what it was asked."""

    def __init__(self, shown: Shown, *, ends: bool = True) -> None:
        self.lines: dict[str, list[str]] = {path: [LINE % f"{path}-{n}" for n in range(3)] for path in FOLLOWED}
        self.asked: list[JsonObject] = []
        self.sent = 0
        self._ends = ends
        shown.job_info.task("eventlog-watch", self._watch)

    async def _watch(self, request: Request) -> None:
        ask = request.parse(dict)
        self.asked.append(ask)
        if ask["id"] == 404:
            raise RpcError(errno.ENOENT, "there is no eventlog of job ƒC")
        for number, line in enumerate(self.lines[ask["path"]]):
            await request.stream({"event": line, "position": [number + 1, 0]})
            self.sent += 1
        if not self._ends:
            await trio.sleep_forever()


async def test_a_job_is_followed_to_its_end(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, made):
        logs = Logs(shown)
        await client.say(type="follow", id=5, job="ƒ2", position={"guest.output": [1, 0]})
        names: dict[str, list[str]] = {}
        while (message := await client.hear("job", "ended"))["type"] == "job":
            events = cast("list[dict[str, str]]", message["events"])
            names.setdefault(cast("str", message["path"]), []).extend(event["name"] for event in events)
        assert message["id"] == 5
        assert names == {path: [f"{path}-{n}" for n in range(3)] for path in FOLLOWED}
        assert made.follows == 0
        asked = {cast("str", each["path"]): (each["id"], each["flags"], each["position"]) for each in logs.asked}
        assert asked == {
            "eventlog": (1, 0, [0, 0]),
            "guest.exec.eventlog": (1, 1, [0, 0]),
            "guest.output": (1, 1, [1, 0]),
        }


async def test_a_job_that_cannot_be_followed(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, shown, _):
        Logs(shown)
        await client.say(type="follow", id=5, job="404")
        error = await client.hear("error")
        assert (error["id"], error["error"]) == (5, "cannot follow the job: there is no eventlog of job ƒC")
        await client.say(type="follow", id=5, job="1")
        assert (await client.hear("job"))["id"] == 5, "the number is free again"


async def test_output_comes_in_bounded_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PAUSE", 0.001)
    async with talking(tmp_path) as (client, shown, _):
        logs = Logs(shown)
        logs.lines = {path: [] for path in FOLLOWED}
        logs.lines["guest.output"] = [LINE % ("x" * 20_000) for _ in range(100)]
        await client.say(type="follow", id=5, job="1")
        sizes = []
        while (message := await client.hear("job", "ended"))["type"] == "job":
            sizes.append(len(cast("list[object]", message["events"])))
        assert sum(sizes) == 100
        assert max(sizes) <= 3


async def test_a_slow_reader_makes_its_job_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PAUSE", 1000.0)
    async with talking(tmp_path) as (client, shown, _):
        logs = Logs(shown)
        logs.lines["guest.output"] = [LINE % n for n in range(10_000)]
        await client.say(type="follow", id=5, job="1")
        await client.hear("job")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert logs.sent < 200


async def test_there_are_so_many_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_ALL_FOLLOWS", 4)
    async with talking(tmp_path) as (client, shown, made):
        Logs(shown, ends=False)

        async def error(number: int) -> str:
            await client.say(type="follow", id=number, job="1")
            while (message := await client.hear("job", "error"))["type"] != "error":
                pass
            return cast("str", message["error"])

        for number in range(conversation.MAX_FOLLOWS):
            await client.say(type="follow", id=number, job="1")
        assert await error(8) == "cannot follow more jobs: 4 at a time are allowed"
        await client.say(type="unsubscribe", id=0)
        await until(lambda: made.follows == 3)
        made.follows = 4
        assert await error(9) == "cannot follow this job: 4 are followed already"
        made.follows = 3


# -- ends


async def test_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    async with serving(make_endpoint(tmp_path)) as port:
        assert await rejection(port) == 503


@pytest.mark.parametrize(("state", "code"), [("run", 1012), ("shutdown", 1001)])
async def test_who_looked_at_it_is_told(tmp_path: Path, state: str, code: int) -> None:
    made, shown = make_endpoint(tmp_path), Shown()
    async with serving(made) as port, trio.open_nursery() as nursery:
        attached = trio.Event()

        async def live() -> None:
            with made.attached(shown.attached):
                await attached.wait()

        nursery.start_soon(live)
        await trio.testing.wait_all_tasks_blocked()
        async with client_of(port) as client:
            await client.say(type="subscribe", id=1, topics=["jobs"])
            await client.hear("hello")
            await client.hear("snapshot")
            shown.state = state
            attached.set()
            assert (await client.closed()).code == code
        await until(lambda: not made.connections)


async def test_the_end_of_the_process(tmp_path: Path) -> None:
    made, shown = make_endpoint(tmp_path), Shown()
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def live(task_status: trio.TaskStatus[None]) -> None:
            with scope, made.attached(shown.attached):
                await made.run(task_status)

        await nursery.start(live)
        async with client_of(int(made.uri.rstrip("/").rpartition(":")[2])) as client:
            await client.hear("hello")
            scope.cancel()
            assert (await client.closed()).code in (1001, 1012)


async def test_a_fault_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with talking(tmp_path) as (client, shown, _):
        shown.boards.fault = RuntimeError("no board")
        await client.say(type="subscribe", id=1, topics=["jobs"])
        assert (await client.closed()).code == 1011
    assert "RuntimeError" in caplog.text
    assert "Traceback" in caplog.text


async def test_binary_messages(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, _, _):
        await client.socket.send_message(b"{}")
        assert (await client.closed()).code == 1003


async def test_messages_that_are_too_long(tmp_path: Path) -> None:
    async with talking(tmp_path) as (client, _, _):
        await client.say(type="unsubscribe", id=1, more="x" * 17_000)
        assert (await client.closed()).code == 1009


HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def test_who_does_not_answer_a_ping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_EVERY", 0.02)
    monkeypatch.setattr(websocket, "PONG_WITHIN", 0.05)
    monkeypatch.setattr(websocket, "CLOSE_GRACE", 0.05)
    async with talking(tmp_path) as (client, _, made):
        async with await trio.open_tcp_stream("localhost", _port(made)) as silent:
            await silent.send_all(HANDSHAKE)
            received = await drain(silent)
            assert b"no answer to a ping" in received
        await client.say(type="subscribe", id=1, topics=["jobs"])
        await client.hear("snapshot")  # who answers stays


def _port(made: Endpoint) -> int:
    return int(made.uri.rstrip("/").rpartition(":")[2])


async def test_who_does_not_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds up nobody meanwhile."""
    monkeypatch.setattr(stream, "STUCK", 0.2)
    async with talking(tmp_path) as (client, shown, made):
        shown.boards.board.begin("f", {"jobs": {str(n): {"text": "x" * 10_000} for n in range(3000)}})
        async with await trio.open_tcp_stream("localhost", _port(made)) as stuck:
            await stuck.send_all(HANDSHAKE)
            await until(lambda: made.readers == 2)
            text = b'{"type":"subscribe","id":1,"topics":["jobs"]}'
            await stuck.send_all(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)
            await until(lambda: shown.boards.opened == 1)
            await client.say(type="subscribe", id=1, topics=["instance"])
            await client.hear("snapshot")
            await until(lambda: made.readers == 1)
        shown.boards.board.change({"instance": {"queue": {}}})
        await client.hear("delta")


async def test_the_number_of_websockets(tmp_path: Path) -> None:
    async with talking(tmp_path) as (_, _, made):
        made.limit = 65
        assert await rejection(_port(made)) == 503
        assert (await ask(_port(made), "/healthz"))[0] == 200


async def test_what_is_no_websocket(tmp_path: Path) -> None:
    async with talking(tmp_path) as (_, _, made):
        status, headers, _ = await ask(_port(made), "/ws")
        assert (status, headers["upgrade"]) == (426, "websocket")
        async with await dial(_port(made)) as other:
            await other.send_all(HANDSHAKE.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Protocol: chat\r\n\r\n"))
            assert b"400 Bad Request" in await drain(other)


def test_the_subprotocol() -> None:
    from fluxres.status.http import BadRequest
    from fluxres.status.http import Request as HttpRequest

    def chosen(offered: str) -> str | None:
        return choose(HttpRequest(method="GET", path="/ws", headers={"sec-websocket-protocol": offered}))

    assert chosen("") is None
    assert chosen("fluxres.bearer.abc") is None
    assert chosen("fluxres.status.v2, fluxres.status.v1, fluxres.bearer.abc") == SUBPROTOCOL
    with pytest.raises(BadRequest):
        chosen("fluxres.status.v2")


def test_close_frames() -> None:
    assert close_frame(1002, "no") == b"\x88\x04\x03\xeano"
    assert len(close_frame(1002, "x" * 500)) == 2 + 2 + 100
