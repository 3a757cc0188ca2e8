"""Running a simulation: Trio on a virtual clock that jumps to the next thing that is going to happen.

Thousands of brokers are millions of objects that live as long as the simulation. Python's cyclic garbage collector
would walk through all of them again and again, and take most of the time; so it looks at the old ones rarely.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Final, ParamSpec, TypeVar

import trio
import trio.testing

P = ParamSpec("P")
T = TypeVar("T")

YOUNG: Final = 50_000
"""Objects made before the collector looks at the young ones (Python's default is 700)."""
OLDER: Final = 20
OLD: Final = 1000
"""How many times younger ones are looked at before the older, and the old ones, are."""


def simulate(main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` in virtual time; returns what it returns."""
    with _rare_collections():
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def simulated(main: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """The async function `main` (a test, say) as one that is run in virtual time."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return simulate(partial(main, *args, **kwargs))

    return run


@contextmanager
def _rare_collections() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(YOUNG, OLDER, OLD)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
