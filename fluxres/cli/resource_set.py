"""Resource sets (RFC 20, R version 1) as far as commands count and name what is in them. Pure.

`fluxres.job.resources` is the broker's: strict, and slow to import. This reads what a broker has answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.errors import ProtocolError
from fluxres.base.hostlist import Hostlist
from fluxres.base.idset import IdSet
from fluxres.cli.common import field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxres.wire.payload import WireMap


class Node(NamedTuple):
    """What a resource set has of one node."""

    host: str
    cores: IdSet
    gpus: IdSet


class Resources:
    """Some resources, by rank."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        """Take the nodes as they are."""
        self._nodes = dict(sorted(nodes.items()))

    @property
    def ranks(self) -> IdSet:
        """The ranks of its nodes."""
        return IdSet(self._nodes)

    @property
    def hosts(self) -> Hostlist:
        """The hosts of its nodes, by rank."""
        return Hostlist(node.host for node in self._nodes.values())

    @property
    def ncores(self) -> int:
        """How many cores it has."""
        return sum(len(node.cores) for node in self._nodes.values())

    @property
    def ngpus(self) -> int:
        """How many GPUs it has."""
        return sum(len(node.gpus) for node in self._nodes.values())

    def only(self, ranks: IdSet) -> Resources:
        """The part of it on `ranks`."""
        return Resources({rank: node for rank, node in self._nodes.items() if rank in ranks})

    def __sub__(self, other: Resources) -> Resources:
        """What is not in `other`; nodes of which nothing is left are left out."""
        left = {}
        for rank, node in self._nodes.items():
            taken = other._nodes.get(rank)
            if taken is not None:
                node = Node(node.host, node.cores - taken.cores, node.gpus - taken.gpus)
            if node.cores or node.gpus:
                left[rank] = node
        return Resources(left)


EMPTY: Final = Resources({})


def parse_resources(value: WireMap) -> Resources:
    """Read an R. Raises ProtocolError where it is none."""
    execution = field(value, "execution", dict)
    entries: dict[int, tuple[IdSet, IdSet]] = {}
    try:
        for entry in field(execution, "R_lite", list):
            children = field(entry, "children", dict)
            cores, gpus = (IdSet.parse(str(children.get(kind, ""))) for kind in ("core", "gpu"))
            entries.update(dict.fromkeys(IdSet.parse(field(entry, "rank", str)), (cores, gpus)))
        hosts = [host for text in field(execution, "nodelist", list) for host in Hostlist.parse(text)]
        pairs = zip(sorted(entries.items()), hosts, strict=True)
        return Resources({rank: Node(host, *having) for (rank, having), host in pairs})
    except (ValueError, TypeError, AttributeError) as error:
        raise ProtocolError(f"cannot use the broker's answer: its resources are malformed: {error}") from error
