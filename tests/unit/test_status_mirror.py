"""The view of a rank that is not rank 0: there while somebody looks, under rank 0's own numbers, whatever breaks."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from rpckit import OWNER, settled
from viewkit import NOW, job, messages_of

from fluxres.base.errors import RpcError
from fluxres.base.json import JsonObject
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.status.asks import WatchRequest
from fluxres.status.board import LINGER, Audience, Board
from fluxres.status.messages import bodies
from fluxres.status.mirror import Mirror
from fluxres.status.picture import Picture
from fluxres.status.view import TOPICS, Cursor, Position, View
from fluxres.wire.payload import WireMap

HANG = 60.0
"""Seconds on the test's own clock after which something that should have come has not."""


class Root:
    """Rank 0: a board, and the service that tells of it; `lose` ends the streams as the loss of a broker does."""

    def __init__(self, router: Router) -> None:
        self.board = Board(View("e1"))
        self.service = Service("status", router)
        self.service.task("watch", self._watch)
        self.asked: list[WireMap] = []
        self.streams = 0
        self.spoil: Callable[[WireMap], WireMap] = lambda payload: payload
        self._scopes: list[trio.CancelScope] = []

    async def _watch(self, request: Request) -> None:
        self.asked.append(request.payload)
        watch = request.parse(WatchRequest).read()
        cursor = Cursor(self.board.view, watch.topics, watch.select, watch.position)
        self.streams += 1
        try:
            with trio.CancelScope() as scope:
                self._scopes.append(scope)
                while True:
                    while (body := cursor.next()) is not None:
                        for payload in bodies(body, NOW):
                            await request.stream(self.spoil(payload))
                    await self.board.news(cursor.seen)
        finally:
            self.streams -= 1
        raise RpcError(errno.EHOSTUNREACH, "rank 1 is not reachable")

    def lose(self) -> None:
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    def change(self, *jobs: JsonObject) -> Position:
        self.board.change({"jobs": {str(each["dec"]): each for each in jobs}})
        return self.board.view.position


class World:
    """One router, so that there is no tree to be built: the handle finds rank 0's service beside it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.router = Router(rank=0, size=1)
        self.root = Root(self.router)
        self.handle = Handle(self.router, "status", OWNER)
        self.mirror = Mirror(self.handle)

    async def serve(self) -> None:
        await self._nursery.start(self.root.service.run)


@asynccontextmanager
async def world(*, serving: bool = True) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        made = World(nursery)
        if serving:
            await made.serve()
        await nursery.start(made.mirror.run)
        yield made
        nursery.cancel_scope.cancel()
    made.handle.close()


class Reader:
    """Somebody who looks at a board."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.cursor = Cursor(board.view, TOPICS)
        self.picture = Picture()
        self.kinds: list[str] = []

    async def until(self, position: Position) -> None:
        """Read on until the picture is of this position."""
        with trio.fail_after(HANG):
            while self.picture.position != position:
                if (body := self.cursor.next()) is None:
                    await self.board.news(self.cursor.seen)
                    continue
                for message in messages_of(body):
                    self.picture.apply(message)
                self.kinds.append(str(message.get("why", message["type"])))


