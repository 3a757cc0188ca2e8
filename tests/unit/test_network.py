"""The in-memory network behaves like TCP: in order, nothing lost, ends seen late or not at all."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.overlay.errors import ConnectError
from fluxres.overlay.transport import OUTBOX_BOUND, OUTBOX_ROOM, Connection, Transport
from fluxres.testing.network import HEADER, RETRANSMIT, MemoryConnection, Network, Port
from fluxres.testing.simulate import simulate, simulated
from fluxres.testing.timeline import Timeline

LATENCY = 0.25
CONNECT_TIMEOUT = 3.0
settled = trio.testing.wait_all_tasks_blocked


@asynccontextmanager
async def running(**options: float) -> AsyncIterator[Network]:
    timeline = Timeline()
    network = Network(timeline, Random(1), **{"latency": LATENCY, **options})
    async with trio.open_nursery() as nursery:
        await nursery.start(timeline.run)
        yield network
        nursery.cancel_scope.cancel()


class Pair:
    """Rank 0, which listens, and rank 1, which is connected to it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.ports = (network.attach(0), network.attach(1, connect_timeout=CONNECT_TIMEOUT))

    async def connect(self) -> tuple[Connection, Connection]:
        if self.ports[0].listener is None:
            await self.ports[0].listen()
        ours = await self.ports[1].connect(0)
        assert self.ports[0].listener is not None
        return ours, await self.ports[0].listener.accept()


def transport(port: Port) -> Transport:
    """For the type checker."""
    return port


def connection(end: MemoryConnection) -> Connection:
    """For the type checker."""
    return end


async def read_all(end: Connection) -> list[bytes]:
    frames = []
    while batch := await end.receive():
        frames += batch
    return frames


# --- connections


@simulated
async def test_frames_arrive_a_latency_later_in_order() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        sent = trio.current_time()
        for body in (b"a", b"", b"c"):
            child.send(body)
        assert await parent.receive() == [b"a", b"", b"c"]
        assert trio.current_time() == pytest.approx(sent + LATENCY)
        parent.send(b"back")
        assert await child.receive() == [b"back"]
        assert network.traffic[1].frames == 3
        assert network.traffic[1].bytes == 2 + 3 * HEADER
        assert network.traffic[0].frames == 1


@simulated
async def test_a_close_comes_after_all_that_was_sent() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        child.send(b"last words")
        child.close()
        child.close()
        child.send(b"nobody hears this")
        assert await read_all(parent) == [b"last words"]
        assert await child.receive() == []
        await child.room()


@simulated
async def test_what_is_sent_to_a_closed_end_is_lost() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        parent.close()
        child.send(b"too late")
        assert await child.receive() == []
        assert await parent.receive() == []


@simulated
async def test_jitter_and_loss_keep_the_order() -> None:
    async with running(jitter=1.0, loss=0.3) as network:
        child, parent = await Pair(network).connect()
        bodies = [b"%d" % number for number in range(200)]
        for body in bodies:
            child.send(body)
        child.close()
        begun = trio.current_time()
        assert await read_all(parent) == bodies
        assert trio.current_time() > begun + LATENCY + RETRANSMIT


@pytest.mark.parametrize("options", [{"latency": -1.0}, {"jitter": -1.0}, {"loss": 1.0}, {"loss": -0.1}])
@simulated
async def test_networks_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="cannot simulate"):
        Network(Timeline(), Random(), **options)


@simulated
async def test_producers_wait_while_much_is_on_its_way() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        child.send(bytes(OUTBOX_ROOM))
        passed = []

        async def produce(number: int) -> None:
            await child.room()
            passed.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(produce, number)
            await trio.sleep(10 * LATENCY)
            assert passed == []  # it has arrived, and nobody has read it
            assert child.backlog == OUTBOX_ROOM
            await parent.receive()
        assert sorted(passed) == [0, 1, 2]
        assert child.backlog == 0


@simulated
async def test_who_does_not_read_is_given_up() -> None:
    async with running() as network:
        child, _parent = await Pair(network).connect()
        piece = bytes(OUTBOX_BOUND // 4)
        for _ in range(5):
            child.send(piece)
        assert await child.receive() == []
        await child.room()


@simulated
async def test_a_reader_is_woken_by_its_own_close() -> None:
    async with running() as network:
        child, _parent = await Pair(network).connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, child)
            await settled()
            child.close()


# --- connecting


@simulated
async def test_nobody_listens() -> None:
    async with running() as network:
        pair = Pair(network)
        with pytest.raises(ConnectError, match="rank 0: connection refused"):
            await pair.ports[1].connect(0)
        with pytest.raises(ConnectError, match="rank 7: connection refused"):
            await pair.ports[1].connect(7)


@simulated
async def test_listening_twice() -> None:
    async with running() as network:
        pair = Pair(network)
        listener = await pair.ports[0].listen()
        with pytest.raises(ConnectError, match="does already"):
            await pair.ports[0].listen()
        listener.close()
        listener.close()
        await pair.ports[0].listen()
        with pytest.raises(ValueError, match="cannot attach rank 0"):
            network.attach(0)


@simulated
async def test_connections_that_nobody_takes_end_with_the_listener() -> None:
    async with running() as network:
        pair = Pair(network)
        listener = await pair.ports[0].listen()
        child = await pair.ports[1].connect(0)
        listener.close()
        assert await child.receive() == []


