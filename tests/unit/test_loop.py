"""The loop of incarnations: a shutdown without a parent leaves nothing behind; what one life tells of another."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fluxres.base.errors import RpcError
from fluxres.broker.config import parse
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.loop import BrokerLoop
from fluxres.broker.platform import LocalPlatform
from fluxres.broker.presence import Ending
from fluxres.broker.statedir import Statedir
from fluxres.overlay.errors import ConnectError, ParentLost
from fluxres.overlay.sockets import SocketConnection, SocketTransport
from fluxres.rpc.router import Router


class Parentless(SocketTransport):
    """The way to a parent that is lost, and at that very moment this broker is asked to shut down."""

    answer: Exception
    loop: BrokerLoop

    async def connect(self, rank: int) -> SocketConnection:
        await trio.lowlevel.checkpoint()
        self.loop.shutdown.set()
        raise self.answer


@pytest.mark.parametrize("answer", [ParentLost("it is shut down too"), ConnectError("nobody is there")])
async def test_the_socket_of_an_earlier_incarnation_is_removed(tmp_path: Path, answer: Exception) -> None:
    config = parse({"bootstrap": {"size": 2}, "broker": {"rundir": str(tmp_path / "run")}}, "of the test")
    with closing(Statedir(str(tmp_path / "state"))) as statedir:
        platform = LocalPlatform(config, 1, statedir)
        platform.transport = transport = Parentless(config.addresses(), rank=1)
        async with trio.open_nursery() as nursery:
            await nursery.start(platform.clients(Router(rank=1, size=2)).run)
            nursery.cancel_scope.cancel()
        assert await trio.Path(platform.socket).exists()
        said: list[str] = []
        transport.answer = answer
        transport.loop = BrokerLoop(
            config=config,
            rank=1,
            topology=config.topology(),
            statedir=statedir,
            platform=platform,
            logbuffer=LogBuffer(1),
            notify=said.append,
        )
        assert await transport.loop.run() == 0
        assert said == ["STOPPING=1"]
        assert not await trio.Path(platform.socket).exists()


class Scripted:
    """Incarnations that come online, or do not, and end as the script says."""

    script: list[tuple[bool, Exception | None]]
    told: list[Ending | None]

    def __init__(self, *, online: Callable[[], None], ending: Ending | None, **_: object) -> None:
        self.told.append(ending)
        self._online = online

    async def run(self) -> None:
        await trio.sleep(1)
        comes_online, error = self.script.pop(0)
        if comes_online:
            self._online()
        if error is not None:
            raise error

    def clean_up(self) -> None:
        pass


async def test_an_incarnation_tells_how_the_last_one_ended_that_was_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    lost = ParentLost("the parent, rank 0, is lost")
    consequence = RpcError(errno.EHOSTUNREACH)
    Scripted.told = []
    Scripted.script = [
        (False, ParentLost("not yet")),
        (True, ExceptionGroup("", [lost, consequence])),
        (False, ConnectionResetError("something else")),
        (True, ValueError("a bug")),
        (True, None),
    ]
    monkeypatch.setattr("fluxres.broker.loop.Incarnation", Scripted)
    config = parse({"bootstrap": {"size": 2}, "broker": {"rundir": str(tmp_path / "run")}}, "of the test")
    with closing(Statedir(str(tmp_path / "state"))) as statedir:
        loop = BrokerLoop(
            config=config,
            rank=1,
            topology=config.topology(),
            statedir=statedir,
            platform=LocalPlatform(config, 1, statedir),
            logbuffer=LogBuffer(1),
            notify=lambda _: None,
        )
        assert await loop.run() == 0
    first, second, third, fourth, fifth = Scripted.told
    assert first is second is None  # a process that was never online has not restarted
    assert third is not None
    assert third is fourth
    assert third.why == "the parent, rank 0, is lost"
    assert fifth is not None
    assert fifth.why == "ValueError('a bug')"
    assert third.at < fifth.at < trio.current_time()
