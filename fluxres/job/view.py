"""A job as job-list shows it: a JSON object with flux-core's attribute names.

Pure. An attribute that has no value yet is left out, as flux-core leaves it out: `priority` before SCHED
was reached, `ranks` before RUN, `result` and the exception before INACTIVE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fluxres.job.result import result
from fluxres.job.value import JobState

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxres.base.json import JsonObject, JsonValue
    from fluxres.job.jobspec import Jobspec
    from fluxres.job.resources import ResourceSet
    from fluxres.job.value import Job

ALL_ATTRIBUTES: Final = "all"
"""The name that asks for every attribute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a listing needs of a jobspec, and of R once there is one. None where it is not known (yet)."""

    name: str
    duration: float
    cwd: str | None = None
    queue: str | None = None
    project: str | None = None
    bank: str | None = None
    ntasks: int | None = None
    ncores: int | None = None
    nnodes: int | None = None
    ranks: str | None = None
    nodelist: str | None = None
    expiration: float | None = None


def summarize(jobspec: Jobspec, r: ResourceSet | None = None) -> Summary:
    """The summary of a job: counts from R where there is one, else as far as the jobspec tells."""
    system = jobspec.system
    ntasks, ncores, nnodes = jobspec.ntasks, jobspec.ncores, jobspec.nnodes or None
    ranks = nodelist = expiration = None
    if r is not None:
        ntasks = sum(jobspec.tasks_per_target(r)) if ntasks is None else ntasks
        ncores, nnodes, expiration = r.ncores(), len(r.targets), r.expiration
        ranks = f"[{r.ranks()}]" if nnodes > 1 else str(r.ranks())
        nodelist = str(r.hosts())
    return Summary(
        name=jobspec.name,
        duration=system.duration,
        cwd=system.cwd,
        queue=system.queue,
        project=system.project,
        bank=system.bank,
        ntasks=ntasks,
        ncores=ncores,
        nnodes=nnodes,
        ranks=ranks,
        nodelist=nodelist,
        expiration=expiration,
    )


def entry(job: Job, summary: Summary, attrs: Iterable[str] = (ALL_ATTRIBUTES,)) -> JsonObject:
    """The job-list entry with these attributes, and always `id`; raises ValueError for an unknown one."""
    wanted: dict[str, None] = {}
    for attr in attrs:
        if attr != ALL_ATTRIBUTES and attr not in ATTRIBUTES and attr != "id":
            raise ValueError(f"cannot list jobs: {attr!r} is not a valid attribute")
        wanted.update(dict.fromkeys(ATTRIBUTES if attr == ALL_ATTRIBUTES else (attr,)))
    listed: JsonObject = {"id": job.id}
    for attr in wanted:
        value = job.id if attr == "id" else ATTRIBUTES[attr](job, summary)
        if value is not None:
            listed[attr] = value
    return listed


def _when_scheduled(job: Job, summary: Summary) -> JsonValue:
    return None if job.t_sched is None else job.priority


def _expiration(job: Job, summary: Summary) -> JsonValue:
    return summary.expiration if job.expiration is None else job.expiration


def _annotations(job: Job, summary: Summary) -> JsonValue:
    return None if job.annotations is None else dict(job.annotations)


def _dependencies(job: Job, summary: Summary) -> JsonValue:
    return list(job.dependencies) or None


def _success(job: Job, summary: Summary) -> JsonValue:
    return job.success if job.state is JobState.INACTIVE else None


def _exception_occurred(job: Job, summary: Summary) -> JsonValue:
    return job.exception is not None if job.state is JobState.INACTIVE else None


def _exception(field: str) -> Callable[[Job, Summary], JsonValue]:
    """A getter of one field of the exception that an inactive job is remembered for."""

    def get(job: Job, summary: Summary) -> JsonValue:
        if job.state is not JobState.INACTIVE or job.exception is None:
            return None
        raised: JsonObject = {
            "severity": job.exception.severity,
            "type": job.exception.type,
            "note": job.exception.note,
        }
        return raised[field]

    return get


ATTRIBUTES: Final[Mapping[str, Callable[[Job, Summary], JsonValue]]] = {
    "userid": lambda job, _: job.userid,
    "urgency": lambda job, _: job.urgency,
    "priority": _when_scheduled,
    "t_submit": lambda job, _: job.t_submit,
    "t_depend": lambda job, _: job.t_depend,
    "t_priority": lambda job, _: job.t_priority,
    "t_sched": lambda job, _: job.t_sched,
    "t_run": lambda job, _: job.t_run,
    "t_cleanup": lambda job, _: job.t_cleanup,
    "t_inactive": lambda job, _: job.t_inactive,
    "state": lambda job, _: job.state.value,
    "name": lambda _, summary: summary.name,
    "cwd": lambda _, summary: summary.cwd,
    "queue": lambda _, summary: summary.queue,
    "project": lambda _, summary: summary.project,
    "bank": lambda _, summary: summary.bank,
    "ntasks": lambda _, summary: summary.ntasks,
    "ncores": lambda _, summary: summary.ncores,
    "duration": lambda _, summary: summary.duration,
    "nnodes": lambda _, summary: summary.nnodes,
    "ranks": lambda _, summary: summary.ranks,
    "nodelist": lambda _, summary: summary.nodelist,
    "success": _success,
    "exception_occurred": _exception_occurred,
    "exception_severity": _exception("severity"),
    "exception_type": _exception("type"),
    "exception_note": _exception("note"),
    "result": lambda job, _: result(job),
    "expiration": _expiration,
    "annotations": _annotations,
    "dependencies": _dependencies,
    "waitstatus": lambda job, _: job.status,
}
"""The attributes that can be asked for, and how each is found; None means that it has no value yet."""
