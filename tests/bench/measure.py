"""What a measurement is, and what the measurements share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.system.kit import Instance


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """`run` measures once, in a directory of its own, and returns a figure in `unit`."""

    what: str
    run: Callable[[Path], float]
    unit: str
    goal: str
    peers: str = ""
    digits: int = 1
    runs: int = 0


@contextlib.contextmanager
def instance(path: Path, *, cores: int = 2) -> Iterator[Instance]:
    """A running instance, ended at the end."""
    made = Instance(path, cores=cores)
    made.start()
    try:
        yield made
    finally:
        made.clean_up()


def seconds(function: Callable[[], object]) -> float:
    """How long `function` takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
