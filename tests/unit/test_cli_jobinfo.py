"""The fields of `fluxres jobs`, from job-list entries."""

from __future__ import annotations

import pytest

from fluxres.base.json import JsonObject
from fluxres.cli.format import FieldValue
from fluxres.cli.jobinfo import CANCELED_RETURNCODE, FIELDS, JobInfo, attrs_of, title
from fluxres.job.view import ATTRIBUTES

NOW = 1000.0
RUNNING: JsonObject = {
    "id": 1,
    "userid": 7,
    "state": 16,
    "name": "sleep",
    "ntasks": 4,
    "t_submit": 900.0,
    "t_run": 990.0,
    "expiration": 1100.0,
    "nodelist": "n[0-1]",
    "duration": 110.0,
}


def inactive(result: int, **more: object) -> JsonObject:
    entry: dict[str, object] = {"id": 1, "state": 64, "result": result, "t_run": 10.0, "t_cleanup": 12.5, **more}
    return entry  # type: ignore[return-value]


def info(entry: JsonObject) -> JobInfo:
    return JobInfo(entry, NOW, lambda userid: f"user{userid}")


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("id", "ƒ2"),
        ("id.f58", "ƒ2"),
        ("id.f58plain", "f2"),
        ("id.dec", 1),
        ("id.hex", "0x1"),
        ("id.dothex", "0000.0000.0000.0001"),
        ("id.kvs", "job.0000.0000.0000.0001"),
        ("username", "user7"),
        ("state", "RUN"),
        ("state_single", "R"),
        ("status", "RUN"),
        ("status_abbrev", "R"),
        ("result", ""),
        ("returncode", ""),
        ("runtime", 10.0),
        ("t_remaining", 100.0),
        ("contextual_info", "n[0-1]"),
        ("contextual_time", 10.0),
        ("inactive_reason", ""),
        ("exception.type", ""),
        ("t_cleanup", 0.0),
        ("queue", ""),
        ("annotations", ""),
        ("sched.reason_pending", ""),
    ],
)
def test_fields_of_a_running_job(field: str, expected: FieldValue) -> None:
    assert info(RUNNING)(field) == expected


@pytest.mark.parametrize(
    ("entry", "status", "returncode", "reason"),
    [
        (inactive(1, waitstatus=0), "CD", 0, "Exit 0"),
        (inactive(2, waitstatus=3 << 8), "F", 3, "Exit 3"),
        (inactive(2, waitstatus=127 << 8), "F", 127, "command not found"),
        (inactive(2, waitstatus=126 << 8), "F", 126, "Command invoked cannot execute"),
        (inactive(2, waitstatus=137 << 8), "F", 137, "Killed"),
        (inactive(2, waitstatus=9), "F", -9, "Killed"),
        (inactive(2, waitstatus=250 << 8), "F", 250, "Signaled 122"),
        (inactive(2), "F", 1, "Exit 1"),
        (
            inactive(2, exception_occurred=True, exception_severity=0, exception_type="alloc", exception_note="no"),
            "F",
            1,
            "Exception: type=alloc note=no",
        ),
        (
            inactive(2, waitstatus=256, exception_occurred=True, exception_severity=0, exception_type="exec"),
            "F",
            1,
            "Exit 1",
        ),
        (inactive(4), "CA", CANCELED_RETURNCODE, "Canceled"),
        (inactive(4, exception_type="cancel", exception_note="enough"), "CA", -128, "Canceled: enough"),
        (inactive(8, waitstatus=142 << 8), "TO", 142, "Timeout"),
    ],
)
def test_how_jobs_end(entry: JsonObject, status: str, returncode: int, reason: str) -> None:
    job = info(entry)
    assert (job("status_abbrev"), job("returncode"), job("inactive_reason")) == (status, returncode, reason)
    assert job("runtime") == 2.5
    assert job("state") == "INACTIVE"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"state": 4}, "priority-wait"),
        ({"state": 2, "dependencies": ["after:1", "x"]}, "depends:after:1,x"),
        ({"state": 8, "urgency": 0, "priority": 0}, "held"),
        ({"state": 8, "urgency": 16, "priority": 0}, "priority-hold"),
        ({"state": 8, "urgency": 16, "priority": 16}, ""),
        ({"state": 8, "annotations": {"sched": {"t_estimate": 1090.0}}}, "eta:1.5m"),
        ({"state": 8, "annotations": {"sched": {"t_estimate": 900.0}}}, "eta:now"),
    ],
)
def test_why_pending_jobs_wait(entry: JsonObject, expected: str) -> None:
    job = info({"id": 1, "duration": 60.0, **entry})
    assert job("contextual_info") == expected
    assert job("contextual_time") == 60.0
    assert job("runtime") == 0.0


def test_annotations_are_reached_by_their_path() -> None:
    job = info({"id": 1, "annotations": {"sched": {"queue": "q"}, "user": {"a": {"b": 2}}}})
    assert job("annotations.sched.queue") == job("sched.queue") == "q"
    assert job("user.a.b") == 2
    assert job("user.a") == '{"b": 2}'
    assert job("user.a.b.c") == ""
    with pytest.raises(KeyError):
        job("nosuch")


def test_titles_and_attributes() -> None:
    assert title("id.f58") == "JOBID"
    assert title("sched.reason_pending") == "REASON"
    assert title("annotations.sched.x") == "SCHED.X"
    assert title("user") == "USER"
    assert title("annotations") == "ANNOTATIONS"
    assert title("nosuch") is None
    assert attrs_of(["runtime", "name", "user.x"]) == ["annotations", "name", "t_cleanup", "t_run"]


def test_every_attribute_asked_for_is_one_that_job_list_has() -> None:
    assert set(attrs_of(FIELDS)) <= set(ATTRIBUTES)


def test_json_of_a_running_job() -> None:
    assert info(RUNNING).as_json() == {
        "jobid": "ƒ2",
        "id": 1,
        "userid": 7,
        "username": "user7",
        "state": "RUN",
        "status": "RUN",
        "name": "sleep",
        "ntasks": 4,
        "nodelist": "n[0-1]",
        "duration": 110.0,
        "expiration": 1100.0,
        "runtime": 10.0,
        "t_remaining": 100.0,
        "t_submit": 900.0,
        "t_run": 990.0,
        "dependencies": [],
        "annotations": {},
        "exception": {},
    }


def test_json_says_whether_there_was_an_exception_once_that_is_known() -> None:
    assert info(inactive(1, exception_occurred=False)).as_json()["exception"] == {"occurred": False}


def test_json_of_a_job_with_an_exception() -> None:
    job = info(inactive(4, exception_occurred=True, exception_severity=0, exception_type="cancel"))
    made = job.as_json()
    assert made["result"] == "CANCELED"
    assert made["returncode"] == CANCELED_RETURNCODE
    assert made["exception"] == {"occurred": True, "severity": 0, "type": "cancel", "note": ""}
