"""The tasks of one shell as processes: started, signalled, and their standard streams opened.

A task is the leader of its own session, so that a signal to its process group reaches what it started. Its
stdout and stderr are pipes that the shell reads, or files that it writes itself (opened here, with the job
owner's permissions, for appending). Everything is opened before the first task starts: a bad file name starts
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres_shell import pidfd as pidfds
from fluxres_shell.environment import render, task_env
from fluxres_shell.records import STDERR, STDOUT
from fluxres_shell.spec import ShellSpec, TaskSpec

TRUNCATE_MARGIN: Final = 0.02
"""Seconds that a file's mtime may lag behind the clock; see `_truncate_old`."""
STATUS_FAILED: Final = 1 << 8
STATUS_NOT_EXECUTABLE: Final = 126 << 8
STATUS_NOT_FOUND: Final = 127 << 8
_TMPDIR_MODE: Final = 0o700
_FILE_MODE: Final = 0o666


class StartError(FluxresError):
    """The tasks cannot be started; `status` is the wait status that stands for it."""

    def __init__(self, text: str, status: int = STATUS_FAILED) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Whom tasks run as, where that is not the shell's own user."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Task:
    """One task: its process once it is started, and the shell's ends of its pipes."""

    spec: TaskSpec
    pid: int = 0
    pidfd: int = -1
    stdin: int = -1
    outputs: dict[str, int] = field(default_factory=dict)
    """Stream name to the descriptor that the shell reads it from; streams that go to files are not here."""
    theirs: list[int] = field(default_factory=list)
    """The task's own stdin, stdout and stderr, until it is started."""

    @property
    def alive(self) -> bool:
        """Whether it is started and not yet reaped."""
        return self.pidfd >= 0

    def start(self, shell: ShellSpec, tmpdir: str, user: User | None, cgroup_fd: int | None) -> None:
        """Start the process. Raises StartError."""
        try:
            try:
                child = self._spawn(shell, tmpdir, user, cgroup_fd)
            except pidfds.SpawnError as error:
                if error.stage is not pidfds.Stage.CGROUP:
                    raise
                child = self._spawn(shell, tmpdir, user, None)  # a cgroup is a help, not a need
        except pidfds.SpawnError as error:
            raise StartError(f"task {self.spec.rank}: {error}", _spawn_status(error)) from error
        finally:
            self.close_theirs()
        self.pid, self.pidfd = child.pid, child.pidfd

    def _spawn(self, shell: ShellSpec, tmpdir: str, user: User | None, cgroup_fd: int | None) -> pidfds.Child:
        stdin, stdout, stderr = self.theirs
        return pidfds.spawn(
            shell.command,
            env=task_env(shell, self.spec, tmpdir),
            cwd=shell.cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            uid=user.uid if user else None,
            gid=user.gid if user else None,
            groups=user.groups if user else None,
            cgroup_fd=cgroup_fd,
            new_session=True,
        )

    def signal(self, signum: int) -> None:
        """Signal its process group, while it is not reaped (afterwards the number may be another's)."""
        if self.alive:
            # Gone, or a set-uid program: nothing that can be done about it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def reaped(self) -> None:
        """Its wait status has been taken."""
        os.close(self.pidfd)
        self.pidfd = -1

    def close_theirs(self) -> None:
        """Close the shell's copies of the task's own descriptors."""
        for fd in set(self.theirs):
            os.close(fd)
        self.theirs.clear()

    def close_stream(self, stream: str) -> None:
        """Close the shell's end of an output pipe."""
        os.close(self.outputs.pop(stream))

    def close_stdin(self) -> None:
        """Close the shell's end of the input pipe."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1


def _spawn_status(error: pidfds.SpawnError) -> int:
    """The status that sh(1) and flux give a command that could not be started."""
    if error.stage is not pidfds.Stage.EXEC:
        return STATUS_FAILED
    return STATUS_NOT_FOUND if error.errno == errno.ENOENT else STATUS_NOT_EXECUTABLE


def find_user(uid: int) -> User | None:
    """Whom tasks of the job owner `uid` run as; None for the shell's own user. Raises StartError."""
    if uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise StartError(f"cannot run tasks as user {uid}: the shell is user {os.geteuid()}, not root")
    import pwd  # only a system instance needs it

    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise StartError(f"cannot run tasks as user {uid}: no such user on {os.uname().nodename}") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(uid=uid, gid=entry.pw_gid, groups=tuple(groups))


