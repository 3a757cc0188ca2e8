"""The life of a job, as RFC 21 has it: a fold over its eventlog, and what is owed next.

Pure. `apply` moves a job by one event, `fold` replays a whole eventlog: state = fold(events). The
legal moves are in `TRANSITIONS`; whatever it does not name is refused with the events that led there,
since a log that breaks the rules must not be guessed at. `next_action` says what the job manager owes
the job in its present state, and depends on durable events only: a restarted manager owes the same.

    NEW --validate--> DEPEND --depend--> PRIORITY --priority--> SCHED --alloc--> RUN --finish--> CLEANUP
    SCHED --urgency, jobspec-update, flux-restart--> PRIORITY
    DEPEND, PRIORITY, SCHED, RUN --fatal exception--> CLEANUP --clean--> INACTIVE

Events decided before a fatal exception reached the log may follow it: in CLEANUP they are legal and
move nothing, but `alloc`, whose resources then have to be freed. An INACTIVE job never changes again.
Events that RFC 21 does not know are kept in the history and mean nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import IllegalTransition
from fluxres.base.jobid import f58
from fluxres.job.changes import CHANGES, integer
from fluxres.job.value import PRIORITY_MAX, URGENCY_EXPEDITE, URGENCY_HOLD, Job, JobState

if TYPE_CHECKING:
    from fluxres.base.eventlog import Event

MAX_HISTORY: Final = 24
"""How many event names a job remembers, for the text of an error."""

FATAL_EXCEPTION: Final = "exception(severity=0)"
"""The row of `TRANSITIONS` for an exception of severity 0."""


class Action(Enum):
    """What the job manager owes a job. It acts once per debt and waits for the events that follow."""

    NONE = "nothing: something else has to happen first"
    LOG_VALIDATE = "validate the job and log `validate`, or `invalidate`"
    REMOVE = "remove the job: it was found invalid"
    LOG_DEPEND = "log `depend`: no dependency is left"
    LOG_PRIORITY = "log `priority`"
    REQUEST_ALLOC = "ask the scheduler for resources"
    START = "ask job-exec to start the shells"
    KILL = "have job-exec end the job, whether or not anything of it has started"
    FREE = "give the resources back and log `free`"
    LOG_CLEAN = "log `clean`"


def _stay(*states: JobState) -> dict[JobState, JobState]:
    return {state: state for state in states}


_N, _D, _P, _S, _R, _C, _I = JobState

TRANSITIONS: Final[Mapping[str, Mapping[JobState, JobState]]] = {
    "submit": _stay(_N),
    "validate": {_N: _D},
    "invalidate": _stay(_N),
    "dependency-add": _stay(_N, _D, _C),
    "dependency-remove": _stay(_N, _D, _C),
    "depend": {_D: _P, _C: _C},
    "priority": {_P: _S, _S: _S, _C: _C},
    "urgency": {_N: _N, _D: _D, _P: _P, _S: _P, _R: _R, _C: _C},
    "jobspec-update": {_N: _N, _D: _D, _P: _P, _S: _P, _R: _R, _C: _C},
    "flux-restart": {_N: _N, _D: _D, _P: _P, _S: _P, _R: _R, _C: _C},
    "set-flags": _stay(_N, _D, _P, _S, _R, _C),
    "alloc": {_S: _R, _C: _C},
    "resource-update": _stay(_R, _C),
    "prolog-start": _stay(_D, _P, _S, _R, _C),
    "prolog-finish": _stay(_D, _P, _S, _R, _C),
    "start": _stay(_R, _C),
    "finish": {_R: _C, _C: _C},
    "epilog-start": _stay(_C),
    "epilog-finish": _stay(_C),
    "release": _stay(_R, _C),
    "free": _stay(_C),
    "clean": {_C: _I},
    "memo": _stay(*JobState),
    "exception": _stay(*JobState),
    FATAL_EXCEPTION: {_D: _C, _P: _C, _S: _C, _R: _C, _C: _C, _I: _I},
}
"""Event and state to the next state; a pair that is not here is illegal."""


def _never(job: Job, event: Event) -> bool:
    return False


def _release_too_soon(job: Job, event: Event) -> bool:
    """Nothing to release, released before, or the end of a job that has neither finished nor failed."""
    ends_running_job = event.context.get("final") is True and job.state is JobState.RUN
    return not job.needs_exec or ends_running_job


_GUARDS: Final[Mapping[str, Callable[[Job, Event], bool]]] = {
    "alloc": lambda job, _: job.allocated or job.t_run is not None,
    "start": lambda job, _: not job.needs_exec or job.started,
    "finish": lambda job, _: not job.needs_exec or job.status is not None,
    "release": _release_too_soon,
    "free": lambda job, _: not job.allocated or job.needs_exec,
    "clean": lambda job, _: job.allocated,
}


def fold(jobid: int, events: Iterable[Event]) -> Job:
    """The job that these events make, oldest first; raises as `apply` does."""
    job = Job(id=jobid)
    for event in events:
        job = apply(job, event)
    return job


def apply(job: Job, event: Event) -> Job:
    """The job after one more event.

    Raises IllegalTransition when the event is not allowed now, EventError when its context is malformed.
    """
    row = event.name
    if row == "exception" and integer(job, event, "severity", 0, 7) == 0:
        row = FATAL_EXCEPTION
    moves = TRANSITIONS.get(row)
    state = job.state if moves is None else moves.get(job.state)
    refused = _GUARDS.get(event.name, _never)(job, event)
    submitted = bool(job.history)  # `submit` comes first, and once
    if state is None or refused or submitted == (row == "submit") or (job.invalid and moves is not None):
        raise IllegalTransition(f"job {f58(job.id)}", job.state.name, row, job.history)
    if job.state is not JobState.INACTIVE:
        change = CHANGES.get(event.name)
        if change is not None:
            job = change(job, event)
    history = (*job.history[1 - MAX_HISTORY :], event.name)
    if state is job.state:
        return job._replace(history=history)
    return _entered(job._replace(state=state, history=history), event.timestamp)


def _entered(job: Job, at: float) -> Job:
    """The job with the time at which it first entered its state; timestamps are never zero."""
    match job.state:
        case JobState.NEW:
            return job
        case JobState.DEPEND:
            return job._replace(t_depend=job.t_depend or at)
        case JobState.PRIORITY:
            return job._replace(t_priority=job.t_priority or at)
        case JobState.SCHED:
            return job._replace(t_sched=job.t_sched or at)
        case JobState.RUN:
            return job._replace(t_run=job.t_run or at)
        case JobState.CLEANUP:
            return job._replace(t_cleanup=job.t_cleanup or at)
        case JobState.INACTIVE:
            return job._replace(t_inactive=job.t_inactive or at)


def next_action(job: Job) -> Action:
    """What the job manager owes the job now, from durable events alone.

    It stays owed until an event pays it: whoever acts on it remembers that a request is under way.
    """
    match job.state:
        case JobState.NEW:
            return Action.REMOVE if job.invalid else Action.LOG_VALIDATE
        case JobState.DEPEND:
            return Action.NONE if job.dependencies else Action.LOG_DEPEND
        case JobState.PRIORITY:
            return Action.LOG_PRIORITY
        case JobState.SCHED:
            return Action.NONE if is_held(job) else Action.REQUEST_ALLOC
        case JobState.RUN:
            return Action.NONE if job.perilogs or job.started else Action.START
        case JobState.CLEANUP:
            return _cleanup_action(job)
        case JobState.INACTIVE:
            return Action.NONE


def _cleanup_action(job: Job) -> Action:
    if job.needs_exec:
        return Action.KILL if job.fatal and job.status is None else Action.NONE
    if job.perilogs:
        return Action.NONE
    return Action.FREE if job.allocated else Action.LOG_CLEAN


def is_held(job: Job) -> bool:
    """True when the job gets no resources however many are free (RFC 30)."""
    return job.urgency == URGENCY_HOLD or job.priority == 0


def priority_for(urgency: int) -> int:
    """The priority of a job of this urgency: the urgency itself, but for held and expedited (RFC 30)."""
    return PRIORITY_MAX if urgency == URGENCY_EXPEDITE else urgency
