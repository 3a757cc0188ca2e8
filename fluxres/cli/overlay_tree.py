"""The tree of brokers with its health (`overlay.report`), drawn (flux-overlay(1)). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.fsd import format_fsd
from fluxres.overlay.report import FULL, LOST, OFFLINE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fluxres.base.idset import IdSet
    from fluxres.base.json import JsonObject
    from fluxres.cli.ranks import Hosts
    from fluxres.overlay.report import Seen
    from fluxres.overlay.topology import Topology

_TEE, _ELBOW, _PIPE, _BLANK = "├─ ", "└─ ", "│  ", "   "
_RESET: Final = "\x1b[0m"
_BOLD_BLUE: Final = "\x1b[01;34m"
_GHOST: Final = "\x1b[90m"
_COLORS: Final = {LOST: "\x1b[31m", OFFLINE: "\x1b[33m"}


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
