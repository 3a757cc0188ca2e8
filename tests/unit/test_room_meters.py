"""What rooms measure of themselves for `/metrics`: commits, stalls, requests, trackers, torpid peers, traffic."""

from __future__ import annotations

import errno
from pathlib import Path

import trio
import trio.testing
from kvskit import Results, running_kvs
from rpckit import OWNER, Peer, settled

from fluxres.broker.health import TICK, StallMeter
from fluxres.kvs.ops import PRIMARY, Append, Put, Require
from fluxres.overlay.liveness import Liveness
from fluxres.overlay.traffic import Traffic
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.rpc.tracker import Tracker
from fluxres.testing.simulate import simulated
from fluxres.wire.messages import NODEID_ANY, request, response_to
from fluxres.wire.payload import WireMap, pack


async def test_commits(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        results = Results(kvs)
        before = kvs.meters.commits.count, kvs.meters.transactions.count
        for index in range(20):
            results.submit(f"n{index}", Append(PRIMARY, "a", b"x" * 1000))
        results.submit("guard", Put(PRIMARY, "b", b"1"), Require(PRIMARY, "a"))
        assert (kvs.queued_commits, kvs.held_commits) == (21, 0)
        await results.wait("n19", "guard")
        assert results.errnum("guard") == errno.EEXIST
        assert kvs.meters.commits.count - before[0] == 20
        assert 1 <= kvs.meters.transactions.count - before[1] <= 21
        assert kvs.meters.failed == 1
        assert kvs.meters.commits.sum > 0
        assert (kvs.queued_commits, kvs.queued_bytes) == (0, 0)
        assert kvs.size().used >= 20_000
        assert kvs.size().log > 0


async def test_a_commit_that_is_refused_at_once(tmp_path: Path) -> None:
    async with running_kvs(tmp_path / "kvs") as kvs:
        pass
    results = Results(kvs)
    results.submit("late", Put(PRIMARY, "a", b"1"))
    await results.wait("late")
    assert (results.errnum("late"), kvs.meters.failed) == (errno.ECANCELED, 1)


@simulated
async def test_stalls() -> None:
    meter = StallMeter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meter.run)
        await trio.sleep(10.25 * TICK)
        nursery.cancel_scope.cancel()
    assert meter.late.cumulative()[0] == meter.late.count == 10


async def test_requests_of_a_service() -> None:
    router = Router(rank=0, size=1)
    service, handle = Service("calc", router), Handle(router, "broker", OWNER)
    go = trio.Event()

    async def slow(_request: Request) -> WireMap:
        await go.wait()
        return {}

    service.task("slow", slow)
    client = Peer(router, "client")
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        nursery.start_soon(handle.call, "calc.slow")
        router.receive(client, request("calc.ping", pack({}), matchtag=1, nodeid=NODEID_ANY))
        router.receive(client, request("calc.slow", pack({}), matchtag=2, nodeid=NODEID_ANY))
        await settled()
        assert (service.taken, service.under_way, service.queue()[0], handle.under_way) == (3, 2, 2, 1)
        go.set()
        await settled()
        assert (service.taken, service.under_way, service.queue()[0], handle.under_way) == (3, 0, 0, 0)
        nursery.cancel_scope.cancel()


def test_requests_over_a_hop() -> None:
    tracker = Tracker()
    asked = [request("kvs.get", None, matchtag=tag)._replace(route=("c",)) for tag in range(1, 4)]
    for hop, message in zip(("parent", "child", "child"), asked, strict=True):
        tracker.sent(hop, message)
    assert [tracker.over(hop) for hop in ("parent", "child", "other")] == [1, 2, 0]
    tracker.answered("child", response_to(asked[1]))
    tracker.lost("parent", "gone")
    assert [tracker.over(hop) for hop in ("parent", "child")] == [0, 1]


def test_torpid_peers() -> None:
    liveness = Liveness(torpid_min=4, timeout=100)
    for peer in ("a", "b"):
        liveness.watch(peer, 0)
    for now in range(8):
        liveness.heard("b", now)
        liveness.tick(now)
    assert liveness.torpid == 1
    liveness.heard("a", 8)
    liveness.tick(8)
    assert liveness.torpid == 0
    liveness.forget("a")


def test_traffic_is_added_up() -> None:
    past, here = Traffic(1, 10, 2, 20), Traffic(3, 30, 4, 40)
    assert past.plus([here, here]) == Traffic(7, 70, 10, 100)
    assert past == Traffic(1, 10, 2, 20)
    past.add(here)
    assert past == Traffic(4, 40, 6, 60)