@contextlib.contextmanager
def acting_as(user: User | None) -> Iterator[None]:
    """Use the user's permissions for opening files. Only for a shell that is root."""
    if user is None:
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.setgroups(user.groups)
    os.setegid(user.gid)
    os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


def make_tmpdir(base: str, name: str, user: User | None) -> str:
    """Make the job's temporary directory, the owner's only; its path. Raises StartError."""
    path = os.path.join(base, name)
    try:
        os.makedirs(base, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # the next lines tell whether it is ours
            os.mkdir(path, _TMPDIR_MODE)
        info = os.lstat(path)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (os.geteuid(), user.uid if user else -1):
            raise PermissionError(errno.EPERM, "it exists and is somebody else's", path)
        if user is not None:
            os.chown(path, user.uid, user.gid, follow_symlinks=False)
    except OSError as error:
        raise StartError(f"cannot make the job's temporary directory {path!r}: {error.strerror}") from error
    return path


def remove_tmpdir(path: str) -> None:
    """Remove the job's temporary directory and what is in it, as far as that is possible."""
    try:
        os.rmdir(path)
    except OSError:
        import shutil  # large, and most jobs leave the directory empty

        shutil.rmtree(path, ignore_errors=True)


def open_streams(shell: ShellSpec, tmpdir: str, user: User | None, submitted: float) -> list[Task]:
    """Open the standard streams of every task. `submitted`: see `_truncate_old`. Raises StartError."""
    tasks: list[Task] = []
    try:
        for spec in shell.tasks:
            task = Task(spec=spec)
            tasks.append(task)
            _open_stdin(shell, task, tmpdir, user)
            for stream, template in ((STDOUT, shell.stdio.stdout_path), (STDERR, shell.stdio.stderr_path)):
                if template is None:
                    task.outputs[stream], theirs = _pipe()
                else:
                    path = os.path.join(shell.cwd, render(template, shell, spec, tmpdir))
                    theirs = _open_output(path, user, submitted if shell.stdio.truncate else 0)
                task.theirs.append(theirs)
    except OSError as error:
        close_all(tasks)
        raise StartError(f"cannot open {error.filename!r}: {error.strerror}") from error
    return tasks


def close_all(tasks: list[Task]) -> None:
    """Close every descriptor that the shell has of tasks that are not started."""
    for task in tasks:
        task.close_theirs()
        task.close_stdin()
        for stream in tuple(task.outputs):
            task.close_stream(stream)


def _pipe() -> tuple[int, int]:
    """A pipe whose reading end, the shell's, does not block."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ours, False)
    return ours, theirs


def _open_stdin(shell: ShellSpec, task: Task, tmpdir: str, user: User | None) -> None:
    if shell.stdio.stdin_null:
        task.theirs.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    elif shell.stdio.stdin_path is not None:
        path = os.path.join(shell.cwd, render(shell.stdio.stdin_path, shell, task.spec, tmpdir))
        with acting_as(user):
            task.theirs.append(_open(path, os.O_RDONLY))
    else:
        theirs, task.stdin = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(task.stdin, False)
        task.theirs.append(theirs)


def _open(path: str, flags: int) -> int:
    """Open without waiting for a FIFO's other end; the descriptor itself blocks. Raises OSError."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, _FILE_MODE)
    os.set_blocking(fd, True)
    return fd


def _open_output(path: str, user: User | None, submitted: float) -> int:
    with acting_as(user):
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if submitted:
        _truncate_old(fd, submitted)
    return fd


def _truncate_old(fd: int, submitted: float) -> None:
    """Empty a regular file that was last written before the job was submitted.

    Several shells of the job, and tasks of one, may share the file: whoever opens it first empties it, and
    the time tells the others that it is theirs already. The lock keeps looking and emptying together.
    """
    with contextlib.suppress(OSError):  # a file system without locks: the time alone must do
        fcntl.flock(fd, fcntl.LOCK_EX)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_size and info.st_mtime < submitted - TRUNCATE_MARGIN:
        os.ftruncate(fd, 0)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def signal_all(tasks: list[Task], signum: int) -> None:
    """Signal every living task's process group."""
    for task in tasks:
        task.signal(signum)
