"""What the user of `make demo` sees: plain text, with colours on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

RED, GREEN, BOLD, FAINT = "31", "32", "1", "2"
"""SGR codes (ECMA-48)."""


class Screen:
    """Chapters, lines, and the lines of the verdict."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    def paint(self, code: str, text: str) -> str:
        """`text` in a colour, where there are any."""
        return f"\033[{code}m{text}\033[0m" if self._colours else text

    def step(self, text: str, code: str = BOLD) -> None:
        """Begin the next chapter."""
        self._step += 1
        self.say("\n" + self.paint(code, f"{self._step}. {text}"))

    def say(self, text: str = "") -> None:
        """One line, at once."""
        print(text, flush=True)

    def tell(self, lines: Iterable[str], code: str = "") -> None:
        """Indented lines."""
        for line in lines:
            self.say("   " + (self.paint(code, line) if code else line))

    def check(self, holds: bool, text: str) -> bool:
        """One line of the verdict; returns `holds`."""
        mark = self.paint(GREEN, "  ok    ") if holds else self.paint(f"1;{RED}", "  FAILED")
        self.say(f"{mark}  {text}")
        return holds
