"""What the tests of real shells share: hand-made directories, a process, a broker's side of the socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.payload import Wire, WireMap, pack, unpack_map
from fluxres_shell import find
from fluxres_shell.records import DataRecord, EventRecord, ExitRecord, Record, decode
from fluxres_shell.segments import SegmentReader

NONCE = "a-nonce"
JOBID = 123456789
PATIENCE = 30.0
"""Seconds that a test waits for what has to come; reached only when something is wrong."""


def make_spec(path: Path, *command: str, **changes: object) -> dict[str, object]:
    """A valid spec for the directory `path` with one task, whose tmpdir and cwd are below its parent."""
    spec: dict[str, object] = {
        "version": 1,
        "id": JOBID,
        "rank": 0,
        "nonce": NONCE,
        "instance": "an-instance",
        "userid": os.getuid(),
        "jobspec": {"version": 1, "tasks": [{"command": list(command or ("true",))}]},
        "R": {"version": 1},
        "ranks": [0],
        "nnodes": 1,
        "ntasks_total": 1,
        "tasks": [{"rank": 0, "local": 0}],
        "env": {"PATH": os.environ["PATH"]},
        "cwd": str(path.parent),
        "time_limit": 0,
        "uri": "local:///nowhere",
        "namespace": "job-test",
        "options": {},
        "tmpdir_base": str(path.parent / "tmp"),
        "cgroup_parent": None,
        "journal_limit": 16 * 1024 * 1024,
        "segment_size": 1024 * 1024,
    }
    return spec | changes


class Shell:
    """A real shell process on a directory of its own."""

    def __init__(self, path: Path, *command: str, env: dict[str, str] | None = None, **changes: object) -> None:
        self.path = path
        self._dialled: list[socket.socket] = []
        path.mkdir(mode=0o700, exist_ok=True)
        (path / "spec").write_text(json.dumps(make_spec(path, *command, **changes)), encoding="utf-8")
        self.dirfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fluxres_shell.main", str(path)], env={**os.environ, **(env or {})}
        )

    def close(self) -> None:
        """End the shell, whatever its state."""
        for sock in self._dialled:
            sock.close()
        self.process.kill()
        self.process.wait(PATIENCE)
        if self.dirfd >= 0:
            os.close(self.dirfd)
            self.dirfd = -1

    def wait(self) -> int:
        """Wait for the shell to end; its exit status."""
        return self.process.wait(PATIENCE)

    def records(self, from_seq: int = 1) -> list[Record]:
        """The journal as it lies on disk."""
        return read_journal(self.dirfd, from_seq)

    def attach(self, from_seq: int = 1, nonce: str = NONCE) -> Broker:
        """Dial it and attach; the answer is the next message."""
        broker = Broker(self.dial())
        broker.send(type="attach", nonce=nonce, **{"from": from_seq})
        return broker

    def dial(self) -> socket.socket:
        """Connect, waiting until it listens."""
        found: list[socket.socket] = []

        def connected() -> bool:
            with find.find(self.dirfd) as facts:
                sock = find.connect(self.dirfd, facts) if facts.kind is find.Kind.ALIVE else None
            if sock is not None:
                found.append(sock)
            return sock is not None

        wait_until(connected)
        self._dialled += found
        return found[0]


class Starter(Protocol):
    """What the `shell` fixture is: starts a shell in a directory of its own."""

    def __call__(self, *command: str, at: Path = ..., env: dict[str, str] | None = None, **changes: object) -> Shell:
        """Start it."""
        ...


class Broker:
    """A broker's side of a connection to a shell."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(True)
        sock.settimeout(PATIENCE)
        self._decoder = FrameDecoder()
        self._messages: list[WireMap] = []
        self.seen: list[Record] = []

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def close_when(self, kind: str) -> None:
        """Hang up after the next message of a kind, dropping all before it."""
        while (message := self.receive()) is not None and message["type"] != kind:
            pass
        assert message is not None
        self.close()

    def send(self, **message: Wire) -> None:
        """Send a message."""
        self.sock.sendall(frame(pack(message)))

    def pass_barrier(self) -> None:
        """Have the tasks start: answer the next barrier."""
        while (message := self.receive()) is not None and message["type"] != "barrier":
            pass
        assert message is not None
        self.send(**message | {"type": "barrier-done"})

    def receive(self) -> WireMap | None:
        """The next message, None at the end of the connection."""
        while not self._messages:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._messages += [unpack_map(body) for body in self._decoder.feed(data)]
        return self._messages.pop(0)

    def expect(self, kind: str) -> WireMap:
        """The next message, which must be a `kind`."""
        message = self.receive()
        assert message is not None
        assert message["type"] == kind, message
        return message

    def read_until(self, wanted: Callable[[Record], bool], *, ack: bool = True) -> Record:
        """Collect records in `seen` up to the first wanted one, acking each batch; that record."""
        while True:
            message = self.receive()
            assert message is not None, f"the connection ended after {self.seen[-3:]}"
            if message["type"] != "records":
                continue
            payloads = message["records"]
            assert isinstance(payloads, list)
            batch = [decode(payload) for payload in payloads if isinstance(payload, bytes)]
            self.seen += batch
            if ack:
                self.send(type="ack", seq=batch[-1].seq)
            for record in batch:
                if wanted(record):
                    return record

    def read_to_exit(self, *, ack: bool = True) -> ExitRecord:
        """Collect records up to the exit record."""
        record = self.read_until(lambda record: isinstance(record, ExitRecord), ack=ack)
        assert isinstance(record, ExitRecord)
        return record

    def read_to_event(self, name: str) -> Record:
        """Collect records up to an event."""
        return self.read_until(lambda record: isinstance(record, EventRecord) and record.name == name)

    def ended(self) -> bool:
        """Whether the shell hangs up, whatever it says before."""
        while self.receive() is not None:
            pass
        return True


def read_journal(dirfd: int, from_seq: int = 1) -> list[Record]:
    """The records of a journal."""
    reader = SegmentReader(dirfd, from_seq)
    try:
        return [decode(stored.payload) for stored in reader]
    finally:
        reader.close()


def output(records: list[Record], stream: str = "stdout", task: int = 0) -> bytes:
    """What a task wrote to a stream."""
    mine = [r for r in records if isinstance(r, DataRecord) and r.stream == stream and r.task == task]
    return b"".join(record.data for record in mine)


def exit_of(records: list[Record]) -> ExitRecord:
    """The exit record, which must be the last."""
    assert isinstance(records[-1], ExitRecord), records
    return records[-1]


def event_names(records: list[Record]) -> list[str]:
    """The names of the events among the records."""
    return [record.name for record in records if isinstance(record, EventRecord)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        select.select([], [], [], 0.005)


def process_gone(pid: int) -> bool:
    """Whether a process is dead; a zombie is."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def pids_printed(records: list[Record]) -> list[int]:
    return [int(word) for word in output(records).split()]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Starter]:
    """Starts shells, each in a directory of its own, and ends them."""
    started: list[Shell] = []

    def start(*command: str, at: Path = tmp_path, env: dict[str, str] | None = None, **changes: object) -> Shell:
        started.append(Shell(at / f"shell{len(started)}", *command, env=env, **changes))
        return started[-1]

    yield start
    for one in started:
        one.close()
