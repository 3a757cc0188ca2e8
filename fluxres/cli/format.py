"""The output format language of flux-jobs(1): Python's format syntax with Flux's extensions. Pure.

A format is text with `{field!conversion:spec}` in it. The extensions, as flux-jobs(1) has them:

- conversions `!D` (ISO 8601 date and time), `!d` (a moment, with a strftime spec, then `::` and a text spec),
  `!F` (Flux Standard Duration), `!H` (hours:minutes:seconds) and `!P` (percentage);
- spec suffix `h`: a hyphen for what is empty; suffix `+`: a `+` as the last character of what was cut short;
- before a field, `?:` leaves it out where it is empty in all rows, `+:` makes it as wide as its widest value,
  `?+:` both;
- `sort:key,-key ` at the very beginning: the order of the rows.
"""

from __future__ import annotations

import re
import string
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from math import isinf
from typing import Final, NamedTuple, TypeAlias

from fluxres.cli.common import UsageError, printable

FieldValue: TypeAlias = "str | int | float | bool"
"""What a field of a row can be; the empty string where the row has no such thing."""
Row: TypeAlias = Callable[[str], FieldValue]
"""Gives the value of a field by its name."""

HYPHEN: Final = "-"
CUT: Final = "+"
_MARKERS: Final = ("?+:", "?:", "+:")
"""Longest first: `?+:` ends in `+:`."""
_ISO: Final = "%Y-%m-%dT%H:%M:%S"
_CONVERSIONS: Final = "dDFHPrsa"
WIDTH_DIGITS: Final = 4
"""Digits of a width or precision at most: a column is as long as its spec says, in memory too."""
_TOO_WIDE: Final = re.compile(rf"\d{{{WIDTH_DIGITS + 1},}}")
_SORT: Final = re.compile(r"sort:(?P<keys>[^\s{]*)\s?")
_SPEC: Final = re.compile(
    r"(?P<align>(?:[\s\S])?[<>=^])?(?P<flags>[- +]?z?#?)(?P<zero>0)?(?P<width>\d+)?(?P<group>[_,])?"
    r"(?:\.(?P<precision>\d+))?(?P<type>[bcdeEfFgGnosxX%])?(?P<hyphen>h)?(?P<cut>\+)?"
)


class Part(NamedTuple):
    """One field of a format with the text before it; `field` is empty for the text after the last field."""

    text: str
    field: str = ""
    conversion: str = ""
    spec: str = ""
    marker: str = ""


class Moment:
    """The value of a field under `!d`: seconds since the epoch, 0 where it never happened."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __str__(self) -> str:
        return datetime.fromtimestamp(self._seconds).strftime(_ISO) if self._seconds else ""

    def render(self, spec: str) -> str:
        """Format by a strftime format, followed by `::` and a text spec where a width is wanted."""
        clock, _, outer = spec.partition("::")
        if clock.endswith("h") and not clock.endswith("%h"):
            clock, outer = clock[:-1], "h"
        if not self._seconds:
            return _render_plain("", outer)
        return _render_plain(datetime.fromtimestamp(self._seconds).strftime(clock or _ISO), outer)


class OutputFormat:
    """A parsed format. Raises UsageError for bad syntax or a field that `heading` does not know.

    `heading` gives a field's column title, or None for an unknown one.
    """

    def __init__(self, text: str, heading: Callable[[str], str | None]) -> None:
        self._heading = heading
        sort = _SORT.match(text)
        self.parts = _parse(text[sort.end() :] if sort else text, heading)
        self.sort = parse_sort(sort["keys"], heading) if sort else ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that rows are asked for, those of the sort order included."""
        return (*(part.field for part in self.parts if part.field), *(key for key, _ in self.sort))

    def fit(self, rows: Sequence[Row], *, with_header: bool = True) -> None:
        """Settle the marked fields (`?:`, `+:`, `?+:`) by what the rows hold."""
        self.parts = [fitted for part in self.parts if (fitted := self._fit(part, rows, with_header)) is not None]

    def _fit(self, part: Part, rows: Sequence[Row], with_header: bool) -> Part | None:
        if not part.marker:
            return part
        bare = part._replace(spec="")
        shown = [render(bare, row) for row in rows]
        widest = max((len(text) for text in shown if not is_empty(text)), default=0)
        if not widest and part.marker.startswith("?"):
            return None
        if not part.marker.endswith("+:"):
            return part._replace(marker="")
        title = len(self._heading(part.field) or "") if with_header else 0
        return part._replace(marker="", spec=_widened(part.spec, max(widest, title)))

    def header(self) -> str:
        """The titles, in the columns' widths."""
        return "".join(
            part.text + (format(self._heading(part.field) or "", _title_spec(part.spec)) if part.field else "")
            for part in self.parts
        )

    def row(self, row: Row) -> str:
        """One line, without its newline. Raises UsageError where a spec does not suit a value."""
        return "".join(part.text + (render(part, row) if part.field else "") for part in self.parts)


def parse_sort(keys: str, heading: Callable[[str], str | None]) -> tuple[tuple[str, bool], ...]:
    """Read `key,-key,…` into (field, descending) pairs. Raises UsageError for an unknown field."""
    order: list[tuple[str, bool]] = []
    for word in filter(None, (key.strip() for key in keys.split(","))):
        field = word.removeprefix("-")
        if heading(field) is None:
            raise UsageError(f"cannot sort by {field!r}: there is no such field")
        order.append((field, word.startswith("-")))
    return tuple(order)


