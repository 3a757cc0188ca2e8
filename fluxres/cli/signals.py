"""Signals as something to poll for: a pipe that becomes readable, and the numbers that came.

While it is in use, the signals that it was given do nothing by themselves. A signal that was ignored from the
start (nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType, TracebackType

    Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

MAX_AT_ONCE: Final = 256
"""Signals taken at a time; more stay in the pipe."""


class Signals:
    """A context manager; its `fileno` is readable when `take` has something."""

    def __init__(self, signums: Iterable[int]) -> None:
        self._signums = tuple(signums)
        self._before: dict[int, Handler] = {}
        self._read, self._write = -1, -1
        self._wakeup = -1

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in self._signums:
            if signal.getsignal(signum) != signal.SIG_IGN:
                self.catch(signum)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in list(self._before):
            self.release(signum)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def catch(self, signum: int) -> None:
        """Take one more signal over."""
        if signum not in self._before:
            self._before[signum] = signal.signal(signum, _ignore)

    def release(self, signum: int) -> None:
        """Let a signal do again what it did before."""
        before = self._before.pop(signum, None)
        if before is not None:
            signal.signal(signum, before)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._read

    def take(self) -> list[int]:
        """The signals that came since the last time, oldest first."""
        with contextlib.suppress(BlockingIOError):  # none came
            return list(os.read(self._read, MAX_AT_ONCE))
        return []


def signal_name(signum: int) -> str:
    """`SIGTERM` for 15, and the number itself where it has no name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def parse_signal(text: str) -> int:
    """A signal's number from `15`, `TERM` or `SIGTERM`. Raises ValueError for anything else."""
    if text.isascii() and text.isdigit() and 0 < int(text) < signal.NSIG:
        return int(text)
    name = text.upper()
    for candidate in (name, f"SIG{name}"):
        if candidate in signal.Signals.__members__:
            return int(signal.Signals[candidate])
    raise ValueError(f"cannot take {text!r} for a signal: it must be a name such as TERM, or a number")


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """The wakeup descriptor has it."""
