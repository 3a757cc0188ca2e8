"""Where `fluxres watch` writes: the output of many jobs, and below it a line of progress where there is a terminal.

With labels each line is preceded by its job and its task's rank. With a line of progress, output comes in whole lines,
so that the line can be taken away before each and be drawn again after it; without either, bytes pass as they are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from fluxres.cli.common import id_text, write_bytes
from fluxres.cli.output import MAX_LINE, STDERR, STDOUT, Output

if TYPE_CHECKING:
    from fluxres.base.eventlog import Event

WIPE: Final = b"\r\x1b[K"
"""Takes away what is on the line of a terminal."""
COLUMNS: Final = 80
"""The width of a terminal that does not tell."""


class Lines:
    """Holds the unfinished lines of one job's output back, up to `MAX_LINE` bytes of each."""

    def __init__(self) -> None:
        self._held: dict[int, bytes] = {}

    def take(self, descriptor: int, data: bytes) -> bytes:
        """What can be written now."""
        data = self._held.pop(descriptor, b"") + data
        end = len(data) if len(data) > MAX_LINE else data.rfind(b"\n") + 1
        if end < len(data):
            self._held[descriptor] = data[end:]
        return whole(data[:end])

    def finish(self) -> list[tuple[int, bytes]]:
        """What is left at the end."""
        held, self._held = self._held, {}
        return [(descriptor, whole(data)) for descriptor, data in held.items()]


def whole(data: bytes) -> bytes:
    """Data that ends a line."""
    return data if not data or data.endswith(b"\n") else data + b"\n"


def labelled(label: str, data: bytes) -> bytes:
    """Each line of `data` behind a label; pieces of lines become lines."""
    prefix = f"{label}: ".encode()
    return b"".join(prefix + line + b"\n" for line in whole(data).split(b"\n")[:-1])


class JobOutput:
    """Writes of one job's output eventlog."""

    def __init__(self, jobid: int, zero: float, *, label: bool, by_lines: bool) -> None:
        self._label = id_text(jobid) if label else ""
        self._zero = zero
        self._output = Output(label=label)
        self._lines = Lines() if by_lines else None

    def take(self, event: Event) -> list[tuple[int, bytes]]:
        """What an event has to be written, and where. Raises FluxresError for data that makes no sense."""
        return self._writes(self._output.take(event, self._zero))

    def finish(self) -> list[tuple[int, bytes]]:
        """What is left at the end."""
        left = self._writes(self._output.finish())
        return [*left, *(self._lines.finish() if self._lines is not None else ())]

    def _writes(self, writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        if self._label:
            writes = [(descriptor, labelled(self._label, data)) for descriptor, data in writes]
        if self._lines is not None:
            writes = [(descriptor, self._lines.take(descriptor, data)) for descriptor, data in writes]
        return [(descriptor, data) for descriptor, data in writes if data]


class Sink:
    """Standard output and standard error, and with `progress` the last line of the terminal."""

    def __init__(self, *, progress: bool) -> None:
        self.progress = progress
        self._shown = ""

    @property
    def width(self) -> int:
        """Characters that the line of progress may have."""
        try:
            return (os.get_terminal_size(STDOUT).columns or COLUMNS) - 1
        except OSError:
            return COLUMNS - 1

    def write(self, descriptor: int, data: bytes) -> None:
        """Write output; with a line of progress, whole lines. Raises as `write_bytes` does."""
        if self._shown:
            write_bytes(WIPE)
            self._shown = ""
        write_bytes(data, descriptor)

    def say(self, text: str) -> None:
        """A line of our own on standard error."""
        self.write(STDERR, f"{text}\n".encode(errors="replace"))

    def show(self, text: str) -> None:
        """Draw the line of progress."""
        if self.progress and text != self._shown:
            write_bytes(WIPE + text.encode(errors="replace"))
            self._shown = text

    def close(self) -> None:
        """Leave the line of progress where it is, and go on below it."""
        if self._shown:
            self._shown = ""
            write_bytes(b"\n")
