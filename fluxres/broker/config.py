"""The configuration of a broker: TOML tables named like Flux's, read strictly before anything starts.

Unknown keys and bad values are refused by name. A directory is read file by file, `*.toml` in order of name; a key that
two files set is refused as well. `load` looks at the certificate and the files of `[status]` too, and nothing else
beyond the configuration.
"""

from __future__ import annotations

import math
import os
import socket
from functools import partial
from typing import Annotated, Final, cast

import msgspec

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.base.hostlist import Hostlist
from fluxres.base.json import JsonObject, JsonValue
from fluxres.broker.hosts import Bootstrap, Hosts, expand, unix_address
from fluxres.overlay.address import Addresses
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.topology import MAX_SIZE as MAX_SIZE
from fluxres.overlay.topology import Topology, parse_topo
from fluxres.status.settings import (
    DEFAULT_BIND,
    DEFAULT_RANKS,
    StatusFileError,
    StatusSettings,
    check_files,
    make_settings,
)
from fluxres.wire.codec import MAX_ROUTE

DEFAULT_STATEDIR: Final = "/var/lib/fluxres"
DEFAULT_RUNDIR: Final = "/run/fluxres"
MIN_HEARTBEAT: Final = 0.01
"""Seconds: with shorter ones a broker would be busy with nothing else."""
MAX_LEVEL: Final = MAX_ROUTE - 1
"""Levels of the tree below rank 0: the route of a request has room for a client and for so many hops."""
MAX_SHOWN: Final = 100
"""Characters of a hostlist that an error shows."""

_Bytes = Annotated[int, msgspec.Meta(ge=256 * 1024)]


class ConfigError(FluxresError):
    """A configuration that cannot be used; the text names the file and the key."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What all tables have in common: keys with dashes, none unknown."""


