"""A cgroup v2 for the tasks of one shell: the kernel then knows every process of theirs, and kills them at
once.

The broker names the parent directory (`cgroup_parent` of the spec), which it has been delegated (cgroups(7));
the shell makes `job-<id>-<rank>` below it, for its tasks only, and moves itself into `shells` beside that, so
that the end of the broker's own cgroup does not end it. All of it is best effort: where there is no cgroup
v2, or no permission, the shell finds processes by being their subreaper instead (`leftover`).

`find_mount` also finds the v2 hierarchy of a hybrid system (`/sys/fs/cgroup/unified`).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from fluxres.wire.payload import WireMap

OWN: Final = "/proc/self/cgroup"
MOUNTS: Final = "/proc/self/mountinfo"
SHELLS: Final = "shells"
_MODE: Final = 0o755
_MAX_FILE: Final = 4096


def find_mount(mountinfo: str = MOUNTS) -> str | None:
    """Where a cgroup v2 hierarchy is mounted; None where none is. For whoever chooses `cgroup_parent`."""
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields, _, rest = line.partition(" - ")
                if rest.startswith("cgroup2 "):
                    return fields.split(" ")[4].replace("\\040", " ")
    except OSError:
        return None
    return None


def join_shells(parent: str) -> bool:
    """Move this process into `<parent>/shells`, unless it is there; whether it is.

    The launcher does it, for all the shells that it forks: moving a process takes the kernel many milliseconds.
    """
    path = os.path.join(parent, SHELLS)
    try:
        with open(OWN, encoding="utf-8", errors="surrogateescape") as own:
            if any(line.startswith("0::/") and path.endswith(line[3:].rstrip("\n")) for line in own):
                return True
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, _MODE)
        _write(os.path.join(path, "cgroup.procs"), b"0")
    except OSError:
        return False
    return True


class JobCgroup:
    """The cgroup at `path`; `fd` is its directory, to start tasks in."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def create(cls, parent: str, name: str) -> JobCgroup | None:
        """Make the cgroup `name` below `parent`; None where that cannot be."""
        path = os.path.join(parent, name)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, _MODE)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        if _read(fd, "cgroup.procs") is None:  # an ordinary directory: `parent` is not in cgroup v2
            os.close(fd)
            with contextlib.suppress(OSError):  # it may have been there before, with something in it
                os.rmdir(path)
            return None
        return cls(path, fd)

    def kill(self) -> bool:
        """SIGKILL every process in it; False where the kernel (before 5.14) cannot."""
        try:
            _write(os.path.join(self.path, "cgroup.kill"), b"1")
        except OSError:
            return False
        return True

    def populated(self) -> bool:
        """Whether any process is in it (zombies are not)."""
        return "populated 1" in (_read(self.fd, "cgroup.events") or "")

    def usage(self) -> WireMap:
        """What its processes used: `memory_peak` bytes and `cpu_usec`, each only where the kernel tells."""
        usage: WireMap = {}
        peak = (_read(self.fd, "memory.peak") or "").strip()
        if peak.isdecimal():
            usage["memory_peak"] = int(peak)
        for line in (_read(self.fd, "cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "usage_usec" and value.isdecimal():
                usage["cpu_usec"] = int(value)
        return usage

    def remove(self) -> bool:
        """Remove it; False where something is still in it, or it is gone."""
        os.close(self.fd)
        self.fd = -1
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


def _read(dirfd: int, name: str) -> str | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dirfd)
    except OSError:
        return None
    try:
        return os.read(fd, _MAX_FILE).decode("ascii", "replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
