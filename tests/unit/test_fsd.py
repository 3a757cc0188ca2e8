"""fluxres.base.fsd: durations of RFC 23, read and written."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.fsd import format_fsd, parse_fsd


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0d", 0.0),
        ("0.5", 0.5),
        ("5s", 5.0),
        ("250ms", 0.25),
        (".5m", 30.0),
        ("1.h", 3600.0),
        ("1.5d", 129600.0),
        ("1e3", 1000.0),
        ("1E-3s", 0.001),
        ("+2m", 120.0),
        (" 2m", 120.0),
        ("0x10", 16.0),
        ("0x1p2m", 240.0),
        ("inf", math.inf),
        ("infinity", math.inf),
        ("INFINITY", math.inf),
    ],
)
def test_parse(text: str, seconds: float) -> None:
    assert parse_fsd(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "s",
            "-1",
            "-0",
            "1 s",
            "1s ",
            "1S",
            "1M",
            "1sec",
            "1.0f",
            "1m30s",
            "1:30",
            "nan",
            "infinitys",
        ),
        *("-inf", "1e", ".", "0x", "1_000", "٣", "in", "infs", "1e999", "1e308d", "0x1p99999", "1\n"),
    ],
)
def test_bad_durations_are_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot parse duration") as caught:
        parse_fsd(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0621, "62.1ms"),
        (0.0000123, "0.0123ms"),
        (0.1, "0.1s"),
        (1.5, "1.5s"),
        (5, "5s"),
        (59.5, "59.5s"),
        (60, "1m"),
        (62, "1.03333m"),
        (120, "2m"),
        (3600, "1h"),
        (11700, "3.25h"),
        (86400, "1d"),
        (103680, "1.2d"),
        (math.inf, "infinity"),
    ],
)
def test_format(seconds: float, text: str) -> None:
    assert format_fsd(seconds) == text


@pytest.mark.parametrize("seconds", [-1.0, -math.inf, math.nan])
def test_bad_seconds_are_refused_by_value(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^cannot format duration") as caught:
        format_fsd(seconds)
    assert repr(seconds) in str(caught.value)


@given(st.floats(1e-9, 1e12))
def test_what_is_written_reads_back_to_six_digits(seconds: float) -> None:
    assert parse_fsd(format_fsd(seconds)) == pytest.approx(seconds, rel=1e-5)
