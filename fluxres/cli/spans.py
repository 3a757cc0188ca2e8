"""Text with styles, as lines of a screen: what `fluxres top` draws before a terminal comes into it. Pure.

A style is a word for what the text means (`down`, `selected`), not for how it looks. Widths are in terminal cells.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from fluxres.cli.common import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

CUT: Final = "+"
"""The last character of what was cut short, as flux-jobs(1) has it."""


class Span(NamedTuple):
    """Text of one style."""

    text: str
    style: str = ""


Line: TypeAlias = tuple[Span, ...]


def cells(text: str) -> int:
    """How many cells of a terminal `text` takes."""
    return len(text) if text.isascii() else sum(_cells(char) for char in text)


def clip(text: str, width: int) -> str:
    """`text`, if need be cut to `width` cells, of which the last then says so."""
    if cells(text) <= width:
        return text
    room, kept = width - 1, []
    for char in text:
        room -= _cells(char)
        if room < 0:
            break
        kept.append(char)
    return "".join(kept) + CUT if width > 0 else ""


def column(text: str, width: int, *, right: bool = False) -> str:
    """`text` as a column of exactly `width` cells, without characters that could drive a terminal."""
    shown = clip(printable(text), width)
    space = " " * (width - cells(shown))
    return space + shown if right else shown + space


def line(*parts: Span | str) -> Line:
    """A line of these parts."""
    return tuple(part if isinstance(part, Span) else Span(part) for part in parts)


def length(of: Line) -> int:
    """How many cells a line takes."""
    return sum(cells(span.text) for span in of)


def fitted(whole: Line, width: int) -> Line:
    """A line cut to `width` cells."""
    if length(whole) <= width:
        return whole
    kept: list[Span] = []
    for text, style in whole:
        room = width - length(tuple(kept))
        kept.append(Span(text if cells(text) < room else clip(text + " ", room), style))
        if cells(text) >= room:
            break
    return tuple(kept)


def apart(left: Line, right: Line, width: int) -> Line:
    """Two lines in one of `width` cells, one at each end; what is too long is cut, the left one first."""
    left = fitted(left, max(0, width - length(right) - 1))
    return fitted((*left, Span(" " * (width - length(left) - length(right))), *right), width)


def restyled(whole: Line, style: str, width: int) -> Line:
    """A line in one style, `width` cells wide."""
    text = plain(whole)
    return (Span(clip(text, width) + " " * (width - cells(text)), style),)


def wrapped(words: Iterable[Span], width: int, indent: int = 0) -> list[Line]:
    """Words laid out in lines of at most `width` cells, separated by spaces, all but the first line indented."""
    lines: list[Line] = []
    current: Line = ()
    for word in words:
        if current and length(current) + 1 + cells(word.text) > width:
            lines.append(fitted(current, width))
            current = (Span(" " * indent),)
        elif current:
            current = (*current, Span(" "))
        current = (*current, word)
    return [*lines, fitted(current, width)] if current else lines


def plain(whole: Line) -> str:
    """A line's text."""
    return "".join(span.text for span in whole)


def _cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
