"""A job's output eventlog (RFC 24) as bytes for standard output and standard error. Pure.

Without labels the bytes are the tasks' own, in the order of the eventlog. With labels each line is preceded
by its task's rank, and a line that comes in pieces is put together first, so that lines of different tasks do
not mix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import printable

if TYPE_CHECKING:
    from fluxres.base.eventlog import Event

STDOUT: Final = 1
STDERR: Final = 2
MAX_LINE: Final = 64 * 1024
"""Bytes of an unfinished line that are kept for its end; a longer line is labelled and shown in pieces."""
_LEVELS: Final = ("FATAL", "FATAL", "FATAL", "ERROR", "WARN", "", "DEBUG", "TRACE")
"""What the shell's log levels (RFC 5424 severities) are called."""


class Output:
    """Turns output events into writes, each a (descriptor, bytes) pair."""

    def __init__(self, *, label: bool = False, quiet: bool = False) -> None:
        self._label = label
        self._quiet = quiet
        self._partial: dict[tuple[int, str], bytearray] = {}
        self.started = False

    def take(self, event: Event, zero: float) -> list[tuple[int, bytes]]:
        """Take the next event; `zero` is the time of the job's first event, which log lines count from.

        Raises FluxresError for data that RFC 24 does not allow.
        """
        self.started = True
        context = event.context
        if event.name == "data":
            stream = STDOUT if context.get("stream") == "stdout" else STDERR
            rank, data = str(context.get("rank", "")), _bytes(event)
            if not self._label:
                return [(stream, data)] if data else []
            text = self._labelled(stream, rank, data, bool(context.get("eof")))
            return [(stream, text)] if text else []
        if self._quiet:
            return []
        if event.name == "redirect":
            path = context.get("path")
            where = f" to {path}" if path else ""
            said = printable(f"{context.get('rank')}: {context.get('stream')} redirected{where}")
            return [(STDERR, f"{said}\n".encode())]
        if event.name == "log":
            return [(STDERR, _log_line(event, zero).encode())]
        return []

    def finish(self) -> list[tuple[int, bytes]]:
        """The unfinished lines that are left when the eventlog has ended."""
        left = [(stream, f"{rank}: ".encode() + data) for (stream, rank), data in self._partial.items() if data]
        self._partial.clear()
        return left

    def _labelled(self, stream: int, rank: str, data: bytes, eof: bool) -> bytes:
        partial = self._partial.setdefault((stream, rank), bytearray())
        partial += data
        end = len(partial) if eof or len(partial) > MAX_LINE else partial.rfind(b"\n") + 1
        prefix = f"{rank}: ".encode()
        lines = bytes(partial[:end]).split(b"\n")
        text = b"".join(prefix + line + b"\n" for line in lines[:-1]) + (prefix + lines[-1] if lines[-1] else b"")
        del partial[:end]
        if eof:
            del self._partial[stream, rank]
        return text


def _bytes(event: Event) -> bytes:
    data = event.context.get("data", "")
    if not isinstance(data, str):
        raise FluxresError(f"cannot show output: its data is {type(data).__name__}, not text")
    if event.context.get("encoding") != "base64":
        return data.encode("utf-8", "surrogateescape")
    from binascii import Error, a2b_base64

    try:
        return a2b_base64(data, strict_mode=True)
    except Error as error:
        raise FluxresError(f"cannot show output: its data is not base64: {error}") from error


def _log_line(event: Event, zero: float) -> str:
    context = event.context
    level = context.get("level")
    word = _LEVELS[level] if isinstance(level, int) and 0 <= level < len(_LEVELS) else ""
    rank = context.get("rank")
    where = f"[{rank}]" if isinstance(rank, int) and rank >= 0 else ""
    parts = [f"{event.timestamp - zero:.3f}s: fluxres-shell{where}"]
    parts += [str(part) for part in (word, context.get("component")) if part]
    text = ": ".join([*parts, str(context.get("message", ""))])
    return "".join(f"{printable(line)}\n" for line in text.split("\n"))
