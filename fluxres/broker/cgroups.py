"""Chooses the cgroup v2 below which the job shells of this broker make those of their tasks (cgroups(7)).

`[exec] cgroup` names it, or says "off"; by default ("auto") it is one of our own below the broker's, where the node
lets us make one. Nothing depends on it: without a cgroup, processes are found in other ways (`fluxres_shell.leftover`).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from fluxres_shell.cgroup import SHELLS, find_mount

AUTO: Final = "auto"
OFF: Final = "off"
OWN: Final = "/proc/self/cgroup"
_MODE: Final = 0o755


def parent_cgroup(setting: str, name: str) -> str | None:
    """The directory of the parent cgroup, made where it is missing; None where there is to be, or can be, none."""
    if setting == OFF:
        return None
    if setting != AUTO:
        return setting
    mount, own = find_mount(), _own_path()
    if mount is None or own is None:
        return None
    path = f"{mount}{own.rstrip('/')}/{name}"
    try:
        os.makedirs(path, mode=_MODE, exist_ok=True)
    except OSError:
        return None
    return path


def remove_parent(path: str | None) -> None:
    """Remove the cgroup that `parent_cgroup` made, unless shells live in it."""
    if path is not None:
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(path, SHELLS))
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _own_path() -> str | None:
    """The path of this process's cgroup in the v2 hierarchy."""
    with contextlib.suppress(OSError), open(OWN, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("0::"):
                return line[3:].rstrip("\n")
    return None
