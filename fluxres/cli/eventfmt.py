"""Events as flux-job(1) eventlog prints them: `timestamp name key=value …`. Pure.

Time formats: raw (seconds since the epoch), offset (seconds since the first event), iso (local date and
time), human (the minute where it changes, else seconds since that event).
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fluxres.base.eventlog import Event
    from fluxres.base.json import JsonValue

TIME_FORMATS: Final = ("raw", "offset", "iso", "human")


class EventFormat:
    """Formats the events of one eventlog, in order."""

    def __init__(self, time_format: str = "raw", *, as_json: bool = False) -> None:
        self._time_format = time_format
        self._as_json = as_json
        self._first: float | None = None
        self._minute: tuple[int, ...] = ()
        self._base = 0.0

    def skip(self, event: Event) -> None:
        """Take notice of an event that is not shown: offsets count from the first of all."""
        if self._first is None:
            self._first = event.timestamp

    def line(self, event: Event) -> str:
        """The event as one line, without its newline."""
        self.skip(event)
        if self._as_json:
            entry: dict[str, JsonValue] = {"timestamp": event.timestamp, "name": event.name}
            if event.context:
                entry["context"] = dict(event.context)
            return _compact(entry)
        context = "".join(f" {key}={_compact(value)}" for key, value in event.context.items())
        return f"{self._time(event.timestamp)} {event.name}{context}"

    def _time(self, timestamp: float) -> str:
        if self._time_format == "offset":
            return f"{timestamp - (self._first or 0.0):.6f}"
        if self._time_format == "iso":
            return _iso(timestamp)
        if self._time_format == "human":
            return self._human(timestamp)
        return f"{timestamp:.6f}"

    def _human(self, timestamp: float) -> str:
        local = time.localtime(timestamp)
        if local[:5] == self._minute:
            return f"[{timestamp - self._base:+11.6f}]"
        self._minute, self._base = local[:5], timestamp
        return f"[{time.strftime('%b%d %H:%M', local)}]"


def _iso(timestamp: float) -> str:
    seconds, micros = divmod(round(timestamp * 1_000_000), 1_000_000)
    local = time.localtime(seconds)
    zone = time.strftime("%z", local)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{micros:06d}{zone[:3]}:{zone[3:]}"


def _compact(value: JsonValue) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
