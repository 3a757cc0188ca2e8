"""A feed for tests of the status page that tells whatever a test wants told, and the documents that it tells.

`FakeFeed` serves the page's files and speaks the protocol of docs/status-messages.md on a port of loopback, from
documents that the test gives it: instances that are too large for a test, and texts that no broker would have.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar, cast

import trio
import trio_websocket
from pagekit import PATIENCE

from fluxres.base.json import JsonObject, JsonValue
from fluxres.status import static
from fluxres.status.access import BEARER_PROTOCOL
from fluxres.status.http import SECURITY
from fluxres.status.messages import SUBPROTOCOL

T = TypeVar("T")

PART: Final = 500
"""Documents in one part of a snapshot."""
_HEAD: Final = 64 * 1024

Docs = dict[str, dict[str, JsonObject]]
"""Documents by topic and key."""


class FakeFeed:
    """Serves the page and a feed of `docs` on loopback from a thread of its own. A context manager."""

    def __init__(self, docs: Docs | None = None, *, token: str | None = None, instance: str = "fake") -> None:
        self.docs: Docs = docs or {}
        self.token = token
        self.instance = instance
        self.why = "restarted"
        """What it says to one whose position is not that of now."""
        self.unknown: set[str] = set()
        """Jobs that it says there are not, to those who want to follow them."""
        self.port = 0
        self.accepted = 0
        """WebSockets so far."""
        self.subscribed: list[JsonObject] = []
        """The subscriptions that came."""
        self._logs: dict[str, dict[str, list[JsonObject]]] = {}
        self._readers: set[_Reader] = set()
        self._position: tuple[str, int] = ("", 0)
        self._thread: threading.Thread | None = None
        self._files = static.load()
        self._refuses = False

    def __enter__(self) -> FakeFeed:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listen; after a `stop` on the same port, as another life of the feed."""
        self._position = (uuid.uuid4().hex, 0)
        ready: queue.Queue[int | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._main, args=(ready,), daemon=True)
        self._thread.start()
        port = ready.get(timeout=PATIENCE)
        if isinstance(port, BaseException):
            raise port
        self.port = port

    def stop(self) -> None:
        """Be away, without a word."""
        if self._thread is not None:
            self._in_trio(self._scope.cancel)
            self._thread.join(PATIENCE)
            self._thread = None

    def change(self, changed: Docs | None = None, deleted: Mapping[str, Sequence[str]] | None = None) -> None:
        """Tell all readers a delta."""
        self._in_trio(lambda: self._change(changed or {}, deleted or {}))

    def write(self, job: str, path: str, *events: JsonObject) -> None:
        """Append to an eventlog of a job."""

        def append() -> None:
            self._logs.setdefault(job, {}).setdefault(path, []).extend(events)
            for reader in self._readers:
                reader.send_logs()

        self._in_trio(append)

    def drop(self, code: int = 1012, reason: str = "service restart") -> None:
        """Close all WebSockets, by default as a broker that begins anew."""

        def close() -> None:
            for reader in self._readers:
                reader.close(code, reason)

        self._in_trio(close)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Let nobody in for now, who asks /api/access as the page does."""
        self._refuses = True
        try:
            yield
        finally:
            self._refuses = False

    # --- in the thread

    def _in_trio(self, call: Callable[[], T]) -> T:
        return trio.from_thread.run_sync(call, trio_token=self._token)

    def _main(self, ready: queue.Queue[int | BaseException]) -> None:
        async def serve() -> None:
            self._token = trio.lowlevel.current_trio_token()
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
                ready.put(int(listeners[0].socket.getsockname()[1]))
                await trio.serve_listeners(self._serve, listeners, handler_nursery=nursery)

        try:
            trio.run(serve)
        except BaseException as error:
            ready.put(error)
            raise

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._request(stream)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio_websocket.ConnectionClosed):
            pass  # the browser has gone

    async def _request(self, stream: trio.SocketStream) -> None:
        head = await _head(stream)
        if head is None:
            return
        request, _, rest = head.partition(b"\r\n")
        path = request.split()[1].decode()
        if path == "/ws":
            await self._websocket(_Replayed(stream, head))
        else:
            await stream.send_all(self._answer(path, _headers(rest)))

    def _answer(self, path: str, headers: Mapping[str, str]) -> bytes:
        if path == "/api/access":
            if self._refuses:
                return _response(503, b"{}", "application/json")
            if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
                return _response(401, b'{"needs":"token"}', "application/json")
            return _response(200, b'{"access":"ok"}', "application/json")
        if path == "/readyz":
            return _response(503, b"replay\n", "text/plain")
        file = self._files.get(path)
        if file is None:
            return _response(404, b"", "text/plain")
        return _response(200, file.body, file.content_type)

    async def _websocket(self, stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await trio_websocket.wrap_server_stream(nursery, stream)
            offered = request.proposed_subprotocols
            bearer = next(
                (each.removeprefix(BEARER_PROTOCOL) for each in offered if each.startswith(BEARER_PROTOCOL)), ""
            )
            given = base64.urlsafe_b64decode(bearer + "=" * (-len(bearer) % 4)).decode()
            if SUBPROTOCOL not in offered or (self.token is not None and given != self.token):
                await request.reject(401)
                return
            socket = await request.accept(subprotocol=SUBPROTOCOL)
            self.accepted += 1
            await _Reader(self, socket).run(nursery)
            nursery.cancel_scope.cancel()

    def _change(self, changed: Docs, deleted: Mapping[str, Sequence[str]]) -> None:
        epoch, seq = self._position
        for topic, keys in deleted.items():
            for key in keys:
                self.docs[topic].pop(key, None)
        for topic, docs in changed.items():
            self.docs.setdefault(topic, {}).update(docs)
        self._position = (epoch, seq + 1)
        for reader in self._readers:
            reader.send_delta(seq, changed, deleted)


class _Reader:
    """One WebSocket of a FakeFeed."""

    def __init__(self, feed: FakeFeed, socket: trio_websocket.WebSocketConnection) -> None:
        self._feed = feed
        self._socket = socket
        self._send, self._receive = trio.open_memory_channel[str | tuple[int, str]](math.inf)
        self._topics: dict[int, list[str]] = {}
        self._follows: dict[int, tuple[str, dict[str, int]]] = {}

    async def run(self, nursery: trio.Nursery) -> None:
        """Until the other side, or `close`, ends it."""
        nursery.start_soon(self._sending)
        hello = {"type": "hello", "version": 1, "software": "0.1.0", "instance": self._feed.instance}
        self._say({**hello, "rank": 0, "size": len(self._feed.docs.get("overlay", {}))})
        self._feed._readers.add(self)
        try:
            while True:
                self._take(json.loads(await self._socket.get_message()))
        finally:
            self._feed._readers.discard(self)

    async def _sending(self) -> None:
        async for message in self._receive:
            if isinstance(message, str):
                await self._socket.send_message(message)
            else:
                await self._socket.aclose(*message)

    def _say(self, body: Mapping[str, object]) -> None:
        self._send.send_nowait(json.dumps({**body, "now": time.time()}))

    def close(self, code: int, reason: str) -> None:
        self._send.send_nowait((code, reason))

    def _take(self, message: JsonObject) -> None:
        number = cast("int", message["id"])
        match message["type"]:
            case "subscribe":
                self._feed.subscribed.append(message)
                self._topics[number] = cast("list[str]", message["topics"])
                self._send_first(number, message.get("position"))
            case "follow" if message["job"] in self._feed.unknown:
                self._say({"type": "error", "id": number, "error": "cannot follow the job: no such job"})
            case "follow":
                given = cast("dict[str, list[int]]", message.get("position", {}))
                self._follows[number] = (str(message["job"]), {path: at[0] for path, at in given.items()})
                self.send_logs()
            case "unsubscribe":
                self._topics.pop(number, None)
                self._follows.pop(number, None)

    def _send_first(self, number: int, position: JsonValue) -> None:
        epoch, seq = self._feed._position
        if position == [epoch, seq]:
            self.send_delta(seq, {}, {})
            return
        why = "first" if position is None else self._feed.why
        topics = self._topics[number]
        all_docs = [(t, k, d) for t in topics for k, d in self._feed.docs.get(t, {}).items()]
        parts = [all_docs[at : at + PART] for at in range(0, len(all_docs), PART)] or [[]]
        for index, part in enumerate(parts):
            docs: dict[str, dict[str, JsonObject]] = {topic: {} for topic in topics}
            for topic, key, doc in part:
                docs[topic][key] = doc
            body = {"type": "snapshot", "id": number, "position": [epoch, seq], "why": why, "docs": docs}
            self._say({**body, "part": index, "more": index + 1 < len(parts)})

    def send_delta(self, prev: int, changed: Docs, deleted: Mapping[str, Sequence[str]]) -> None:
        epoch, seq = self._feed._position
        for number, topics in self._topics.items():
            body = {"type": "delta", "id": number, "prev": prev, "position": [epoch, seq]}
            some = {topic: docs for topic, docs in changed.items() if topic in topics}
            gone = {topic: list(keys) for topic, keys in deleted.items() if topic in topics}
            self._say({**body, "part": 0, "more": False, "set": some, "delete": gone})

    def send_logs(self) -> None:
        for number, (job, sent) in self._follows.items():
            for path, events in self._feed._logs.get(job, {}).items():
                fresh = events[sent.get(path, 0) :]
                if not fresh:
                    continue
                sent[path] = len(events)
                body = {"type": "job", "id": number, "path": path, "events": fresh, "position": [len(events), 0]}
                self._say(body)


class _Replayed(trio.abc.Stream):
    """A stream whose first bytes have been read already, and are read once more."""

    def __init__(self, stream: trio.abc.Stream, first: bytes) -> None:
        self._stream = stream
        self._first = first

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            await trio.lowlevel.checkpoint()
            return first
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _head(stream: trio.SocketStream) -> bytes | None:
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some(_HEAD)
        if not data or len(head) > _HEAD:
            return None
        head += data
    return head


def _headers(lines: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines.decode("latin-1").split("\r\n"))
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _response(status: int, body: bytes, kind: str) -> bytes:
    security = "".join(f"{name}: {value}\r\n" for name, value in SECURITY)
    head = f"HTTP/1.1 {status} Answer\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{security}Connection: close\r\n\r\n".encode() + body


# --- documents


def instance_documents(size: int, *, fanout: int, cores: int = 16, started: float = 0.0) -> Docs:
    """The documents of a healthy, idle instance."""
    began = started or time.time() - 7200
    overlay: dict[str, JsonObject] = {}
    resources: dict[str, JsonObject] = {}
    for rank in range(size):
        host = f"node{rank:04d}"
        parent = None if rank == 0 else (rank - 1) // fanout
        overlay[str(rank)] = {
            "rank": rank, "parent": parent, "host": host, "status": "full", "since": began + rank / 100, "torpid": False
        }  # fmt: skip
        resources[str(rank)] = {
            "rank": rank, "host": host, "cores": cores, "cores_used": 0, "gpus": 0, "gpus_used": 0,
            "online": True, "torpid": False, "properties": [],
        }  # fmt: skip
    about: JsonObject = {
        "instance": "fake", "size": size, "version": "0.1.0", "host": "node0000", "uuid": uuid.uuid4().hex,
        "incarnations": 1, "started": began,
    }  # fmt: skip
    docs: Docs = {
        "instance": {"about": about, "queue": {"enabled": True, "started": True}},
        "overlay": overlay,
        "resources": resources,
        "jobs": {},
        "events": {},
        "log": {},
    }
    docs["instance"].update(counted(docs))
    return docs


def counted(docs: Docs) -> dict[str, JsonObject]:
    """The documents `jobs` and `resources` of an instance, counted from the others."""
    states = [str(job["state"]).lower() for job in docs["jobs"].values()]
    results = [str(job.get("result", "")).lower() for job in docs["jobs"].values()]
    jobs: JsonObject = {
        **{name: states.count(name) for name in ("depend", "priority", "sched", "run", "cleanup", "inactive")},
        **{name: results.count(name) for name in ("completed", "failed", "canceled", "timeout")},
        "submitted": len(states),
    }
    nodes = list(docs["resources"].values())

    def total(key: str) -> int:
        return sum(cast("int", node.get(key, 0)) for node in nodes)

    down = sum(cast("int", node["cores"]) for node in nodes if not node["online"] or "drained" in node)
    resources: JsonObject = {
        "nodes": len(nodes), "online": sum(bool(node["online"]) for node in nodes),
        "torpid": sum(bool(node["torpid"]) for node in nodes), "drained": sum("drained" in node for node in nodes),
        "lost": sum("lost" in node for node in nodes), "cores": total("cores"), "cores_used": total("cores_used"),
        "cores_down": down, "gpus": total("gpus"), "gpus_used": total("gpus_used"),
    }  # fmt: skip
    return {"jobs": jobs, "resources": resources}


def job_document(number: int, state: str = "SCHED", **facts: JsonValue) -> dict[str, JsonObject]:
    """A document of a job, by its key."""
    now = time.time()
    dec = str(1_000_000_000 + number)
    doc: JsonObject = {
        "id": f"ƒ{number:06d}", "dec": dec, "state": state, "name": f"job{number}", "userid": 1000, "username": "ada",
        "urgency": 16, "priority": 16, "t_submit": now - 300, "duration": 600.0, "ntasks": 4, "ncores": 4, "nnodes": 1,
        "exception_occurred": False, "restarts": 0, **facts,
    }  # fmt: skip
    return {dec: doc}


def event(name: str, at: float, **context: JsonValue) -> JsonObject:
    """An event as eventlogs have it (RFC 18)."""
    return {"timestamp": at, "name": name, "context": context}


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something again and again from a thread, as long as the block runs."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)
