"""A job's standard input on its way to the tasks: a pure buffer between the socket and the pipes.

The broker sends one stream of bytes, each piece meant for one task (its global rank) or for all (-1);
`offset` counts the stream's bytes from 0, whatever their target. A piece may be sent again after a reattach:
what is known of it is dropped. The sender may be at most `STDIN_BUFFER` bytes ahead of `consumed`, which is
what it is told in acks; more, or a gap, is a ProtocolError. A task that closes its standard input, or ends,
takes everything from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fluxres.base.errors import ProtocolError

STDIN_BUFFER: Final = 128 * 1024
"""Bytes of standard input that a shell holds for its tasks."""
ALL_TASKS: Final = -1


@dataclass(slots=True)
class _Target:
    """What one task has still to be given: pieces with the stream offset of their first byte."""

    pieces: deque[tuple[int, bytes]] = field(default_factory=deque)
    eof: bool = False


class StdinStream:
    """The state of standard input for the tasks with the global ranks `tasks`."""

    def __init__(self, tasks: Iterable[int]) -> None:
        self._targets = {task: _Target() for task in tasks}
        self.received = 0
        """Bytes of the stream that came in: the next piece's offset."""

    @property
    def consumed(self) -> int:
        """Bytes of the stream that no task has to be given any more."""
        return min((t.pieces[0][0] for t in self._targets.values() if t.pieces), default=self.received)

    @property
    def eof(self) -> bool:
        """Whether nothing more can come for any task."""
        return all(target.eof for target in self._targets.values())

    def feed(self, task: int, offset: int, data: bytes, eof: bool) -> list[int]:
        """Take a piece of the stream; returns the tasks that have something to do. Raises ProtocolError."""
        if offset > self.received:
            raise ProtocolError(f"cannot take stdin from offset {offset}: the next byte is {self.received}")
        fresh = data[self.received - offset :]
        if self.received + len(fresh) - self.consumed > STDIN_BUFFER:
            raise ProtocolError(f"cannot take {len(fresh)} bytes of stdin: more than {STDIN_BUFFER} are unacknowledged")
        touched = []
        for rank, target in self._targets.items():
            if task not in (ALL_TASKS, rank) or target.eof:
                continue
            if fresh:
                target.pieces.append((self.received, fresh))
            target.eof = eof
            touched.append(rank)
        self.received += len(fresh)
        return touched

    def next_piece(self, task: int) -> bytes | None:
        """What to write to `task` next; b"" when its stdin is to be closed, None for nothing."""
        target = self._targets.get(task)
        if target is None:
            return None
        if target.pieces:
            return target.pieces[0][1]
        return b"" if target.eof else None

    def written(self, task: int, count: int) -> None:
        """`count` bytes of the next piece have been written to `task`."""
        pieces = self._targets[task].pieces
        start, data = pieces.popleft()
        if count < len(data):
            pieces.appendleft((start + count, data[count:]))

    def close(self, task: int) -> None:
        """`task` takes no more input: what it was still to be given counts as consumed."""
        self._targets.pop(task, None)
