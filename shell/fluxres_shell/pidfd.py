"""Processes by pidfd: start one, name it, signal it, see it end.

A pidfd (pidfd_open(2)) names one process for as long as it is open: unlike a pid it is never reused.
It is readable, to poll(2), from the moment the process is dead. A zombie counts as dead: in many
containers nobody ever reaps.

The C half is csrc/pidfd.c, through cffi. What Python's own os, signal and socket modules can do is
done here. Failures are SpawnError (a start failed, where and why), ProcessLookupError (no such
process) and plain OSError.
"""

from __future__ import annotations

import _thread
import errno
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast

from fluxres_shell._pidfd import ffi as _ffi
from fluxres_shell._pidfd import lib as _lib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from _cffi_backend import FFI, _CDataBase

    class _Child(Protocol):
        """`struct fluxres_child`."""

        pid: int
        pidfd: int
        stage: int
        errnum: int

    class _Exit(Protocol):
        """`struct fluxres_exit`."""

        status: int
        has_cgroupid: int
        cgroupid: int

    class _Lib(Protocol):
        """The functions of csrc/pidfd.h."""

        FLUXRES_NEW_SESSION: int
        FLUXRES_SET_GROUPS: int
        FLUXRES_SET_GID: int
        FLUXRES_SET_UID: int
        FLUXRES_FORCE_FALLBACK: int

        def fluxres_spawn(self, spawn: _CDataBase, child: _Child, /) -> int: ...
        def fluxres_exit_info(self, pidfd: int, info: _Exit, /) -> int: ...
        def fluxres_pidfs_inode(self, pidfd: int, inode: _CDataBase, /) -> int: ...


ffi: Final[FFI] = _ffi
lib: Final[_Lib] = _lib

MAX_FDS: Final = 64
"""Descriptors that `spawn` passes on, standard input, output and error among them."""
SO_PEERPIDFD: Final = 77
"""Linux 6.5, asm-generic/socket.h; the socket module has no name for it."""
SCRIPT_SHELL: Final = b"/bin/sh"
"""Runs a program that the kernel does not know how to (ENOEXEC), as execvp(3) has it."""
_UCRED: Final = struct.Struct("iII")
_UNSUPPORTED: Final = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL)
_MS_PER_SECOND: Final = 1000


class Stage(StrEnum):
    """Where a start failed; the names are those of `enum fluxres_stage`, in its order."""

    NONE = "none"
    CHANNEL = "channel"
    CLONE = "clone"
    PIDFD = "pidfd"
    GUARD = "guard"
    CGROUP = "cgroup"
    SESSION = "session"
    DUP = "dup"
    GROUPS = "setgroups"
    SETGID = "setgid"
    SETUID = "setuid"
    CHDIR = "chdir"
    EXEC = "exec"


_STAGES: Final = tuple(Stage)


