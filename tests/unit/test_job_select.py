"""The constraint of job-list.list, against an evaluator that is as plain as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.jobid import f58
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job.result import JobResult, result
from fluxres.job.select import ALL_STATES, MAX_DEPTH, parse_constraint
from fluxres.job.value import ACTIVE, Job, JobException, JobState

S = JobState
VIRTUAL = {"PENDING": S.DEPEND | S.PRIORITY | S.SCHED, "RUNNING": S.RUN | S.CLEANUP, "ACTIVE": int(ACTIVE)}
JOBS = st.builds(
    lambda jobid, state, userid, success, cause: Job(
        id=jobid,
        state=state,
        userid=userid,
        success=success,
        exception=None if cause is None else JobException(0, cause, ""),
    ),
    jobid=st.integers(1, 3),
    state=st.sampled_from(JobState),
    userid=st.integers(0, 2),
    success=st.booleans(),
    cause=st.sampled_from([None, "cancel", "timeout", "exec"]),
)
NAMES = st.sampled_from([*(state.name.lower() for state in JobState), "pending", "RUNNING", "active", "Sched"])
RESULTS = st.sampled_from(["completed", "FAILED", "canceled", "timeout", 1, 6, 15])
LEAVES: st.SearchStrategy[JsonObject] = st.one_of(
    st.just(dict[str, JsonValue]()),
    st.fixed_dictionaries({"states": st.lists(NAMES | st.integers(0, ALL_STATES), max_size=3)}),
    st.fixed_dictionaries({"results": st.lists(RESULTS, max_size=3)}),
    st.fixed_dictionaries({"userid": st.lists(st.integers(0, 2), max_size=3)}),
    st.fixed_dictionaries({"ids": st.lists(st.integers(1, 3) | st.integers(1, 3).map(f58), max_size=3)}),
)
CONSTRAINTS: st.SearchStrategy[JsonObject] = st.recursive(
    LEAVES,
    lambda inner: st.sampled_from(["and", "or", "not"]).flatmap(
        lambda operator: st.fixed_dictionaries({operator: st.lists(inner, max_size=3)})
    ),
    max_leaves=6,
)


def states_of(name: JsonValue) -> int:
    if isinstance(name, int):
        return name
    name = str(name).upper()
    return VIRTUAL[name] if name in VIRTUAL else JobState[name]


def naive(constraint: JsonValue, job: Job) -> bool:
    """What the constraint means, word for word (RFC 31)."""
    assert isinstance(constraint, dict)
    return all(_holds(operator, operands, job) for operator, operands in constraint.items())


def _holds(operator: str, operands: JsonValue, job: Job) -> bool:
    assert isinstance(operands, list)
    match operator:
        case "and":
            return all(naive(operand, job) for operand in operands)
        case "or":
            return any(naive(operand, job) for operand in operands)
        case "not":
            return not any(naive(operand, job) for operand in operands)
        case "states":
            return any(job.state & states_of(operand) for operand in operands)
        case "results":
            return any(_has_result(operand, job) for operand in operands)
        case "userid":
            return job.userid in operands
    assert operator == "ids"
    return job.id in operands or f58(job.id) in operands


def _has_result(operand: JsonValue, job: Job) -> bool:
    mask = operand if isinstance(operand, int) else JobResult[str(operand).upper()]
    return bool((result(job) or 0) & mask)


@given(CONSTRAINTS, JOBS)
def test_it_selects_what_it_says(constraint: JsonObject, job: Job) -> None:
    selection = parse_constraint(constraint)
    assert selection.matches(job) is naive(constraint, job)
    if selection.matches(job):
        assert job.state & selection.states, "the mask hides a job that matches"


def test_the_mask_spares_a_search_through_inactive_jobs() -> None:
    active: JsonObject = {"states": ["pending", "running"]}
    inactive: JsonObject = {"results": ["failed"]}
    assert parse_constraint({}).states == ALL_STATES == 127
    assert parse_constraint(active).states == 62
    assert parse_constraint({"and": [{"userid": [1]}, active]}).states == 62
    assert parse_constraint({"or": [{"states": ["run"]}, {"states": ["sched"]}]}).states == 24
    assert parse_constraint(inactive).states == S.INACTIVE
    assert parse_constraint({"and": [active, inactive]}).states == 0
    assert parse_constraint({"not": [active]}).states == ALL_STATES


def deep(levels: int) -> JsonObject:
    return {"not": [deep(levels - 1)]} if levels else {}


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        ({"color": ["red"]}, "unknown operator 'color'"),
        ({"states": ["flying"]}, "states knows no 'flying'"),
        ({"states": [None]}, "states knows no None"),
        ({"states": [1.5]}, "states knows no 1.5"),
        ({"results": ["pending"]}, "results knows no 'pending'"),
        ({"states": "run"}, "states takes a list, got 'run'"),
        ({"and": {}}, "and takes a list"),
        ({"and": [1]}, "expected an object with one operator, got 1"),
        ({"userid": [1], "states": []}, "expected an object with one operator"),
        ({"ids": ["no id"]}, "no id"),
        ({"ids": [None]}, "None"),
        (deep(MAX_DEPTH + 1), "expected an object"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(constraint: JsonObject, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_constraint(constraint)
    parse_constraint(deep(MAX_DEPTH))
