"""A command on a terminal of its own, for tests: what it shows, keys for it, and how it leaves the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

PATIENCE = 60.0
ENTER_SCREEN = b"\x1b[?1049h"
LEAVE_SCREEN = b"\x1b[?1049l"
HIDE_CURSOR = b"\x1b[?25l"
SHOW_CURSOR = b"\x1b[?25h"
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?]*[@-~]|[()][A-Z0-9]|.)")


class OnTerminal:
    """`fluxres ARGS` whose standard streams are a terminal of `columns` by `lines`. A context manager: it kills it."""

    def __init__(
        self,
        *args: str,
        env: Mapping[str, str],
        columns: int = 90,
        lines: int = 30,
        term: str = "xterm-256color",
        runner: Sequence[str] = (),
    ) -> None:
        """`runner` are the words of a command that runs it."""
        self.ours, self._theirs = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.ours)
        self.raw = b""
        self._from = 0
        # The leader of a new session gets the first terminal that it opens as its own.
        take = ("sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._theirs))
        self.process = subprocess.Popen(
            [*take, *runner, sys.executable, "-m", "fluxres.cli.main", *args],
            start_new_session=True,
            env={**env, "TERM": term},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self.ours)
        os.close(self._theirs)

    @property
    def attributes(self) -> list[object]:
        """The terminal's settings as they are now."""
        return list(termios.tcgetattr(self.ours))

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size; the kernel tells the command."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Press keys; what is expected from now on has to be shown after this."""
        self._drain(0)
        self._from = len(self.raw)
        os.write(self.ours, keys)

    def expect(self, text: str) -> None:
        """Wait until `text` has been shown since the last key."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} was never shown:\n{self.text[-4000:]}"
            if not self._drain(0.1):
                assert text in self.text, f"it ended without {text!r}:\n{self.text[-4000:]}"

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self._drain(0.1)
        self._drain(0)
        return self.process.returncode

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(signum)

    @property
    def text(self) -> str:
        """What was shown since the last key, without what drives the terminal."""
        return _SEQUENCE.sub(b"", self.raw[self._from :]).decode(errors="replace")

    def _drain(self, timeout: float) -> bool:
        """Take what is there; False where it has ended and nothing is left."""
        ended = self.process.poll() is not None
        while select.select([self.ours], [], [], 0 if ended else timeout)[0]:
            data = os.read(self.ours, 65536)
            self.raw += data
            timeout = 0
        return not ended
