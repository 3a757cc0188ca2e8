"""Who is at the other end of a TCP connection over the loopback."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxres.status import peer
from fluxres.status.peer import Address, peer_uid, question, uid_in, uid_of

FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
OTHER = 12_345


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, that of the one who listened first."""
    family, host = request.param
    with socket.socket(family) as listener, socket.socket(family) as theirs:
        listener.bind((host, 0))
        listener.listen()
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            yield ours, theirs


def addresses(pair: tuple[socket.socket, socket.socket]) -> tuple[Address, Address]:
    ours, _ = pair
    return ours.getpeername()[:2], ours.getsockname()[:2]


def test_the_kernel_tells(pair: tuple[socket.socket, socket.socket]) -> None:
    assert peer_uid(pair[0]) == os.getuid()


def test_the_tables_tell(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: bytes) -> bytes:
        raise OSError

    monkeypatch.setattr(peer, "_ask", refuse)
    assert peer_uid(pair[0]) == os.getuid()
    monkeypatch.setattr(peer, "TABLES", {family: "/nowhere" for family, _ in FAMILIES})
    assert peer_uid(pair[0]) is None


def test_a_peer_that_is_gone_is_nobody(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its socket may still be there, and has root's uid then."""
    ours, theirs = pair
    theirs.close()
    assert peer_uid(ours) is None
    ours.shutdown(socket.SHUT_RDWR)
    assert peer_uid(ours) is None


def test_what_is_not_connected_has_no_peer() -> None:
    with socket.socket() as sock:
        assert peer_uid(sock) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    with socket.socket(ours.family) as listener:
        listener.bind((ours.getsockname()[0], 0))
        listener.listen()
        listener.settimeout(30)
        address = listener.getsockname()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setuid(OTHER)
            os.close(writer)
            with socket.socket(ours.family) as sock:
                sock.connect(address)
                os.read(reader, 1)
            os._exit(0)
        accepted, _ = listener.accept()
        with accepted:
            assert peer_uid(accepted) == OTHER
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


# -- what the kernel says, byte by byte

THEIRS: Address = ("127.0.0.1", 40_000)
OURS: Address = ("127.0.0.1", 8080)


def answer(*, kind: int = 20, theirs: Address = THEIRS, uid: int = 7, inode: int = 99) -> bytes:
    packed = socket.inet_aton(theirs[0]).ljust(16, b"\0"), socket.inet_aton(OURS[0]).ljust(16, b"\0")
    body = (
        struct.pack("=BBBB", socket.AF_INET, 1, 0, 0)
        + struct.pack("!HH16s16s", theirs[1], OURS[1], *packed)
        + struct.pack("=III", 0, 1, 2)
        + struct.pack("=IIIII", 0, 0, 0, uid, inode)
    )
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + b"attributes"


def test_answers() -> None:
    assert uid_of(answer(), THEIRS, OURS) == 7
    assert uid_of(answer(inode=0, uid=0), THEIRS, OURS) is None
    assert uid_of(answer(theirs=("127.0.0.1", 40_001)), THEIRS, OURS) is None
    assert uid_of(answer(kind=2), THEIRS, OURS) is None, "NLMSG_ERROR"
    for size in range(len(answer()) - len(b"attributes")):
        assert uid_of(answer()[:size], THEIRS, OURS) is None


def test_the_question_is_exact() -> None:
    message = question(socket.AF_INET, THEIRS, OURS)
    assert len(message) == struct.unpack_from("=I", message)[0] == 16 + 8 + 48
    assert struct.unpack_from("!HH", message, 24) == (40_000, 8080)


@pytest.mark.skipif(struct.pack("=H", 1) != b"\1\0", reason="the tables below are those of a little-endian machine")
def test_tables() -> None:
    table = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 55 1 0 20 4 30 10 -1
   2: 0100007F:9C41 0100007F:1F90 06 00000000:00000000 03:00000EB6 00000000     0        0 0 3 0
   3: broken
"""
    assert uid_in(iter(table.splitlines()), THEIRS, OURS) == 1001
    assert uid_in(iter(table.splitlines()), ("127.0.0.1", 40_001), OURS) is None
    assert uid_in(iter(table.splitlines()), ("127.0.0.1", 40_002), OURS) is None
    six = "   0: 00000000000000000000000001000000:9C40 00000000000000000000000001000000:1F90 01 a b c  1001 0 55"
    assert uid_in(iter([six]), ("::1", 40_000), ("::1", 8080)) == 1001


def test_the_tables_of_this_machine_are_where_they_are_looked_for() -> None:
    assert all(Path(path).exists() for path in peer.TABLES.values())
