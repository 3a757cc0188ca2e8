"""What the tests of the overlay share: brokers on hosts, strays, requests that stay pending, and trackers at rest.

`Network` is a tree whose brokers listen on addresses of a network, and that can be joined by brokers whose
configuration is not quite right. `Requester` speaks the wire protocol itself, because the client would drop the very
thing that is looked for: a second response to a request that has ended.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kit import PATIENCE, Expect, birth, eventually, process_gone
from treekit import Tree

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58, parse_jobid
from fluxres.rpc.tracker import is_terminal
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag, request
from fluxres.wire.payload import WireMap, pack

READ_SIZE: Final = 256 * 1024

WAITER: Final = """
print('begun', flush=True)
while not os.path.exists("end"):
    time.sleep(0.05)
mark("end")
print('ended', flush=True)
"""
"""A task that runs until the test makes the file `end` (`Tree.path` is its working directory)."""
WAITED: Final = b"begun\nended\n"
"""What WAITER prints."""


@dataclass(frozen=True, slots=True)
class Stray:
    """A broker that is not of the tree, or not yet; what it wrote to stderr is in `path`."""

    process: subprocess.Popen[bytes]
    path: Path

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def wait_log(self, text: str) -> None:
        """Wait until it has said something with `text` in it."""
        eventually(lambda: text in self.log, what=f"{text!r} in {self.path}")

    def died(self) -> int:
        """Wait for its own end; its exit status."""
        return self.process.wait(PATIENCE)


class Network(Tree):
    """A tree that strays try to join. With `hosts`, an RFC 29 hostlist, brokers listen there, not on Unix sockets."""

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        fanout: int = 2,
        hosts: str = "",
        cert: Path | None = None,
        settings: Mapping[str, Mapping[str, str | int | bool]] | None = None,
    ) -> None:
        """`cert` is made by `fluxres keygen`; without it TCP is plain."""
        tables = {name: dict(table) for name, table in (settings or {}).items()}
        if hosts:
            tables.setdefault("bootstrap", {})["default_bind"] = "tcp://%h:%p"
        if cert is not None:
            tables.setdefault("bootstrap", {})["cert"] = str(cert)
        super().__init__(path, size=size, fanout=fanout, settings=tables)
        if hosts:
            with self._config.open("a", encoding="utf-8") as config:
                config.write(f'[[bootstrap.hosts]]\nhost = "{hosts}"\n')
        if cert is not None and not cert.exists():
            self.fluxres("keygen", str(cert))

    def variant(self, name: str, *changes: tuple[str, str]) -> Path:
        """A configuration that differs from the tree's in these pieces of text."""
        text = self._config.read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is not in the configuration once:\n{text}"
            text = text.replace(old, new)
        path = self.path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    def stray(self, rank: int, config: Path | None = None, *, before: str = "") -> Stray:
        """Start a broker beside the tree's own, with the tree's configuration or a variant of it.

        `before` is Python that it runs first.
        """
        path = self.path / f"stray-{len(self._others)}.log"
        program = f"{before}\nimport sys\nfrom fluxres.broker.main import main\nsys.exit(main())"
        command = [sys.executable, "-c", program, "--config", str(config or self._config), "--rank", str(rank)]
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        self._others.append(process)
        return Stray(process, path)


def loopback_hosts(size: int) -> str:
    """A hostlist of loopback addresses that nobody else is likely to use."""
    return f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.[1-{size}]"


