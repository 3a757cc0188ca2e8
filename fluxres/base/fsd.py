"""Flux Standard Duration: `N[SUFFIX]`, the way people write durations (RFC 23).

N is a non-negative floating point number as C's strtod reads it; the suffix is ms, s, m, h or d, and seconds
where there is none. `infinity` (also `inf`) is a duration without end and takes no suffix.
"""

from __future__ import annotations

import math
import re
from typing import Final

_UNITS: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_DURATION: Final = re.compile(
    r"\s*\+?(?:(?P<hex>0[xX](?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]?[0-9]+)?)"
    r"|(?P<decimal>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?))"
    r"(?P<unit>ms|s|m|h|d|)"
)
_INFINITY: Final = re.compile(r"\s*\+?inf(?:inity)?", re.IGNORECASE)

_MS_BELOW: Final = 0.1
"""Durations shorter than this, in seconds, are written in ms: 62.1ms reads better than 0.0621s."""


def parse_fsd(text: str) -> float:
    """Read a duration into seconds, `math.inf` for an endless one; raises ValueError naming `text`."""
    if _INFINITY.fullmatch(text):
        return math.inf
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"cannot parse duration {text!r}: it must be a number that is not negative with a suffix of "
            "ms, s, m, h or d (none means seconds), or infinity"
        )
    try:
        number = float.fromhex(match["hex"]) if match["hex"] else float(match["decimal"])
    except OverflowError:  # only fromhex raises it, float() answers inf
        number = math.inf
    seconds = number * _UNITS[match["unit"]]
    if math.isinf(seconds):
        raise ValueError(f"cannot parse duration {text!r}: it is too large (write infinity for no limit)")
    return seconds


def format_fsd(seconds: float) -> str:
    """Write `seconds` as flux does: six significant digits in the largest unit that fits: `1.5s`, `3.25h`.

    Raises ValueError when `seconds` is negative or not a number.
    """
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"cannot format duration {seconds!r}: it must not be negative")
    if math.isinf(seconds):
        return "infinity"
    if 0 < seconds < _MS_BELOW:
        return f"{seconds * 1000:.6g}ms"
    if seconds < _UNITS["m"]:
        return f"{seconds:.6g}s"
    for unit, larger in (("m", "h"), ("h", "d")):
        if seconds < _UNITS[larger]:
            return f"{seconds / _UNITS[unit]:.6g}{unit}"
    return f"{seconds / _UNITS['d']:.6g}d"
