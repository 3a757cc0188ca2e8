"""Histograms against a naive count, and the bounds that are metrics' for good."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.meter import OUTAGES, QUICK, WAITS, Histogram


@given(st.lists(st.floats(0, 20)), st.sets(st.floats(0.001, 10), min_size=1).map(sorted))
def test_counts_are_those_of_a_naive_count(values: list[float], bounds: list[float]) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    expected = [sum(value <= bound for value in values) for bound in bounds]
    assert histogram.cumulative() == (*expected, len(values))
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_a_bound_is_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.1, 2.0, 2.1):
        histogram.observe(value)
    assert histogram.cumulative() == (2, 4, 5)


@pytest.mark.parametrize("bounds", [(), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Histogram(bounds)


@pytest.mark.parametrize("bounds", [QUICK, WAITS, OUTAGES])
def test_the_bounds_that_there_are(bounds: tuple[float, ...]) -> None:
    assert Histogram(bounds).bounds == bounds
    assert len(bounds) <= 16  # a series each, for whoever keeps them
