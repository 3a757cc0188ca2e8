"""An instance with fake jobs, for tests of commands: a thread with a Unix socket that speaks the real protocol.

`cuts` says, for each connection in turn, after how many responses it is cut; later ones stay whole. What was asked is
done even where the answer is cut off, as a real broker's death may have it.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fluxres.base.errors import RpcError
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import Message, response_to
from fluxres.wire.payload import WireMap, pack, unpack_map

PATIENCE = 30.0
"""Seconds that the instance waits for its client's next word at most."""
Serve = Callable[[WireMap], "WireMap | list[WireMap]"]


@dataclass
class FakeJob:
    """Eventlogs by path, as RFC 18 lines; a path in `ended` gets ENODATA after its last line."""

    logs: dict[str, list[str]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    stdin: bytearray = field(default_factory=bytearray)
    stdin_eof: bool = False


@dataclass
class _Watch:
    request: Message
    job: FakeJob
    path: str
    next: int
    over: bool = False


class FakeInstance:
    """A context manager; `uri` is where it listens."""

    def __init__(self, directory: Path, cuts: Iterable[int] = ()) -> None:
        path = str(directory / "local-0")
        self.uri = f"local://{path}"
        self.jobs: dict[int, FakeJob] = {}
        self.services: dict[str, Serve] = {"job-info.lookup": self._lookup}
        self.asked: list[tuple[str, WireMap]] = []
        self.connections = 0
        self.failures: list[BaseException] = []
        self._cuts = list(cuts)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(8)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeInstance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join(PATIENCE)
        for descriptor in (self._stop_read, self._stop_write):
            os.close(descriptor)
        self._listener.close()
        assert not self.failures, self.failures

    def payloads(self, topic: str) -> list[WireMap]:
        """What was asked of a topic, in order."""
        return [payload for asked, payload in self.asked if asked == topic]

    def readable(self, watched: socket.socket) -> bool:
        """Wait for a socket; False when the test is over."""
        sources: list[socket.socket | int] = [watched, self._stop_read]
        ready, _, _ = select.select(sources, [], [], PATIENCE)
        return watched in ready and self._stop_read not in ready

    def _run(self) -> None:
        try:
            while self.readable(self._listener):
                connection, _ = self._listener.accept()
                cut = self._cuts.pop(0) if self._cuts else None
                self.connections += 1
                with connection:
                    _Connection(self, connection, cut).serve()
        except BaseException as error:
            self.failures.append(error)

    def _lookup(self, payload: WireMap) -> WireMap:
        job = self.jobs.get(_int(payload["id"]))
        keys = payload["keys"]
        assert isinstance(keys, list)
        found: WireMap = {"id": payload["id"]}
        for key in keys:
            if job is None or str(key) not in job.logs:
                raise RpcError(errno.ENOENT)
            found[str(key)] = "".join(job.logs[str(key)])
        return found


class _Connection:
    def __init__(self, instance: FakeInstance, connection: socket.socket, cut: int | None) -> None:
        self._instance = instance
        self._socket = connection
        self._left = cut
        self._watches: list[_Watch] = []

    def serve(self) -> None:
        frames = FrameDecoder()
        try:
            self._socket.sendall(b"\0")
            while self._instance.readable(self._socket):
                received = self._socket.recv(65536)
                if not received:
                    return
                for body in frames.feed(received):
                    self._take(decode(body))
                self._pump()
        except (ConnectionError, _CutError):
            return

    def _take(self, request: Message) -> None:
        payload = unpack_map(request.payload)
        self._instance.asked.append((request.topic, payload))
        if request.topic == "job-info.eventlog-watch":
            self._watch(request, payload)
        elif "matchtag" in payload:
            self._watches = [w for w in self._watches if w.request.matchtag != payload["matchtag"]]
        else:
            self._answer(request, payload)

    def _answer(self, request: Message, payload: WireMap) -> None:
        service = self._instance.services.get(request.topic)
        try:
            if service is None:
                raise RpcError(errno.ENOENT, f"no {request.topic} here")
            answer = service(payload)
        except RpcError as error:
            self._send(response_to(request, payload=error.text.encode(), errnum=error.errnum))
            return
        if isinstance(answer, dict):
            self._send(response_to(request, payload=pack(answer)))
            return
        for part in answer:
            self._send(response_to(request, payload=pack(part)))
        self._send(response_to(request, errnum=errno.ENODATA))

    def _watch(self, request: Message, payload: WireMap) -> None:
        job, path = self._instance.jobs.get(_int(payload["id"])), str(payload["path"])
        if job is None or (path not in job.logs and not payload["flags"]):
            self._send(response_to(request, errnum=errno.ENOENT))
            return
        position = payload.get("position")
        begin = _int(position[1]) + 1 if isinstance(position, list) else 0
        self._watches.append(_Watch(request, job, path, begin))

    def _pump(self) -> None:
        """Send what watches wait for, one event of each in turn."""
        while sum(self._step(watch) for watch in self._watches if not watch.over):
            pass

    def _step(self, watch: _Watch) -> bool:
        log = watch.job.logs.get(watch.path, [])
        if watch.next < len(log):
            event: WireMap = {"event": log[watch.next], "position": [0, watch.next]}
            watch.next += 1
            self._send(response_to(watch.request, payload=pack(event)))
            return True
        if watch.path in watch.job.ended:
            watch.over = True
            self._send(response_to(watch.request, errnum=errno.ENODATA))
        return False

    def _send(self, message: Message) -> None:
        if self._left is not None:
            if self._left == 0:
                raise _CutError
            self._left -= 1
        self._socket.sendall(frame(encode(message)))


class _CutError(Exception):
    """The connection is to be cut now."""


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def line(name: str, at: float, **context: object) -> str:
    """An RFC 18 line."""
    return json.dumps({"timestamp": at, "name": name, **({"context": context} if context else {})}) + "\n"


def ended_job(output: Iterable[str] = (), status: int = 0) -> FakeJob:
    """A job that has run to its end."""
    return FakeJob(
        logs={
            "eventlog": [
                line("submit", 100.0, userid=os.getuid(), urgency=16, flags=0),
                line("validate", 100.1),
                line("depend", 100.2),
                line("priority", 100.3, priority=16),
                line("alloc", 100.4),
                line("start", 100.5),
                line("finish", 101.0, status=status),
                line("release", 101.1, ranks="all", final=True),
                line("free", 101.2),
                line("clean", 101.3),
            ],
            "guest.exec.eventlog": [line("init", 100.41), line("done", 101.05)],
            "guest.output": [line("header", 100.45, version=1), *output],
        },
        ended={"eventlog", "guest.exec.eventlog", "guest.output"},
    )


def cancelled_job(note: str = "no") -> FakeJob:
    """A job that never ran."""
    eventlog = [*ended_job().logs["eventlog"][:4]]
    eventlog += [line("exception", 100.5, type="cancel", severity=0, note=note), line("clean", 100.6)]
    return FakeJob(logs={"eventlog": eventlog}, ended={"eventlog"})


def data(text: str, *, stream: str = "stdout", rank: str = "0", **more: object) -> str:
    """A data event of an output eventlog."""
    return line("data", 100.6, stream=stream, rank=rank, data=text, **more)
