"""Ordered lists of host names, and their compact string form (RFC 29).

The string form is a comma separated list of `prefix[idlist]suffix`, as in `node[00-03,7],login1`. Order and
duplicates are kept. Leading zeros of an idlist's first element give all its ids that width; an element with
more zeros of its own keeps them, because flux-core writes such lists. Host names are printable ASCII without
blanks, brackets and commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeAlias, final, overload

MAX_HOSTS: Final = 1 << 17
"""The most hosts in one list. A short string can name a vast range: this bounds what reading it may cost."""

MAX_HOST_LENGTH: Final = 255
"""The most characters in a host name, as in DNS."""

_MAX_DIGITS: Final = 18
"""Longer digit runs are text, not ids."""

_CHARS: Final = r"[!-+\--Z\\^-~]"  # printable ASCII but for comma and square brackets
_HOST: Final = re.compile(rf"{_CHARS}{{1,{MAX_HOST_LENGTH}}}")
_AFFIX: Final = rf"{_CHARS}{{0,{MAX_HOST_LENGTH}}}"
_EXPRESSION: Final = re.compile(rf"(?P<prefix>{_AFFIX})(?:\[(?P<idlist>[0-9,-]+)\](?P<suffix>{_AFFIX}))?(?:,|\Z)")
_ELEMENT: Final = re.compile(rf"([0-9]{{1,{_MAX_DIGITS}}})(?:-([0-9]{{1,{_MAX_DIGITS}}}))?")
_DIGITS: Final = re.compile("[0-9]+")
_MAX_SHOWN: Final = 100

_Slice: TypeAlias = "slice[int | None, int | None, int | None]"


@final
class Hostlist:
    """An immutable, ordered list of host names that may repeat."""

    __slots__ = ("_hosts", "_positions")

    _hosts: tuple[str, ...]
    _positions: dict[str, int] | None

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        """Make a list of host names (`parse` reads the compact form); raises ValueError for a bad one."""
        given = tuple(islice(hosts, MAX_HOSTS + 1))
        if len(given) > MAX_HOSTS:
            raise ValueError(f"cannot make a hostlist: more than {MAX_HOSTS} hosts")
        for host in given:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"cannot make a hostlist with {host[: MAX_HOST_LENGTH + 1]!r}: a host name is at most "
                    f"{MAX_HOST_LENGTH} printable ASCII characters without blanks, commas and square brackets"
                )
        self._hosts = given
        self._positions = None

    @classmethod
    def parse(cls, text: str) -> Hostlist:
        """Read the string form; empty expressions are no host. Raises ValueError naming what is wrong."""
        hosts: list[str] = []
        position = 0
        while position < len(text):
            match = _EXPRESSION.match(text, position)
            if match is None:
                rest = text[position : position + _MAX_SHOWN]
                raise _bad(
                    text,
                    f"no host expression at {rest!r} (write node7, or node[0-3,7] with one pair of brackets)",
                )
            prefix, idlist, suffix = match.group("prefix", "idlist", "suffix")
            if idlist is not None:
                room = MAX_HOSTS - len(hosts)
                hosts.extend(f"{prefix}{digits}{suffix}" for digits in _expand(idlist, room, text))
            elif prefix:
                hosts.append(prefix)
            position = match.end()
        return cls(hosts)

    def find(self, host: str) -> int | None:
        """The index of the first occurrence of `host`, None when it is not in the list."""
        if self._positions is None:
            last = len(self._hosts) - 1
            self._positions = {name: last - index for index, name in enumerate(reversed(self._hosts))}
        return self._positions.get(host)

    def __str__(self) -> str:
        """The compact string form: neighbours that differ in one number share brackets."""
        expressions = []
        index = 0
        while index < len(self._hosts):
            expression, index = _compact(self._hosts, index)
            expressions.append(expression)
        return ",".join(expressions)

    def __repr__(self) -> str:
        return f"Hostlist.parse({str(self)!r})"

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __contains__(self, host: object) -> bool:
        return isinstance(host, str) and self.find(host) is not None

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: _Slice) -> Hostlist: ...
    def __getitem__(self, index: int | _Slice) -> str | Hostlist:
        """The host at `index`, or the list of those in a slice; raises IndexError beyond the ends."""
        return Hostlist(self._hosts[index]) if isinstance(index, slice) else self._hosts[index]

    def __eq__(self, other: object) -> bool:
        return self._hosts == other._hosts if isinstance(other, Hostlist) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._hosts)


def _expand(idlist: str, room: int, text: str) -> Iterator[str]:
    """The ids of an idlist as digits, zeros included, `room` at most; `text` is the whole, for errors."""
    first_width: int | None = None
    for element in idlist.split(","):
        match = _ELEMENT.fullmatch(element)
        if match is None:
            raise _bad(text, f"{element[:_MAX_SHOWN]!r} is no id or range of at most {_MAX_DIGITS} digits")
        low, high = match[1], match[2] or match[1]
        width = len(low) if low.startswith("0") else 0
        first_width = width if first_width is None else first_width
        count = int(high) - int(low) + 1
        if count < 1:
            raise _bad(text, f"the range {element!r} descends")
        room -= count
        if room < 0:
            raise _bad(text, f"more than {MAX_HOSTS} hosts")
        for number in range(int(low), int(high) + 1):
            yield f"{number:0{max(width, first_width)}d}"


def _compact(hosts: tuple[str, ...], start: int) -> tuple[str, int]:
    """One expression for as many hosts from `start` on as it can hold, and the index of the first one after.

    Brackets go around the last number in which the host may differ from the next one, all else the same.
    """
    host = hosts[start]
    following = hosts[start + 1] if start + 1 < len(hosts) else ""
    for digits in reversed(list(_DIGITS.finditer(host))):
        prefix, suffix = host[: digits.start()], host[digits.end() :]
        width = len(digits[0]) if digits[0].startswith("0") else 0
        if len(digits[0]) > _MAX_DIGITS or _number(following, prefix, suffix, width) is None:
            continue
        ids = [int(digits[0])]
        while start + len(ids) < len(hosts):
            number = _number(hosts[start + len(ids)], prefix, suffix, width)
            if number is None:
                break
            ids.append(number)
        return f"{prefix}[{_idlist(ids, width)}]{suffix}", start + len(ids)
    return host, start + 1


def _number(host: str, prefix: str, suffix: str, width: int) -> int | None:
    """The number between prefix and suffix, if `host` has just that there, padded with zeros to `width`."""
    if not (host.startswith(prefix) and host.endswith(suffix)):
        return None
    digits = host[len(prefix) : len(host) - len(suffix)]
    if not (digits.isdecimal() and len(digits) <= _MAX_DIGITS):
        return None
    number = int(digits)
    return number if f"{number:0{width}d}" == digits else None


def _idlist(ids: list[int], width: int) -> str:
    """The ids as an idlist, consecutive ones as ranges, each padded with zeros to `width`."""
    runs = [(ids[0], ids[0])]
    for number in ids[1:]:
        low, high = runs[-1]
        if number == high + 1:
            runs[-1] = (low, number)
        else:
            runs.append((number, number))
    return ",".join(f"{low:0{width}d}" if low == high else f"{low:0{width}d}-{high:0{width}d}" for low, high in runs)


def _bad(text: str, why: str) -> ValueError:
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return ValueError(f"cannot parse hostlist {shown!r}: {why}")
