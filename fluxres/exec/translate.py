"""From a shell's journal records to what the guest namespace holds: RFC 50 events and RFC 24 output. Pure.

A batch of records becomes at most one append to `exec.eventlog` and one to `output`, so that it is committed, with the
cursor, in one transaction. Output that is valid UTF-8 is stored as text, anything else as base64: per chunk, so that
every byte can be told again (I3). Of the ranks of a job only the leader, the first, tells of the shells' beginning.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, cast

from fluxres.base.errors import ProtocolError
from fluxres.base.eventlog import Event, encode
from fluxres.base.json import JsonObject
from fluxres.exec.progress import Problem, Progress
from fluxres_shell import records

OUTPUT_KEY: Final = "output"
EXEC_EVENTLOG_KEY: Final = "exec.eventlog"
TIMEOUT_EVENT: Final = "shell.timeout"
LEADER_EVENTS: Final = frozenset({"shell.init", "shell.start"})
"""Events that are the same on every rank of a job, and are logged for the leader only."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """What a run of records says. `last` is the sequence number of its last record, 0 when it has none."""

    last: int = 0
    timed_out: bool = False
    exit: records.ExitRecord | None = None
    events: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)


def translate(payloads: Iterable[bytes], *, cursor: int, leader: bool) -> Batch:
    """Read encoded records and drop those at or below `cursor`: they are committed already.

    `leader` says that they are of the job's first rank.

    Raises ProtocolError for a record that cannot be decoded, that leaves a gap, or that follows the exit record.
    """
    batch = Batch(last=cursor)
    for payload in payloads:
        record = records.decode(payload)
        if record.seq <= batch.last:
            continue
        if record.seq != batch.last + 1 or batch.exit is not None:
            raise ProtocolError(
                f"cannot take journal record {record.seq}: {batch.last + 1} was to come"
                + (", nothing after the exit record" if batch.exit else "")
            )
        batch.last = record.seq
        try:
            _take(batch, record, leader=leader)
        except ValueError as error:
            raise ProtocolError(f"cannot take journal record {record.seq}: {error}") from error
    return batch


def _take(batch: Batch, record: records.Record, *, leader: bool) -> None:
    match record:
        case records.EventRecord():
            batch.timed_out = batch.timed_out or record.name == TIMEOUT_EVENT
            if leader or record.name not in LEADER_EVENTS:
                batch.events.append(encode(Event(record.time, record.name, cast("JsonObject", record.context))))
        case records.DataRecord():
            batch.output.append(_data_line(record))
        case records.EofRecord():
            context: JsonObject = {"stream": record.stream, "rank": str(record.task), "eof": True}
            batch.output.append(encode(Event(record.time, "data", context)))
        case records.ExitRecord():
            batch.exit = record


def _data_line(record: records.DataRecord) -> str:
    context: JsonObject = {"stream": record.stream, "rank": str(record.task)}
    try:
        context["data"] = record.data.decode()
    except UnicodeDecodeError:
        context["data"] = base64.b64encode(record.data).decode()
        context["encoding"] = "base64"
    return encode(Event(record.time, "data", context))


def problems_of(batch: Batch, progress: Progress) -> tuple[Problem, ...]:
    """The exceptions that the job gets for what `batch` says, beside those that `progress` has."""
    problems = []
    if batch.timed_out:
        problems.append(Problem(type="timeout", severity=0, note="resource allocation expired"))
    if batch.exit is not None:
        match batch.exit.info.get("exception"):
            case {"type": str(kind), "severity": int(severity), "note": str(note)}:
                problems.append(Problem(type=kind, severity=min(max(int(severity), 0), 7), note=note))
    new = dict.fromkeys(problems)  # the time limit is told when it fires, and again at the end
    return tuple(problem for problem in new if problem not in progress.problems)


def output_header(*, time: float, tasks: int) -> str:
    """The first entry of a job's output (RFC 24)."""
    context: JsonObject = {
        "version": 1,
        "encoding": {"stdout": "UTF-8", "stderr": "UTF-8"},
        "count": {"stdout": tasks, "stderr": tasks},
        "options": {},
    }
    return encode(Event(time, "header", context))
