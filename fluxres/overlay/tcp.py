"""TCP sockets by address: dialled within a time, bound to an address or a network interface. IPv4 and IPv6."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import Final, TypeAlias

import trio

from fluxres.base.fsd import format_fsd
from fluxres.overlay.address import ANY, TcpAddress

_Where: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""What getaddrinfo(3) calls an address of a socket."""
_SIOCGIFADDR: Final = 0x8915
_IFREQ: Final = struct.Struct("16s4x4s16x")
"""netdevice(7)'s ifreq: the interface's name, and its IPv4 address within a sockaddr_in."""


async def dial(address: TcpAddress, timeout: float) -> socket.socket:
    """A non-blocking socket connected to `address`, of which each number gets its share of `timeout` seconds.

    Raises OSError, that of the last number tried; ETIMEDOUT where it did not answer.
    """
    error = OSError(errno.ETIMEDOUT, f"no answer in {format_fsd(timeout)}")
    deadline = trio.current_time() + timeout
    found: list[tuple[int, _Where]] = []
    with trio.move_on_at(deadline):
        infos = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        found = [(info[0], info[4]) for info in infos]
    for index, (family, where) in enumerate(found):
        share = max(0.0, deadline - trio.current_time()) / (len(found) - index)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.move_on_after(share):
                await _connect(sock, where)
                return sock
        except OSError as failed:
            error = failed
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise error


async def _connect(sock: socket.socket, where: _Where) -> None:
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(where)
    await trio.lowlevel.wait_writable(sock)
    failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failed:
        raise OSError(failed, os.strerror(failed))
    if sock.getsockname() == sock.getpeername():  # nobody listens, and the kernel chose that very port for us
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


async def listen(address: TcpAddress, backlog: int) -> socket.socket:
    """A non-blocking socket that listens at `address`. Raises OSError."""
    if address.host == ANY:
        family: int = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        where: _Where = ("", address.port)
    else:
        host = _interface(address.host) or address.host
        found = await trio.socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, where = found[0][0], found[0][4]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of our last incarnation linger
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != ANY)
        sock.bind(where)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _interface(name: str) -> str | None:
    """The IPv4 address of the network interface `name`; None where there is no such interface. Raises OSError."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFADDR, _IFREQ.pack(name.encode(), b""))
    return socket.inet_ntoa(_IFREQ.unpack(answer)[1])