def sort_rows(rows: Sequence[Row], order: Sequence[tuple[str, bool]]) -> list[Row]:
    """The rows in `order`; what is empty comes first, numbers before text."""
    ordered = list(rows)
    for field, descending in reversed(order):

        def key(row: Row, field: str = field) -> tuple[int, float, str]:
            value = row(field)
            if isinstance(value, str):
                return (2 if value else 0, 0.0, value)
            return (1, float(value), "")

        ordered.sort(key=key, reverse=descending)
    return ordered


def cut_line(line: str, width: int) -> str:
    """`line`, cut short to `width` columns where that is above zero."""
    return line[: width - 1] + CUT if 0 < width < len(line) else line


def render(part: Part, row: Row) -> str:
    """The text of one field of one row."""
    value = convert(row(part.field), part.conversion, part.field)
    if isinstance(value, str):
        value = printable(value)
    try:
        if isinstance(value, Moment):
            return value.render(part.spec)
        return _render_plain(value, part.spec)
    except ValueError as error:
        raise UsageError(f"cannot format {part.field} as {part.spec!r}: {error}") from error


def convert(value: FieldValue, conversion: str, field: str = "value") -> FieldValue | Moment:
    """Apply a conversion; what is empty stays empty. Raises UsageError for text where it wants a number."""
    if not conversion:
        return value
    if conversion in "rsa":
        return repr(value) if conversion == "r" else ascii(value) if conversion == "a" else str(value)
    if value == "" and conversion != "d":
        return ""
    if isinstance(value, str) and value:
        raise UsageError(f"cannot convert {field} with !{conversion}: {value!r} is not a number")
    number = float(value or 0)
    return _CONVERT[conversion](number)


def duration_text(seconds: float) -> str:
    """A duration as flux-jobs(1) shows it: an FSD to four digits, milliseconds at the finest."""
    if isinf(seconds):
        return "inf"
    if seconds < 0.001:
        return "0s"
    if seconds < 10:
        return f"{seconds:.3f}s"
    for unit, size, bound in (("s", 1, 60), ("m", 60, 3600), ("h", 3600, 86400)):
        if seconds < bound:
            return f"{seconds / size:.4g}{unit}"
    return f"{seconds / 86400:.4g}d"


def is_empty(text: str) -> bool:
    """Whether a field's text says nothing: no text, no time, or the epoch."""
    return text in ("", "0s", "0.0", "0:00:00", "1970-01-01T00:00:00") or text == time.strftime(_ISO, time.localtime(0))


def _clock_text(seconds: float) -> str:
    """H:MM:SS; what is above zero never shows as zero."""
    if isinf(seconds):
        return "inf"
    return str(timedelta(seconds=1 if 0 < seconds < 1 else round(seconds)))


def _percent_text(ratio: float) -> str:
    percent = ratio * 100
    return f"{percent:.2f}%" if 0 < percent < 1 else f"{percent:.3g}%"


_CONVERT: Final[Mapping[str, Callable[[float], FieldValue | Moment]]] = {
    "d": Moment,
    "D": lambda seconds: str(Moment(seconds)),
    "F": duration_text,
    "H": _clock_text,
    "P": _percent_text,
}


def _parse(text: str, heading: Callable[[str], str | None]) -> list[Part]:
    parts: list[Part] = []
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"cannot read format {text!r}: {error}") from error
    for before, name, spec, conversion in pieces:
        if name is None:
            parts.append(Part(before))
            continue
        if heading(name) is None:
            raise UsageError(f"cannot read format {text!r}: there is no field {name!r}")
        if conversion and conversion not in _CONVERSIONS:
            raise UsageError(f"cannot read format {text!r}: there is no conversion !{conversion}")
        if spec and _TOO_WIDE.search(spec):
            raise UsageError(f"cannot read format {text!r}: {spec!r} has a number of more than {WIDTH_DIGITS} digits")
        marker = next((mark for mark in _MARKERS if before.endswith(mark)), "")
        parts.append(Part(before[: len(before) - len(marker)], name, conversion or "", spec or "", marker))
    return parts


def _split(spec: str) -> re.Match[str] | None:
    return _SPEC.fullmatch(spec.partition("::")[2] if "::" in spec else spec)


def _title_spec(spec: str) -> str:
    """A spec's alignment and width: all that concerns its title."""
    match = _split(spec)
    return (match["align"] or "") + (match["width"] or "") if match else ""


def _widened(spec: str, width: int) -> str:
    """`spec` with at least `width` columns, and a precision, where it has one, that cuts nothing."""
    match = _split(spec)
    if match is None:
        return spec
    width = max(width, int(match["width"] or 0))
    precision = f".{max(width, int(match['precision']))}" if match["precision"] else ""
    before = spec.partition("::")[0] + "::" if "::" in spec else ""
    tail = "".join(match[name] or "" for name in ("type", "hyphen", "cut"))
    head = "".join(match[name] or "" for name in ("align", "flags", "zero"))
    return f"{before}{head}{width}{match['group'] or ''}{precision}{tail}"


def _render_plain(value: FieldValue, spec: str) -> str:
    match = _SPEC.fullmatch(spec)
    if match is None:
        return format(value, spec)
    hyphen, cut = match["hyphen"], match["cut"]
    bare = spec[: len(spec) - len(hyphen or "") - len(cut or "")]
    if hyphen and is_empty(str(value)):
        value = HYPHEN
    if isinstance(value, str):  # a number's presentation type means nothing to text
        bare = bare[:-1] if match["type"] and match["type"] != "s" else bare
    elif hyphen or match["type"] == "s" or isinstance(value, bool):
        value = str(value)
    text = format(value, bare)
    return text[:-1] + CUT if cut and len(text) < len(str(value)) else text
