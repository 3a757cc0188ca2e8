"""Find a shell from its directory: the facts, and a connection to it. Nothing here sends a signal.

The flock on the claim is the truth about life and death (claim.py). A pid alone is not: it may have been
reused. So: read the claim, see the lock held, open a pidfd of the pid, see the lock *still* held and the
process of the pidfd not dead: its holder lived all the while, so that pid was its own, and the pidfd is
that shell. The pid is only looked at in the boot and pid namespace that it was written in.

What follows from the facts is decided by a pure function of the broker (fluxres.exec.reattach), which
also reads the journal, after death is established. Silence is never death. See unix(7), flock(2),
pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres_shell import claim as claims
from fluxres_shell import pidfd as pidfds

if TYPE_CHECKING:
    from types import TracebackType

    from fluxres_shell.claim import ClaimRecord

SPEC: Final = "spec"
"""The name of what to run."""
SOCK: Final = "sock"
"""The name of the socket on which the shell listens."""
SOCK_TEMPORARY: Final = f"{SOCK}.new"
"""Its name until it listens. Only the holder of the claim binds, so one name is enough."""
LISTEN_BACKLOG: Final = 16
"""Connections that wait to be accepted; one more gets no answer for now."""
_TIMEVAL: Final = struct.Struct("ll")
_MICROSECONDS: Final = 1_000_000
_NO_ANSWER: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN, errno.ENOTCONN)
_NO_SUCH_PROCESS: Final = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
"""The latter two: the number is by now that of a thread."""


class Kind(Enum):
    """What a shell's directory says about its shell."""

    NOTHING = auto()  # neither spec nor claim
    UNCLAIMED = auto()  # a spec: a shell may still be started, or the start voided
    VOID = auto()  # nothing ran, and nothing will
    ALIVE = auto()  # a process holds the claim's lock
    DEAD = auto()  # there is a claim, and nobody holds its lock
    CORRUPT = auto()  # the claim cannot be read


class PeerMismatch(FluxresError):
    """Another process than the shell listens on the shell's socket."""


@dataclass(slots=True, kw_only=True)
class Found:
    """The facts about one shell's directory, as of one moment. Owns `pidfd`: close it, or use `with`.

    - `claim`: VOID, ALIVE, DEAD.
    - `pidfd`: ALIVE. The shell's; None where its pid means nothing here (another pid namespace or
      host), or it is just dying.
    - `locked`: the claim's lock is held: ALIVE, and possibly CORRUPT.
    - `rebooted`: the claim is of another boot.
    - `reason`: why it is CORRUPT or VOID.
    """

    kind: Kind
    claim: ClaimRecord | None = None
    pidfd: int | None = None
    locked: bool = False
    rebooted: bool = False
    reason: str = ""

    def close(self) -> None:
        """Close the pidfd. May be called again."""
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def __enter__(self) -> Found:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find(dirfd: int, *, boot_id: str | None = None, pid_ns: int | None = None) -> Found:
    """The facts about the shell of the directory `dirfd`.

    `boot_id` and `pid_ns` are for tests: this boot and pid namespace when None. Raises OSError where the
    directory cannot be read: that is no fact about the shell.
    """
    try:
        fd = claims.open_claim(dirfd)
    except claims.ClaimCorrupt as error:
        return Found(kind=Kind.CORRUPT, reason=str(error))
    if fd is None:
        return Found(kind=Kind.UNCLAIMED if _exists(dirfd, SPEC) else Kind.NOTHING)
    try:
        return _examine(
            fd,
            claims.read_boot_id() if boot_id is None else boot_id,
            claims.read_pid_namespace() if pid_ns is None else pid_ns,
        )
    finally:
        os.close(fd)


