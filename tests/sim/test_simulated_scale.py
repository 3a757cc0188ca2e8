"""A thousand brokers: they come up, lose rank 0, and recover; in a time that follows the tree's depth."""

from __future__ import annotations

from functools import partial

from fluxres.testing.scale import DOWN, measure, show
from fluxres.testing.simulate import simulate

SIZE = 1000


def test_a_thousand_brokers() -> None:
    """The figures are virtual, and so the same everywhere; those of real time and memory are not looked at."""
    report = simulate(partial(measure, SIZE))
    small = simulate(partial(measure, 64, jobs=8))
    assert report.levels == small.levels == 2
    assert f"{SIZE} brokers, 2 levels" in show(report)
    assert report.bring_up.seconds <= 1.5 * small.bring_up.seconds
    assert report.bring_up.messages < 30 * SIZE
    assert report.recovery.messages < 60 * SIZE
    assert DOWN < report.recovery.seconds < DOWN + 2
