"""The launcher: a small process with everything imported, that forks into job shells (DESIGN §9).

It reads requests from a SOCK_SEQPACKET socket, one a packet: the CBOR map {dir, id, rank}, with two
descriptors (SCM_RIGHTS): the shell's directory, and the writing end of a pipe, `ready`, which the shell
closes when it listens or ends. `dir` is that directory's path, for people. It answers only where it could not
fork, {id, rank, errnum, text}. It ends when its socket closes; the shells go on. It has one thread and no
state, so a fork of it is a clean start.

A request that makes no sense is answered with EPROTO where it can be, and its descriptors are closed.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import sys
import traceback
from typing import Final, NoReturn

from fluxres.base.errors import ProtocolError
from fluxres.base.failpoint import hit
from fluxres.wire.payload import pack, unpack_map
from fluxres_shell.run import NAME, run_shell

GC_THRESHOLD: Final = 20_000
"""Objects allocated before a shell looks for garbage: more than a short job ever has."""
MAX_PACKET: Final = 64 * 1024
REQUEST_FDS: Final = 2
_WAKEUP_READ: Final = 4096


def serve(fd: int) -> int:
    """Be the launcher on the socket `fd` until it closes; the process's exit status."""
    import ctypes  # noqa: F401 (every shell needs these two: loaded once, here)
    import encodings.ascii  # noqa: F401

    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):  # a session leader already
        os.setsid()
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)  # the byte in the pipe is what counts
    # Whatever is allocated by now lives as long as the process: no collection in a shell need look at it,
    # so that its pages stay shared.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    _Launcher(sock, reader, writer).run()
    return 0


class _Launcher:
    def __init__(self, sock: socket.socket, reader: int, writer: int) -> None:
        self._sock = sock
        self._reader = reader
        self._writer = writer

    def run(self) -> None:
        """Serve requests until the socket closes."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._reader, select.POLLIN)
        while True:
            ready = [fd for fd, _revents in poll.poll()]
            if self._reader in ready:
                os.read(self._reader, _WAKEUP_READ)
                _reap()
            if self._sock.fileno() in ready and not self._serve_one():
                return

    def _serve_one(self) -> bool:
        """Serve one request; False where the broker is gone."""
        try:
            packet, fds, flags, _address = socket.recv_fds(self._sock, MAX_PACKET, REQUEST_FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        try:
            if not packet and not fds:
                return False
            job, rank = _parse(packet, fds, flags)
        except ProtocolError as error:
            _close(fds)
            return self._answer(0, 0, errno.EPROTO, str(error))
        hit("fork.before")
        try:
            pid = os.fork()
        except OSError as error:
            _close(fds)
            return self._answer(job, rank, error.errno or errno.EAGAIN, f"cannot fork: {error.strerror}")
        if pid == 0:
            self._become_shell(*fds)
        hit("fork.after")
        _close(fds)
        return True

    def _become_shell(self, dirfd: int, ready: int) -> NoReturn:
        """In the child: let go of everything that is the launcher's, and be the shell."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for fd in (self._reader, self._writer):
                os.close(fd)
            self._sock.close()
            status = run_shell(dirfd, _Once(ready).close)
        except BaseException:
            text = traceback.format_exc().strip().replace("\n", " | ")
            print(f"{NAME}: cannot go on: {text}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def _answer(self, job: int, rank: int, errnum: int, text: str) -> bool:
        try:
            self._sock.send(pack({"id": job, "rank": rank, "errnum": errnum, "text": text}))
        except ConnectionError:
            return False
        return True


class _Once:
    """A descriptor that is closed once, however often that is asked."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Close it, unless that was done."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _parse(packet: bytes, fds: list[int], flags: int) -> tuple[int, int]:
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != REQUEST_FDS:
        raise ProtocolError(f"cannot take a launch request of {len(packet)} bytes with {len(fds)} descriptors")
    match unpack_map(packet):
        case {"dir": str(), "id": int(job), "rank": int(rank)}:
            return job, rank
    raise ProtocolError("cannot take a launch request: it needs dir, id and rank")


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _reap() -> None:
    """Take the status of shells that have ended; nobody needs it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
