"""Which jobs a listing is to show: the constraint of `job-list.list` (RFC 31 syntax, flux-core's operators). Pure.

Operators: `states` (names or a mask), `results` (names or a mask), `userid`, `ids` (jobids), and `and`, `or`, `not`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias

from fluxres.base.jobid import parse_jobid
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job.result import JobResult, result
from fluxres.job.value import Job, JobState

MAX_DEPTH: Final = 8
ALL_STATES: Final = sum(JobState)
VIRTUAL: Final = {
    "pending": JobState.DEPEND | JobState.PRIORITY | JobState.SCHED,
    "running": JobState.RUN | JobState.CLEANUP,
    "active": ALL_STATES & ~JobState.INACTIVE,
}
Matcher: TypeAlias = Callable[[Job], bool]


def _any(_job: Job) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is selected: `matches` decides; `states` is a mask outside of which nothing can match."""

    states: int = ALL_STATES
    matches: Matcher = field(default=_any)


def parse_constraint(value: JsonObject) -> Selection:
    """Read a constraint. Raises ValueError naming the operator."""
    return _parse(value, 0)


def _parse(value: JsonValue, depth: int) -> Selection:
    if not isinstance(value, dict) or len(value) > 1 or depth > MAX_DEPTH:
        raise ValueError(f"cannot select jobs: expected an object with one operator, got {value!r:.80}")
    for operator, operands in value.items():
        if not isinstance(operands, list):
            raise ValueError(f"cannot select jobs: {operator} takes a list, got {operands!r:.80}")
        if operator in ("and", "or", "not"):
            return _combined(operator, [_parse(operand, depth + 1) for operand in operands])
        return _leaf(operator, operands)
    return Selection()


def _combined(operator: str, parts: list[Selection]) -> Selection:
    tests = [part.matches for part in parts]
    if operator == "or":
        states = 0
        for part in parts:
            states |= part.states
        return Selection(states=states, matches=lambda job: any(test(job) for test in tests))
    if operator == "and":
        states = ALL_STATES
        for part in parts:
            states &= part.states
        return Selection(states=states, matches=lambda job: all(test(job) for test in tests))
    return Selection(matches=lambda job: not any(test(job) for test in tests))


def _leaf(operator: str, operands: list[JsonValue]) -> Selection:
    match operator:
        case "states":
            states = _mask(operator, operands, JobState, VIRTUAL)
            return Selection(states=states, matches=lambda job: bool(job.state & states))
        case "results":
            results = _mask(operator, operands, JobResult, {})
            return Selection(states=JobState.INACTIVE, matches=lambda job: bool((result(job) or 0) & results))
        case "userid":
            users = {operand for operand in operands if isinstance(operand, int)}
            if len(users) < len(set(map(str, operands))):
                raise ValueError(f"cannot select jobs: userid takes numbers, got {operands!r:.80}")
            return Selection(matches=lambda job: job.userid in users)
        case "ids":
            ids = {operand if isinstance(operand, int) else parse_jobid(str(operand)) for operand in operands}
            return Selection(matches=lambda job: job.id in ids)
    raise ValueError(f"cannot select jobs: unknown operator {operator!r}")


def _mask(operator: str, operands: list[JsonValue], names: type[IntEnum], virtual: dict[str, int]) -> int:
    mask = 0
    for operand in operands:
        if isinstance(operand, int):
            mask |= operand
        elif isinstance(operand, str) and operand.lower() in virtual:
            mask |= virtual[operand.lower()]
        elif isinstance(operand, str) and operand.upper() in names.__members__:
            mask |= names[operand.upper()]
        else:
            raise ValueError(f"cannot select jobs: {operator} knows no {operand!r}")
    return mask
