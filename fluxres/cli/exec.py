"""`fluxres exec`: run a command on brokers' nodes, beside all jobs (flux-exec(1)).

Standard output and error come together here, standard input goes to all. SIGINT and SIGTERM are passed on to the
processes; from the third Ctrl-C on, one within `CTRL_C_WINDOW` seconds of the one before leaves them. When this command
goes, so do the processes. The exit status is the largest of all: 128+N for a signal, 127 and 126 for a command that is
not found or cannot be executed, 68 for a rank that cannot be reached, 1 for other errors.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import time
from argparse import REMAINDER
from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event
from fluxres.base.idset import IdSet
from fluxres.cli.common import argument, parser, printable, write_some
from fluxres.cli.output import Output
from fluxres.cli.ranks import MAX_RANK, get_size
from fluxres.cli.remote_run import STDIN, RemoteRun
from fluxres.cli.signals import Signals, signal_name
from fluxres.client import Client

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.base.json import JsonObject
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import WireMap
EXEC_FLAGS: Final = 1 | 2 | 8
"""RFC 42: standard output, standard error, and credit for standard input."""
CHUNK: Final = 16 * 1024
"""Bytes of input that one request carries at most."""
CTRL_C_WINDOW: Final = 1.0
"""Seconds within which a further Ctrl-C leaves the processes."""
MAX_CAUGHT: Final = 16
"""Signals that are kept for processes that have not started."""
REPLIES_AT_ONCE: Final = 64
"""Replies taken before signals and input have their turn."""
LOCAL_VARIABLES: Final = ("FLUXRES_URI", "FLUX_URI", "FLUX_PROXY_REMOTE")
"""Variables that mean something only where they were set."""
ALL: Final = "all"
NO_DIRECTORY: Final = "none"


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("exec", "Run a command on brokers' nodes.", usage="[OPTIONS] COMMAND …")
    add = made.add_argument
    add("-r", "--rank", metavar="IDSET", type=argument(_ranks), help="on these ranks (all)")
    add("-x", "--exclude", metavar="IDSET", type=argument(IdSet.parse), default=IdSet(), help="but not on these")
    add("-d", "--dir", metavar="DIR", help="in this directory (the current one; none: the broker's)")
    add("-l", "--label-io", action="store_true", help="put its rank before each line of output")
    add("-n", "--noinput", action="store_true", help="give the command no standard input")
    add("-q", "--quiet", action="store_true", help="do not say which ranks have failed, and how")
    add("command", metavar="COMMAND", nargs=REMAINDER, help="the command and its arguments")
    args = made.parse_args(argv)
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        made.error("there is no command to run")
    with Client.connect(args.uri) as client:
        size = get_size(lambda topic, payload: client.call(topic, payload))
        ranks = (IdSet(range(size)) if args.rank is None else args.rank) - args.exclude
        if not ranks:
            raise FluxresError("cannot run the command: no rank is left to run it on")
        return Exec(client, ranks, args).run()


def _ranks(text: str) -> IdSet | None:
    """An argparse type: ranks, None for all. Raises ValueError."""
    ranks = None if text == ALL else IdSet.parse(text)
    if ranks and max(ranks) > MAX_RANK:
        raise ValueError(f"{max(ranks)} is no rank")
    return ranks


class Exec:
    """A command on its way on many ranks."""

    def __init__(self, client: Client, ranks: IdSet, args: Namespace) -> None:
        self._client = client
        self._ranks = ranks
        self._args = args
        self._run = RemoteRun(ranks)
        self._output = Output(label=args.label_io)
        self._rank_of: dict[int, int] = {}
        """matchtag -> rank, of the exec requests."""
        self._killing: dict[int, int] = {}
        """matchtag -> rank, of the kill requests."""
        self._reading = not args.noinput
        self._signals = Signals((signal.SIGINT, signal.SIGTERM))
        self._caught: list[int] = []
        """The signals so far."""
        self._interrupted_at = 0.0
        self._left = False

    def run(self) -> int:
        """Run the command to its end on all ranks; returns the exit status. Raises FluxresError."""
        with self._signals:
            request: WireMap = {"cmd": _command(self._args), "flags": EXEC_FLAGS, "local_flags": 0}
            for rank in self._ranks:
                self._rank_of[self._client.open("rexec.exec", request, nodeid=rank)] = rank
            while not self._run.done and not self._left:
                busy = self._take_replies()
                if not self._run.done:
                    self._poll(0.0 if busy else None)
            for descriptor, data in self._output.finish():
                self._write(descriptor, data)
        if self._left:
            self._say(f"leaving the command where it still runs: {self._run.unfinished}")
            return 1
        if not self._args.quiet:
            for line in self._run.summary():
                print(line, file=sys.stderr)
        return self._run.exit_code

    # --- what the brokers say

    def _take_replies(self) -> bool:
        """Take the replies that are there; True where there may be more."""
        for _ in range(REPLIES_AT_ONCE):
            reply = None if self._run.done or self._left else self._client.receive(0)
            if reply is None:
                return False
            if reply.matchtag in self._rank_of:
                self._take(self._rank_of[reply.matchtag], reply)
            else:
                self._killed(self._killing.pop(reply.matchtag, None), reply)
        return True

    def _take(self, rank: int, reply: Reply) -> None:
        if reply.error is not None:
            self._ended(rank, reply.error)
            return
        io = self._run.take(rank, reply.payload)
        if io is not None:
            for descriptor, data in self._output.take(Event(0.0, "data", cast("JsonObject", io)), 0.0):
                self._write(descriptor, data)
        elif reply.payload.get("type") == "started":
            self._started(rank, reply.matchtag)

    def _started(self, rank: int, matchtag: int) -> None:
        """A process runs: it gets the signals of which it was too late to hear, and the end of input that is over."""
        for signum in self._caught:
            self._kill(rank, signum)
        if not self._reading:
            self._send_input(rank, matchtag, b"")

    def _ended(self, rank: int, error: RpcError) -> None:
        why = self._run.ended(rank, error)
        if why is not None:
            name = self._args.command[0]
            self._say(f"cannot run {name} on rank {rank}: {why.removeprefix(f'cannot start {name!r}: ')}")

    def _write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data`, with an eye on signals where the reader may keep us waiting."""
        view = memoryview(data)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            while view:
                view = view[write_some(descriptor, view) :]
            return
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        poller.register(self._signals.fileno(), select.POLLIN)
        while view and not self._left:
            ready = dict(poller.poll())
            if self._signals.fileno() in ready:
                self._take_signals()
            if descriptor in ready:
                view = view[write_some(descriptor, view[: select.PIPE_BUF]) :]

    # --- standard input

    def _read_input(self) -> None:
        try:
            data = os.read(0, min(CHUNK, self._run.room))
        except BlockingIOError:
            return
        except OSError:  # closed, or a terminal that is not ours to read (EIO): there is no input
            data = b""
        for matchtag, rank in self._rank_of.items():
            if rank in self._run.running:
                self._send_input(rank, matchtag, data)
        self._run.sent(len(data))
        self._reading = bool(data)

    def _send_input(self, rank: int, matchtag: int, data: bytes) -> None:
        io: WireMap = {"stream": STDIN, "rank": str(rank)}
        if data:
            try:
                io["data"] = data.decode()
            except UnicodeDecodeError:
                from binascii import b2a_base64

                io |= {"data": b2a_base64(data, newline=False).decode(), "encoding": "base64"}
        else:
            io["eof"] = True
        self._client.send("rexec.write", {"matchtag": matchtag, "io": io}, nodeid=rank)

    # --- waiting, and signals

    def _poll(self, timeout: float | None) -> None:
        poller = select.poll()
        poller.register(self._signals.fileno(), select.POLLIN)
        poller.register(self._client.fileno(), select.POLLIN)
        if self._reading and self._run.room:
            poller.register(0, select.POLLIN)
        ready = dict(poller.poll(None if timeout is None else timeout * 1000))
        if self._signals.fileno() in ready:
            self._take_signals()
        if 0 in ready:
            self._read_input()

    def _take_signals(self) -> None:
        for signum in self._signals.take():
            if signum == signal.SIGINT:
                now, before = time.monotonic(), self._interrupted_at
                self._interrupted_at = now
                self._left |= self._caught.count(signum) >= 2 and now - before <= CTRL_C_WINDOW
            if signum in (signal.SIGINT, signal.SIGTERM) and not self._left:
                self._forward(signum)

    def _forward(self, signum: int) -> None:
        if len(self._caught) < MAX_CAUGHT:
            self._caught.append(signum)
        running = self._run.running
        if self._args.verbose:
            self._say(f"sending {signal_name(signum)} to {len(running)} processes")
        for rank in running:
            self._kill(rank, signum)
        if signum == signal.SIGINT and self._caught.count(signum) > 1:
            self._say(f"one more ctrl-C within {CTRL_C_WINDOW:g}s leaves the command")

    def _kill(self, rank: int, signum: int) -> None:
        payload: WireMap = {"pid": self._run.running[rank], "signum": signum}
        self._killing[self._client.open("rexec.kill", payload, nodeid=rank, streaming=False)] = rank

    def _killed(self, rank: int | None, reply: Reply) -> None:
        if rank in self._run.running and reply.error is not None:  # else it has ended by itself
            self._say(f"cannot signal the command on rank {rank}: {reply.error.text}")

    def _say(self, text: str) -> None:
        print(printable(f"fluxres-exec: {text}"), file=sys.stderr, flush=True)


def _command(args: Namespace) -> WireMap:
    """The command object (RFC 42)."""
    env: WireMap = {name: value for name, value in os.environ.items() if name not in LOCAL_VARIABLES}
    command: WireMap = {"cmdline": args.command, "env": env, "opts": {}, "channels": []}
    directory = args.dir if args.dir is not None else os.getcwd()
    return command if directory == NO_DIRECTORY else {**command, "cwd": directory}
