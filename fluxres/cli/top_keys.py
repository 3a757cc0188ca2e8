"""The keys of `fluxres top`: from bytes of a terminal to what is to be shown. Pure.

| key | what it does |
|---|---|
| j, down; k, up; page down, page up; home, end | move among the jobs |
| tab, right, left | show all jobs, only those that run, wait, or have ended |
| / | filter by id, name, user, queue or state: enter keeps it, escape drops it |
| d, enter | details of the selected job, and of what became of those that ended |
| h, ? | help |
| control-l | draw anew |
| q | quit |
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ESCAPE: Final = "\x1b"
SECTIONS: Final = ("", "running", "pending", "ended")
"""What can be shown: everything, or one section."""
PAGE: Final = 10
"""Jobs that page up and page down move by."""
MAX_FILTER: Final = 64
"""Characters of a filter."""
MAX_SEQUENCE: Final = 16
"""Characters of an escape sequence; what is longer is none."""
_SEQUENCES: Final = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "H": "home",
    "F": "end",
    "1~": "home",
    "4~": "end",
    "7~": "home",
    "8~": "end",
    "5~": "pageup",
    "6~": "pagedown",
    "Z": "backtab",
}
_PLAIN: Final = {"\r": "enter", "\n": "enter", "\t": "tab", "\x0c": "redraw", "\x7f": "backspace", "\x08": "backspace"}
_MOVES: Final = {"j": 1, "down": 1, "k": -1, "up": -1, "pagedown": PAGE, "pageup": -PAGE}
_TURNS: Final = {"tab": 1, "right": 1, "backtab": -1, "left": -1}


class Keys:
    """Turns what a terminal sends into names of keys; a character is its own name."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def waiting(self) -> bool:
        """Whether an escape came that may be a key by itself: `flush` when nothing follows soon."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[str]:
        """The keys in what came."""
        text = self._held + self._decoder.decode(data)
        self._held = ""
        names: list[str] = []
        while text:
            if text[0] != ESCAPE:
                names.append(_PLAIN.get(text[0], text[0]))
                text = text[1:]
                continue
            size = _sequence(text)
            if not size:
                self._held = text
                break
            name = _SEQUENCES.get(text[2:size]) if size > 1 else "escape"
            names += [name] if name else []
            text = text[size:]
        return names

    def flush(self) -> list[str]:
        """Nothing followed an escape: it was the key of that name."""
        held, self._held = self._held, ""
        return ["escape"] if held == ESCAPE else []


def _sequence(text: str) -> int:
    """The length of the escape sequence that `text` begins with, 1 for a lone escape, 0 where more may follow."""
    if len(text) == 1:
        return 0
    if text[1] not in "[O":
        return 1
    for index, char in enumerate(text[2:MAX_SEQUENCE], 2):
        if "@" <= char <= "~":
            return index + 1
    return 0 if len(text) < MAX_SEQUENCE else MAX_SEQUENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What the person at the keys wants to see. `selected` is a jobid in decimal, `at` where in the list it was."""

    section: str = ""
    queue: str = ""
    filter: str = ""
    typing: bool = False
    selected: str = ""
    at: int = 0
    details: bool = False
    help: bool = False
    quit: bool = False


def press(controls: Controls, key: str, rows: Sequence[str]) -> Controls:
    """What a key makes of it; `rows` are the jobs that can be selected, in order."""
    if controls.typing:
        return _type(controls, key)
    if controls.help:  # any key closes it
        return replace(controls, help=False, quit=key == "q")
    if key in _MOVES or key in ("home", "end"):
        return _move(controls, key, rows)
    if key in _TURNS:
        index = SECTIONS.index(controls.section) + _TURNS[key]
        return replace(controls, section=SECTIONS[index % len(SECTIONS)])
    match key:
        case "q":
            return replace(controls, quit=True)
        case "d" | "enter":
            return replace(controls, details=not controls.details)
        case "h" | "?":
            return replace(controls, help=True)
        case "/":
            return replace(controls, typing=True)
        case "escape":
            return replace(controls, filter="", selected="", details=False)
    return controls


def _move(controls: Controls, key: str, rows: Sequence[str]) -> Controls:
    if not rows:
        return replace(controls, selected="", at=0)
    if key in ("home", "end"):
        at = 0 if key == "home" else len(rows) - 1
    elif controls.selected in rows:
        at = rows.index(controls.selected) + _MOVES[key]
    else:  # nothing was selected, or what was is gone: go on from its place
        at = controls.at
    at = min(max(at, 0), len(rows) - 1)
    return replace(controls, selected=rows[at], at=at)


def _type(controls: Controls, key: str) -> Controls:
    text = controls.filter
    match key:
        case "enter":
            return replace(controls, typing=False)
        case "escape":
            return replace(controls, typing=False, filter="")
        case "backspace":
            return replace(controls, filter=text[:-1])
    if len(key) == 1 and key.isprintable():
        return replace(controls, filter=(text + key)[:MAX_FILTER])
    return controls
