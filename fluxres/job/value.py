"""The value that a job is: what its events so far have made of it (RFC 21), and the words for it.

A `Job` never changes: `fluxres.job.state.apply` makes the next one. It is kept small, because a manager
holds every pending job in memory; jobspec and R stay in the KVS.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxres.base.eventlog import Event
    from fluxres.base.idset import IdSet
    from fluxres.base.json import JsonValue

URGENCY_HOLD: Final = 0
URGENCY_DEFAULT: Final = 16
URGENCY_EXPEDITE: Final = 31
PRIORITY_MAX: Final = 4294967295


class JobState(IntEnum):
    """The states of RFC 21, with the bits that flux-core gives them on the wire."""

    NEW = 1
    DEPEND = 2
    PRIORITY = 4
    SCHED = 8
    RUN = 16
    CLEANUP = 32
    INACTIVE = 64


PENDING: Final = JobState.DEPEND | JobState.PRIORITY | JobState.SCHED
RUNNING: Final = JobState.RUN | JobState.CLEANUP
ACTIVE: Final = PENDING | RUNNING
"""The virtual states, as masks: `job.state & PENDING`."""


class JobFlag(IntEnum):
    """Flags given at submit or set later, with flux-core's bits."""

    DEBUG = 2
    WAITABLE = 4
    NOVALIDATE = 8


@dataclass(frozen=True, slots=True)
class JobException:
    """The exception that a job is remembered for: the most severe one, and the first of those."""

    severity: int
    type: str
    note: str


class Job(NamedTuple):
    """A job as its events so far have made it. Times are of its first entry into that state, in seconds.

    A NamedTuple and not a frozen dataclass because a restart replays every active job, each event makes
    a new one, and `_replace` takes a third of the time of `dataclasses.replace`.
    """

    id: int
    state: JobState = JobState.NEW
    userid: int = -1
    urgency: int = URGENCY_DEFAULT
    priority: int = 0
    flags: int = 0
    t_submit: float | None = None
    t_depend: float | None = None
    t_priority: float | None = None
    t_sched: float | None = None
    t_run: float | None = None
    t_cleanup: float | None = None
    t_inactive: float | None = None
    invalid: bool = False
    dependencies: tuple[str, ...] = ()
    perilogs: tuple[str, ...] = ()
    """Prologs and epilogs under way, by description."""
    allocated: bool = False
    """It has resources: `alloc` was logged and `free` was not."""
    started: bool = False
    status: int | None = None
    """The wait status that `finish` brought, None before."""
    success: bool = False
    released: IdSet | None = None
    """Ranks named by partial releases so far."""
    final_release: bool = False
    """job-exec is done with the job: nothing of it runs or will."""
    exception: JobException | None = None
    updates: Mapping[str, JsonValue] | None = None
    """All `jobspec-update` keys so far, dotted as logged, with their latest values."""
    expiration: float | None = None
    """The expiration that `resource-update` gave R."""
    annotations: Mapping[str, JsonValue] | None = None
    end_event: Event | None = None
    """What ended it: the first fatal exception, or `finish`."""
    restarts: int = 0
    history: tuple[str, ...] = ()
    """The names of the latest events."""

    @property
    def fatal(self) -> bool:
        """True when an exception of severity 0 was raised."""
        return self.exception is not None and self.exception.severity == 0

    @property
    def needs_exec(self) -> bool:
        """True when shells may exist and job-exec has not said that it is done: a restart takes it up."""
        return self.allocated and self.t_run is not None and not self.final_release
