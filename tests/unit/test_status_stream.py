"""The stream of a connection to the status endpoint: what is cut off is the last."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from fluxres.status.stream import CLOSE_FRAME, ConnectionStream


async def test_nothing_follows_a_message_that_was_cut_off() -> None:
    near, far = trio.testing.lockstep_stream_pair()
    stream = ConnectionStream(near)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"half of a message")
        assert await far.receive_some(4) == b"half"
        nursery.cancel_scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(CLOSE_FRAME + b"\0")


async def test_a_cancelled_wait_for_another_message_ends_nothing() -> None:
    near, far = trio.testing.lockstep_stream_pair()
    stream = ConnectionStream(near)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"one")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await stream.send_all(b"two")
        assert await far.receive_some(10) == b"one"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"three")
        assert await far.receive_some(10) == b"three"
