"""The output format language: conversions, specs, markers, sorting."""

from __future__ import annotations

import math
import time

import pytest

from fluxres.base.errors import FluxresError
from fluxres.cli.format import FieldValue, OutputFormat, Row, cut_line, duration_text, parse_sort, sort_rows

TITLES = {"name": "NAME", "n": "N", "t": "TIME", "id.f58": "JOBID", "queue": "QUEUE"}


def row(**values: FieldValue) -> Row:
    return lambda field: values.get(field, "")


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("{n}", 3, "3"),
        ("{n:>4}", 3, "   3"),
        ("{n:<4}|", 3, "3   |"),
        ("{n:4d}", 3, "   3"),
        ("{n:.2f}", 1.239, "1.24"),
        ("{n:.2f}", "", ""),
        ("{n:>4d}", "", "    "),
        ("{n:>5h}", "", "    -"),
        ("{n:>5h}", 7, "    7"),
        ("{n:h}", 0.0, "-"),
        ("{n!F:h}", 0.0, "-"),
        ("{n!F}", 0.0, "0s"),
        ("{n!F}", 1.5, "1.500s"),
        ("{n!F}", 90, "1.5m"),
        ("{n!F}", "", ""),
        ("{n!H}", 3723.4, "1:02:03"),
        ("{n!H}", 0.2, "0:00:01"),
        ("{n!H}", 0, "0:00:00"),
        ("{n!P}", 0.5, "50%"),
        ("{n!P}", 0.0005, "0.05%"),
        ("{n!D}", 0.0, ""),
        ("{n!D}", 1577836860.0, "2020-01-01T00:01:00"),
        ("{n!d:%H:%M}", 60.0, "00:01"),
        ("{n!d:%H:%M::>8}", 60.0, "   00:01"),
        ("{n!d:%H:%M::>8h}", 0.0, "       -"),
        ("{n!d}", 60.0, "1970-01-01T00:01:00"),
        ("{name:.3}", "abcdef", "abc"),
        ("{name:<5.5}|", "ab", "ab   |"),
        ("{name:.3+}", "abcdef", "ab+"),
        ("{name:.3+}", "abc", "abc"),
        ("{name:.3h+}", "abcdef", "ab+"),
        ("{name:*^7}", "abc", "**abc**"),
        ("{n}", True, "True"),
        ("{n:>6}", True, "  True"),
        ("{{{n}}}", 1, "{1}"),
        ("{n!r}", "x", "'x'"),
    ],
)
def test_a_field_is_rendered(text: str, value: FieldValue, expected: str) -> None:
    shown = OutputFormat(text, TITLES.get)
    assert shown.row(lambda _field: value) == expected


@pytest.mark.parametrize("text", ["{nosuch}", "{name", "{name!q}", "{}", "sort:nosuch {name}"])
def test_a_wrong_format_is_refused(text: str) -> None:
    with pytest.raises(FluxresError, match="cannot"):
        OutputFormat(text, TITLES.get)


def test_a_spec_that_does_not_fit_its_value_is_an_error() -> None:
    with pytest.raises(FluxresError, match="cannot format n"):
        OutputFormat("{n:q}", TITLES.get).row(row(n=1))
    with pytest.raises(FluxresError, match="not a number"):
        OutputFormat("{name!F}", TITLES.get).row(row(name="x"))


def test_the_header_has_each_columns_width() -> None:
    shown = OutputFormat("{id.f58:>12} {name:<8.8} {n:>4d} {t!d:%H:%M::>9}", TITLES.get)
    assert shown.header() == "       JOBID NAME        N      TIME"


def test_an_empty_column_goes_where_it_is_marked() -> None:
    shown = OutputFormat("{name:<4} ?:{queue:<8.8} {n}", TITLES.get)
    rows = [row(name="a", n=1), row(name="b", n=2)]
    shown.fit(rows)
    assert shown.header() == "NAME N"
    assert shown.row(rows[0]) == "a    1"


def test_a_marked_column_stays_where_one_row_has_it() -> None:
    shown = OutputFormat("{name:<4} ?:{queue:<8.8}|{n}", TITLES.get)
    shown.fit([row(name="a"), row(queue="batch")])
    assert shown.row(row(name="a", queue="batch", n=1)) == "a    batch   |1"


@pytest.mark.parametrize(
    ("marker", "spec", "widest", "expected"),
    [
        ("+:", ":<4.4", "abcdefgh", "abcdefgh|"),
        ("+:", ":>4", "abcdefgh", "abcdefgh|"),
        ("+:", "", "ab", "ab  |"),
        ("?+:", ":>2", "abcdef", "abcdef|"),
    ],
)
def test_a_marked_column_widens(marker: str, spec: str, widest: str, expected: str) -> None:
    shown = OutputFormat(f"{marker}{{name{spec}}}|", TITLES.get)
    shown.fit([row(name=widest)])
    assert shown.row(row(name=widest)) == expected


def test_a_title_counts_for_the_width_only_where_it_is_shown() -> None:
    narrow = OutputFormat("+:{name}|", TITLES.get)
    narrow.fit([row(name="a")], with_header=False)
    assert narrow.row(row(name="a")) == "a|"


def test_rows_are_sorted_by_several_fields() -> None:
    shown = OutputFormat("sort:name,-n {name}", TITLES.get)
    rows = [row(name="b", n=1), row(name="a", n=1), row(name="a", n=20), row(name="a")]
    assert shown.sort == (("name", False), ("n", True))
    assert [(r("name"), r("n")) for r in sort_rows(rows, shown.sort)] == [
        ("a", 20),
        ("a", 1),
        ("a", ""),
        ("b", 1),
    ]
    assert parse_sort(" name , ,-n", TITLES.get) == shown.sort
    assert shown.row(rows[0]) == "b"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0001, "0s"), (9.99, "9.990s"), (59.996, "60s"), (3000, "50m"), (90000, "1.042d"), (math.inf, "inf")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_lines_are_cut() -> None:
    assert cut_line("abcdef", 4) == "abc+"
    assert cut_line("abcd", 4) == "abcd"
    assert cut_line("abcdef", -1) == "abcdef"
