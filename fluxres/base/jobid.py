"""Job ids: FLUIDs, their text forms, and the clock that draws them (RFC 19).

A FLUID is a 64-bit integer: 40 bits of milliseconds since the instance's epoch, 14 bits of generator id, 10
bits of sequence. Ids drawn later are larger, so they sort by submission. Text forms, told apart by how they
begin or what they hold: decimal, hex (`0x…`), dothex (`0017.e9fb.8df1.6c2e`), the KVS path (`job.` and
dothex), and F58 (`ƒuZZybuNNy`, or `fuZZybuNNy` where only ASCII can be typed). RFC 19's words and emoji are
not read.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from fluxres.base.errors import FluxresError

JobId = NewType("JobId", int)
"""A job's FLUID."""

TIMESTAMP_BITS: Final = 40
GENERATOR_BITS: Final = 14
SEQUENCE_BITS: Final = 10

MAX_JOBID: Final = 2 ** (TIMESTAMP_BITS + GENERATOR_BITS + SEQUENCE_BITS) - 1
MAX_TIMESTAMP_MS: Final = 2**TIMESTAMP_BITS - 1
MAX_GENERATOR_ID: Final = 2**GENERATOR_BITS - 1
_MAX_SEQUENCE: Final = 2**SEQUENCE_BITS - 1
_TIMESTAMP_SHIFT: Final = GENERATOR_BITS + SEQUENCE_BITS

_F58_DIGITS: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_F58_VALUES: Final = {digit: value for value, digit in enumerate(_F58_DIGITS)}
_F58_MAX_DIGITS: Final = 11
"""58**11 is above 2**64: a longer one can only be padded."""

_DECIMAL: Final = re.compile(r"[0-9]{1,20}")
_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_DOTHEX: Final = re.compile(r"(?:[0-9a-fA-F]{4}\.){3}[0-9a-fA-F]{4}")
_KVS_PREFIX: Final = "job."
_MAX_SHOWN: Final = 64


def parse_jobid(text: str) -> JobId:
    """Read a jobid in any of its text forms, blanks around it ignored; raises ValueError naming the text."""
    word = text.strip()
    if "." in word:
        digits = word.removeprefix(_KVS_PREFIX)
        value = int(digits.replace(".", ""), 16) if _DOTHEX.fullmatch(digits) else None
    elif word.startswith(("ƒ", "f")):
        value = _parse_f58(word[1:])
    elif _HEX.fullmatch(word):
        value = int(word, 16)
    else:
        value = int(word) if _DECIMAL.fullmatch(word) else None
    if value is None or value > MAX_JOBID:
        shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
        raise ValueError(f"cannot parse jobid {shown!r}: it is no jobid in decimal, 0x hex, dothex or F58 (ƒ…)")
    return JobId(value)


def f58(jobid: int, ascii: bool = False) -> str:  # noqa: A002
    """The id in base 58 behind `ƒ`, or behind `f` when `ascii`."""
    rest = _checked(jobid)
    digits = ""
    while rest or not digits:
        rest, digit = divmod(rest, 58)
        digits = _F58_DIGITS[digit] + digits
    return ("f" if ascii else "ƒ") + digits


def dothex(jobid: int) -> str:
    """The id as four groups of four hex digits: of fixed width, so that it sorts as the number does."""
    digits = f"{_checked(jobid):016x}"
    return f"{digits[:4]}.{digits[4:8]}.{digits[8:12]}.{digits[12:]}"


def kvs_path(jobid: int, *parts: str) -> str:
    """The KVS key of the job's directory, or of what `parts` name in it: `job.0017.e9fb.8df1.6c2e.R`."""
    return ".".join((f"{_KVS_PREFIX}{dothex(jobid)}", *parts))


def fluid_timestamp_ms(jobid: int, epoch_ms: int) -> int:
    """When the id was drawn, in milliseconds since the Unix epoch; `epoch_ms` is that of its clock."""
    return (_checked(jobid) >> _TIMESTAMP_SHIFT) + epoch_ms


class FluidClock:
    """Draws jobids that only ever increase. It reads no clock: the caller says what time it is.

    Ids stay above `last` (the largest id known to be taken, 0 for none) when the system's clock steps back,
    and when a millisecond's 1024 ids are used up: both borrow from the milliseconds ahead instead of waiting
    for them.
    """

    __slots__ = ("_epoch_ms", "_generator_id", "_last")

    def __init__(self, generator_id: int, epoch_ms: int, last: int = 0) -> None:
        """Start above `last`; raises ValueError when the generator id or `last` is out of range."""
        if not 0 <= generator_id <= MAX_GENERATOR_ID:
            raise ValueError(f"cannot use generator id {generator_id}: it must be from 0 to {MAX_GENERATOR_ID}")
        self._generator_id = generator_id
        self._epoch_ms = epoch_ms
        self._last = _checked(last)

    def next(self, now_ms: int) -> JobId:
        """Draw an id; `now_ms` is the time in milliseconds since the Unix epoch.

        Raises FluxresError when the 40 bits of milliseconds are used up, some 34 years after the epoch.
        """
        last = self._last
        stamp = max(now_ms - self._epoch_ms, last >> _TIMESTAMP_SHIFT)
        drawn = self._compose(stamp)
        if drawn <= last:  # this generator, or one with a larger id, was already here in this millisecond
            ours = (last >> SEQUENCE_BITS) & MAX_GENERATOR_ID == self._generator_id
            drawn = last + 1 if ours and last & _MAX_SEQUENCE < _MAX_SEQUENCE else self._compose(stamp + 1)
        if drawn > MAX_JOBID:
            raise FluxresError(
                f"cannot draw a jobid: its {TIMESTAMP_BITS}-bit timestamp is used up "
                f"(is the clock right? {now_ms} ms, epoch {self._epoch_ms} ms)"
            )
        self._last = drawn
        return JobId(drawn)

    def _compose(self, stamp: int) -> int:
        """The first id of this generator in the millisecond `stamp`."""
        return stamp << _TIMESTAMP_SHIFT | self._generator_id << SEQUENCE_BITS


def _checked(jobid: int) -> int:
    if not 0 <= jobid <= MAX_JOBID:
        raise ValueError(f"cannot use {jobid} as a jobid: it must be from 0 to {MAX_JOBID}")
    return jobid


def _parse_f58(digits: str) -> int | None:
    """The value of base 58 `digits`, which may exceed 64 bits; None when they are no such number."""
    if not 1 <= len(digits) <= _F58_MAX_DIGITS:
        return None
    value = 0
    for digit in digits:
        if digit not in _F58_VALUES:
            return None
        value = value * 58 + _F58_VALUES[digit]
    return value
