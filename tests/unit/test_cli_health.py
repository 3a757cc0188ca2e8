"""The health of a broker: which requests are told as stuck, with which stack, and what `fluxres health` makes of it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from fakebroker import FakeBroker

from fluxres.broker.health import MAX_STACK, MAX_STUCK, STUCK_AFTER, StallMeter, report
from fluxres.cli.main import main
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

CLOCK = trio.testing.MockClock


async def hang(_request: Request) -> None:
    await trio.sleep_forever()


async def hang_below(_request: Request) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deep, 2 * MAX_STACK)


async def deep(depth: int) -> None:
    if depth:
        await deep(depth - 1)
    await trio.sleep_forever()


async def tick(request: Request) -> None:
    await request.stream({})
    await trio.sleep_forever()


async def silent(_request: Request) -> None:
    await trio.sleep_forever()


class Broker:
    """One with a service that gets stuck in every way."""

    def __init__(self) -> None:
        router = Router(rank=5, size=6)
        self.handle = Handle(router, "test", 1000)
        self.service = Service("toy", router)
        for name, task in (("hang", hang), ("hang-below", hang_below), ("tick", tick), ("silent", silent)):
            self.service.task(name, task)
        self.service.deferred("later", lambda _request: None)

    def report(self) -> list[WireMap]:
        """The stuck requests of the service."""
        told = report([self.service], StallMeter(), rank=5, tasks=False)
        services = told["services"]
        assert isinstance(services, list)
        stuck = services[0]["stuck"]
        assert isinstance(stuck, list)
        return stuck


@asynccontextmanager
async def broker(*topics: str) -> AsyncIterator[Broker]:
    """One with these requests under way, all unanswered for twice as long as is allowed."""
    made = Broker()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.service.run)
        for topic in topics:
            nursery.start_soon(_ask, made.handle, topic)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(2 * STUCK_AFTER)
        yield made
        nursery.cancel_scope.cancel()


async def _ask(handle: Handle, topic: str) -> None:
    async with handle.stream(topic, {}) if topic in ("toy.tick", "toy.silent") else _plain(handle, topic) as replies:
        async for _ in replies:
            pass


@asynccontextmanager
async def _plain(handle: Handle, topic: str) -> AsyncIterator[AsyncIterator[WireMap]]:
    async def one() -> AsyncIterator[WireMap]:
        yield await handle.call(topic, {})

    yield one()


async def test_the_stack_of_a_handler_that_hangs(autojump_clock: CLOCK) -> None:
    async with broker("toy.hang") as made:
        (stuck,) = made.report()
    assert stuck["topic"] == "toy.hang"
    assert stuck["age"] == pytest.approx(2 * STUCK_AFTER)
    stack = stuck["stack"]
    assert isinstance(stack, list)
    assert stack[0] == "toy.hang"
    assert any("hang:" in line and "await trio.sleep_forever()" in line for line in stack)


async def test_a_handler_that_waits_for_its_own_tasks(autojump_clock: CLOCK) -> None:
    async with broker("toy.hang-below") as made:
        (stuck,) = made.report()
    stack = stuck["stack"]
    assert isinstance(stack, list)
    assert len(stack) == MAX_STACK
    assert stack[0] == "…"
    assert "deep:" in stack[-4]


async def test_what_is_stuck_and_what_is_not(autojump_clock: CLOCK) -> None:
    async with broker("toy.tick", "toy.silent", "toy.later") as made:
        stuck = made.report()
        assert sorted(str(each["topic"]) for each in stuck) == ["toy.later", "toy.silent"]
        assert next(each["stack"] for each in stuck if each["topic"] == "toy.later") == []
    async with broker() as made:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ask, made.handle, "toy.hang")
            await trio.sleep(STUCK_AFTER / 2)
            assert made.report() == []
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_STUCK + 1):
                nursery.start_soon(_ask, made.handle, "toy.hang")
            await trio.sleep(STUCK_AFTER * 2)
            assert len(made.report()) == MAX_STUCK
            nursery.cancel_scope.cancel()


def test_how_it_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stuck: list[WireMap] = [
        {"topic": "kvs.lookup", "age": 3.24, "stack": ["kvs.lookup", "  | KvsService._lookup:7: await it\x1b"]},
        {"topic": "kvs.commit", "age": 90.0, "stack": []},
    ]
    service: WireMap = {"name": "kvs", "queue": 2, "oldest": 90.0, "stuck": [*stuck]}
    with FakeBroker(tmp_path / "local-0") as fake:
        fake.on("broker.health", {"rank": 5, "services": [service], "stall": {"worst": 0.0, "recent": 0.0}})
        assert main(["health", "--uri", fake.uri, "-r", "5"]) == 0
        assert fake.messages[0].nodeid == 5
        assert capfd.readouterr().out == (
            "rank 5: event loop stalled for 0s at worst, 0s recently\n"
            "SERVICE  QUEUE  OLDEST\n"
            "kvs          2    1.5m\n"
            "\n"
            "kvs.lookup unanswered for 3.2s\n"
            "  kvs.lookup\n"
            "    | KvsService._lookup:7: await it?\n"
            "\n"
            "kvs.commit unanswered for 1.5m (no task of its own handles it)\n"
        )
        fake.on("broker.health", (errno.EHOSTUNREACH, "rank 5 is lost"))
        assert main(["health", "--uri", fake.uri, "-r", "5"]) == 1
        assert main(["health", "--uri", fake.uri, "-r", "4294967295"]) == 2