class Tbon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tbon]`: the tree and its times, in FSD; keys as in flux-config-tbon(5). See `TbonSettings`.

    `topo`, such as "kary:2", goes before `bootstrap.fanout`.
    """

    topo: str | None = None
    heartbeat: str = "1s"
    torpid_min: str = "5s"
    timeout: str = "20s"
    connect_timeout: str = "5s"


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


class Status(_Table, frozen=True):
    """`[status]`: where the status endpoint listens, and who may ask. See `StatusSettings`."""

    bind: str = DEFAULT_BIND
    ranks: str = DEFAULT_RANKS
    token_file: str | None = None
    cert: str | None = None
    origins: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. What `parse` and `load` return is checked: no method of it raises then."""

    bootstrap: Bootstrap = Bootstrap()
    tbon: Tbon = Tbon()
    broker: Broker = Broker()
    exec: Exec = Exec()
    resource: Resource = Resource()
    access: Access = Access()
    status: Status = Status()

    @property
    def size(self) -> int:
        """How many brokers the instance has."""
        return len(self._hosts.names) or self.bootstrap.size or 1

    def hostlist(self, host: str) -> Hostlist:
        """The hosts in order of rank; `host` for every rank where the configuration names none."""
        return self._hosts.names or Hostlist([host] * self.size)

    @property
    def _hosts(self) -> Hosts:
        return expand(self.bootstrap)

    def rank_of(self, hostname: str) -> int | None:
        """The rank of a host: by its name, or else by what is before the first dot of it. None where it has none."""
        names = self._hosts.names
        rank = names.find(hostname)
        return names.find(hostname.partition(".")[0]) if rank is None else rank

    def host_of(self, rank: int) -> str | None:
        """The host of a rank; None where the configuration names no hosts."""
        return self._hosts.names[rank] if self.bootstrap.hosts else None

    def topology(self) -> Topology:
        """The tree. Raises ValueError naming the key."""
        parents, topo = self._hosts.parents, self.tbon.topo
        if parents is not None and topo is not None:
            raise ValueError("tbon.topo: the parents in bootstrap.hosts make the tree; leave one of the two out")
        try:
            if parents is not None:
                return _shallow(Topology.custom(parents))
            return _shallow(parse_topo(topo or f"kary:{self.bootstrap.fanout}", self.size))
        except ValueError as error:
            raise ValueError(f"{'tbon.topo' if parents is None else 'bootstrap.hosts'}: {error}") from error

    def addresses(self) -> Addresses:
        """Where each rank listens: on the network where there are hosts, else on Unix sockets in the rundir."""
        timeout = self.tbon_settings().connect_timeout
        if not self.bootstrap.hosts:
            find = partial(unix_address, self.broker.rundir)
            return Addresses(bind=find, connect=find, connect_timeout=timeout)
        return Addresses(
            bind=self._hosts.bind, connect=self._hosts.connect, connect_timeout=timeout, cert=self.bootstrap.cert
        )

    def tbon_settings(self) -> TbonSettings:
        """The times of the overlay in seconds. Raises ValueError naming the key."""
        table = self.tbon
        heartbeat = _seconds("tbon.heartbeat", table.heartbeat, above=0.0)
        if heartbeat < MIN_HEARTBEAT:
            raise ValueError(f"tbon.heartbeat: {table.heartbeat} is less than {format_fsd(MIN_HEARTBEAT)}")
        torpid_min = _seconds("tbon.torpid_min", table.torpid_min, above=heartbeat, named="tbon.heartbeat")
        return TbonSettings(
            heartbeat=heartbeat,
            torpid_min=torpid_min,
            timeout=_seconds("tbon.timeout", table.timeout, above=torpid_min, named="tbon.torpid_min"),
            connect_timeout=_seconds("tbon.connect_timeout", table.connect_timeout, above=0.0),
        )

    def status_settings(self) -> StatusSettings:
        """Where status is served, and to whom. Raises ValueError naming the key."""
        table = self.status
        return make_settings(
            bind=table.bind,
            ranks=table.ranks,
            token_file=table.token_file,
            cert=table.cert,
            origins=table.origins,
        )


def _shallow(tree: Topology) -> Topology:
    """The tree itself, no rank of which is too far from the root for a request. Raises ValueError."""
    if tree.maxlevel > MAX_LEVEL:
        raise ValueError(
            f"the tree has {tree.maxlevel} levels below rank 0, {MAX_LEVEL} are allowed: give ranks more children"
        )
    return tree


def find_rank(config: Config, hostname: str) -> int:
    """The rank of the broker on host `hostname`. Raises ConfigError."""
    if not config.bootstrap.hosts:
        if config.size == 1:
            return 0
        raise ConfigError("cannot tell which broker this is: bootstrap.hosts is not set, so say it with --rank")
    rank = config.rank_of(hostname)
    if rank is None:
        shown = str(config.hostlist(hostname))
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
        raise ConfigError(
            f"cannot tell which broker this is: host {hostname} is not in bootstrap.hosts ({shown}); "
            "add it there, or say it with --rank"
        )
    return rank


def _seconds(key: str, text: str, *, above: float = -1.0, named: str = "") -> float:
    """A finite duration above a bound, that of the key `named` if it is one. Raises ValueError naming the key."""
    try:
        seconds = parse_fsd(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if not math.isfinite(seconds):
        raise ValueError(f"{key}: it must be finite")
    if seconds <= above:
        bound = f"{named}, {format_fsd(above)}" if named else format_fsd(above)
        raise ValueError(f"{key}: {text} is not more than {bound}")
    return seconds


def load(path: str) -> Config:
    """Read the configuration at `path`, a TOML file or a directory of them. Raises ConfigError, CertError."""
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
    config = parse(tables, path)
    if config.bootstrap.cert is not None:
        from fluxres.overlay.tls import load_credentials

        load_credentials(config.bootstrap.cert)
    _check_status_files(config, path)
    return config


def _check_status_files(config: Config, source: str) -> None:
    """Look at the files of `[status]` where this host is one that serves it: the others need not have them."""
    settings = config.status_settings()
    rank = config.rank_of(socket.gethostname()) if config.bootstrap.hosts else next(iter(settings.ranks), None)
    if rank is None or not settings.serves(rank):
        return
    try:
        check_files(settings)
    except StatusFileError as error:
        raise ConfigError(f"cannot use configuration {source}: {error}") from error


def parse(tables: JsonValue, source: str) -> Config:
    """The configuration of these tables. Raises ConfigError naming `source` and the key."""
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cannot use configuration {source}: {_named(str(error))}") from error
    try:
        _seconds("exec.kill-timeout", config.exec.kill_timeout)
        config.tbon_settings()
        config.topology()
        config.status_settings()
    except ValueError as error:
        raise ConfigError(f"cannot use configuration {source}: {error}") from error
    if config.exec.segment_size > config.exec.journal_limit:
        raise ConfigError(
            f"cannot use configuration {source}: exec.segment-size {config.exec.segment_size} is more than "
            f"exec.journal-limit {config.exec.journal_limit}"
        )
    return config


def _named(text: str) -> str:
    """msgspec's text with the key in our words: `exec.kill-timeout: …`."""
    why, at, where = text.replace(" | null", "").partition(" - at `")
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
