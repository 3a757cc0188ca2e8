"""One thread that makes calls which wait for the disk, for a Trio task that awaits each of them.

`trio.to_thread` can do this too, but costs about 100 µs a call more, a third of a commit on a fast disk.

While the Trio thread is busy without a pause, the worker has to wait for the interpreter lock to give its
result back, and with Python's switch interval of 5 ms it may wait for seconds: an event loop gives the lock
up and takes it again in less than that, and the interval starts anew. So the interval is `SWITCH_INTERVAL`
in `run`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

import outcome
import trio

SWITCH_INTERVAL: Final = 0.000_05
"""Seconds after which a thread that waits for the interpreter lock asks for it."""


class Worker:
    """The thread, while `running`."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[trio.lowlevel.Task, Callable[[], None]] | None] = SimpleQueue()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the thread in the block; calls have ended when it is left, since each is awaited."""
        token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=self._work, args=(token,), name="kvs-worker", daemon=True)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        thread.start()
        try:
            yield
        finally:
            self._calls.put(None)
            thread.join()
            sys.setswitchinterval(interval)

    async def call(self, function: Callable[[], None]) -> None:
        """Make a call in the thread; not cancellable. Raises what the function raises."""
        self._calls.put((trio.lowlevel.current_task(), function))
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def _work(self, token: trio.lowlevel.TrioToken) -> None:
        while (item := self._calls.get()) is not None:
            task, function = item
            token.run_sync_soon(trio.lowlevel.reschedule, task, outcome.capture(function))
