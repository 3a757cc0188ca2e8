"""Parts for tests of the status endpoint: one that serves on the loopback, and an incarnation that it shows."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import h11
import trio

from fluxres.base.json import JsonObject
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service
from fluxres.status.board import Board
from fluxres.status.endpoint import Attached, Endpoint
from fluxres.status.settings import StatusSettings
from fluxres.status.view import View

PATIENCE: Final = 30.0
"""Seconds that a test waits for what has to come."""
DOCUMENTS: Final[dict[str, dict[str, JsonObject]]] = {
    "instance": {"about": {"size": 1}},
    "jobs": {"1": {"dec": "1", "state": "RUN"}, "2": {"dec": "2", "state": "INACTIVE"}},
}


class FakeBoards:
    """A board for everybody."""

    def __init__(self) -> None:
        self.board = Board(View())
        self.board.begin("e", DOCUMENTS, 1)
        self.opened = 0
        self.fault: Exception | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Board]:
        if self.fault is not None:
            raise self.fault
        self.opened += 1
        try:
            yield self.board
        finally:
            self.opened -= 1


class Shown:
    """An incarnation, as far as an endpoint needs one. `job_info` is what it asks for jobs."""

    def __init__(self) -> None:
        self.router = Router(rank=0, size=1)
        self.job_info = Service("job-info", self.router)
        self.boards = FakeBoards()
        self.state = "run"
        self.attached = Attached(
            rank=0,
            size=1,
            instance="i",
            handle=Handle(self.router, "broker", os.getuid()),
            boards=self.boards,
            state=lambda: self.state,
        )


def make_endpoint(tmp_path: Path, settings: StatusSettings | None = None, *, rank: int = 0) -> Endpoint:
    return Endpoint(
        settings or StatusSettings(),
        rank=rank,
        owner=os.getuid(),
        port_file=tmp_path / "port",
        scrape=lambda accept: (f"metrics for {accept}\n".encode(), "text/plain"),
    )


@asynccontextmanager
async def serving(endpoint: Endpoint) -> AsyncIterator[int]:
    """Run an endpoint; its port."""
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run)
        yield port_of(endpoint)
        nursery.cancel_scope.cancel()


def port_of(endpoint: Endpoint) -> int:
    return int(endpoint.uri.rstrip("/").rpartition(":")[2]) if endpoint.uri else 0


async def dial(port: int) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port)


async def drain(stream: trio.abc.Stream) -> bytes:
    """All that comes, however the connection ends."""
    received = b""
    with trio.fail_after(PATIENCE):
        try:
            while data := await stream.receive_some():
                received += data
        except trio.BrokenResourceError:
            pass  # a reset is an end too
    return received


async def until(condition: Callable[[], object]) -> None:
    """Return as soon as something is true."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 (what is looked at tells nobody when it changes)
            await trio.sleep(0.005)


async def ask(
    port: int, path: str, *headers: tuple[str, str], method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    """One request: status, headers and body."""
    async with await dial(port) as stream:
        return await ask_over(stream, path, *headers, method=method)


async def ask_over(
    stream: trio.abc.Stream, path: str, *headers: tuple[str, str], method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    client = h11.Connection(h11.CLIENT)
    request = h11.Request(method=method, target=path, headers=[("Host", "localhost"), *headers])
    await stream.send_all((client.send(request) or b"") + (client.send(h11.EndOfMessage()) or b""))
    client.receive_data(await drain(stream))
    client.receive_data(b"")
    response = client.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += bytes(event.data)
    return response.status_code, {n.decode(): v.decode() for n, v in response.headers}, body
