"""The job shell's life as a pure state machine: events in, effects out; no clock, file, process or socket.

      ┌──Kill───────────────────────────────────────────┐
    WAITING                                             │
      ▲ │ BarrierDone                                   │
      │ ▼                                               ▼
    SETUP ──Started──▶ RUNNING ──last TaskExited──▶ DRAINING ──nothing left──▶ ENDING ──ExitStored──▶ CLOSING ──▶ DONE
      └──StartFailed, nothing runs──────────────────────▲                        └──released from memory───────────▲

- SETUP: claimed, the journal is open, nothing has been started.
- WAITING: only of a job with several shells (BarrierEntered): all that can fail without a task is set up, and the
  tasks start when every other shell has come as far. The attached broker is told, and each one that attaches
  afterwards; detached, the shell waits for as long as it takes. A signal that would end a task ends the shell with
  that status, and no task was ever started. BarrierDone leads back to SETUP, in which the tasks start at once.
- RUNNING: at least one task lives. (Where some could not be started, those that could are being killed.)
- DRAINING: no task lives. What they left behind is killed, and their pipes are read to the end, for a bounded
  time.
- ENDING: the exit record is appended but not in the journal (a full disk): served from memory, retried by the
  caller.
- CLOSING: the exit record is in the journal. Waits for the attached broker's release, or its loss; a shell that no
  broker has attached to yet lingers a moment, because the one that asked for it is about to.
- DONE: the last effect of all was Exit.

Beside the phase: who is attached, if anyone (the newest attach wins); whether the pipes are read (back
pressure of a full journal); the time limit, which sends SIGALRM and after KILL_GRACE SIGKILL, as flux-core's
job-exec does.

`_TABLE` below lists what each phase allows; anything else raises IllegalTransition. The caller (`loop`)
carries out effects in their order and reports what came of them as further events.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final, TypeAlias, cast

from fluxres.base.errors import IllegalTransition
from fluxres.wire.payload import Wire, WireMap
from fluxres_shell import records
from fluxres_shell.events import (
    Acked,
    Append,
    Attached,
    BarrierDone,
    BarrierEntered,
    Close,
    CloseStreams,
    ConnectionLost,
    DropTasks,
    Effects,
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
    Started,
    StartFailed,
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

KILL_GRACE: Final = 5.0
"""Seconds between the time limit's SIGALRM and SIGKILL (flux-core's kill-timeout)."""
DRAIN_GRACE: Final = 2.0
"""Seconds that pipes are read after every process that could be found is gone."""
SWEEP_INTERVAL: Final = 0.01
"""Seconds between looks at whether the processes that the tasks left are gone; longer each time."""
MAX_SWEEPS: Final = 40
"""Looks before what is left is reported as `leftover` (8.2 seconds in all)."""
LINGER: Final = 0.25
"""Seconds that a shell which has ended waits for its first broker, before it syncs its journal and exits. A short
job is over before its broker has dialled; waiting saves both of them most of the work."""
MAX_HISTORY: Final = 64
"""Events remembered for an IllegalTransition's text."""
_SPARING: Final = frozenset({
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
})  # fmt: skip
"""The signals that do not end a process by default (signal(7))."""


class Phase(Enum):
    """Where a shell is in its life."""

    SETUP = "setup"
    WAITING = "waiting"
    RUNNING = "running"
    DRAINING = "draining"
    ENDING = "ending"
    CLOSING = "closing"
    DONE = "done"


def exit_code(wait_status: int) -> int:
    """The exit code that a shell (and flux) shows for a wait status: 128+N for signal N."""
    return 128 + os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else os.WEXITSTATUS(wait_status)


