"""Sets of non-negative integer ids, such as ranks and cores, and their string form (RFC 22).

The string form is strict, as in RFC 22: decimal ids without leading zeros, ascending, each once, separated by
commas; two or more consecutive ids may be written as a range; square brackets around the whole are optional.
`""` and `[]` are the empty set. An `IdSet` never changes, so it can be shared, hashed and used as a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, final

MAX_ID: Final = 2**32 - 2
"""The largest id (flux-core keeps ids in an unsigned 32-bit integer and reserves its last value)."""

MAX_ID_COUNT: Final = 1 << 18
"""The most ids in one set. A short string can name a vast range: this bounds what reading it may cost."""

_MAX_DIGITS: Final = len(str(MAX_ID))
_ELEMENT: Final = re.compile(rf"(0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})(?:-(0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}}))?")
_MAX_SHOWN: Final = 100


@final
class IdSet:
    """An immutable set of ids, iterated in ascending order."""

    __slots__ = ("_ids",)

    _ids: frozenset[int]

    def __init__(self, ids: Iterable[int] = ()) -> None:
        """Make a set of `ids`, in any order; raises ValueError for what is no id, and for too many."""
        given = list(islice(ids, MAX_ID_COUNT + 1))
        for value in given:
            if type(value) is not int or not 0 <= value <= MAX_ID:
                raise ValueError(f"cannot make an idset with {value!r}: ids are integers from 0 to {MAX_ID}")
        _check_count(len(given))
        self._ids = frozenset(given)

    @classmethod
    def parse(cls, text: str) -> IdSet:
        """Read the string form, brackets or not; raises ValueError naming the text and what is wrong."""
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        ids: set[int] = set()
        last = -1
        for element in inner.split(",") if inner else ():
            low, high = _parse_element(element, text)
            if low <= last:
                raise _bad(text, f"{element!r} is out of order, ids must ascend")
            if len(ids) + high - low + 1 > MAX_ID_COUNT:
                raise _bad(text, f"more than {MAX_ID_COUNT} ids")
            ids.update(range(low, high + 1))
            last = high
        return _make(frozenset(ids))

    def first(self) -> int:
        """The smallest id; raises ValueError when the set is empty."""
        if not self._ids:
            raise ValueError("cannot take the first id: the idset is empty")
        return min(self._ids)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Runs of consecutive ids in ascending order, as (first, last), both included."""
        run: tuple[int, int] | None = None
        for value in self:
            if run is not None and value == run[1] + 1:
                run = (run[0], value)
                continue
            if run is not None:
                yield run
            run = (value, value)
        if run is not None:
            yield run

    def isdisjoint(self, other: IdSet) -> bool:
        """True when no id is in both sets."""
        return self._ids.isdisjoint(other._ids)

    def __str__(self) -> str:
        """The most compact string form, without brackets: `0-3,7`."""
        return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ranges())

    def __repr__(self) -> str:
        return f"IdSet.parse({str(self)!r})"

    def __or__(self, other: IdSet) -> IdSet:
        union = self._ids | other._ids
        _check_count(len(union))
        return _make(union)

    def __and__(self, other: IdSet) -> IdSet:
        return _make(self._ids & other._ids)

    def __sub__(self, other: IdSet) -> IdSet:
        return _make(self._ids - other._ids)

    def __le__(self, other: IdSet) -> bool:
        """True when every id of this set is in `other`."""
        return self._ids <= other._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._ids))

    def __contains__(self, value: object) -> bool:
        return value in self._ids

    def __eq__(self, other: object) -> bool:
        return self._ids == other._ids if isinstance(other, IdSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._ids)


def _make(ids: frozenset[int]) -> IdSet:
    """An IdSet of ids that are known to be good, without checking each again."""
    made = IdSet.__new__(IdSet)
    made._ids = ids
    return made


def _check_count(count: int) -> None:
    if count > MAX_ID_COUNT:
        raise ValueError(f"cannot make an idset: more than {MAX_ID_COUNT} ids")


def _parse_element(element: str, text: str) -> tuple[int, int]:
    """Read one id or range into (first, last), both included; `text` is the whole, for the error."""
    match = _ELEMENT.fullmatch(element)
    if match is None:
        raise _bad(text, f"{element[:_MAX_SHOWN]!r} is no id or range (no leading zeros; write 7 or 0-3)")
    low = int(match[1])
    high = low if match[2] is None else int(match[2])
    if match[2] is not None and high <= low:
        raise _bad(text, f"the range {element!r} does not ascend")
    if high > MAX_ID:
        raise _bad(text, f"{high} is above the largest id {MAX_ID}")
    return low, high


def _bad(text: str, why: str) -> ValueError:
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return ValueError(f"cannot parse idset {shown!r}: {why}")
