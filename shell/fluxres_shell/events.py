"""What a shell's state machine takes and gives: events (what happened) and effects (what is to be done).

Values only; what they mean for the shell is in `state`, and `loop` makes the ones and carries out the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from fluxres.wire.payload import Wire, WireMap


class Timer(Enum):
    """Timers that the caller runs; starting one again moves it."""

    LIMIT = "limit"
    KILL = "kill"
    SWEEP = "sweep"
    DRAIN = "drain"
    LINGER = "linger"


# Events.


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Every task runs; `taskmap` is RFC 34's, for the `shell.start` event."""

    taskmap: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierEntered:
    """All is set up; the tasks are to be started when every shell of the job has come as far."""

    name: str
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierDone:
    """The attached broker says that every shell of the job has entered the barrier."""

    name: str
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """A task (or what all of them need) could not be started; `running` others were, with these `streams`."""

    status: int
    note: str
    running: int
    streams: frozenset[tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExited:
    """The task with global rank `task` ended with this wait status."""

    task: int
    local: int
    pid: int
    wait_status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeData:
    """A task wrote."""

    task: int
    stream: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeEof:
    """A task's stream ended."""

    task: int
    stream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """How many processes of the job are left; `usage` goes into the exit record's info."""

    remaining: int
    usage: WireMap = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    """A started timer has run out."""

    timer: Timer


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalFull:
    """The journal is at its limit, or the disk is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRoom:
    """The journal takes records again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStored:
    """The exit record is in the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A connection with the right nonce wants the records from `from_seq`."""

    connection: int
    from_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLost:
    """A connection is gone."""

    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Acked:
    """Records up to `seq` are durable at rank 0."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Signal the tasks: asked for by the attached broker, or by SIGTERM to the shell."""

    signum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The attached broker wants nothing more of this shell."""

    connection: int


Event: TypeAlias = (
    Started
    | BarrierEntered
    | BarrierDone
    | StartFailed
    | TaskExited
    | PipeData
    | PipeEof
    | Swept
    | TimerFired
    | JournalFull
    | JournalRoom
    | ExitStored
    | Attached
    | ConnectionLost
    | Acked
    | Kill
    | Released
)

# Effects.


@dataclass(frozen=True, slots=True)
class Append:
    """Give the journal one more record: its kind and fields (see `records`)."""

    kind: str
    fields: tuple[Wire, ...]


@dataclass(frozen=True, slots=True)
class StartTasks:
    """Start every task; report Started or StartFailed."""


@dataclass(frozen=True, slots=True)
class DropTasks:
    """No task is to be started any more: close what was opened for them."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Send `signum` to every living task's process group; SIGKILL to everything of theirs."""

    signum: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Kill every process that the tasks left; report Swept."""


@dataclass(frozen=True, slots=True)
class CloseStreams:
    """Close the pipes that are still open, unread."""


@dataclass(frozen=True, slots=True)
class StopReading:
    """Leave the tasks' pipes alone: back pressure."""


@dataclass(frozen=True, slots=True)
class ResumeReading:
    """Read the tasks' pipes again."""


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Report TimerFired in so many seconds."""

    timer: Timer
    seconds: float


@dataclass(frozen=True, slots=True)
class StopTimer:
    """Forget the timer, if it runs."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer `attached`, and send records from `from_seq` on and as they come."""

    connection: int
    from_seq: int


@dataclass(frozen=True, slots=True)
class SendBarrier:
    """Say, after the records that there are by now, that this shell waits in a barrier."""

    connection: int
    name: str
    seq: int


@dataclass(frozen=True, slots=True)
class Close:
    """End a connection; where `why` is not empty, say so first."""

    connection: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete what the journal needs no more: records up to `seq`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process; with `sync`, make the journal durable first."""

    sync: bool


Effect: TypeAlias = (
    Append
    | StartTasks
    | DropTasks
    | Signal
    | Sweep
    | CloseStreams
    | StopReading
    | ResumeReading
    | StartTimer
    | StopTimer
    | Serve
    | SendBarrier
    | Close
    | Forget
    | Exit
)
Effects: TypeAlias = list[Effect]