class ShellState:
    """One shell's state. `apply` is the only way in.

    `what` names it in errors; `streams` are the (task, stream) pairs that end in pipes of the shell;
    `time_limit` is seconds, 0 for none.
    """

    def __init__(self, what: str, *, tasks: int, streams: set[tuple[int, str]], time_limit: float) -> None:
        self.phase = Phase.SETUP
        self.connection: int | None = None
        self.reading = True
        self.seq = 0
        """Records appended so far."""
        self._what = what
        self._running = tasks
        self._streams = set(streams)
        self._time_limit = time_limit
        self._barrier: BarrierEntered | None = None
        """The one that this shell waits in."""
        self._highest = 0
        self._failure: StartFailed | None = None
        self._timed_out = False
        self._swept = False
        self._sweeps = 0
        self._leftover = 0
        self._usage: Mapping[str, Wire] = {}
        self._acked = 0
        self._was_attached = False
        self._history: deque[str] = deque(maxlen=MAX_HISTORY)

    def apply(self, event: Event) -> Effects:
        """Apply one event and return what is to be done. Raises IllegalTransition."""
        handler = _TABLE.get((self.phase, type(event)))
        if handler is None:
            raise IllegalTransition(self._what, self.phase.value, type(event).__name__, tuple(self._history))
        self._history.append(type(event).__name__)
        return handler(self, event)

    def event_record(self, name: str, context: WireMap) -> Append:
        """An entry for the execution eventlog; counts it."""
        return self._append(records.EVENT, name, context)

    def _append(self, kind: str, *fields: Wire) -> Append:
        self.seq += 1
        return Append(kind, fields)

    # Waiting for the other shells.

    def barrier_entered(self, event: BarrierEntered) -> Effects:
        self.phase = Phase.WAITING
        self._barrier = event
        return self._tell_barrier()

    def _tell_barrier(self) -> Effects:
        """Tell the attached broker, if there is one, what this shell waits for, if it does."""
        if self._barrier is None or self.connection is None:
            return []
        return [SendBarrier(self.connection, self._barrier.name, self._barrier.seq)]

    def barrier_done(self, event: BarrierDone) -> Effects:
        if self._barrier is None or (event.name, event.seq) != (self._barrier.name, self._barrier.seq):
            return []
        self.phase = Phase.SETUP
        self._barrier = None
        return [StartTasks()]

    def give_up(self, event: Kill) -> Effects:
        """A signal before there are tasks: what it would do to them."""
        if event.signum in _SPARING:
            return []
        self._barrier = None
        self._running = 0
        self._highest = exit_code(event.signum)
        return [DropTasks(), *self._end_streams(), *self._drain()]

    # Starting and ending of tasks.

    def started(self, event: Started) -> Effects:
        self.phase = Phase.RUNNING
        effects: Effects = [self.event_record("shell.start", {"taskmap": event.taskmap})]
        if self._time_limit:
            effects.append(StartTimer(Timer.LIMIT, self._time_limit))
        return effects

    def start_failed(self, event: StartFailed) -> Effects:
        self._failure = event
        self._running = event.running
        unused = sorted(self._streams - event.streams)
        self._streams &= event.streams
        effects: Effects = [self._append(records.EOF, stream, task) for task, stream in unused]
        if event.running:
            self.phase = Phase.RUNNING
            return [*effects, Signal(signal.SIGKILL)]
        return effects + self._drain()

    def task_exited(self, event: TaskExited) -> Effects:
        code = exit_code(event.wait_status)
        self._highest = max(self._highest, code)
        self._running -= 1
        context: WireMap = {
            "localid": event.local,
            "rank": event.task,
            "state": "Exited",
            "pid": event.pid,
            "wait_status": event.wait_status,
            "signaled": os.WTERMSIG(event.wait_status) if os.WIFSIGNALED(event.wait_status) else 0,
            "exitcode": code,
        }
        effects: Effects = [self.event_record("shell.task-exit", context)]
        return effects if self._running else effects + self._drain()

    def _drain(self) -> Effects:
        self.phase = Phase.DRAINING
        effects: Effects = [StopTimer(Timer.LIMIT), StopTimer(Timer.KILL)]
        if not self.reading:
            # What is still in the pipes is little, and has to come before the exit record.
            self.reading = True
            effects.append(ResumeReading())
        return [*effects, Sweep()]

    def swept(self, event: Swept) -> Effects:
        self._usage = event.usage
        if event.remaining and self._sweeps < MAX_SWEEPS:
            self._sweeps += 1
            return [StartTimer(Timer.SWEEP, SWEEP_INTERVAL * self._sweeps)]
        self._leftover = event.remaining
        self._swept = True
        return [StartTimer(Timer.DRAIN, DRAIN_GRACE)] if self._streams else self._end()

    # Output.

    def pipe_data(self, event: PipeData) -> Effects:
        return [self._append(records.DATA, event.stream, event.task, event.data)]

    def pipe_eof(self, event: PipeEof) -> Effects:
        self._streams.remove((event.task, event.stream))
        effects: Effects = [self._append(records.EOF, event.stream, event.task)]
        if self._swept and not self._streams:
            effects += [StopTimer(Timer.DRAIN), *self._end()]
        return effects

    def _end_streams(self) -> Effects:
        """Nothing more comes from any stream."""
        ends: Effects = [self._append(records.EOF, stream, task) for task, stream in sorted(self._streams)]
        self._streams.clear()
        return ends

    def journal_full(self, _event: JournalFull) -> Effects:
        if self.phase is not Phase.RUNNING or not self.reading:
            return []
        self.reading = False
        return [StopReading()]

    def journal_room(self, _event: JournalRoom) -> Effects:
        if self.reading:
            return []
        self.reading = True
        return [ResumeReading()]

    # Time.

    def timer_fired(self, event: TimerFired) -> Effects:
        match self.phase, event.timer:
            case Phase.RUNNING, Timer.LIMIT:
                self._timed_out = True
                return [
                    self.event_record("shell.timeout", {"time_limit": self._time_limit}),
                    Signal(signal.SIGALRM),
                    StartTimer(Timer.KILL, KILL_GRACE),
                ]
            case Phase.RUNNING, Timer.KILL:
                return [Signal(signal.SIGKILL)]
            case Phase.DRAINING, Timer.SWEEP:
                return [Sweep()]
            case Phase.DRAINING, Timer.DRAIN:
                return [CloseStreams(), *self._end_streams(), *self._end()]
            case Phase.CLOSING, Timer.LINGER:
                if self.connection is not None:
                    return []
                self.phase = Phase.DONE
                return [Exit(sync=True)]
        raise IllegalTransition(self._what, self.phase.value, f"TimerFired({event.timer.value})", tuple(self._history))

    def kill(self, event: Kill) -> Effects:
        return [Signal(event.signum)]

    # The end.

    def _end(self) -> Effects:
        self.phase = Phase.ENDING
        status = self._highest << 8 if self._failure is None else self._failure.status
        return [self._append(records.EXIT, status, self._info())]

    def _info(self) -> WireMap:
        info: WireMap = dict(self._usage)
        if self._failure is not None:
            info["exception"] = {"type": "exec", "severity": 0, "note": self._failure.note}
        elif self._timed_out:
            info["timeout"] = True
            info["exception"] = {"type": "timeout", "severity": 0, "note": "resource allocation expired"}
        if self._leftover:
            info["leftover"] = self._leftover
        return info

    def exit_stored(self, _event: ExitStored) -> Effects:
        if self.connection is None and self._was_attached:
            self.phase = Phase.DONE
            return [Exit(sync=True)]
        self.phase = Phase.CLOSING
        return [] if self.connection is not None else [StartTimer(Timer.LINGER, LINGER)]

    # Connections.

    def attached(self, event: Attached) -> Effects:
        effects: Effects = []
        if self.connection is not None:
            effects.append(Close(self.connection, "a newer attach takes over"))
        self.connection = event.connection
        self._was_attached = True
        self._acked = max(self._acked, min(event.from_seq - 1, self.seq))
        return [*effects, Serve(event.connection, event.from_seq), *self._tell_barrier()]

    def connection_lost(self, event: ConnectionLost) -> Effects:
        if event.connection != self.connection:
            return []
        self.connection = None
        if self.phase is Phase.CLOSING:
            self.phase = Phase.DONE
            return [Exit(sync=True)]
        return []

    def acked(self, event: Acked) -> Effects:
        self._acked = max(self._acked, event.seq)
        return [Forget(event.seq)]

    def released(self, event: Released) -> Effects:
        ending = self.phase in (Phase.ENDING, Phase.CLOSING)
        if not ending or self._acked < self.seq:
            return [Close(event.connection, f"cannot release: record {self._acked} of {self.seq} is acknowledged")]
        self.phase = Phase.DONE
        return [Exit(sync=False)]

    def ignored(self, _event: Event) -> Effects:
        """Allowed, and nothing to do: a signal when no task lives, journal room when none is needed, a barrier's end
        told once more."""
        return []


