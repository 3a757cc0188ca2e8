"""Running a simulation: Trio on a virtual clock that jumps to the next thing that is going to happen, and by a seed.

One seed is one history: Trio runs what can run at the same moment in an order that it draws, and that is drawn from the
seed here. (It has no public way to that; the Hypothesis plug-in of Trio takes the same one.)

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
from trio._core import _run as scheduler

P = ParamSpec("P")
T = TypeVar("T")

YOUNG: Final = 50_000
"""Objects made before the collector looks at the young ones (Python's default is 700)."""
OLDER: Final = 20
OLD: Final = 1000
"""How many times younger ones are looked at before the older, and the old ones, are."""
_DETERMINISTIC: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"
"""Trio's flag for sorting the tasks that can run before their order is drawn."""


def simulate(main: Callable[[], Awaitable[T]], *, seed: int = 0) -> T:
    """Run `main` in virtual time; returns what it returns."""
    with _rare_collections(), _drawn_from(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def simulated(main: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """The async function `main` (a test, say) as one that is run in virtual time."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return simulate(partial(main, *args, **kwargs))

    return run


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    before: object = getattr(scheduler, _DETERMINISTIC)
    state = scheduler._r.getstate()
    setattr(scheduler, _DETERMINISTIC, True)
    scheduler._r.seed(seed)
    try:
        yield
    finally:
        setattr(scheduler, _DETERMINISTIC, before)
        scheduler._r.setstate(state)


@contextmanager
def _rare_collections() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(YOUNG, OLDER, OLD)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
