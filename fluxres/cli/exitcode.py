"""From a wait status, as waitpid(2) and RFC 21's `finish` event give it, to an exit code. Pure."""

from __future__ import annotations

from typing import Final

SIGNAL_BASE: Final = 128
"""What a shell adds to a signal's number to make an exit code of it."""
_SIGNAL_MASK: Final = 0x7F


def exit_code(status: int) -> int:
    """The exit code that a shell would have for `status`: 128+N for death by signal N."""
    signum = status & _SIGNAL_MASK
    return SIGNAL_BASE + signum if signum else (status >> 8) & 0xFF


def status_text(status: int) -> str:
    """A wait status other than 0 in words: `task(s) exited with exit code 1`, `task(s) Terminated`."""
    code = exit_code(status)
    if code <= SIGNAL_BASE:
        return f"task(s) exited with exit code {code}"
    import signal

    try:
        words = signal.strsignal(code - SIGNAL_BASE)
    except ValueError:  # above the kernel's last signal: a plain exit code after all
        words = None
    return f"task(s) {words}" if words else f"task(s) exited with exit code {code}"
