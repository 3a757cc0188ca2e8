"""What each event changes in a job beside its state, and what its context must hold (RFC 21).

`CHANGES` maps an event's name to a function from the job before to the job after. Whether the event is
allowed at all is `fluxres.job.state`'s business. Raises EventError for a context that is not as required.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import f58
from fluxres.job.value import PRIORITY_MAX, URGENCY_EXPEDITE, URGENCY_HOLD, Job, JobException, JobFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxres.base.eventlog import Event
    from fluxres.base.json import JsonObject

EVENTLOG_VERSION: Final = 1
"""The only version of the eventlog format that there is (RFC 21)."""

_EMPTY: Final[JsonObject] = {}


class EventError(FluxresError):
    """An event that is legal here but whose context is not what RFC 21 requires."""


def integer(job: Job, event: Event, key: str, low: int, high: int) -> int:
    value = event.context.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(job, event, key, f"an integer from {low} to {high}")
    return value


def _string(job: Job, event: Event, key: str) -> str:
    value = event.context.get(key)
    if not isinstance(value, str):
        raise _bad(job, event, key, "a string")
    return value


def _bad(job: Job, event: Event, key: str, expected: str) -> EventError:
    value = event.context.get(key)
    return EventError(
        f"cannot apply {event.name} to job {f58(job.id)}: context key {key}: expected {expected}, got {value!r:.100}"
    )


def _submit(job: Job, event: Event) -> Job:
    if event.context.get("version", EVENTLOG_VERSION) != EVENTLOG_VERSION:
        raise _bad(job, event, "version", f"{EVENTLOG_VERSION}")
    return job._replace(
        t_submit=event.timestamp,
        userid=integer(job, event, "userid", 0, 2**32 - 1),
        urgency=integer(job, event, "urgency", URGENCY_HOLD, URGENCY_EXPEDITE),
        flags=integer(job, event, "flags", 0, 2**31 - 1),
    )


def _invalidate(job: Job, event: Event) -> Job:
    return job._replace(invalid=True)


def _dependency_add(job: Job, event: Event) -> Job:
    description = _string(job, event, "description")
    known = job.dependencies
    return job if description in known else job._replace(dependencies=(*known, description))


def _dependency_remove(job: Job, event: Event) -> Job:
    description = _string(job, event, "description")
    return job._replace(dependencies=tuple(d for d in job.dependencies if d != description))


def _priority(job: Job, event: Event) -> Job:
    return job._replace(priority=integer(job, event, "priority", 0, PRIORITY_MAX))


def _urgency(job: Job, event: Event) -> Job:
    return job._replace(urgency=integer(job, event, "urgency", URGENCY_HOLD, URGENCY_EXPEDITE))


def _jobspec_update(job: Job, event: Event) -> Job:
    return job._replace(updates={**(job.updates or _EMPTY), **event.context})


def _resource_update(job: Job, event: Event) -> Job:
    expiration = event.context.get("expiration")
    if isinstance(expiration, bool) or not isinstance(expiration, int | float) or expiration < 0:
        raise _bad(job, event, "expiration", "a number of seconds that is not negative")
    return job._replace(expiration=float(expiration))


def _flux_restart(job: Job, event: Event) -> Job:
    return job._replace(restarts=job.restarts + 1)


def _set_flags(job: Job, event: Event) -> Job:
    names = event.context.get("flags")
    flags = job.flags
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name.upper() not in JobFlag.__members__:
            raise _bad(job, event, "flags", "a list of debug, waitable, novalidate")
        flags |= JobFlag[name.upper()]
    return job._replace(flags=flags)


def _alloc(job: Job, event: Event) -> Job:
    given = event.context.get("annotations")
    annotations = {**(job.annotations or _EMPTY), **given} if isinstance(given, dict) else job.annotations
    return job._replace(allocated=True, annotations=annotations)


def _perilog_start(job: Job, event: Event) -> Job:
    return job._replace(perilogs=(*job.perilogs, _string(job, event, "description")))


def _perilog_finish(job: Job, event: Event) -> Job:
    description = _string(job, event, "description")
    if description not in job.perilogs:
        return job
    at = job.perilogs.index(description)
    return job._replace(perilogs=job.perilogs[:at] + job.perilogs[at + 1 :])


def _start(job: Job, event: Event) -> Job:
    return job._replace(started=True)


def _finish(job: Job, event: Event) -> Job:
    status = integer(job, event, "status", 0, 2**31 - 1)
    end_event = job.end_event or event
    return job._replace(status=status, success=status == 0 and not job.fatal, end_event=end_event)


def _release(job: Job, event: Event) -> Job:
    if event.context.get("final") is True:
        return job._replace(final_release=True)
    try:
        ranks = IdSet.parse(_string(job, event, "ranks"))
    except ValueError as error:
        raise _bad(job, event, "ranks", 'an idset, or "all" with the final release') from error
    return job._replace(released=ranks if job.released is None else job.released | ranks)


def _free(job: Job, event: Event) -> Job:
    return job._replace(allocated=False)


def _memo(job: Job, event: Event) -> Job:
    annotations = dict(job.annotations or _EMPTY)
    before = annotations.get("user")
    user: JsonObject = {**(before if isinstance(before, dict) else _EMPTY), **event.context}
    annotations["user"] = user = {key: value for key, value in user.items() if value is not None}
    if not user:
        del annotations["user"]
    return job._replace(annotations=annotations or None)


def _exception(job: Job, event: Event) -> Job:
    severity = integer(job, event, "severity", 0, 7)
    raised = JobException(severity, _string(job, event, "type"), _string(job, event, "note"))
    if job.exception is not None and job.exception.severity <= severity:
        return job
    end_event = event if severity == 0 and job.end_event is None else job.end_event
    return job._replace(exception=raised, end_event=end_event)


CHANGES: Final[Mapping[str, Callable[[Job, Event], Job]]] = {
    "submit": _submit,
    "invalidate": _invalidate,
    "dependency-add": _dependency_add,
    "dependency-remove": _dependency_remove,
    "priority": _priority,
    "urgency": _urgency,
    "jobspec-update": _jobspec_update,
    "resource-update": _resource_update,
    "flux-restart": _flux_restart,
    "set-flags": _set_flags,
    "alloc": _alloc,
    "prolog-start": _perilog_start,
    "prolog-finish": _perilog_finish,
    "epilog-start": _perilog_start,
    "epilog-finish": _perilog_finish,
    "start": _start,
    "finish": _finish,
    "release": _release,
    "free": _free,
    "memo": _memo,
    "exception": _exception,
}
