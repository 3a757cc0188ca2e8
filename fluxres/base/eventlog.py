"""Events and eventlogs: one JSON object a line, appended and never rewritten (RFC 18).

`encode` writes one event, `decode` reads a whole log. Reading is strict, because the eventlog is the only
truth about a job: a line that is not exactly one well-formed event, an unknown key, or a last line without
its newline (a torn append) refuses the whole log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    from fluxres.base.json import JsonValue

NO_CONTEXT: Final[Mapping[str, JsonValue]] = MappingProxyType({})
"""The context of an event that has none."""

_KEYS: Final = frozenset({"timestamp", "name", "context"})
_MAX_SHOWN: Final = 200


class Event(NamedTuple):
    """One entry of an eventlog.

    `timestamp` is in seconds since the Unix epoch and above zero; `name` says what happened; `context` holds
    the event's own data. A NamedTuple and not a frozen dataclass because a restart decodes the logs of all
    active jobs, and this is built in less than half the time.
    """

    timestamp: float
    name: str
    context: Mapping[str, JsonValue] = NO_CONTEXT


def encode(event: Event) -> str:
    """The event as one line, with its newline; an empty context is left out.

    Raises ValueError for a timestamp or name that RFC 18 does not allow, and for what JSON cannot carry.
    """
    try:
        timestamp, name, context = _checked(event.timestamp, event.name, dict(event.context))
        entry: dict[str, JsonValue] = {"timestamp": timestamp, "name": name}
        if context:
            entry["context"] = dict(context)
        return _ENCODER.encode(entry) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot encode event {event.name!r}: {error}") from error


def decode(log: str | bytes) -> list[Event]:
    """Read a whole eventlog, in order; an empty one has no events.

    Raises ValueError with the line that is wrong, and why.
    """
    lines = (log if isinstance(log, str) else _text(log)).split("\n")
    torn = lines.pop()
    if torn:
        raise _bad(repr(torn), "the last line does not end in a newline")
    return [_decode_line(line) for line in lines]


def _text(log: bytes) -> str:
    """The log as text; raises ValueError with the line that is not UTF-8, up to where it is not."""
    try:
        return log.decode()
    except UnicodeDecodeError as error:
        line = log[log.rfind(b"\n", 0, error.start) + 1 : error.end]
        raise _bad(repr(line), str(error)) from error


def _decode_line(line: str) -> Event:
    """Read one line, given without its newline."""
    try:
        # raw_decode, because decode spends as long again on looking for blanks, which are not allowed here
        entry, end = _DECODER.raw_decode(line)
        if end != len(line):
            raise ValueError("something follows the JSON object")
        if not isinstance(entry, dict):
            raise ValueError("it is not a JSON object")
        if not entry.keys() <= _KEYS:
            raise ValueError(f"unknown key {min(entry.keys() - _KEYS)!r}")
        return _checked(entry.get("timestamp"), entry.get("name"), entry.get("context", NO_CONTEXT))
    except json.JSONDecodeError as error:
        raise _bad(repr(line), f"it is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _bad(repr(line), str(error)) from error


def _checked(timestamp: object, name: object, context: object) -> Event:
    """The event of these parts; raises ValueError saying which of them RFC 18 does not allow."""
    if (
        not isinstance(timestamp, (float, int))
        or isinstance(timestamp, bool)
        or not 0 < timestamp <= sys.float_info.max  # false for NaN, and for integers that no float can hold
    ):
        raise ValueError(f"the timestamp must be a number above zero, not {timestamp!r}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name must be a string that is not empty, not {name!r}")
    if not isinstance(context, dict) and context is not NO_CONTEXT:
        raise ValueError(f"the context must be an object, not {context!r}")
    return Event(timestamp, name, context)


def _refuse_constant(constant: str) -> NoReturn:
    """NaN and infinities are Python's own additions to JSON."""
    raise ValueError(f"{constant} is not JSON")


def _bad(line: str, why: str) -> ValueError:
    """The error for a line, shown as its repr `line`."""
    shown = line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…"
    return ValueError(f"cannot decode event {shown}: {why}")


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
