"""Journal records: everything that a job shell has to say, as values and as bytes.

A record is the CBOR array `[seq, time, kind, fields…]`; the same bytes are stored in the journal, sent on the
socket and decoded by rank 0. `seq` counts from 1 without gaps, `time` is the shell's wall clock in seconds.

| kind    | fields              | meaning |
|---------|---------------------|---|
| `event` | name, context       | an entry for the execution eventlog (RFC 50), names `shell.*` |
| `data`  | stream, task, bytes | what a task wrote to `stdout` or `stderr`; `task` is its global rank |
| `eof`   | stream, task        | nothing more comes from that stream |
| `exit`  | status, info        | always last: the wait status of this shell's part of the job, and why |

Keys of an exit record's `info`, each there only where it applies: `exception` {type, severity, note} that
rank 0 is to raise; `timeout` true where the time limit ended the tasks; `leftover` a number of processes that
would not die; `memory_peak` (bytes) and `cpu_usec` of the job's cgroup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from fluxres.base.errors import ProtocolError
from fluxres.wire.payload import Wire, WireMap, pack, unpack

EVENT: Final = "event"
DATA: Final = "data"
EOF: Final = "eof"
EXIT: Final = "exit"

STDOUT: Final = "stdout"
STDERR: Final = "stderr"
STREAMS: Final = (STDOUT, STDERR)

MAX_RECORD: Final = 1024 * 1024
"""Bytes of one encoded record. Larger ones are never written and, when read, are taken for corruption."""

MAX_STATUS: Final = 2**31 - 1
"""The highest wait status that RFC 21's `finish` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """An entry of the execution eventlog."""

    seq: int
    time: float
    name: str
    context: WireMap


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """Bytes that a task wrote."""

    seq: int
    time: float
    stream: str
    task: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EofRecord:
    """The end of a task's stream."""

    seq: int
    time: float
    stream: str
    task: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """The last word of a shell; `status` is a wait status as RFC 21's `finish` has it."""

    seq: int
    time: float
    status: int
    info: WireMap


Record: TypeAlias = EventRecord | DataRecord | EofRecord | ExitRecord


def encode(seq: int, time: float, kind: str, *fields: Wire) -> bytes:
    """Encode a record. Raises ProtocolError where it is longer than `MAX_RECORD`."""
    payload = pack([seq, time, kind, *fields])
    if len(payload) > MAX_RECORD:
        raise ProtocolError(f"cannot write a {kind} record of {len(payload)} bytes: the bound is {MAX_RECORD}")
    return payload


def decode(payload: bytes) -> Record:
    """Decode a record, strictly. Raises ProtocolError where `payload` is not one."""
    match unpack(payload):
        case [int(seq), int() | float() as time, str(kind), *fields] if seq > 0:
            record = _decode_fields(seq, float(time), kind, fields)
            if record is not None:
                return record
    raise ProtocolError(f"cannot decode a journal record of {len(payload)} bytes: not a known kind with its fields")


def _decode_fields(seq: int, time: float, kind: str, fields: list[Wire]) -> Record | None:
    match kind, fields:
        case "event", [str(name), dict(context)]:
            return EventRecord(seq=seq, time=time, name=name, context=context)
        case "data", [str(stream), int(task), bytes(data)] if stream in STREAMS:
            return DataRecord(seq=seq, time=time, stream=stream, task=task, data=data)
        case "eof", [str(stream), int(task)] if stream in STREAMS:
            return EofRecord(seq=seq, time=time, stream=stream, task=task)
        case "exit", [int(status), dict(info)] if 0 <= status <= MAX_STATUS and not isinstance(status, bool):
            return ExitRecord(seq=seq, time=time, status=status, info=info)
    return None
