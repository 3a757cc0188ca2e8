"""The loop of incarnations: a shutdown while there is no parent leaves nothing behind."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import trio

from fluxres.broker.config import parse
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.loop import BrokerLoop
from fluxres.broker.platform import LocalPlatform
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
