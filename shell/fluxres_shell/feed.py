"""Standard input into the tasks' pipes: the I/O around `stdin.StdinStream`.

A pipe that is full is waited for; one that its task has closed, or whose task has ended, takes everything.
"""

from __future__ import annotations

import os
import select

from fluxres_shell.poller import Poller
from fluxres_shell.stdin import StdinStream
from fluxres_shell.tasks import Task


class StdinFeed:
    """Writes the stream of standard input to the tasks that have a pipe for it."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._tasks: dict[int, Task] = {}
        self.stream = StdinStream(())

    def open(self, tasks: list[Task]) -> None:
        """The tasks' streams are open. Those whose stdin is a pipe are fed from now on."""
        self._tasks = {task.spec.rank: task for task in tasks if task.stdin >= 0}
        self.stream = StdinStream(self._tasks)

    def feed(self, task: int, offset: int, data: bytes, eof: bool) -> None:
        """Take a piece of the stream from the broker. Raises ProtocolError."""
        for rank in self.stream.feed(task, offset, data, eof):
            self._write(self._tasks[rank])

    def close(self, task: Task) -> None:
        """The task takes no more input."""
        self.stream.close(task.spec.rank)
        self._tasks.pop(task.spec.rank, None)
        if task.stdin >= 0:
            self._poller.forget(task.stdin)
            task.close_stdin()

    def _write(self, task: Task) -> None:
        """Write what the pipe takes, and wait for it to take more."""
        while (piece := self.stream.next_piece(task.spec.rank)) is not None:
            if not piece:
                self.close(task)
                return
            try:
                count = os.write(task.stdin, piece)
            except BlockingIOError:
                self._poller.watch(task.stdin, lambda _revents: self._write(task), select.POLLOUT)
                return
            except BrokenPipeError:
                self.close(task)
                return
            self.stream.written(task.spec.rank, count)
        self._poller.forget(task.stdin)
