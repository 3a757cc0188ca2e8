"""Job constraints: which ranks a job may run on (RFC 31).

A constraint is a JSON object with one operator: `properties`, `hostlist`, `ranks`, or `and`, `or`, `not`
over more of them. Reading one is where it is checked; matching cannot fail. The parsed form is immutable
and hashable, so that the pool remembers which ranks satisfy it. As in flux-core, a host name counts as a
property of its host.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

from fluxres.base.hostlist import Hostlist
from fluxres.base.idset import IdSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fluxres.base.json import JsonValue

MAX_CONSTRAINT_DEPTH: Final = 32
"""How deep constraints may nest."""

MAX_CONSTRAINT_ITEMS: Final = 1 << 17
"""The most operators, properties, hosts and ranks in one constraint, all counted together."""

_NOT_IN_PROPERTIES: Final = frozenset("!&'\"`|()")  # RFC 20; `^` is allowed here, it negates


class Conditional(Enum):
    """The operators over constraints. An empty `and` or `or` matches everything, an empty `not` nothing."""

    AND = "and"
    OR = "or"
    NOT = "not"


@dataclass(frozen=True, slots=True)
class Properties:
    """The rank has all of `names`; one that begins with `^` is a property that it must not have."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hosts:
    """The rank's host is one of these."""

    hosts: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank is one of these."""

    ranks: IdSet


@dataclass(frozen=True, slots=True)
class Combined:
    """A conditional over further constraints; `not` negates the `and` of them."""

    operator: Conditional
    parts: tuple[Constraint, ...]


Constraint: TypeAlias = "Properties | Hosts | Ranks | Combined"

ANY_RANK: Final = Combined(Conditional.AND, ())
"""The constraint that every rank satisfies: what `{}` means."""


def parse_constraint(value: JsonValue) -> Constraint:
    """Read an RFC 31 object; raises ValueError with what is wrong and where (`and[1].ranks: …`)."""
    return _Reader().constraint(value, "", MAX_CONSTRAINT_DEPTH)


def matches(constraint: Constraint, rank: int, host: str, properties: frozenset[str]) -> bool:
    """True when a rank with this host and these properties satisfies the constraint."""
    match constraint:
        case Properties(names=names):
            return all(_has(name, host, properties) for name in names)
        case Hosts(hosts=hosts):
            return host in hosts
        case Ranks(ranks=ranks):
            return rank in ranks
        case Combined(operator=Conditional.OR, parts=parts):
            return not parts or any(matches(part, rank, host, properties) for part in parts)
        case Combined(operator=operator, parts=parts):
            every = all(matches(part, rank, host, properties) for part in parts)
            return every is not (operator is Conditional.NOT)


def _has(name: str, host: str, properties: frozenset[str]) -> bool:
    wanted = name.removeprefix("^")
    return (wanted in properties or wanted == host) is not name.startswith("^")


class _Reader:
    """Reads one constraint and counts what it holds: short strings can name very many hosts and ranks."""

    def __init__(self) -> None:
        self._room = MAX_CONSTRAINT_ITEMS

    def constraint(self, value: JsonValue, path: str, depth: int) -> Constraint:
        if depth == 0:
            raise _bad(path, f"nested deeper than {MAX_CONSTRAINT_DEPTH}")
        if not isinstance(value, dict):
            raise _bad(path, f"expected an object, got {value!r:.100}")
        if not value:
            return ANY_RANK
        if len(value) > 1:
            raise _bad(path, f"expected one operator, got {', '.join(sorted(value))!r:.100}")
        [(operator, values)] = value.items()
        path = f"{path}.{operator}" if path else operator
        if not isinstance(values, list):
            raise _bad(path, f"expected a list, got {values!r:.100}")
        self._count(len(values) + 1, path)
        if operator in _CONDITIONALS:
            parts = tuple(self.constraint(part, f"{path}[{i}]", depth - 1) for i, part in enumerate(values))
            return Combined(Conditional(operator), parts)
        leaf = _LEAVES.get(operator)
        if leaf is None:
            raise _bad(path, f"unknown operator, known are {', '.join((*_LEAVES, *_CONDITIONALS))}")
        return leaf(self, _strings(values, path), path)

    def properties(self, values: Sequence[str], path: str) -> Constraint:
        for name in values:
            if not name.removeprefix("^") or not _NOT_IN_PROPERTIES.isdisjoint(name):
                raise _bad(path, f"{name!r:.100} is no property (it is empty or has one of !&'\"`|() in it)")
        return Properties(tuple(values))

    def hostlist(self, values: Sequence[str], path: str) -> Constraint:
        hosts: set[str] = set()
        for text in values:
            try:
                named = Hostlist.parse(text)
            except ValueError as error:
                raise _bad(path, str(error)) from error
            self._count(len(named), path)
            hosts.update(named)
        return Hosts(frozenset(hosts))

    def ranks(self, values: Sequence[str], path: str) -> Constraint:
        ranks: set[int] = set()
        for text in values:
            try:
                named = IdSet.parse(text)
            except ValueError as error:
                raise _bad(path, str(error)) from error
            self._count(len(named), path)
            ranks.update(named)
        return Ranks(IdSet(ranks))

    def _count(self, items: int, path: str) -> None:
        self._room -= items
        if self._room < 0:
            raise _bad(path, f"the constraint has more than {MAX_CONSTRAINT_ITEMS} items")


_CONDITIONALS: Final = tuple(conditional.value for conditional in Conditional)

_LEAVES: Final[dict[str, Callable[[_Reader, Sequence[str], str], Constraint]]] = {
    "properties": _Reader.properties,
    "hostlist": _Reader.hostlist,
    "ranks": _Reader.ranks,
}


def _strings(values: Sequence[JsonValue], path: str) -> list[str]:
    """The same values, all of them strings."""
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) != len(values):
        stranger = next(value for value in values if not isinstance(value, str))
        raise _bad(path, f"expected strings, got {stranger!r:.100}")
    return strings


def _bad(path: str, why: str) -> ValueError:
    return ValueError(f"cannot parse constraint: {path + ': ' if path else ''}{why}")
