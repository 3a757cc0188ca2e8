"""What brokers report of the overlay's health, put together to what is known of each rank. Pure.

Of a rank it is told, in this order of preference:

1. what it says of itself, where it was asked and has answered (`overlay.health`, `overlay.monitor`);
2. what its parent says of it, with the reason where it was asked and has not answered;
3. for ranks below one that says nothing: what was told of that one. They are *ghosts*: nobody has seen them.

Source: flux-overlay(1).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxres.base.errors import RpcError
    from fluxres.overlay.topology import Topology
    from fluxres.wire.payload import Wire, WireMap

FULL: Final = "full"
LOST: Final = "lost"
OFFLINE: Final = "offline"
STATES: Final = (FULL, "partial", "degraded", LOST, OFFLINE)
GONE: Final = (LOST, OFFLINE)
"""States of a rank that cannot be asked: only its parent knows them."""


class Report(NamedTuple):
    """What a rank answered to `overlay.health`; `children` are status and duration by rank. `took` is in seconds."""

    status: str
    duration: float
    children: Mapping[int, tuple[str, float]]
    took: float = 0.0


class Failed(NamedTuple):
    """A rank was asked and has not answered; `unreachable`: because it is lost."""

    why: str
    unreachable: bool = False


class Seen(NamedTuple):
    """What is known of one rank."""

    status: str
    duration: float | None = None
    ghost: bool = False
    error: str = ""
    took: float | None = None


def parse_report(payload: WireMap, took: float = 0.0) -> Report:
    """An answer of `overlay.health`, or a response of `overlay.monitor`. Raises ProtocolError."""
    listed = payload.get("children")
    if not isinstance(listed, list):
        raise _unusable("children", listed)
    children: dict[int, tuple[str, float]] = {}
    for child in listed:
        if not isinstance(child, dict):
            raise ProtocolError(f"cannot use the broker's answer: {child!r} is no child")
        rank = child.get("rank")
        if not isinstance(rank, int):
            raise _unusable("rank", rank)
        children[rank] = _health(child)
    return Report(*_health(payload), children, took)


def _health(payload: Mapping[str, Wire]) -> tuple[str, float]:
    """The status and the duration that a report has of a rank."""
    status, duration = payload.get("status"), payload.get("duration")
    if not isinstance(status, str):
        raise _unusable("status", status)
    if not isinstance(duration, int | float):
        raise _unusable("duration", duration)
    return status, float(duration)


def _unusable(key: str, value: object) -> ProtocolError:
    return ProtocolError(f"cannot use the broker's answer: its {key} is {value!r}")


def failed(error: RpcError) -> Failed:
    """The error that a rank's health was answered with."""
    return Failed(error.text, error.errnum == errno.EHOSTUNREACH)


def worth_asking(report: Report, topology: Topology, *, leaves: bool) -> list[int]:
    """The children of a rank to ask as well: those that are there, leaves only on demand."""
    return [
        rank
        for rank, (status, _) in report.children.items()
        if status not in GONE and rank < topology.size and (leaves or topology.children(rank))
    ]


def assemble(root: int, topology: Topology, answers: Mapping[int, Report | Failed]) -> dict[int, Seen]:
    """What is known of each rank below `root`, itself included; `root` must have answered, or its parent."""
    seen: dict[int, Seen] = {}
    for rank in topology.subtree(root):
        seen[rank] = look(rank, topology, answers, seen)
    return seen


def look(rank: int, topology: Topology, answers: Mapping[int, Report | Failed], seen: Mapping[int, Seen]) -> Seen:
    """What is known of one rank; its parent must have answered, or be in `seen`. Raises ProtocolError."""
    answer = answers.get(rank)
    if isinstance(answer, Report):
        return Seen(answer.status, answer.duration, took=answer.took)
    parent = topology.parent(rank)
    above = None if parent is None else answers.get(parent)
    if isinstance(above, Report) and rank in above.children:
        return _as_its_parent_says(answer, *above.children[rank])
    if parent is not None and parent in seen:
        return Seen(seen[parent].status, ghost=True)
    raise ProtocolError(f"cannot tell the status of rank {rank}: nobody has told it")


def _as_its_parent_says(answer: Failed | None, status: str, duration: float) -> Seen:
    """What is known of a rank that has not been asked, or has not answered."""
    if answer is None or status in GONE:
        return Seen(status, duration)
    if answer.unreachable:  # lost since its parent was asked
        return Seen(LOST, error=answer.why)
    return Seen(status, duration, error=answer.why)
