"""Reading the option values of submitting commands: what flux-submit(1) says they mean.

Pure: files are read through a function that the caller gives. Raises ValueError with the option's value
and what is wrong with it. Imported by the command line, so it stays free of heavy imports.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from string import Template
from typing import TYPE_CHECKING, Final

from fluxres.base.fsd import parse_fsd

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue

MAX_ENV_FILES: Final = 64
"""The most `^FILE` rules followed for one environment: a file may name itself."""

ReadFile = Callable[[str], str]
"""Reads a text file; raises OSError."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_NUMBER: Final = re.compile(r"[+-]?[0-9]+|[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def parse_time_limit(text: str) -> float:
    """`--time-limit` in seconds: a plain number means minutes, else an FSD (RFC 23); `inf` is 0, no limit."""
    try:
        minutes = float(text)
    except ValueError:
        return _finite(parse_fsd(text))
    if math.isnan(minutes) or minutes < 0:
        raise ValueError(f"cannot use time limit {text!r}: it must not be negative")
    return _finite(minutes * 60)


def _finite(seconds: float) -> float:
    return 0.0 if math.isinf(seconds) else seconds


def parse_keyval(text: str, read_file: ReadFile) -> tuple[str, JsonValue]:
    """`-o` and `--setattr`: `key=value`, `key` alone (value 1), or `^key=file` with JSON in the file.

    A value that is not JSON is a string.
    """
    key, equals, rest = text.partition("=")
    if key.startswith("^"):
        try:
            return key[1:], _json(read_file(rest))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {rest!r} for {key[1:]}: {error}") from error
    if not equals:
        return key, 1
    try:
        return key, _json(rest)
    except ValueError:
        return key, rest


def _json(text: str) -> JsonValue:
    value: JsonValue = json.loads(text)
    return value


def parse_uri(text: str, what: str) -> JsonObject:
    """`--dependency=SCHEME:VALUE[?key=val&…]` as an RFC 26 object; `what` is its name in errors."""
    from urllib.parse import parse_qs  # here, because it takes longer to import than all of this module

    scheme, _, rest = text.partition(":")
    if _SCHEME.fullmatch(scheme) is None:
        raise ValueError(f"cannot use {what} {text!r}: expected SCHEME:VALUE")
    value, _, query = rest.partition("?")
    entry: JsonObject = {"scheme": scheme, "value": value}
    for key, values in parse_qs(query).items():
        numbers = [_number(each) for each in values]
        entry[key] = numbers[0] if len(numbers) == 1 else numbers
    return entry


def _number(text: str) -> JsonValue:
    if _NUMBER.fullmatch(text) is None:
        return text
    return float(text) if "." in text else int(text)


def filter_environment(
    rules: Iterable[str], environ: Mapping[str, str], read_file: ReadFile
) -> tuple[dict[str, str], dict[str, str]]:
    """`--env` rules applied in order to a copy of `environ`: the environment, and what the shell expands.

    `-PATTERN` removes, `VAR=VALUE` sets ($VAR in it means what was built so far), `PATTERN` takes from
    `environ` what was removed, `^FILE` has more rules, one a line. Patterns are globs, or /REGEX/. A value
    with `{{…}}` in it is left to the job shell.
    """
    return _EnvironmentBuilder(environ, read_file).build(rules)


class _EnvironmentBuilder:
    def __init__(self, environ: Mapping[str, str], read_file: ReadFile) -> None:
        self._environ = environ
        self._read_file = read_file
        self._files_left = MAX_ENV_FILES
        self._built = dict(environ)
        self._expand: dict[str, str] = {}

    def build(self, rules: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        for rule in rules:
            if rule.startswith("-"):
                matches = _pattern(rule[1:])
                self._built = {key: value for key, value in self._built.items() if not matches(key)}
            elif rule.startswith("^"):
                self._include(rule[1:])
            elif "=" in rule:
                self._set(rule)
            else:
                matches = _pattern(rule)
                kept = {key: value for key, value in self._environ.items() if matches(key)}
                self._built = {**kept, **self._built}
        return self._built, self._expand

    def _include(self, path: str) -> None:
        self._files_left -= 1
        if self._files_left < 0:
            raise ValueError(f"cannot read --env rules from {path!r}: more than {MAX_ENV_FILES} files")
        try:
            lines = self._read_file(path).splitlines()
        except OSError as error:
            raise ValueError(f"cannot read --env rules from {path!r}: {error}") from error
        self.build(line.strip() for line in lines if line.strip())

    def _set(self, rule: str) -> None:
        name, _, value = rule.partition("=")
        if not name:
            raise ValueError(f"cannot use --env={rule}: it has no name before =")
        if "{{" in value:
            self._expand[name] = value
            return
        try:
            self._built[name] = Template(value).substitute({**self._environ, **self._built})
        except KeyError as error:
            raise ValueError(f"cannot use --env={rule}: there is no variable {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"cannot use --env={rule}: it has a $ that names no variable") from error


def _pattern(pattern: str) -> Callable[[str], object]:
    """A test of names against a glob, or a regular expression between slashes."""
    text = pattern[1:].rstrip("/") if pattern.startswith("/") else fnmatch.translate(pattern)
    try:
        return re.compile(text).match
    except re.error as error:
        raise ValueError(f"cannot use --env pattern {pattern!r}: {error}") from error
