"""For tests of commands that run in the test's own process."""

from __future__ import annotations

from typing import Protocol


class Run(Protocol):
    """Runs `fluxres` with these arguments: its exit status, stdout and stderr."""

    def __call__(self, *argv: str) -> tuple[int, str, str]: ...