@pytest.mark.parametrize("one_way", [False, True])
@simulated
async def test_connecting_through_a_cut_is_a_timeout(one_way: bool) -> None:
    async with running() as network:
        pair = Pair(network)
        await pair.ports[0].listen()
        network.cut([0], [1], one_way=one_way)
        begun = trio.current_time()
        with pytest.raises(ConnectError, match="no answer within 3s"):
            await pair.ports[1].connect(0)
        assert trio.current_time() == pytest.approx(begun + CONNECT_TIMEOUT)


@simulated
async def test_connecting_goes_on_when_a_cut_is_healed() -> None:
    async with running() as network:
        pair = Pair(network)
        await pair.ports[0].listen()
        network.cut([1], [0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.ports[1].connect, 0)
            await trio.sleep(1)
            network.heal()


# --- the end of processes and nodes


@simulated
async def test_a_killed_process_ends_its_connections_and_says_nothing_more() -> None:
    async with running() as network:
        pair = Pair(network)
        child, parent = await pair.connect()
        child.send(b"said in time")
        pair.ports[1].kill()
        child.send(b"goodbye")
        child.close()
        assert await read_all(parent) == [b"said in time"]
        with pytest.raises(ConnectError, match="the process is gone"):
            await pair.ports[1].connect(0)
        with pytest.raises(ConnectError, match="the process is gone"):
            await pair.ports[1].listen()
        again = network.attach(1)
        pair.ports[1].kill()  # of the old one, once more
        assert network.port(1) is again
        await again.connect(0)


@simulated
async def test_a_node_without_power_is_silent_until_it_is_up() -> None:
    async with running() as network:
        pair = Pair(network)
        child, parent = await pair.connect()
        child.send(b"lost with the node")
        network.power_off(0)
        with trio.move_on_after(100) as silence:
            await child.receive()
        assert silence.cancelled_caught
        with pytest.raises(ConnectError, match="no answer"):
            await pair.ports[1].connect(0)
        with pytest.raises(ValueError, match="cannot attach rank 0"):
            network.attach(0)
        network.power_on(0)
        assert await parent.receive() == []
        child.send(b"who is there?")
        assert await child.receive() == []  # the new kernel knows of no such connection
        with pytest.raises(ConnectError, match="refused"):
            await pair.ports[1].connect(0)
        await network.attach(0).listen()
        await pair.ports[1].connect(0)


# --- cuts


@simulated
async def test_a_cut_holds_back_what_is_on_its_way_and_what_follows() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        child.send(b"on its way")
        network.cut([0], [1])
        child.send(b"held")
        child.close()
        with trio.move_on_after(100) as silence:
            await parent.receive()
        assert silence.cancelled_caught
        network.heal()
        begun = trio.current_time()
        assert await read_all(parent) == [b"on its way", b"held"]
        assert trio.current_time() == pytest.approx(begun + LATENCY)


@simulated
async def test_a_cut_in_one_direction() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        network.cut([1], [0], one_way=True)
        child.send(b"held")
        parent.send(b"through")
        assert await child.receive() == [b"through"]
        parent.close()
        assert await child.receive() == []
        network.heal()


@simulated
async def test_only_the_ranks_that_are_cut_off_are() -> None:
    async with running() as network:
        child, parent = await Pair(network).connect()
        network.cut([0, 1], [0, 1, 2])
        network.heal()
        network.cut([0], [0, 2])
        child.send(b"through")
        assert await parent.receive() == [b"through"]


STEPS = st.lists(
    st.one_of(
        st.just("send"), st.just("cut"), st.just("heal"), st.floats(0.01, 1.0), st.just("one way"), st.just("read")
    ),
    max_size=40,
)


@given(steps=STEPS, seed=st.integers(0, 99))
@settings(deadline=None)
def test_whatever_happens_frames_come_once_and_in_order(steps: list[str | float], seed: int) -> None:
    async def main() -> None:
        timeline = Timeline()
        network = Network(timeline, Random(seed), latency=0.2, jitter=0.5, loss=0.1)
        async with trio.open_nursery() as nursery:
            await nursery.start(timeline.run)
            child, parent = await Pair(network).connect()
            sent: list[bytes] = []
            got: list[bytes] = []
            for step in steps:
                if isinstance(step, float):
                    await trio.sleep(step)
                elif step == "send":
                    sent.append(b"%d" % len(sent))
                    child.send(sent[-1])
                elif step == "read":
                    with trio.move_on_after(0.3):
                        got += await parent.receive()
                elif step == "heal":
                    network.heal()
                else:
                    network.cut([1], [0], one_way=step == "one way")
                assert got == sent[: len(got)]
            child.close()
            network.heal()
            got += await read_all(parent)
            assert got == sent
            nursery.cancel_scope.cancel()

    simulate(main)


@simulated
async def test_the_timeline_keeps_to_its_times() -> None:
    timeline = Timeline()
    seen: list[tuple[str, float]] = []

    def note(what: str) -> None:
        seen.append((what, trio.current_time() - begun))

    async with trio.open_nursery() as nursery:
        await nursery.start(timeline.run)
        begun = trio.current_time()
        timeline.after(2, lambda: note("late"))
        timeline.after(1, lambda: note("first"))
        timeline.after(1, lambda: note("second"))
        timeline.after(1, lambda: timeline.after(0, lambda: note("third")))
        timeline.at(-math.inf, lambda: note("at once"))
        assert seen == []
        assert len(timeline) == 5
        await trio.sleep(3)
        assert [(what, round(time, 6)) for what, time in seen] == [
            ("at once", 0),
            ("first", 1),
            ("second", 1),
            ("third", 1),
            ("late", 2),
        ]
        nursery.cancel_scope.cancel()
