"""The configuration of a broker: TOML tables named like Flux's, read strictly before anything starts.

Unknown keys and bad values are refused by name. A directory is read file by file, `*.toml` in order of name; a key that
two files set is refused as well.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Final, cast

import msgspec

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import parse_fsd
from fluxres.base.json import JsonObject, JsonValue

DEFAULT_STATEDIR: Final = "/var/lib/fluxres"
DEFAULT_RUNDIR: Final = "/run/fluxres"
MAX_SIZE: Final = 65_536

_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
_Bytes = Annotated[int, msgspec.Meta(ge=256 * 1024)]


class ConfigError(FluxresError):
    """A configuration that cannot be used; the text names the file and the key."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What all tables have in common: keys with dashes, none unknown."""


class Bootstrap(_Table, frozen=True):
    """`[bootstrap]`: the shape of the instance."""

    size: _Size = 1
    fanout: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32


class Broker(_Table, frozen=True):
    """`[broker]`: where one instance lives. A temporary one cancels its jobs when it is shut down."""

    statedir: str = DEFAULT_STATEDIR
    rundir: str = DEFAULT_RUNDIR
    temporary: bool = False


class Exec(_Table, frozen=True):
    """`[exec]`: job shells. Times are in FSD, sizes in bytes.

    `cgroup` is the directory of the cgroup v2 below which jobs get theirs: a path, "auto" or "off".
    """

    kill_timeout: str = "5s"
    journal_limit: _Bytes = 64 * 1024 * 1024
    segment_size: _Bytes = 4 * 1024 * 1024
    tmpdir: str = "/tmp"
    cgroup: str = "auto"


class Resource(_Table, frozen=True):
    """`[resource]`: what a rank has. `cores` replaces what the system says."""

    cores: Annotated[int, msgspec.Meta(ge=1, le=65_536)] | None = None
    gpus: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0


class Access(_Table, frozen=True):
    """`[access]`: who may use the instance."""

    allow_guest_user: bool = False
    allow_root_owner: bool = False


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration."""

    bootstrap: Bootstrap = Bootstrap()
    broker: Broker = Broker()
    exec: Exec = Exec()
    resource: Resource = Resource()
    access: Access = Access()


def load(path: str) -> Config:
    """Read the configuration at `path`, a TOML file or a directory of them. Raises ConfigError."""
    import tomllib

    tables: JsonObject = {}
    for name in _files(path):
        try:
            with open(name, "rb") as file:
                _merge(tables, cast("JsonObject", tomllib.load(file)), name)
        except OSError as error:
            raise ConfigError(f"cannot read configuration {name}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read configuration {name}: {error}") from error
    return parse(tables, path)


def parse(tables: JsonValue, source: str) -> Config:
    """The configuration of these tables. Raises ConfigError naming `source` and the key."""
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cannot use configuration {source}: {_named(str(error))}") from error
    try:
        if not math.isfinite(parse_fsd(config.exec.kill_timeout)):
            raise ValueError("it must be finite")
    except ValueError as error:
        raise ConfigError(f"cannot use configuration {source}: exec.kill-timeout: {error}") from error
    if config.exec.segment_size > config.exec.journal_limit:
        raise ConfigError(
            f"cannot use configuration {source}: exec.segment-size {config.exec.segment_size} is more than "
            f"exec.journal-limit {config.exec.journal_limit}"
        )
    return config


def _named(text: str) -> str:
    """msgspec's text with the key in our words: `exec.kill-timeout: …`."""
    why, at, where = text.partition(" - at `")
    return f"{where.strip('`').removeprefix('$.').removeprefix('$')}: {why}" if at else why


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".toml"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    if not names:
        raise ConfigError(f"cannot read configuration {path}: there is no *.toml file in it")
    return [os.path.join(path, name) for name in names]


def _merge(into: JsonObject, more: JsonObject, name: str, above: str = "") -> None:
    for key, value in more.items():
        known = into.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value, name, f"{above}{key}.")
        elif key in into:
            raise ConfigError(f"cannot use configuration {name}: {above}{key} is set in an earlier file too")
        else:
            into[key] = value
