"""The constraint syntax of `--requires` (RFC 35), read into an RFC 31 object.

    expression  = term | not expression | -term | ( expression ) | expression [and|or] expression
    term        = PROPERTY[,PROPERTY…] | host:HOSTLIST | rank:IDSET | OPERATOR:VALUE

Terms side by side are joined by `and`, which binds tighter than `or`; `&`, `&&`, `|` and `||` mean the
same. Quotes take a value literally. `not` and `-` negate the next term or parenthesis.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluxres.base.json import JsonObject, JsonValue

MAX_NESTING: Final = 32
"""How deep parentheses and negations may nest."""

_OPERATORS: Final = {"host": "hostlist", "hosts": "hostlist", "rank": "ranks"}
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<mark>[()]|&&?|\|\|?|-)|(?P<word>(?:[^()|&\s\"']|\"[^\"]*\"|'[^']*')+)|(?P<bad>\S))"
)
_QUOTES: Final = re.compile(r"\"([^\"]*)\"|'([^']*)'")
_AND: Final = frozenset({"&", "&&", "and", "AND"})
_OR: Final = frozenset({"|", "||", "or", "OR"})
_NOT: Final = frozenset({"not", "NOT", "-"})


def parse_requires(text: str) -> JsonObject:
    """The constraint that `text` says; raises ValueError with the text and what is wrong with it."""
    reader = _Reader(text)
    constraint = reader.any_of(MAX_NESTING)
    if reader.next is not None:
        raise reader.bad(f"{reader.next!r} is not expected here")
    return constraint


def parse_all_requires(texts: Sequence[str]) -> JsonObject:
    """The constraint that all of `texts`, at least one, say together; raises as `parse_requires` does."""
    return _joined([parse_requires(text) for text in texts])


class _Reader:
    """Recursive descent over the tokens of one expression; `next` is the token to come, None at the end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _TOKEN.finditer(text.strip())
        self.next: str | None = None
        self._advance()

    def any_of(self, depth: int) -> JsonObject:
        parts = [self._all_of(depth)]
        while self.next in _OR:
            self._advance()
            parts.append(self._all_of(depth))
        return parts[0] if len(parts) == 1 else {"or": [*parts]}

    def bad(self, why: str) -> ValueError:
        return ValueError(f"cannot parse constraint {self._text!r}: {why}")

    def _all_of(self, depth: int) -> JsonObject:
        parts = [self._one(depth)]
        while self.next is not None and self.next not in _OR and self.next != ")":
            if self.next in _AND:
                self._advance()
            parts.append(self._one(depth))
        return _joined(parts)

    def _one(self, depth: int) -> JsonObject:
        token = self.next
        if depth == 0:
            raise self.bad(f"nested deeper than {MAX_NESTING}")
        if token is None:
            raise self.bad("it ends too soon")
        self._advance()
        if token in _NOT:
            return {"not": [self._one(depth - 1)]}
        if token == "(":
            inner = self.any_of(depth - 1)
            if self.next != ")":
                raise self.bad("a parenthesis is not closed")
            self._advance()
            return inner
        if token in _AND or token in _OR or token == ")":
            raise self.bad(f"{token!r} is not expected here")
        return self._term(token)

    def _term(self, token: str) -> JsonObject:
        plain = _QUOTES.sub(lambda match: match[1] if match[1] is not None else match[2], token)
        operator, colon, value = plain.partition(":")
        if not colon:
            return {"properties": [*plain.split(",")]}
        if not value:
            raise self.bad(f"{operator!r} has no value")
        if re.fullmatch(r"[\w.+@-]+", operator) is None:
            raise self.bad(f"{operator!r} is no operator")
        values: list[JsonValue] = [*value.split(",")] if operator == "properties" else [value]
        return {_OPERATORS.get(operator, operator): values}

    def _advance(self) -> None:
        match = next(self._tokens, None)
        if match is not None and match["bad"] is not None:
            raise self.bad(f"the quote {match['bad']} is not closed")
        self.next = None if match is None else match["mark"] or match["word"]


def _joined(parts: list[JsonObject]) -> JsonObject:
    """The `and` of constraints, with their plain properties gathered in one, as flux does."""
    joined: list[JsonValue] = []
    gathered: list[JsonValue] | None = None
    for part in parts:
        properties = part.get("properties")
        if not isinstance(properties, list):
            joined.append(part)
        elif gathered is None:
            gathered = [*properties]
            joined.append({"properties": gathered})
        else:
            gathered.extend(properties)
    only = joined[0]
    return only if len(joined) == 1 and isinstance(only, dict) else {"and": joined}