async def test_a_mirror_has_the_positions_of_rank_0(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.root.change(job(1), job(2))
        async with it.mirror.open() as board:
            reader = Reader(board)
            await reader.until(Position("e1", 1))
            await reader.until(it.root.change(job(1, "CLEANUP")))
            reader.board, reader.cursor = it.root.board, Cursor(it.root.board.view, TOPICS, None, Position("e1", 2))
            await reader.until(it.root.change(job(1, "INACTIVE")))
        assert reader.picture.topic("jobs") == {"1": job(1, "INACTIVE"), "2": job(2)}
        assert reader.kinds == ["first", "delta", "delta"]
        assert set(it.root.asked[0]) == {"topics"}


async def test_it_follows_only_while_somebody_looks(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.root.change(job(1))
        await settled()
        assert it.root.asked == []
        async with it.mirror.open() as board, it.mirror.open() as same:
            assert board is same
            await Reader(board).until(Position("e1", 1))
            assert it.root.streams == 1
        await trio.sleep(LINGER - 1)
        async with it.mirror.open():
            await trio.sleep(2 * LINGER)
        await trio.sleep(LINGER - 1)
        assert it.root.streams == 1
        await trio.sleep(2)
        assert it.root.streams == 0
        assert not board.view.begun
        assert len(it.root.asked) == 1
        async with it.mirror.open() as board:
            await Reader(board).until(Position("e1", 1))


async def test_a_lost_stream_is_resumed(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world() as it:
        it.root.change(job(1))
        async with it.mirror.open() as board:
            reader = Reader(board)
            await reader.until(Position("e1", 1))
            with caplog.at_level(logging.WARNING, "fluxres.status"):
                it.root.lose()
                it.root.change(job(2))
                await settled()
            assert reader.cursor.next() is None
            assert board.view.documents("jobs") == {"1": job(1)}
            await reader.until(it.root.change(job(2, "CLEANUP"), job(3)))
        assert reader.kinds == ["first", "delta"]
        assert it.root.asked[1]["position"] == ["e1", 1]
        assert [record.message for record in caplog.records] == [
            "the status of the instance does not arrive, trying again: rank 1 is not reachable"
        ]


async def test_rank_0_restarts(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.root.change(job(1))
        async with it.mirror.open() as board:
            reader = Reader(board)
            await reader.until(Position("e1", 1))
            it.root.lose()
            it.root.board.begin("e2", {"jobs": {"2": job(2)}}, 7)
            await reader.until(Position("e2", 7))
        assert reader.kinds == ["first", "restarted"]
        assert reader.picture.topic("jobs") == {"2": job(2)}


async def test_rank_0_starts_later(autojump_clock: trio.testing.MockClock) -> None:
    async with world(serving=False) as it, it.mirror.open() as board:
        with trio.move_on_after(3 * LINGER):
            await board.begun()
        assert not board.view.begun
        it.root.change(job(1))
        await it.serve()
        await Reader(board).until(Position("e1", 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "delta", "prev": "x"},
        {"type": "delta", "prev": 5, "position": ["e1", 6], "part": 0, "more": False, "set": {}, "delete": {}},
        {"type": "snapshot", "part": 3, "more": False, "docs": {}, "why": "first", "position": ["e1", 9]},
    ],
)
async def test_what_makes_no_sense_is_mended_by_asking_again(
    autojump_clock: trio.testing.MockClock, wrong: WireMap
) -> None:
    async with world() as it, it.mirror.open() as board:
        it.root.change(job(1))
        reader = Reader(board)
        await reader.until(Position("e1", 1))
        it.root.spoil = lambda payload: wrong
        it.root.change(job(2))
        await settled()
        it.root.spoil = lambda payload: payload
        await reader.until(it.root.change(job(3)))
        assert set(reader.picture.topic("jobs")) == {"1", "2", "3"}


async def test_many_parts_are_one_change(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it, it.mirror.open() as board:
        it.root.change(*(job(number, name="x" * 500) for number in range(400)))
        reader = Reader(board)
        await reader.until(Position("e1", 1))
        await reader.until(it.root.change(*(job(number, name="y" * 500) for number in range(400))))
        assert len(board.view.documents("jobs")) == 400
        assert reader.kinds == ["first", "delta"]


async def test_a_broken_handle_is_no_panic(autojump_clock: trio.testing.MockClock) -> None:
    """The incarnation is about to end; until it does, the mirror waits."""
    async with world() as it, it.mirror.open() as board:
        it.handle.close()
        await trio.sleep(LINGER)
        assert not board.view.begun


# --- boards and audiences


async def test_news_wakes_all_who_wait_once() -> None:
    board = Board(View("e"))
    woken = 0

    async def wait() -> None:
        nonlocal woken
        await board.news(Position("e", 0))
        woken += 1

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(wait)
        await settled()
        assert not board.change({})
        await settled()
        assert woken == 0
        board.change({"jobs": {"1": job(1)}})
    assert woken == 500
    await board.news(Position("e", 0))  # it is at another position already


async def test_an_audience_lingers(autojump_clock: trio.testing.MockClock) -> None:
    audience = Audience()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def come_and_go() -> None:
            for _ in range(3):
                with audience.attending():
                    assert len(audience) == 1
                    await trio.sleep(50)
                await trio.sleep(9)

        nursery.start_soon(come_and_go)
        await audience.wanted()
        await audience.gone(10)
        assert trio.current_time() - began == pytest.approx(3 * 50 + 2 * 9 + 10)


async def test_nobody_spins_on_a_view_that_has_to_begin_anew() -> None:
    board = Board(View("e"))
    for position in (Position("e", 0), Position("e", 3), None):
        cursor = Cursor(board.view, TOPICS, None, position)
        while cursor.next() is not None:
            pass
        board.begin("")
        assert cursor.next() is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(board.news, cursor.seen)
            await settled()
            assert len(nursery.child_tasks) == 1
            board.begin("e")
