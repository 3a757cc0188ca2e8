"""The directory of one (job, rank): `<statedir>/jobs/<jobid>/<rank>/`, which is a shell's whole identity.

It is made with its spec before anything is asked of the launcher; the spec is written once and never rewritten. It
goes only after the job's `clean` is durable: renamed into the trash first, so that what is half removed is never taken
for a shell's directory. These are a few quick calls on a local disk, made in the event loop: a thread would cost more,
because each of its calls has to win the interpreter's lock again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from typing import Final, cast

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, dothex, parse_jobid
from fluxres.exec.host import Identity
from fluxres_shell.cgroup import JobCgroup
from fluxres_shell.find import SPEC

JOBS: Final = "jobs"
TRASH: Final = "trash"
SPEC_NEW: Final = "spec.new"
SPEC_MAX: Final = 4 * 1024 * 1024
"""Bytes of a spec that are read."""
PRIVATE: Final = 0o700


def job_path(statedir: str, jobid: JobId, rank: int) -> str:
    """The path of a shell's directory."""
    return os.path.join(statedir, JOBS, dothex(jobid), str(rank))


def open_directory(path: str) -> int:
    """A descriptor of the directory `path`. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the directory `path`, closed at the end. Raises OSError."""
    fd = open_directory(path)
    try:
        yield fd
    finally:
        os.close(fd)


def prepare(statedir: str, jobid: JobId, rank: int, spec: bytes) -> bool:
    """Make the directory with its spec, unless that is there; whether there was no directory. Raises OSError.

    Nothing is synced: the shell does that before it claims, and until then nothing has happened. A spec that cannot be
    read was cut off by the death of the node, and is written again.
    """
    path = job_path(statedir, jobid, rank)
    fresh = not os.path.isdir(path)
    if fresh or spec_identity(path) is None:
        os.makedirs(path, mode=PRIVATE, exist_ok=True)
        new = os.path.join(path, SPEC_NEW)
        with open(new, "wb") as file:
            file.write(spec)
        os.rename(new, os.path.join(path, SPEC))
    return fresh


def spec_identity(path: str) -> Identity | None:
    """Whose the spec in `path` says it is; None where it is missing or no spec. Raises OSError."""
    try:
        with open(os.path.join(path, SPEC), "rb") as file:
            spec = cast("object", json.loads(file.read(SPEC_MAX)))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if isinstance(spec, dict) and isinstance(spec.get("nonce"), str) and isinstance(spec.get("instance"), str):
        return Identity(spec["nonce"], spec["instance"])
    return None


def kill_cgroup(path: str, name: str) -> bool:
    """Kill what is left in the cgroup `name` that a dead shell made for its tasks, and remove it.

    True where something is still dying in it: ask again.
    """
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        with open(os.path.join(path, SPEC), "rb") as file:
            parent = json.loads(file.read(SPEC_MAX))["cgroup_parent"]
        if isinstance(parent, str) and os.path.isdir(os.path.join(parent, name)):
            cgroup = JobCgroup.create(parent, name)
            if cgroup is not None:
                cgroup.kill()
                return not cgroup.remove()
    return False


def inventory(statedir: str, rank: int) -> list[JobId]:
    """The jobs that have a directory for `rank` here, ended ones included."""
    found = []
    jobs = os.path.join(statedir, JOBS)
    for name in sorted(os.listdir(jobs)) if os.path.isdir(jobs) else []:
        try:
            jobid = parse_jobid(name)
        except ValueError:
            continue
        if os.path.isdir(os.path.join(jobs, name, str(rank))):
            found.append(jobid)
    return found


def discard(statedir: str, jobid: JobId, rank: int) -> None:
    """Put a shell's directory into the trash; nothing happens where there is none. Raises FluxresError."""
    path = job_path(statedir, jobid, rank)
    trash = trash_path(statedir)
    try:
        os.makedirs(trash, mode=PRIVATE, exist_ok=True)
        os.rename(path, os.path.join(trash, f"{dothex(jobid)}-{rank}-{secrets.token_hex(4)}"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise FluxresError(f"cannot discard {path}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # other ranks of the job may lie there too
        os.rmdir(os.path.dirname(path))


def trash_path(statedir: str) -> str:
    """Where discarded directories wait to be removed."""
    return os.path.join(statedir, TRASH)


def discarded(statedir: str) -> list[str]:
    """The paths of the directories in the trash."""
    trash = trash_path(statedir)
    return [os.path.join(trash, name) for name in os.listdir(trash)] if os.path.isdir(trash) else []
