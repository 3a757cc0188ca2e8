"""What a broker that failed said last, as its log has it."""

from __future__ import annotations

import os
import re
from typing import Final

LAST_WORDS: Final = 65536
"""Bytes at the end of a log, in which the reason for a broker's failure is looked for."""
WORDS: Final = "fluxres-broker: "
"""How a line begins in which a broker says why it ends. An orphan of an earlier start may write to the same log."""
TAKEN: Final = re.compile(r"another broker \(pid (\d+)\) is running on it$")
"""Why a broker ends whose statedir is in use."""


def last_words(log: str, start: int, config: str) -> str:
    """`: ` and why a broker ended, by what is in the file `log` from `start` on; else the last line; `` for nothing.

    Where another broker runs in its place, this says what can be done; `config` is where the configuration is. Raises
    OSError.
    """
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - LAST_WORDS))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith(WORDS)), lines[-1] if lines else "")
    taken = TAKEN.search(last)
    if taken is not None:
        last += (
            f"; end it with kill {taken[1]}, or start only the brokers that are missing, each with "
            f"fluxres-broker --config {config} --rank RANK"
        )
    return f": {last}" if last else ""
