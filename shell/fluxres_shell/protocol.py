"""The protocol on a shell's socket: frames of CBOR maps, each with a `type` (DESIGN §9). Pure.

| from   | type        | keys                                   | meaning |
|---|---|---|---|
| broker | `attach`    | nonce, from                            | first of all: send the records from `from` |
| broker | `ack`       | seq                                    | records up to `seq` are durable at rank 0 |
| broker | `kill`      | signum                                 | signal the tasks |
| broker | `stdin`     | task, offset, data, eof                | input for a task (global rank) or all (-1) |
| broker | `release`   |                                        | after the exit record is acked: end |
| broker | `barrier-done` | name, seq                           | every shell of the job has entered it |
| shell  | `attached`  | first, last, pid, stdin{offset, eof, window} | the records there are; they follow |
| shell  | `error`     | errnum, text                           | refused; the connection closes |
| shell  | `records`   | records [bytes, …]                     | encoded records in order (see `records`) |
| shell  | `stdin-ack` | offset                                 | input before `offset` is consumed |
| shell  | `barrier`   | name, seq                              | this shell waits until all have entered it |

`first` is the earliest record that still exists, `last + 1` where there is none; records start at the greater
of `first` and `from`. At most `WINDOW_BYTES` of records are sent ahead of the acks. Anything that is not in
the table is a ProtocolError, and ends that connection only.

A barrier is named by `name` and `seq`, and is completed once and for good. `barrier` comes after every record that
was appended before the shell entered it, and again after each attach for as long as the shell waits. A
`barrier-done` of one that the shell does not wait in (any more) is ignored: it may be sent too often, not too
seldom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from fluxres.base.errors import ProtocolError
from fluxres.wire.framing import frame
from fluxres.wire.payload import WireMap, pack, unpack_map

WINDOW_BYTES: Final = 512 * 1024
"""Unacknowledged bytes of records in flight."""
RECORDS_BYTES: Final = 128 * 1024
"""Bytes of records in one message; a message has one record at least."""
MAX_REQUEST: Final = 256 * 1024
"""Bytes of a frame that a shell takes."""
MAX_NONCE: Final = 256
MAX_SIGNAL: Final = 64
MAX_BARRIER_NAME: Final = 256
START_BARRIER: Final = "start"
"""The barrier (its seq is 0) that the shells of a job on several ranks enter before any of them starts a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Serve me the records from `from_seq`."""

    nonce: str
    from_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Records up to `seq` are durable."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Signal every task."""

    signum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stdin:
    """A piece of standard input."""

    task: int
    offset: int
    data: bytes
    eof: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Nothing more is wanted of this shell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierDone:
    """Every shell of the job has entered the barrier."""

    name: str
    seq: int


Request: TypeAlias = Attach | Ack | Kill | Stdin | Release | BarrierDone


def parse_request(body: bytes) -> Request:
    """Parse one frame from a broker. Raises ProtocolError."""
    match unpack_map(body):
        case {"type": "attach", "nonce": str(nonce), "from": int(seq)} if len(nonce) <= MAX_NONCE and seq > 0:
            return Attach(nonce=nonce, from_seq=seq)
        case {"type": "ack", "seq": int(seq)} if seq >= 0:
            return Ack(seq=seq)
        case {"type": "kill", "signum": int(signum)} if 0 < signum <= MAX_SIGNAL:
            return Kill(signum=signum)
        case {
            "type": "stdin",
            "task": int(task),
            "offset": int(offset),
            "data": bytes(data),
            "eof": bool(eof),
        } if task >= -1 and offset >= 0:
            return Stdin(task=task, offset=offset, data=data, eof=eof)
        case {"type": "release"}:
            return Release()
        case {"type": "barrier-done", "name": str(name), "seq": int(seq)} if len(name) <= MAX_BARRIER_NAME and seq >= 0:
            return BarrierDone(name=name, seq=seq)
        case message:
            raise ProtocolError(f"cannot understand a message of type {message.get('type')!r} with {sorted(message)}")


def attached(*, first: int, last: int, pid: int, stdin: WireMap) -> bytes:
    """The frame that accepts an attach."""
    return frame(pack({"type": "attached", "first": first, "last": last, "pid": pid, "stdin": stdin}))


def error(errnum: int, text: str) -> bytes:
    """The frame that refuses a connection."""
    return frame(pack({"type": "error", "errnum": errnum, "text": text}))


def records_frame(payloads: list[bytes]) -> bytes:
    """The frame that carries encoded records."""
    return frame(pack({"type": "records", "records": payloads}))


def stdin_ack(offset: int) -> bytes:
    """The frame that says that input before `offset` is consumed."""
    return frame(pack({"type": "stdin-ack", "offset": offset}))


def barrier(name: str, seq: int) -> bytes:
    """The frame that says that this shell waits in a barrier."""
    return frame(pack({"type": "barrier", "name": name, "seq": seq}))
