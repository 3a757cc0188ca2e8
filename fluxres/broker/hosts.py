"""`[bootstrap]`: how many brokers an instance has, on which hosts, where they listen, and who is whose parent.

Keys and meanings are those of flux-config-bootstrap(5); `cert` stands for `curve_cert`. Without `hosts` all ranks are
on this machine, on Unix sockets in its rundir. With it a rank is a host's place in the list, all entries taken
together. `%h` and `%p` in addresses are the host and `default_port`, `%%` is a percent sign.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final

import msgspec

from fluxres.base.hostlist import Hostlist
from fluxres.overlay.address import ANY, TcpAddress, UnixAddress, is_loopback, parse_tcp
from fluxres.overlay.topology import MAX_SIZE

MAX_FANOUT: Final = 1024
DEFAULT_PORT: Final = 8050
_TOKEN: Final = re.compile("%(.)")

_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
_Fanout = Annotated[int, msgspec.Meta(ge=1, le=MAX_FANOUT)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class HostEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An element of `bootstrap.hosts`: one host or a hostlist. `parent` names the host of the parent broker."""

    host: str
    bind: str | None = None
    connect: str | None = None
    parent: str | None = None


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[bootstrap]`: the shape of the instance."""

    size: _Size | None = None
    fanout: _Fanout = 32
    hosts: tuple[HostEntry, ...] = ()
    default_port: _Port = DEFAULT_PORT
    default_bind: str = f"tcp://{ANY}:%p"
    default_connect: str = "tcp://%h:%p"
    cert: str | None = None


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts in order of rank, each with the index of its entry; `parents` is None for a regular tree."""

    bootstrap: Bootstrap
    names: Hostlist
    entries: tuple[int, ...]
    parents: tuple[int, ...] | None

    def bind(self, rank: int) -> TcpAddress:
        """Where the broker of `rank` listens. Raises ValueError naming the key."""
        return self._address(rank, "bind", self.bootstrap.default_bind)

    def connect(self, rank: int) -> TcpAddress:
        """Where others find it. Raises ValueError naming the key."""
        return self._address(rank, "connect", self.bootstrap.default_connect)

    def _address(self, rank: int, key: str, default: str) -> TcpAddress:
        index = self.entries[rank]
        entry = self.bootstrap.hosts[index]
        own = entry.bind if key == "bind" else entry.connect
        name = f"default_{key}" if own is None else f"hosts[{index}].{key}"
        tokens = {"h": self.names[rank], "p": str(self.bootstrap.default_port), "%": "%"}
        text = _TOKEN.sub(lambda found: tokens.get(found[1], found[0]), default if own is None else own)
        try:
            address = parse_tcp(text)
        except ValueError as error:
            raise ValueError(f"bootstrap.{name}: {error}") from error
        if key == "connect" and address.host == ANY:
            raise ValueError(f"bootstrap.{name}: {text!r} is an address to bind, none to connect to")
        return address


@lru_cache(maxsize=4)
def expand(bootstrap: Bootstrap) -> Hosts:
    """All the hosts of `[bootstrap]`; none where it names none. Raises ValueError naming the key."""
    names: list[str] = []
    entries: list[int] = []
    for index, entry in enumerate(bootstrap.hosts):
        try:
            found = Hostlist.parse(entry.host)
        except ValueError as error:
            raise ValueError(f"bootstrap.hosts[{index}].host: {error}") from error
        if not found:
            raise ValueError(f"bootstrap.hosts[{index}].host: {entry.host!r} names no host")
        names += found
        entries += [index] * len(found)
        if len(names) > MAX_SIZE:
            raise ValueError(f"bootstrap.hosts: more than {MAX_SIZE} hosts")
    ranks = {name: rank for rank, name in enumerate(names)}
    if len(ranks) < len(names):
        twice = next(name for rank, name in enumerate(names) if ranks[name] != rank)
        raise ValueError(f"bootstrap.hosts: {twice} is in it twice")
    if bootstrap.size is not None and names and bootstrap.size != len(names):
        raise ValueError(f"bootstrap.size: it is {bootstrap.size}, and bootstrap.hosts names {len(names)} hosts")
    hosts = Hosts(bootstrap, Hostlist(names), tuple(entries), _parents(bootstrap, entries, ranks))
    _check_addresses(hosts)
    return hosts


def _parents(bootstrap: Bootstrap, entries: list[int], ranks: dict[str, int]) -> tuple[int, ...] | None:
    """The parent of each rank as entries say it: rank 0 where they say nothing, -1 for rank 0 itself."""
    if all(entry.parent is None for entry in bootstrap.hosts):
        return None
    parents = []
    for rank, index in enumerate(entries):
        name = bootstrap.hosts[index].parent
        if name is not None and name not in ranks:
            raise ValueError(f"bootstrap.hosts[{index}].parent: {name!r} is not among the hosts")
        if rank == 0 and name is not None:
            raise ValueError(f"bootstrap.hosts[{index}].parent: {name!r} is no parent of the first host, the root")
        parents.append(-1 if rank == 0 else ranks[name or next(iter(ranks))])
    return tuple(parents)


def _check_addresses(hosts: Hosts) -> None:
    bootstrap = hosts.bootstrap
    taken: dict[TcpAddress, str] = {}
    for rank, name in enumerate(hosts.names):
        bind, connect = hosts.bind(rank), hosts.connect(rank)
        first = taken.setdefault(connect, name)
        if first != name:
            raise ValueError(f"bootstrap.hosts: {first} and {name} have the same address, {connect}")
        far = next((each for each in (bind, connect) if not is_loopback(each.host)), None)
        if bootstrap.cert is None and far is not None and len(hosts.names) > 1:
            raise ValueError(
                f"bootstrap.cert: it is needed, for {far} of {name} is not a loopback address "
                "(fluxres keygen FILE makes one; all brokers use the same)"
            )


def unix_address(rundir: str, rank: int) -> UnixAddress:
    """Where the broker of `rank` listens in an instance that is all on this machine."""
    return UnixAddress(os.path.join(os.path.abspath(rundir), f"tbon-{rank}"))