_Handler: TypeAlias = "Callable[[ShellState, Event], Effects]"
_ANY: Final = (Phase.SETUP, Phase.WAITING, Phase.RUNNING, Phase.DRAINING, Phase.ENDING, Phase.CLOSING)
_LIVE: Final = (Phase.RUNNING, Phase.DRAINING)
_ROWS: Final = (
    # event, phases that allow it, handler
    (Started, (Phase.SETUP,), ShellState.started),
    (StartFailed, (Phase.SETUP,), ShellState.start_failed),
    (BarrierEntered, (Phase.SETUP,), ShellState.barrier_entered),
    (BarrierDone, (Phase.WAITING,), ShellState.barrier_done),
    (BarrierDone, (Phase.SETUP, Phase.RUNNING, Phase.DRAINING, Phase.ENDING, Phase.CLOSING), ShellState.ignored),
    (TaskExited, (Phase.RUNNING,), ShellState.task_exited),
    (PipeData, _LIVE, ShellState.pipe_data),
    (PipeEof, _LIVE, ShellState.pipe_eof),
    (Swept, (Phase.DRAINING,), ShellState.swept),
    (TimerFired, (*_LIVE, Phase.CLOSING), ShellState.timer_fired),
    (JournalFull, _ANY, ShellState.journal_full),
    (JournalRoom, _LIVE, ShellState.journal_room),
    (JournalRoom, (Phase.SETUP, Phase.WAITING, Phase.ENDING, Phase.CLOSING), ShellState.ignored),
    (ExitStored, (Phase.ENDING,), ShellState.exit_stored),
    (Attached, _ANY, ShellState.attached),
    (ConnectionLost, _ANY, ShellState.connection_lost),
    (Acked, _ANY, ShellState.acked),
    (Kill, (Phase.WAITING,), ShellState.give_up),
    (Kill, (Phase.RUNNING,), ShellState.kill),
    (Kill, (Phase.SETUP, Phase.DRAINING, Phase.ENDING, Phase.CLOSING), ShellState.ignored),
    (Released, _ANY, ShellState.released),
)
_TABLE: Final[dict[tuple[Phase, type[Event]], _Handler]] = {
    (phase, event): cast("_Handler", handler) for event, phases, handler in _ROWS for phase in phases
}
