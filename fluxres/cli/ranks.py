"""What commands need to know of an instance's ranks: how many there are, their hosts, and the tree they form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import FluxresError, ProtocolError
from fluxres.base.fsd import format_fsd
from fluxres.base.idset import IdSet
from fluxres.cli.common import Explain, field, whole_number
from fluxres.wire.messages import NODEID_UPSTREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fluxres.base.errors import RpcError
    from fluxres.overlay.topology import Topology
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import Wire, WireMap

    Ask = Callable[[str, WireMap], WireMap]
    """Calls a topic with a payload."""

MAX_RANK: Final = NODEID_UPSTREAM - 1
"""Above it nodeids mean something else (RFC 3)."""


def rank_number(text: str) -> int:
    """An argparse type: a rank. Whether the instance has it, the broker knows."""
    number = whole_number(text)
    if number > MAX_RANK:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is no rank")
    return number


def get_attribute(ask: Ask, name: str) -> str:
    """The value of an attribute of the broker that `ask` asks. Raises FluxresError."""
    with Explain(f"get attribute {name}"):
        return field(ask("attr.get", {"name": name}), "value", str)


def get_size(ask: Ask) -> int:
    """How many ranks the instance has. Raises FluxresError."""
    return int(get_attribute(ask, "size"))


def check_rank(rank: int, size: int, what: str) -> None:
    """Raise FluxresError, `cannot WHAT: …`, for a rank that the instance does not have."""
    if rank >= size:
        raise FluxresError(f"cannot {what}: there is no rank {rank}, the instance has ranks 0 to {size - 1}")


def no_answer(timeout: float) -> str:
    """Why there is no reply, in words."""
    return f"no answer within {format_fsd(timeout)}"


def complaint(reply: Reply | None, timeout: float) -> str | None:
    """Why a reply is of no use, in words: it did not come in time, or is an error; else None."""
    if reply is None:
        return no_answer(timeout)
    error: RpcError | None = reply.error
    return None if error is None else error.text


# --- hosts


class Hosts:
    """The host of each rank; of none, where the instance does not name one a rank."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __bool__(self) -> bool:
        return bool(self.names)

    def label(self, rank: int) -> str:
        """`3 node3`, as far as is known."""
        return f"{rank} {self.names[rank]}" if self.names else str(rank)

    def ranks(self, hosts: str) -> IdSet:
        """The ranks on the hosts of a hostlist (RFC 29). Raises ValueError for one that is no rank's host."""
        from fluxres.base.hostlist import Hostlist

        found: set[int] = set()
        for host in Hostlist.parse(hosts):
            ranks = [rank for rank, name in enumerate(self.names) if name == host]
            if not ranks:
                raise ValueError(f"host {host!r} is that of no rank")
            found.update(ranks)
        return IdSet(found)


def get_hosts(ask: Ask, size: int) -> Hosts:
    """The hosts that the attribute `hostlist` names. Raises FluxresError."""
    from fluxres.base.hostlist import Hostlist

    try:
        names = tuple(Hostlist.parse(get_attribute(ask, "hostlist")))
    except ValueError as error:
        raise ProtocolError(f"cannot use the broker's answer: {error}") from error
    return Hosts(names if len(names) == size else ())


def parse_targets(text: str, hosts: Hosts, size: int) -> IdSet:
    """Ranks from an idset, or the names of their hosts. Raises ValueError."""
    if text[:1].isdigit() or text.startswith("["):
        ranks = IdSet.parse(text)
        if strangers := ranks - IdSet(range(size)):
            raise ValueError(f"there is no rank {strangers}, the instance has ranks 0 to {size - 1}")
        return ranks
    return hosts.ranks(text)


# --- the tree


def get_topology(ask: Ask, size: int) -> Topology:
    """The tree that the ranks form. Raises FluxresError."""
    from fluxres.overlay.topology import NO_PARENT, Topology, parse_topo

    try:
        shape = get_attribute(ask, "tbon.topo")
        if shape.startswith("kary:"):  # says it all, however deep the tree is
            return parse_topo(shape, size)
        parents = [NO_PARENT] * size
        with Explain("get the topology"):
            _take_parents(ask("overlay.topology", {"rank": 0}), parents)
        return Topology.custom(parents)
    except (ValueError, IndexError) as error:
        raise ProtocolError(f"cannot use the broker's answer: {error}") from error


def _take_parents(tree: WireMap, parents: list[int]) -> None:
    """Note the parent of each rank in the answer of `overlay.topology`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        for child in cast("Sequence[Wire]", field(node, "children", list)):
            if not isinstance(child, dict):
                raise ProtocolError(f"cannot use the broker's answer: {child!r} is no rank of the topology")
            parents[field(child, "rank", int)] = field(node, "rank", int)
            todo.append(child)
