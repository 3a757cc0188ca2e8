"""Unix stream sockets by path: listen without a gap, dial paths of any length, and know the peer.

A listener is bound under a new name that is renamed then: who dials finds the old socket or this one, never none. Paths
longer than the 107 bytes of sockaddr_un go through a descriptor of their directory. Who the peer is comes from the
kernel (SO_PEERCRED, unix(7)): the process that dialled, or that began to listen.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from fluxres.base.errors import FluxresError, Refusal

_CREDENTIALS: Final = struct.Struct("iII")


def listen(path: str, *, mode: int, backlog: int) -> socket.socket:
    """A non-blocking socket that listens at `path`, of permissions `mode`; makes its directory where there is none.

    Raises Refusal where another process listens there, FluxresError where the system will not.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with _directory(path) as (dirfd, short, name):
            if _somebody_listens(short):
                raise Refusal(f"cannot listen on {path}: another broker does; give this one its own rundir")
            new = f".{name}.new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=dirfd)
            sock.bind(f"{os.path.dirname(short)}/{new}")
            os.chmod(new, mode, dir_fd=dirfd)
            sock.listen(backlog)
            os.rename(new, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
    except OSError as error:
        sock.close()
        raise FluxresError(f"cannot listen on {path}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def dial(path: str) -> socket.socket:
    """A non-blocking socket connected to `path`. Raises OSError; EAGAIN where its listener is too busy."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        with _directory(path) as (_dirfd, short, _name):
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> tuple[int, int]:
    """The process id and the user id of the other end."""
    pid, userid, _group = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, userid


@contextlib.contextmanager
def _directory(path: str) -> Iterator[tuple[int, str, str]]:
    """A descriptor of the directory of `path`, a short path to the same file, and its name."""
    directory, name = os.path.split(path)
    dirfd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield dirfd, f"/proc/self/fd/{dirfd}/{name}", name
    finally:
        os.close(dirfd)


def _somebody_listens(path: str) -> bool:
    """Whether a living process listens on the socket `path`: what a killed broker left behind refuses connections."""
    try:
        dial(path).close()
    except BlockingIOError:
        return True  # its backlog is full
    except OSError:
        return False
    return True