@dataclass(slots=True)
class Requester:
    """A client over a socket of its own that keeps every response that comes, in order, with the time of its coming."""

    path: str
    responses: list[tuple[float, Message]] = field(default_factory=list)
    ended: bool = False
    _sock: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    _decoder: FrameDecoder = field(default_factory=FrameDecoder)
    _last: int = 0

    def __post_init__(self) -> None:
        """Connect, and read the broker's welcome."""
        self._sock.settimeout(PATIENCE)
        self._sock.connect(self.path)
        assert self._sock.recv(1) == b"\0"

    def __enter__(self) -> Requester:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ask(
        self, topic: str, payload: WireMap, *, count: int, nodeid: int = NODEID_ANY, streaming: bool = False
    ) -> None:
        """Send `count` requests, whose matchtags follow on those of the last."""
        flags = MessageFlag.STREAMING if streaming else MessageFlag.NONE
        tags = range(self._last + 1, self._last + 1 + count)
        asked = (request(topic, pack(payload), matchtag=tag, nodeid=nodeid, flags=flags) for tag in tags)
        self._last += count
        self._sock.sendall(b"".join(frame(encode(each)) for each in asked))

    def read_until(self, done: Callable[[], bool], what: str) -> None:
        """Take what comes until `done`, or the connection has ended."""
        deadline = time.monotonic() + PATIENCE
        while not done() and not self.ended:
            assert time.monotonic() < deadline, f"{what} never came about"
            self._read(max(0.0, deadline - time.monotonic()))

    def read_terminal(self, count: int) -> None:
        """Take what comes until `count` responses have ended requests."""
        self.read_until(lambda: len(self.terminal()) >= count, f"the end of {count} requests")

    def read_to_end(self) -> None:
        """Take all that comes until the broker closes the connection."""
        self.read_until(lambda: self.ended, "the end of the connection")

    def terminal(self) -> list[tuple[float, Message]]:
        """The responses that have ended requests."""
        return [each for each in self.responses if is_terminal(each[1])]

    def check_unreachable(self, count: int) -> None:
        """The requests 1 to `count` have had exactly one terminal response each: EHOSTUNREACH."""
        ends = [message for _, message in self.terminal() if message.matchtag <= count]
        told = Counter(message.matchtag for message in ends)
        missing = set(range(1, count + 1)) - set(told)
        assert not missing, f"{len(missing)} of {count} requests were never answered"
        assert max(told.values()) == 1, f"answered twice: {[tag for tag, times in told.items() if times > 1]}"
        assert {message.errnum for message in ends} == {errno.EHOSTUNREACH}, Counter(m.errnum for m in ends)
        assert all(message.payload for message in ends), "an error without a text"

    def check_nothing_more(self) -> None:
        """Nothing is on its way to this client: the answer to one more request is all that comes."""
        before = len(self.responses)
        self.ask("broker.ping", {}, count=1)
        self.read_until(lambda: len(self.responses) > before, "the answer to a ping")
        more = [message for _, message in self.responses[before:]]
        assert [(message.matchtag, message.errnum) for message in more] == [(self._last, 0)], more

    def _read(self, timeout: float) -> None:
        ready, _, _ = select.select([self._sock], [], [], timeout)
        if not ready:
            return
        try:
            data = self._sock.recv(READ_SIZE)
        except ConnectionResetError:
            data = b""
        now = time.monotonic()
        self.ended = not data
        self.responses += [(now, decode(body)) for body in self._decoder.feed(data)]


def requester(tree: Tree, rank: int) -> Requester:
    """A client of the broker of `rank`."""
    return Requester(tree.uri_of(rank).removeprefix("local://"))


def pending(who: Requester, *, at: int, count: int) -> None:
    """Send `count` requests from `who` that stay unanswered at rank `at`; returns when they are there."""
    who.ask("event.subscribe", {"topic": "none-is-called-so"}, count=count, nodeid=at, streaming=True)
    who.read_until(lambda: len(who.responses) == count, f"{count} requests pending at rank {at}")


def trackers(tree: Tree, ranks: Sequence[int] | None = None) -> dict[int, int]:
    """How many requests each of these brokers, or all, tracks."""
    return {rank: tree.tracked(rank) for rank in (range(tree.size) if ranks is None else ranks)}


def wait_trackers(tree: Tree, expected: dict[int, int]) -> None:
    """Wait until the trackers of these brokers are as expected: nothing has leaked."""
    eventually(lambda: trackers(tree, list(expected)) == expected, what=f"trackers of {expected}")


def wait_log(tree: Tree, rank: int, text: str) -> None:
    """Wait until the broker of `rank` has logged something with `text` in it."""
    eventually(lambda: text in tree.log_of(rank), what=f"{text!r} in the log of rank {rank}")


def submit_on(tree: Tree, body: str, *ranks: int, **facts: object) -> JobId:
    """Submit a job with a task, and a core, on each of these ranks."""
    idset = str(IdSet(ranks))
    shape = {"nodes": len(ranks), "ntasks": len(ranks)} if len(ranks) > 1 else {}
    return tree.submit(tree.job(body, constraint={"ranks": [idset]}, **shape, **facts))


def start_on(tree: Tree, *ranks: int) -> JobId:
    """Submit a job on these ranks, with a task on each that waits for the file `end`, and wait until all run."""
    jobid = submit_on(tree, WAITER, *ranks)
    eventually(lambda: len(tree.marked(jobid)) == len(ranks), what=f"the tasks of {f58(jobid)}")
    return jobid


def waited(ranks: int = 1) -> Expect:
    """What is to become of a job of `start_on` with so many ranks."""
    return Expect(output=dict.fromkeys(range(ranks), WAITED), tasks=ranks)


def births(tree: Tree, *jobids: JobId) -> list[tuple[int, int]]:
    """The tasks of these jobs, or of all, that have started: which processes they are."""
    return [birth(marker.pid) for marker in tree.marked() if not jobids or parse_jobid(marker.jobid) in jobids]


def check_alive(tasks: list[tuple[int, int]]) -> None:
    """Fail unless these processes are what they were, and live."""
    for pid, start in tasks:
        assert birth(pid) == (pid, start), f"task {pid} is another process"
        assert not process_gone(pid), f"task {pid} is dead"
