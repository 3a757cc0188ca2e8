"""The tree of brokers with its health, put together from what the brokers say, and drawn (flux-overlay(1)). Pure.

Of a rank it is told, in this order of preference:

1. what it says of itself, where it was asked and has answered;
2. what its parent says of it, with the reason where it was asked and has not answered;
3. for ranks below one that says nothing: what was told of that one. They are *ghosts*: nobody has seen them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.errors import ProtocolError
from fluxres.base.fsd import format_fsd
from fluxres.cli.common import field, number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fluxres.base.errors import RpcError
    from fluxres.base.idset import IdSet
    from fluxres.base.json import JsonObject
    from fluxres.cli.ranks import Hosts
    from fluxres.overlay.topology import Topology
    from fluxres.wire.payload import WireMap

FULL: Final = "full"
LOST: Final = "lost"
OFFLINE: Final = "offline"
STATES: Final = (FULL, "partial", "degraded", LOST, OFFLINE)
GONE: Final = (LOST, OFFLINE)
"""States of a rank that cannot be asked: only its parent knows them."""

_TEE, _ELBOW, _PIPE, _BLANK = "├─ ", "└─ ", "│  ", "   "
_RESET: Final = "\x1b[0m"
_BOLD_BLUE: Final = "\x1b[01;34m"
_GHOST: Final = "\x1b[90m"
_COLORS: Final = {LOST: "\x1b[31m", OFFLINE: "\x1b[33m"}


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
    children: dict[int, tuple[str, float]] = {}
    for child in field(payload, "children", list):
        if not isinstance(child, dict):
            raise ProtocolError(f"cannot use the broker's answer: {child!r} is no child")
        children[field(child, "rank", int)] = (field(child, "status", str), number(child, "duration"))
    return Report(field(payload, "status", str), number(payload, "duration"), children, took)


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
        answer = answers.get(rank)
        if isinstance(answer, Report):
            seen[rank] = Seen(answer.status, answer.duration, took=answer.took)
            continue
        parent = topology.parent(rank)
        above = None if parent is None else answers.get(parent)
        if isinstance(above, Report) and rank in above.children:
            seen[rank] = _as_its_parent_says(answer, *above.children[rank])
        elif parent in seen:
            seen[rank] = Seen(seen[parent].status, ghost=True)
        else:
            raise ProtocolError(f"cannot tell the status of rank {rank}: nobody has told it")
    return seen


def _as_its_parent_says(answer: Failed | None, status: str, duration: float) -> Seen:
    """What is known of a rank that has not been asked, or has not answered."""
    if answer is None or status in GONE:
        return Seen(status, duration)
    if answer.unreachable:  # lost since its parent was asked
        return Seen(LOST, error=answer.why)
    return Seen(status, duration, error=answer.why)


def without_full(root: int, topology: Topology, seen: Mapping[int, Seen]) -> dict[int, Seen]:
    """Only the ranks that are not full, and those that lead to them."""
    keep: set[int] = set()
    for rank, what in seen.items():
        above: int | None = rank if what.status != FULL else None
        while above is not None and above not in keep:
            keep.add(above)
            above = None if above == root else topology.parent(above)
    return {rank: what for rank, what in seen.items() if rank in keep}


class Style(NamedTuple):
    """How to draw. `verbose`: 1 shows durations, 2 also round trip times."""

    hosts: Hosts
    verbose: int = 0
    pretty: bool = True
    color: bool = False
    highlight: IdSet | None = None


def draw(root: int, topology: Topology, seen: Mapping[int, Seen], style: Style) -> Iterator[str]:
    """The lines of the tree; ranks that are not in `seen` are left out."""
    marked = _ancestors(topology, style.highlight)
    todo = [(root, "", "")] if root in seen else []
    while todo:
        rank, connector, prefix = todo.pop()
        name = _highlighted(style.hosts.label(rank), style.color) if rank in marked else style.hosts.label(rank)
        yield f"{connector}{name}: {describe(seen[rank], style)}"
        children = [child for child in topology.children(rank) if child in seen]
        below = []
        for child in children:
            if style.pretty:
                last = child == children[-1]
                below.append((child, prefix + (_ELBOW if last else _TEE), prefix + (_BLANK if last else _PIPE)))
            else:
                below.append((child, "", ""))
        todo.extend(reversed(below))


def describe(what: Seen, style: Style) -> str:
    """A rank's status as people read it: `partial for 2.5m`."""
    color = _GHOST if what.ghost else _COLORS.get(what.status)
    text = f"{color}{what.status}{_RESET}" if style.color and color else what.status
    if style.verbose and what.duration is not None:
        text += f" for {format_fsd(max(0.0, what.duration))}"
    if what.error:
        text += f" ({what.error})"
    if style.verbose > 1 and what.took is not None:
        text += f" ({what.took * 1000:.3f} ms)"
    return text


def as_json(root: int, topology: Topology, seen: Mapping[int, Seen], hosts: Hosts) -> JsonObject:
    """The tree as nested objects: rank, hostname, status, duration, children; ghost and error where there is one."""
    made: dict[int, JsonObject] = {}
    for rank in reversed(list(seen)):  # children before their parents
        what = seen[rank]
        made[rank] = {
            "rank": rank,
            "hostname": hosts.names[rank] if hosts else None,
            "status": what.status,
            "duration": what.duration,
            **({"ghost": True} if what.ghost else {}),
            **({"error": what.error} if what.error else {}),
            "children": [made[child] for child in topology.children(rank) if child in made],
        }
    return made.get(root, {})


def _ancestors(topology: Topology, ranks: IdSet | None) -> set[int]:
    """These ranks, and all that are above one of them."""
    found: set[int] = set()
    for rank in ranks or ():
        above: int | None = rank
        while above is not None and above not in found:
            found.add(above)
            above = topology.parent(above)
    return found


def _highlighted(text: str, color: bool) -> str:
    return f"{_BOLD_BLUE}{text}{_RESET}" if color else f"<<{text}>>"
