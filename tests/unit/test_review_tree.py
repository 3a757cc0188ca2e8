"""Trees that are deeper than a person would draw: what is allowed works, what cannot work is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from rpckit import OWNER

from fluxres.broker.config import MAX_LEVEL, ConfigError, parse
from fluxres.overlay.hello import PROTOCOL, Hello
from fluxres.overlay.overlay import Overlay
from fluxres.overlay.service import OverlayService
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.topology import Topology
from fluxres.overlay.transport import Connection, Listener
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.wire.payload import WireMap, pack, unpack_map


class NoNetwork:
    """A transport that nobody uses."""

    async def connect(self, rank: int) -> Connection:
        raise AssertionError(rank)

    async def listen(self) -> Listener:
        raise AssertionError("nobody listens")


@asynccontextmanager
async def overlay_service(topology: Topology) -> AsyncIterator[Handle]:
    router = Router(rank=0, size=topology.size)
    hello = Hello(
        rank=0,
        uuid="u",
        protocol=PROTOCOL,
        software="1",
        instance="I",
        statedir="S",
        incarnation=1,
        boot_id="b",
        host="h",
        size=topology.size,
        topo=topology.digest,
        owner=0,
    )
    overlay = Overlay(
        hello=hello,
        topology=topology,
        transport=NoNetwork(),
        router=router,
        settings=TbonSettings(),
        random=Random(0),
        torpid=lambda rank, torpid: None,
        shut_down=lambda: None,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(OverlayService(overlay, router).service.run)
        yield Handle(router, "test", OWNER)
        nursery.cancel_scope.cancel()


def chain(tree: object) -> list[object]:
    """The ranks of a chain, from its top down."""
    found: list[object] = []
    while isinstance(tree, dict):
        found.append((tree["rank"], tree["size"]))
        tree = tree["children"][0] if tree["children"] else None
    return found


async def test_the_topology_of_a_chain_can_be_asked_for() -> None:
    size = MAX_LEVEL + 1
    async with overlay_service(Topology.custom(range(-1, size - 1))) as handle:
        answer: WireMap = await handle.call("overlay.topology")
    assert chain(unpack_map(pack(answer))) == [(rank, size - rank) for rank in range(size)]


@pytest.mark.parametrize(
    "tables",
    [
        {"bootstrap": {"size": MAX_LEVEL + 2, "fanout": 1}},
        {"bootstrap": {"size": MAX_LEVEL + 2}, "tbon": {"topo": "kary:1"}},
    ],
)
def test_a_tree_deeper_than_any_route_is_refused(tables: dict[str, dict[str, str | int]]) -> None:
    with pytest.raises(ConfigError, match=f"{MAX_LEVEL + 1} levels below rank 0, {MAX_LEVEL} are allowed"):
        parse({name: {**table} for name, table in tables.items()}, "f")
    assert parse({"bootstrap": {"size": MAX_LEVEL + 1, "fanout": 1}}, "f").topology().maxlevel == MAX_LEVEL
