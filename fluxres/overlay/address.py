"""Where brokers listen: paths of Unix sockets, and `tcp://HOST:PORT` as in Flux's [bootstrap]. Pure.

To dial, HOST is a name or a number; to bind, a number, `*` for all addresses, or the name of a network interface. An
IPv6 number stands in square brackets.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

ANY: Final = "*"
"""The host that stands for all addresses of this machine."""
_TCP: Final = re.compile(r"tcp://(?:\[(?P<v6>[0-9a-fA-F:.%\w-]+)\]|(?P<host>[^\s/:\[\]]+)):(?P<port>[0-9]{1,5})")
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{host_port(self.host, self.port)}"


Address: TypeAlias = UnixAddress | TcpAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where every rank listens: `bind` says it to the rank itself, `connect` to those that dial it.

    With `cert`, the file of `fluxres keygen`, TCP is encrypted; without it is for loopback addresses only. Unix sockets
    need none. `connect_timeout` bounds, in seconds, both connecting and the handshake.
    """

    bind: Callable[[int], Address]
    connect: Callable[[int], Address]
    connect_timeout: float
    cert: str | None = None


def parse_tcp(text: str) -> TcpAddress:
    """Read `tcp://HOST:PORT`. Raises ValueError."""
    match = _TCP.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no address: write tcp://HOST:PORT, and an IPv6 number in square brackets")
    port = int(match["port"])
    if not 0 < port <= _MAX_PORT:
        raise ValueError(f"{text!r} is no address: a port is 1 to {_MAX_PORT}")
    return TcpAddress(match["v6"] or match["host"], port)


def host_port(host: str, port: int) -> str:
    """`host:port`, an IPv6 number in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or a number, can be this machine only."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