class SpawnError(OSError):
    """A process could not be started; nothing of it is left.

    `errno` and `strerror` as of any OSError; `stage` says where; `filename` is the program, or the
    working directory if that is what failed.
    """

    def __init__(self, errnum: int, stage: Stage, program: str, subject: str) -> None:
        super().__init__(errnum, os.strerror(errnum), subject)
        self.stage = stage
        self.program = program

    def __str__(self) -> str:
        if self.stage is Stage.EXEC:
            return f"cannot start {self.program!r}: {self.strerror}"
        if self.stage is Stage.CHDIR:
            return f"cannot start {self.program!r}: working directory {self.filename!r}: {self.strerror}"
        return f"cannot start {self.program!r}: {self.stage}: {self.strerror}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A started process. The caller closes `pidfd` and reaps `pid` (`os.waitid(P_PIDFD, …)`)."""

    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitInfo:
    """How a process ended: `status` as wait(2) has it, and the id of its cgroup where known."""

    status: int
    cgroup_id: int | None

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None if a signal ended it."""
        return os.WEXITSTATUS(self.status) if os.WIFEXITED(self.status) else None

    @property
    def signum(self) -> int | None:
        """The signal that ended it, or None."""
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else None


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None,
    stdin: int,
    stdout: int,
    stderr: int,
    extra_fds: Mapping[int, int] | None = None,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] | None = None,
    cgroup_fd: int | None = None,
    new_session: bool = False,
    force_fallback: bool = False,
) -> Child:
    """Start `argv` and return when it has passed execve(2).

    The child dies with the calling process (PR_SET_PDEATHSIG; a set-uid program clears that), has default
    signal handling, no signal blocked, and no descriptors but `stdin`, `stdout`, `stderr` and
    `extra_fds` (number there: number here). A program without a slash is looked for in the PATH of
    `env`. `uid` needs `gid` and `groups` beside it. `cgroup_fd` is a cgroup v2 directory, which the child
    is in before its first instruction. `force_fallback` does it as a kernel without clone3(2) must.

    Raises SpawnError; ValueError for arguments that make no process.
    """
    if _thread.get_native_id() != os.getpid():
        raise ValueError(f"cannot start {argv[:1]}: not in the main thread, whose end would kill it")
    flags = _credential_flags(uid, gid, groups)
    flags |= lib.FLUXRES_NEW_SESSION if new_session else 0
    flags |= lib.FLUXRES_FORCE_FALLBACK if force_fallback else 0
    program = _Program(argv, env, cwd)
    fds = {0: stdin, 1: stdout, 2: stderr, **(extra_fds or {})}
    if len(fds) > MAX_FDS or min(fds) < 0:
        raise ValueError(f"cannot pass descriptors {sorted(fds)}: at most {MAX_FDS}, none negative")
    sources, targets = ffi.new("int[]", list(fds.values())), ffi.new("int[]", list(fds))
    group_list = ffi.new("uint32_t[]", list(groups or ()))
    request = {
        **program.fields,
        "sources": sources,
        "targets": targets,
        "nfds": len(fds),
        "groups": group_list,
        "ngroups": len(groups or ()),
        "uid": uid or 0,
        "gid": gid or 0,
        "cgroup_fd": -1 if cgroup_fd is None else cgroup_fd,
        "flags": flags,
    }
    child = cast("_Child", ffi.new("struct fluxres_child *"))
    if lib.fluxres_spawn(ffi.new("struct fluxres_spawn *", request), child) < 0:
        stage = _STAGES[child.stage]
        subject = cwd if stage is Stage.CHDIR and cwd is not None else argv[0]
        raise SpawnError(child.errnum, stage, argv[0], subject)
    return Child(pid=child.pid, pidfd=child.pidfd)


class _Program:
    """What to execute, as C has it: the first fields of `struct fluxres_spawn`, and the memory that
    they point to. ValueError where C cannot have it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        if not argv:
            raise ValueError("cannot start: no program given")
        for name in env:
            if not name or "=" in name:
                raise ValueError(f"cannot start {argv[0]!r}: {name!r} is not the name of a variable")
        args = [_without_nul(arg) for arg in argv]
        variables = [_without_nul(f"{name}={value}") for name, value in env.items()]
        self._owned: list[_CDataBase] = []
        self.fields = {
            "paths": self._array(_candidates(args[0], env.get("PATH", os.defpath))),
            "argv": self._array(args),
            "script_argv": self._array([SCRIPT_SHELL, b"", *args[1:]]),
            "envp": self._array(variables),
            "cwd": ffi.NULL if cwd is None else self._own("char[]", _without_nul(cwd)),
        }

    def _array(self, strings: Sequence[bytes]) -> _CDataBase:
        """A `char *[]` that ends with NULL."""
        return self._own("char *[]", [*(self._own("char[]", text) for text in strings), ffi.NULL])

    def _own(self, kind: str, value: bytes | list[_CDataBase]) -> _CDataBase:
        self._owned.append(ffi.new(kind, value))
        return self._owned[-1]


def _credential_flags(uid: int | None, gid: int | None, groups: Sequence[int] | None) -> int:
    if uid is not None and (gid is None or groups is None):
        raise ValueError(f"cannot start as uid {uid}: gid and groups would stay those of this process")
    flags = lib.FLUXRES_SET_UID if uid is not None else 0
    flags |= lib.FLUXRES_SET_GID if gid is not None else 0
    return flags | (lib.FLUXRES_SET_GROUPS if groups is not None else 0)


