"""What a life of rank 0 reads of those before in `resource.eventlog`: whom it may expect, and when they ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fluxres.base.eventlog import Event, decode
from fluxres.base.idset import IdSet

READ_BACK: Final = 1 << 20
"""Bytes at the end of the eventlog that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """`expected` are the ranks that were online when the last life ended, or that it awaited; `alive` is the time of
    its last event, 0.0 where there is none."""

    expected: IdSet
    alive: float


def recall(eventlog: bytes) -> Recalled:
    """Read the eventlog. Raises ValueError where it cannot be read."""
    start = eventlog.find(b"\n", len(eventlog) - READ_BACK) + 1 if len(eventlog) > READ_BACK else 0
    online: set[int] = set()
    awaited: set[int] = set()
    alive = 0.0
    for event in decode(eventlog[start:]):
        alive = event.timestamp
        ranks = set(_ranks(event, "idset"))
        match event.name:
            case "restart":
                awaited |= online
                online.clear()
            case "online":
                online |= ranks
                awaited -= ranks
            case "offline":
                online -= ranks
                if "reason" not in event.context:  # else it was shut down
                    awaited |= ranks
            case "recovery":
                awaited.difference_update(_ranks(event, "away"))
    return Recalled(expected=IdSet(online | awaited), alive=alive)


def _ranks(event: Event, key: str) -> IdSet:
    """The idset of an event; empty where it has none. Raises ValueError."""
    text = event.context.get(key, "")
    return IdSet.parse(text if isinstance(text, str) else "")
