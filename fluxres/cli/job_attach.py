"""`fluxres job attach` and the second half of `fluxres run`: a job's output and status, and input for it.

One connection carries everything; `fluxres.cli.follow` decides what is watched and printed, this module does
the I/O, in one poll loop. Output is read no faster than it can be written, input no faster than the broker
has made it durable. When the connection is lost the session goes on where it was: what is printed is what
would have been.

Ctrl-C: the first sends SIGINT to the job; a second within `CTRL_C_WINDOW` seconds cancels the job; Ctrl-Z
instead detaches from it. SIGTERM, SIGHUP, SIGALRM, SIGUSR1 and SIGUSR2 are passed on to the job.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import sys
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.jobid import JobId, parse_jobid
from fluxres.cli.common import argument, id_text, parser, printable, write_some
from fluxres.cli.follow import CloseStdin, Effect, Follow, FollowOptions, OpenStdin, Watch, Write
from fluxres.cli.signals import Signals, signal_name
from fluxres.cli.stdin import StdinFeed, StdinState
from fluxres.cli.watch import WAITCREATE, WATCH, event_of, watch_payload
from fluxres.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fluxres.base.errors import RpcError
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import WireMap

CTRL_C_WINDOW: Final = 2.0
"""Seconds within which a second key counts as one with the first Ctrl-C."""
REPLIES_AT_ONCE: Final = 64
"""Replies taken before signals and input have their turn."""
FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
_NOT_TAKEN: Final = frozenset({errno.ENOENT, errno.EPIPE, errno.ESRCH, errno.ECONNRESET})
"""Answers to input of a job that is over or reads none: nothing to trouble anyone with."""


class Attachment:
    """A job and this terminal, while they are attached to each other."""

    def __init__(
        self,
        session: Session,
        jobid: JobId,
        options: FollowOptions,
        *,
        stdin: bool = True,
        from_start: bool = False,
        read_only: bool = False,
    ) -> None:
        """`from_start`: the job's input is ours from its first byte on, so that it need not be asked for."""
        self._session = session
        self._id = jobid
        self._prog = options.prog
        self._follow = Follow(jobid, options)
        self._read_only = read_only
        self._from_start = from_start
        self._feed = StdinFeed(jobid) if stdin and not read_only else None
        self._feeding = False
        self._signals = Signals(() if read_only else (signal.SIGINT, *FORWARDED))
        self._interrupted_at = -CTRL_C_WINDOW
        self._detached = False
        self._answers: dict[int, Callable[[Reply], None]] = {}
        self._watches: dict[str, int] = {}

    def run(self) -> int:
        """Follow the job to its end; returns the exit status. Raises FluxresError."""
        with self._signals:
            self._carry_out(self._follow.begin())
            while not self._follow.done and not self._detached:
                busy = self._take_replies()
                if not self._follow.done:
                    self._poll(0.0 if busy else self._session.poll_timeout())
        return self._follow.exit_code

    # --- what the broker says

    def _take_replies(self) -> bool:
        """Take the replies that are there; True where there may be more."""
        for _ in range(REPLIES_AT_ONCE):
            if self._follow.done or self._detached:
                return True
            reply = self._session.receive(0)
            if reply is None:
                return False
            take = self._answers.get(reply.matchtag)
            if take is not None:
                if reply.last:
                    del self._answers[reply.matchtag]
                take(reply)
        return True

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Write(descriptor, data):
                    self._write(descriptor, data)
                case Watch(path, wait):
                    self._watch(path, wait)
                case OpenStdin():
                    self._open_stdin()
                case CloseStdin():
                    self._feeding = False

    def _watch(self, path: str, wait: bool) -> None:
        if path in self._watches:
            self._session.end(self._watches[path])
            self._answers.pop(self._watches[path], None)
        payload = watch_payload(self._id, path, WAITCREATE if wait else 0)

        def take(reply: Reply) -> None:
            if reply.error is not None:
                self._carry_out(self._follow.ended(path, reply.error))
            else:
                self._carry_out(self._follow.event(path, event_of(reply.payload)[0]))

        self._watches[path] = self._session.begin(WATCH, payload, streaming=True)
        self._answers[self._watches[path]] = take

    def _write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data`, with an eye on signals where the reader may keep us waiting."""
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            size, poller = len(data), None
        else:
            size, poller = select.PIPE_BUF, select.poll()
            poller.register(descriptor, select.POLLOUT)
            poller.register(self._signals.fileno(), select.POLLIN)
        view = memoryview(data)
        while view and not self._detached:
            if poller is not None:
                ready = dict(poller.poll())
                if self._signals.fileno() in ready:
                    self._take_signals()
                if descriptor not in ready:
                    continue
            view = view[write_some(descriptor, view[:size]) :]

    # --- standard input

    def _open_stdin(self) -> None:
        if self._feed is None or self._follow.finished:
            return
        self._feeding = True
        if not self._from_start:
            self._send_stdin(self._feed.resume())

    def _read_stdin(self) -> None:
        if self._feed is None:
            return
        try:
            data = os.read(0, self._feed.room)
        except BlockingIOError:
            return
        except OSError:  # closed, or a terminal that is not ours to read (EIO): the job gets nothing from it
            self._feeding = False
            return
        self._send_stdin(self._feed.data(data))

    def _send_stdin(self, request: WireMap) -> None:
        feed = self._feed
        if feed is None:
            return

        def take(reply: Reply) -> None:
            if reply.error is not None:
                if reply.error.errnum != errno.EINVAL or not feed.rejected(request):
                    self._stdin_refused(feed, reply.error)
                return
            offset = reply.payload.get("offset")
            for again in feed.answered(offset if isinstance(offset, int) else 0):
                self._send_stdin(again)

        self._answers[self._session.begin("job-exec.stdin", request)] = take

    def _stdin_refused(self, feed: StdinFeed, error: RpcError) -> None:
        if feed.unanswered and error.errnum not in _NOT_TAKEN and not self._follow.finished:
            self._say(f"cannot send standard input to {id_text(self._id)}: {error.text}")
        feed.close()

    # --- waiting

    def _poll(self, timeout: float | None) -> None:
        poller = select.poll()
        poller.register(self._signals.fileno(), select.POLLIN)
        if self._session.fileno() >= 0:
            poller.register(self._session.fileno(), select.POLLIN)
        feed = self._feed
        if self._feeding and feed is not None and feed.state is StdinState.OPEN and feed.room > 0:
            poller.register(0, select.POLLIN)
        ready = dict(poller.poll(None if timeout is None else timeout * 1000))
        if self._signals.fileno() in ready:
            self._take_signals()
        if 0 in ready:
            self._read_stdin()

    # --- signals

    def _take_signals(self) -> None:
        for signum in self._signals.take():
            if signum == signal.SIGINT:
                self._interrupted()
            elif signum == signal.SIGTSTP:
                self._stopped()
            elif signum in FORWARDED:
                self._forward(signum)

    def _interrupted(self) -> None:
        again = time.monotonic() - self._interrupted_at <= CTRL_C_WINDOW
        self._interrupted_at = time.monotonic()
        away = self._session.fileno() < 0
        if again and away:
            raise KeyboardInterrupt
        if again:
            payload: WireMap = {
                "id": self._id,
                "type": "cancel",
                "severity": 0,
                "note": "interrupted by ctrl-C",
            }
            self._call("cancel", "job-manager.raise", payload)
        elif away:
            self._say(f"the broker is away; one more ctrl-C within {CTRL_C_WINDOW:g}s leaves the job to itself")
        else:
            self._signals.catch(signal.SIGTSTP)
            self._say(
                f"sending SIGINT to {id_text(self._id)}; within {CTRL_C_WINDOW:g}s one more ctrl-C cancels it, "
                "ctrl-Z detaches from it"
            )
            self._forward(signal.SIGINT)

    def _stopped(self) -> None:
        self._signals.release(signal.SIGTSTP)
        if time.monotonic() - self._interrupted_at <= CTRL_C_WINDOW:
            self._say("detaching")
            self._detached = True
        else:
            os.kill(os.getpid(), signal.SIGTSTP)

    def _forward(self, signum: int) -> None:
        quiet = signum == signal.SIGINT  # a job that does not run yet has nobody to interrupt
        what = "" if quiet else f"send {signal_name(signum)} to"
        self._call(what, "job-manager.kill", {"id": self._id, "signum": signum}, resend=False)

    def _call(self, what: str, topic: str, payload: WireMap, *, resend: bool = True) -> None:
        def take(reply: Reply) -> None:
            if reply.error is not None and what and not self._follow.finished:
                self._say(f"cannot {what} {id_text(self._id)}: {reply.error.text}")

        self._answers[self._session.begin(topic, payload, resend=resend)] = take

    def _say(self, text: str) -> None:
        print(printable(f"{self._prog}: {text}"), file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """`fluxres job attach`."""
    options = parser("job", "Show a job's output and exit with its status.", usage="attach [OPTIONS] JOBID")
    options.add_argument("-l", "--label-io", action="store_true", help="put each line's task rank before it")
    options.add_argument("-q", "--quiet", action="store_true", help="do not say where output was redirected")
    options.add_argument("-r", "--read-only", action="store_true", help="leave stdin and signals alone")
    options.add_argument("-u", "--unbuffered", action="store_true", help="as always: stdin is sent as it comes")
    options.add_argument("-w", "--wait-event", metavar="EVENT", default="finish", help="wait for EVENT (finish)")
    options.add_argument("-E", "--show-events", action="store_true", help="show the job's events on stderr")
    options.add_argument("-X", "--show-exec", action="store_true", help="show the execution events on stderr")
    options.add_argument("jobid", metavar="JOBID", type=argument(parse_jobid))
    args = options.parse_args(argv)
    wanted = FollowOptions(
        prog="fluxres-job",
        label=args.label_io,
        quiet=args.quiet,
        show_events=args.show_events,
        show_exec=args.show_exec,
        wait_event=args.wait_event,
    )
    with Session(args.uri) as session:
        return Attachment(session, args.jobid, wanted, read_only=args.read_only).run()
