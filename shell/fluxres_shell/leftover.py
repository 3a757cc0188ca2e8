"""Processes that a job's tasks left behind, found and killed without ever hitting a stranger.

Two situations:

- In a living shell (`kill_children`): the shell is a subreaper (PR_SET_CHILD_SUBREAPER), so whoever loses its
  parent becomes its child. Only direct children are killed: nobody else can reap them, so their pids cannot
  have been reused. Their own children are the next round's; the caller repeats until none is left, or gives
  up.
- Of a dead shell (`kill_marked`, for brokers): by the job's id and nonce in the environment. The pid is held
  by a pidfd while the environment is read, so the process that is killed is the one that was looked at.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Final

from fluxres_shell import pidfd as pidfds
from fluxres_shell.environment import NONCE_VARIABLE

MAX_ENVIRON: Final = 4 * 1024 * 1024
"""Bytes of a process's environment that are searched for the marker."""
_PR_SET_CHILD_SUBREAPER: Final = 36


def become_subreaper() -> None:
    """Make this process the parent of its orphaned descendants (prctl(2)). Raises OSError."""
    import ctypes  # only a shell needs it; the launcher has it loaded already

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


def children() -> list[int]:
    """The pids of this process's children, zombies among them."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listing:
            return [int(word) for word in listing.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return [other for other in _processes() if _parent_of(other) == pid]


def kill_children() -> int:
    """SIGKILL every child of this process; how many there were. The caller reaps."""
    found = children()
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def kill_marked(job: str, nonce: str) -> list[int]:
    """SIGKILL every process of the job `job` (F58, plain) with this nonce in its environment; their pids.

    A process that is dying is counted too: repeat until the list is empty. Those of other users are seen only
    by root.
    """
    marks = (f"FLUX_JOB_ID={job}".encode(), f"{NONCE_VARIABLE}={nonce}".encode())
    killed = []
    for pid in _processes():
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue  # gone, or no process
        try:
            if _has_marks(pid, marks) and pidfds.send_signal(pidfd, signal.SIGKILL):
                killed.append(pid)
        except PermissionError:
            continue  # a set-uid program of somebody else
        finally:
            os.close(pidfd)
    return killed


def _has_marks(pid: int, marks: tuple[bytes, ...]) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            variables = environ.read(MAX_ENVIRON).split(b"\0")
    except OSError:
        return False
    return all(mark in variables for mark in marks)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _parent_of(pid: int) -> int:
    """The parent's pid, 0 where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            # The command name, in parentheses, may hold anything: fields are counted from its end.
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
