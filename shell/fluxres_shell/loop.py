"""The shell's event loop: carries out what `state` says, with poll(2), one thread and no Trio.

Each round: wait for descriptors or a timer, turn what happened into events, carry out their effects, then
*settle*: write the queued records with one write, report what became of that, and send what the attached
broker has room for. So nothing is sent before it was appended, but for one case: while the disk is full, what
is queued in memory is sent from there.

What may go wrong: a journal that cannot be written stops the pipes and is tried again every JOURNAL_RETRY
seconds, for as long as the shell lives (there is nothing better to do: it is the only copy); a socket that
cannot be bound is bound at the next SIGUSR1; a connection's errors end that connection.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from fluxres.base.failpoint import hit
from fluxres.wire.payload import WireMap
from fluxres_shell import leftover, records
from fluxres_shell.cgroup import JobCgroup
from fluxres_shell.events import (
    Acked,
    Append,
    Attached,
    BarrierDone,
    Close,
    CloseStreams,
    ConnectionLost,
    DropTasks,
    Effect,
    Event,
    Exit,
    ExitStored,
    Forget,
    JournalFull,
    JournalRoom,
    Kill,
    PipeData,
    PipeEof,
    Released,
    ResumeReading,
    SendBarrier,
    Serve,
    Signal,
    StartTasks,
    StartTimer,
    StopReading,
    StopTimer,
    Sweep,
    Swept,
    TaskExited,
    Timer,
    TimerFired,
)
from fluxres_shell.feed import StdinFeed
from fluxres_shell.journal import JournalWriter
from fluxres_shell.poller import Handler, Poller
from fluxres_shell.serve import Server
from fluxres_shell.state import Phase, ShellState
from fluxres_shell.tasks import Task, close_all, signal_all

PIPE_READ: Final = 64 * 1024
"""Bytes read from a pipe at a time, and so at most in one record: what a pipe holds by default."""
ROUND_BYTES: Final = 256 * 1024
"""Bytes read from pipes before they are written to the journal."""
JOURNAL_RETRY: Final = 0.5
"""Seconds between tries to write a journal that could not be written."""
CAUGHT: Final = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM)
"""The signals that the loop takes; blocked until it does."""
_WAKEUP_READ: Final = 4096


class ShellLoop:
    """Runs one shell from its first record to its end.

    The caller opens the tasks' streams, hands them to `take_tasks`, sets `cgroup`, where they have one, starts
    them, reports Started or StartFailed, and calls `watch_tasks` and `run`; or it reports BarrierEntered and calls
    `run`, and then `start_tasks` is called when it is time to start them. `before_exit` is called once, before the
    exit record is appended.
    """

    def __init__(
        self,
        dirfd: int,
        *,
        state: ShellState,
        journal: JournalWriter,
        nonce: str,
    ) -> None:
        self.state = state
        self.journal = journal
        self.tasks: list[Task] = []
        self.cgroup: JobCgroup | None = None
        self.start_tasks: Callable[[], None] = lambda: None
        self.before_exit: Callable[[], None] = lambda: None
        self._poller = Poller()
        self._stdin = StdinFeed(self._poller)
        self._server = Server(self, self._poller, self._stdin, journal, dirfd=dirfd, nonce=nonce)
        self._timers: dict[Timer, float] = {}
        self._retry_at = 0.0
        self._round_bytes = 0
        self._done = False
        self._wakeup = self._catch_signals()

    # Signals.

    def _catch_signals(self) -> int:
        """Have SIGCHLD, SIGUSR1 and SIGTERM arrive as bytes in a pipe; the others do not end a shell."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_IGN)
        for signum in CAUGHT:
            signal.signal(signum, lambda _signum, _frame: None)  # the byte in the pipe is what counts
        self._poller.watch(reader, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        return reader

    def _on_signal(self, _revents: int) -> None:
        caught = set(os.read(self._wakeup, _WAKEUP_READ))
        if signal.SIGUSR1 in caught:
            self._server.bind()
        if signal.SIGTERM in caught:
            self.apply(Kill(signum=signal.SIGTERM))
        if signal.SIGCHLD in caught and not self._reap() and Timer.SWEEP in self._timers:
            self._timers[Timer.SWEEP] = time.monotonic()  # none are left: no need to wait to see it

    def _reap(self) -> bool:
        """Take the wait status of every dead child; whether there are children left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            for task in self.tasks:
                if task.alive and task.pid == pid:
                    task.reaped()
                    self._stdin.close(task)
                    self.apply(TaskExited(task=task.spec.rank, local=task.spec.local, pid=pid, wait_status=status))

    # Events and effects.

    def listen(self) -> None:
        """Begin to accept connections; where the socket cannot be made, SIGUSR1 asks again."""
        self._server.bind()

    def begin(self, event_name: str, context: WireMap) -> None:
        """Write the journal's first record, an entry of the execution eventlog. Raises OSError."""
        self._carry_out(self.state.event_record(event_name, context))
        self._store()
        if self.journal.stuck is not None:
            raise self.journal.stuck

    def apply(self, event: Event) -> None:
        """Give the state an event and carry out what follows from it."""
        for effect in self.state.apply(event):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Append(kind, fields):
                if kind == records.EXIT:
                    self.before_exit()
                self.journal.add(records.encode(self.journal.last + 1, time.time(), kind, *fields))
            case StartTasks():
                self.start_tasks()
            case DropTasks():
                self.drop_tasks()
            case Signal(signum):
                signal_all(self.tasks, signum)
                if signum == signal.SIGKILL and self.cgroup is not None:
                    self.cgroup.kill()
            case Sweep():
                self._sweep()
            case StopReading():
                for task in self.tasks:
                    for fd in task.outputs.values():
                        self._poller.forget(fd)
            case ResumeReading():
                self._watch_outputs()
            case CloseStreams():
                for task in self.tasks:
                    for stream in tuple(task.outputs):
                        self._close_output(task, stream)
            case StartTimer(timer, seconds):
                self._timers[timer] = time.monotonic() + seconds
            case StopTimer(timer):
                self._timers.pop(timer, None)
            case Serve(connection, from_seq):
                self._server.serve(connection, from_seq)
            case SendBarrier(connection, name, seq):
                self._server.barrier(connection, name, seq)
            case Close(connection, why):
                self._server.end(connection, why)
            case Forget(seq):
                self.journal.ack(seq)
                self._retry_at = 0.0  # there may be room now
            case Exit(sync):
                self._exit(sync)

    def _exit(self, sync: bool) -> None:
        if sync:
            with contextlib.suppress(OSError):  # a failing disk: there is nobody left to tell
                self.journal.sync()
        self._done = True

    def _sweep(self) -> None:
        """Kill what the tasks left behind, reap it, and report what remains."""
        populated = self.cgroup is not None and self.cgroup.populated()
        if populated and self.cgroup is not None:
            self.cgroup.kill()
        has_children = self._reap()
        remaining = leftover.kill_children() if has_children else 0
        usage = self.cgroup.usage() if self.cgroup is not None else {}
        self.apply(Swept(remaining=max(remaining, int(populated)), usage=usage))

    # The tasks and their output.

    def take_tasks(self, tasks: list[Task]) -> None:
        """The tasks' streams are open, though nothing is started: what comes of their input goes into their pipes,
        and where those are full, waits."""
        self.tasks = tasks
        self._stdin.open(tasks)

    def drop_tasks(self) -> None:
        """Close what was opened for those tasks that are not started, and forget them."""
        unstarted = [task for task in self.tasks if not task.alive]
        for task in unstarted:
            self._stdin.close(task)
        close_all(unstarted)
        self.tasks = [task for task in self.tasks if task.alive]

    def watch_tasks(self) -> None:
        """The tasks are started: read their pipes."""
        self._watch_outputs()

    def _watch_outputs(self) -> None:
        for task in self.tasks:
            for stream, fd in task.outputs.items():
                self._poller.watch(fd, self._output_handler(task, stream))

    def _output_handler(self, task: Task, stream: str) -> Handler:
        def read(_revents: int) -> None:
            self._read_output(task, stream)

        return read

    def _read_output(self, task: Task, stream: str) -> None:
        """Read a pipe once, unless back pressure began in this round."""
        if not self.state.reading or stream not in task.outputs:
            return
        try:
            data = os.read(task.outputs[stream], PIPE_READ)
        except BlockingIOError:
            return
        if not data:
            self._close_output(task, stream)
            self.apply(PipeEof(task=task.spec.rank, stream=stream))
            return
        self.apply(PipeData(task=task.spec.rank, stream=stream, data=data))
        self._round_bytes += len(data)
        if self._round_bytes >= ROUND_BYTES:
            self._store()

    def _close_output(self, task: Task, stream: str) -> None:
        self._poller.forget(task.outputs[stream])
        task.close_stream(stream)

    # The loop.

    def run(self) -> None:
        """Run until the state says Exit."""
        self._settle()
        while not self._done:
            self._round_bytes = 0
            self._poller.run_once(self._timeout())
            self._fire_timers()
            self._settle()

    def _timeout(self) -> float | None:
        deadlines = list(self._timers.values())
        if self.journal.stuck is not None:
            deadlines.append(self._retry_at)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _fire_timers(self) -> None:
        now = time.monotonic()
        for timer in [timer for timer, deadline in self._timers.items() if deadline <= now]:
            # An earlier one of this round may have stopped it.
            if self._timers.pop(timer, None) is not None:
                self.apply(TimerFired(timer=timer))

    def _settle(self) -> None:
        """Write what is queued, then send what there is to send."""
        if not self._done:
            self._store()
        if not self._done:
            self._server.pump()
        # Acks that came in may have made room.
        if not self._done and not self.state.reading and self._has_room():
            self.apply(JournalRoom())

    def _store(self) -> None:
        self._round_bytes = 0
        if self.journal.stuck is not None and time.monotonic() < self._retry_at:
            return
        ending = self.state.phase is Phase.ENDING
        name = "exit-record" if ending else "first-record" if self.journal.written == 0 else None
        if name:
            hit(f"{name}.before")
        stored = self.journal.flush() or (ending and self.journal.flush_into_reserve())
        if name and stored:
            hit(f"{name}.after")
        if not stored:
            self._retry_at = time.monotonic() + JOURNAL_RETRY
        if ending and stored:
            self.journal.drop_reserve()
            self.apply(ExitStored())
        elif self.state.reading and not self._has_room():
            self.apply(JournalFull())

    def _has_room(self) -> bool:
        return self.journal.stuck is None and not self.journal.full

    # What the server tells.

    def attached(self, connection: int, from_seq: int) -> None:
        """A connection with the right nonce wants records."""
        self.apply(Attached(connection=connection, from_seq=from_seq))

    def lost(self, connection: int) -> None:
        """A connection has ended."""
        if not self._done:
            self.apply(ConnectionLost(connection=connection))

    def acked(self, seq: int) -> None:
        """The attached broker has records up to `seq`."""
        self.apply(Acked(seq=seq))

    def kill(self, signum: int) -> None:
        """The attached broker wants the tasks signalled."""
        self.apply(Kill(signum=signum))

    def released(self, connection: int) -> None:
        """The attached broker wants nothing more."""
        self.apply(Released(connection=connection))

    def barrier_done(self, name: str, seq: int) -> None:
        """Every shell of the job has entered the barrier."""
        self.apply(BarrierDone(name=name, seq=seq))