def _examine(fd: int, boot_id: str, pid_ns: int) -> Found:
    """The facts in an open claim."""
    locked = claims.is_locked(fd)
    try:
        record = claims.read_open(fd)
    except claims.ClaimCorrupt as error:
        return Found(kind=Kind.CORRUPT, locked=locked, reason=str(error))
    rebooted = record.boot_id != boot_id
    if record.void:
        return Found(kind=Kind.VOID, claim=record, rebooted=rebooted, reason=record.reason)
    if not locked:
        return Found(kind=Kind.DEAD, claim=record, rebooted=rebooted)
    pidfd = None if rebooted or record.pid_ns != pid_ns else _open_holder(record.pid)
    if not claims.is_locked(fd):  # it died meanwhile, and the pidfd may be anybody's
        if pidfd is not None:
            os.close(pidfd)
        return Found(kind=Kind.DEAD, claim=record, rebooted=rebooted)
    if pidfd is not None and pidfds.wait_dead(pidfd, 0):
        # Dead and yet locked: for an instant, by a child of it between fork and exec. Ask again later.
        os.close(pidfd)
        pidfd = None
    return Found(kind=Kind.ALIVE, claim=record, pidfd=pidfd, locked=True, rebooted=rebooted)


def _open_holder(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _NO_SUCH_PROCESS:
            return None
        raise


def connect(dirfd: int, found: Found, *, timeout: float = 0.0) -> socket.socket | None:
    """Connect to the shell that was `found` ALIVE; a non-blocking stream socket, its peer verified.

    None is no answer: nobody listens (the caller may ask the shell, by SIGUSR1 through the pidfd, to bind
    again), or more than `LISTEN_BACKLOG` connections wait, for longer than `timeout` seconds (0: do not
    block). Without a pidfd in `found` the peer cannot be verified: the claim's lock and the directory's
    mode then stand for it. Raises PeerMismatch, OSError.
    """
    if found.kind is not Kind.ALIVE:
        raise ValueError(f"cannot connect to a shell that is {found.kind.name}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        answered = _dial(sock, dirfd, timeout) and _verify(sock, found)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    if answered:
        return sock
    sock.close()
    return None


def _dial(sock: socket.socket, dirfd: int, timeout: float) -> bool:
    """Connect, waiting for room in the backlog at most `timeout` seconds. Whether somebody listens."""
    if timeout > 0:
        # Not settimeout(): a non-blocking connect(2) to a full backlog fails at once, whatever one
        # polls for afterwards. This is the wait that unix(7) sockets do have. At least a
        # microsecond: a zero would be for ever.
        microseconds = max(1, int(timeout * _MICROSECONDS))
        bound = _TIMEVAL.pack(*divmod(microseconds, _MICROSECONDS))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
    else:
        sock.setblocking(False)
    try:
        sock.connect(_path(dirfd, SOCK))
        sock.getpeername()  # ENOTCONN: a signal ended the wait, which connect() takes for success
    except OSError as error:
        if error.errno in _NO_ANSWER:
            return False
        raise
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    return True


def _verify(sock: socket.socket, found: Found) -> bool:
    """Whether the peer is the shell, living; False if either is dead. PeerMismatch if it is another."""
    if found.pidfd is None:
        return True
    try:
        peer = pidfds.peer_pidfd(sock)
    except ProcessLookupError:
        return False
    try:
        if pidfds.wait_dead(found.pidfd, 0) or pidfds.wait_dead(peer, 0):
            return False
        if pidfds.same_process(peer, found.pidfd):
            return True
        raise PeerMismatch(
            f"cannot connect to the shell: process {pidfds.pid_of(peer)} listens on its socket, "
            f"not process {pidfds.pid_of(found.pidfd)}"
        )
    finally:
        os.close(peer)


def bind(dirfd: int) -> socket.socket:
    """A socket that listens on `sock` in the directory; for the shell, holding the claim.

    Must be called by the shell itself: the peer that clients see is who called listen(2). It replaces
    what was there in one step, when it listens already. Who may connect is up to the directory's
    mode, 0700. The socket is non-blocking. Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):  # there only if a shell was killed just here
            os.unlink(SOCK_TEMPORARY, dir_fd=dirfd)
        sock.bind(_path(dirfd, SOCK_TEMPORARY))
        sock.listen(LISTEN_BACKLOG)
        os.rename(SOCK_TEMPORARY, SOCK, src_dir_fd=dirfd, dst_dir_fd=dirfd)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _path(dirfd: int, name: str) -> str:
    """A path to `name` that fits into the 108 bytes of sockaddr_un, however deep the directory is."""
    return f"/proc/self/fd/{dirfd}/{name}"


def _exists(dirfd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
