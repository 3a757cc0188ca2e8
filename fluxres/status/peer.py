"""Who is at the other end of a connection over the loopback: the uid of the process that made that socket.

The kernel is asked for the one socket with these four numbers (NETLINK_SOCK_DIAG, sock_diag(7)); where it does not know
such a question, /proc/net/tcp and tcp6 are looked through (proc(5)). A socket without an inode belongs to nobody any
more, whatever uid stands beside it: one in TIME_WAIT has root's. That is "not known", and so is a peer in another
network namespace.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLM_F_REQUEST: Final = 1
ALL_STATES: Final = 0xFFFF_FFFF
ANSWER_SIZE: Final = 8192
TABLES: Final = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}
MAX_LINES: Final = 10_000
"""Sockets that are looked through in a table."""

_HEADER: Final = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_ASK: Final = struct.Struct("=BBBxI")
"""inet_diag_req_v2 up to the socket: family, protocol, extensions, states."""
_SOCKET: Final = struct.Struct("!HH16s16s")
"""inet_diag_sockid up to the interface: ports and addresses of that end and of the other."""
_ANY_INTERFACE_AND_COOKIE: Final = struct.pack("=III", 0, ALL_STATES, ALL_STATES)
_ANSWER: Final = struct.Struct("=BBBB")
"""inet_diag_msg up to its inet_diag_sockid: family, state, timer, retransmissions."""
_OWNER: Final = struct.Struct("=IIIII")
"""What follows that: expires, receive queue, send queue, uid, inode."""

Address: TypeAlias = tuple[str, int]
"""A number and a port."""


def peer_uid(sock: socket.socket) -> int | None:
    """The uid of whoever made the other end of `sock`, a connected TCP socket; None where that is not known."""
    try:
        theirs, ours = _address(sock.getpeername()), _address(sock.getsockname())
    except OSError:
        return None  # it is not connected any more
    try:
        answer = _ask(question(sock.family, theirs, ours))
    except OSError:
        return _look_up(sock.family, theirs, ours)
    return uid_of(answer, theirs, ours)


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return name[0].partition("%")[0], name[1]


def question(family: int, theirs: Address, ours: Address) -> bytes:
    """The netlink message that asks for the socket at `theirs` that is connected to `ours`."""
    body = (
        _ASK.pack(family, socket.IPPROTO_TCP, 0, ALL_STATES)
        + _SOCKET.pack(theirs[1], ours[1], _packed(theirs[0]), _packed(ours[0]))
        + _ANY_INTERFACE_AND_COOKIE
    )
    return _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + body


def _packed(host: str) -> bytes:
    return ipaddress.ip_address(host).packed.ljust(16, b"\0")


def _ask(message: bytes) -> bytes:
    """The kernel's answer. Raises OSError where it takes no such questions."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)  # it answers before `send` returns
        sock.send(message)
        return sock.recv(ANSWER_SIZE)


def uid_of(answer: bytes, theirs: Address, ours: Address) -> int | None:
    """The uid in the kernel's answer; None where it is an error, another socket, or one that nobody has any more."""
    size = _HEADER.size + _ANSWER.size + _SOCKET.size + len(_ANY_INTERFACE_AND_COOKIE) + _OWNER.size
    if len(answer) < size or _HEADER.unpack_from(answer)[1] != SOCK_DIAG_BY_FAMILY:
        return None
    at = _HEADER.size + _ANSWER.size
    expected = _SOCKET.pack(theirs[1], ours[1], _packed(theirs[0]), _packed(ours[0]))
    if answer[at : at + _SOCKET.size] != expected:
        return None
    *_, uid, inode = _OWNER.unpack_from(answer, size - _OWNER.size)
    return int(uid) if inode else None


# --- the tables of proc(5)


def _look_up(family: int, theirs: Address, ours: Address) -> int | None:
    with contextlib.suppress(OSError), Path(TABLES[socket.AddressFamily(family)]).open(encoding="ascii") as table:
        return uid_in(table, theirs, ours)
    return None


def uid_in(lines: Iterator[str], theirs: Address, ours: Address) -> int | None:
    """The uid in a table like /proc/net/tcp of the socket at `theirs` that is connected to `ours`."""
    wanted = [_hex(theirs), _hex(ours)]
    for _, line in zip(range(MAX_LINES), lines, strict=False):
        fields = line.split()
        if len(fields) > 9 and fields[1:3] == wanted:
            return int(fields[7]) if fields[9] != "0" else None
    return None


def _hex(address: Address) -> str:
    """An address as the tables have it: 32-bit words as they lie in memory."""
    packed = ipaddress.ip_address(address[0]).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
