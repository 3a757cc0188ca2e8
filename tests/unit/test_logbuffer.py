"""The broker's log: what is kept, who is woken, and that a log which cannot be written harms nobody."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from fluxres.broker.logbuffer import RING_SIZE, LogBuffer


class FullDisk(io.StringIO):
    """What cannot be written to."""

    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[logging.Logger, LogBuffer]]:
    logger = logging.getLogger("fluxres.test-logbuffer")
    buffer = LogBuffer(3)
    logger.addHandler(buffer)
    logger.propagate = False
    yield logger, buffer
    logger.removeHandler(buffer)


def test_the_ring_keeps_the_latest(log: tuple[logging.Logger, LogBuffer]) -> None:
    logger, buffer = log
    for number in range(RING_SIZE + 2):
        logger.warning("entry %d", number)
    entries, last = buffer.after(0)
    assert (len(entries), last) == (RING_SIZE, RING_SIZE + 2)
    assert entries[0].endswith("test-logbuffer.warning[3]: entry 2")
    assert buffer.after(last - 1)[0] == entries[-1:]


def test_a_log_that_cannot_be_written_fails_nobody(
    log: tuple[logging.Logger, LogBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, buffer = log
    monkeypatch.setattr(sys, "stderr", FullDisk())
    logger.error("no room")
    logger.error("still none")
    assert [entry.rpartition(": ")[2] for entry in buffer.after(0)[0]] == ["no room", "still none"]


async def test_everyone_who_waits_is_woken(log: tuple[logging.Logger, LogBuffer]) -> None:
    logger, buffer = log
    logger.warning("old")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(buffer.more)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(buffer.more)
        await trio.testing.wait_all_tasks_blocked()
        logger.warning("new")
        with trio.fail_after(60):
            while nursery.child_tasks:
                await trio.lowlevel.checkpoint()