def _without_nul(text: str) -> bytes:
    if "\0" in text:
        raise ValueError(f"cannot start a process with a NUL byte in {text.partition('=')[0]!r}")
    return os.fsencode(text)


def _candidates(program: bytes, path: str) -> list[bytes]:
    """Where `program` may be, in order: itself if it has a slash, else in each directory of `path`.

    An empty directory is the current one, as in execvp(3).
    """
    if not program:
        return []
    if b"/" in program:
        return [program]
    return [os.path.join(directory or b".", program) for directory in os.fsencode(path).split(b":")]


def exit_info(pidfd: int) -> ExitInfo | None:
    """How the process of `pidfd` ended, whoever its parent was, once it has been reaped.

    `pidfd` must have been opened before. None if it is not (or not yet) known: the process lives,
    is a zombie, or the kernel is older than 6.15. For a child, waitid(2) is the authority (this is the
    status of the main thread, which may have ended before the others): this is for the text of an
    exception. Raises OSError.
    """
    info = cast("_Exit", ffi.new("struct fluxres_exit *"))
    if _checked(lib.fluxres_exit_info(pidfd, info)) == 0:
        return None
    return ExitInfo(status=info.status, cgroup_id=info.cgroupid if info.has_cgroupid else None)


def wait_dead(pidfd: int, timeout: float | None) -> bool:
    """Wait up to `timeout` seconds (None: without end) for the process to be dead; whether it is."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * _MS_PER_SECOND))


def send_signal(pidfd: int, signum: int) -> bool:
    """Send a signal (0: only ask). False if the process is dead and reaped. Raises PermissionError."""
    try:
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    return True


def peer_pidfd(sock: socket.socket, *, force_fallback: bool = False) -> int:
    """A pidfd of the process at the other end of a connected Unix socket; the caller closes it.

    That is the process that called connect(2), or listen(2) on the listening side. Before Linux 6.5
    it is made from the peer's pid, and is that process only if that still lives: a peer that
    has hung up is refused. Raises ProcessLookupError.
    """
    if not force_fallback:
        try:
            return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except ProcessLookupError:
            raise
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    pid, _uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if pid <= 0:
        raise ProcessLookupError("cannot open the peer's pidfd: it is in another pid namespace")
    pidfd = os.pidfd_open(pid)
    if _hung_up(sock) or wait_dead(pidfd, 0):
        os.close(pidfd)
        raise ProcessLookupError(f"cannot open the peer's pidfd: process {pid} has gone")
    return pidfd


def same_process(pidfd_a: int, pidfd_b: int, *, force_fallback: bool = False) -> bool:
    """Whether two pidfds name one process.

    By the inode number on pidfs (Linux 6.9). Before, by the pid, which only a process that is not
    reaped yet has: False where both are the same process and it is gone. Raises OSError.
    """
    if not force_fallback:
        inode_a, inode_b = _pidfs_inode(pidfd_a), _pidfs_inode(pidfd_b)
        if inode_a is not None and inode_b is not None:
            return inode_a == inode_b
    pid = pid_of(pidfd_a)
    # Asked again: if a still had the pid after b was seen with it, both had it at once.
    return pid is not None and pid_of(pidfd_b) == pid and pid_of(pidfd_a) == pid


def pid_of(pidfd: int) -> int | None:
    """The pid of the process, as /proc sees it; None if it is reaped, or in a namespace out of sight."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as fdinfo:
        for line in fdinfo:
            name, _, value = line.partition(":")
            if name == "Pid":
                return int(value) if int(value) > 0 else None
    raise OSError(f"cannot tell the pid of descriptor {pidfd}: it is not a pidfd")


def _pidfs_inode(pidfd: int) -> int | None:
    inode = ffi.new("uint64_t *")
    return int(inode[0]) if _checked(lib.fluxres_pidfs_inode(pidfd, inode)) else None


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return result


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
