"""Job-list entries: flux-core's attribute names, and none that has no value yet."""

from __future__ import annotations

from typing import TypeAlias

import pytest

from fluxres.base.eventlog import Event
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job.jobspec import parse_jobspec
from fluxres.job.resources import ResourceSet, Target
from fluxres.job.state import fold
from fluxres.job.value import Job
from fluxres.job.view import ATTRIBUTES, entry, summarize

JOBSPEC: JsonObject = {
    "version": 1,
    "resources": [
        {
            "type": "slot",
            "count": 3,
            "label": "task",
            "with": [{"type": "core", "count": 2}],
        }
    ],
    "tasks": [{"command": ["/bin/hostname"], "slot": "task", "count": {"per_slot": 1}}],
    "attributes": {"system": {"duration": 60, "cwd": "/tmp", "queue": "batch"}},
}
R = ResourceSet(
    targets=(
        Target(rank=1, host="n1", cores=IdSet(range(4))),
        Target(rank=2, host="n2", cores=IdSet(range(2))),
    ),
    nslots=3,
    expiration=500.0,
)
Steps: TypeAlias = "tuple[tuple[str, dict[str, JsonValue]], ...]"

PENDING: Steps = (
    ("submit", {"userid": 7, "urgency": 16, "flags": 0, "version": 1}),
    ("dependency-add", {"description": "after=ƒ1"}),
    ("validate", {}),
)
SCHEDULED: Steps = (
    *PENDING,
    ("dependency-remove", {"description": "after=ƒ1"}),
    ("depend", {}),
    ("priority", {"priority": 16}),
)
FATAL: tuple[str, dict[str, JsonValue]] = ("exception", {"type": "cancel", "severity": 0, "note": "why not"})
ENDED: Steps = (
    *SCHEDULED,
    ("memo", {"a": 1}),
    ("alloc", {}),
    ("start", {}),
    FATAL,
    ("finish", {"status": 15}),
    ("release", {"ranks": "all", "final": True}),
    ("free", {}),
    ("clean", {}),
)


def job_after(steps: Steps) -> Job:
    return fold(42, (Event(float(at), name, context) for at, (name, context) in enumerate(steps, 1)))


def test_a_pending_job() -> None:
    assert entry(job_after(PENDING), summarize(parse_jobspec(JOBSPEC))) == {
        "id": 42,
        "userid": 7,
        "urgency": 16,
        "t_submit": 1.0,
        "t_depend": 3.0,
        "state": 2,
        "name": "hostname",
        "cwd": "/tmp",
        "queue": "batch",
        "ntasks": 3,
        "ncores": 6,
        "duration": 60.0,
        "dependencies": ["after=ƒ1"],
    }


def test_a_job_that_was_canceled_while_it_ran() -> None:
    assert entry(job_after(ENDED), summarize(parse_jobspec(JOBSPEC), R)) == {
        "id": 42,
        "userid": 7,
        "urgency": 16,
        "priority": 16,
        "t_submit": 1.0,
        "t_depend": 3.0,
        "t_priority": 5.0,
        "t_sched": 6.0,
        "t_run": 8.0,
        "t_cleanup": 10.0,
        "t_inactive": 14.0,
        "state": 64,
        "name": "hostname",
        "cwd": "/tmp",
        "queue": "batch",
        "ntasks": 3,
        "ncores": 6,
        "duration": 60.0,
        "nnodes": 2,
        "ranks": "[1-2]",
        "nodelist": "n[1-2]",
        "success": False,
        "exception_occurred": True,
        "exception_severity": 0,
        "exception_type": "cancel",
        "exception_note": "why not",
        "result": 4,
        "expiration": 500.0,
        "annotations": {"user": {"a": 1}},
        "waitstatus": 15,
    }


def test_the_exception_is_shown_when_the_job_is_inactive() -> None:
    summary = summarize(parse_jobspec(JOBSPEC))
    canceled: Steps = (*SCHEDULED, FATAL)
    assert not {"exception_occurred", "exception_type", "result"} & entry(job_after(canceled), summary).keys()
    shown = entry(job_after((*canceled, ("clean", {}))), summary, ["exception_type", "result", "waitstatus"])
    assert shown == {"id": 42, "exception_type": "cancel", "result": 4}


def test_chosen_attributes() -> None:
    job, summary = job_after(PENDING), summarize(parse_jobspec(JOBSPEC))
    assert entry(job, summary, []) == {"id": 42}
    assert entry(job, summary, ["id", "state", "ranks"]) == {"id": 42, "state": 2}
    with pytest.raises(ValueError, match="'colour' is not a valid attribute"):
        entry(job, summary, ["state", "colour"])


def test_an_update_of_the_expiration_is_shown() -> None:
    running: Steps = (*SCHEDULED, ("alloc", {}), ("resource-update", {"expiration": 900}))
    summary = summarize(parse_jobspec(JOBSPEC), R)
    assert entry(job_after(running), summary, ["expiration"]) == {"id": 42, "expiration": 900.0}


def test_a_running_job_does_not_say_yet_whether_there_was_an_exception() -> None:
    mild: tuple[str, dict[str, JsonValue]] = ("exception", {"type": "x", "severity": 3, "note": ""})
    running = entry(job_after((*SCHEDULED, ("alloc", {}), ("start", {}), mild)), summarize(parse_jobspec(JOBSPEC), R))
    assert not any(name.startswith("exception") for name in running)


def test_one_rank_is_shown_without_brackets() -> None:
    one = R.only(IdSet([1]))
    assert summarize(parse_jobspec(JOBSPEC), one).ranks == "1"


def test_counts_that_only_r_tells() -> None:
    exclusive: JsonObject = {
        **JOBSPEC,
        "resources": [{"type": "node", "count": 2, "exclusive": True, "with": JOBSPEC["resources"]}],
        "attributes": {"system": {"duration": 0, "shell": {"options": {"per-resource": {"type": "core", "count": 2}}}}},
    }
    jobspec = parse_jobspec(exclusive)
    before, after = summarize(jobspec), summarize(jobspec, R)
    assert (before.nnodes, before.ncores, before.ntasks) == (2, None, None)
    assert (after.nnodes, after.ncores, after.ntasks) == (2, 6, 12)


def test_every_attribute_of_flux_is_known() -> None:
    known = """
    userid urgency priority t_submit t_depend t_priority t_sched t_run t_cleanup t_inactive state name cwd
    queue project bank ntasks ncores duration nnodes ranks nodelist success exception_occurred exception_type
    exception_severity exception_note result expiration annotations waitstatus dependencies
    """
    assert ATTRIBUTES.keys() == set(known.split())
