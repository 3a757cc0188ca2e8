"""The directory of one (job, rank): `<statedir>/jobs/<jobid>/<rank>/`, which is a shell's whole identity.

It is made with its spec, synced up to the statedir, before anything is asked of the launcher; the spec is written once
and never rewritten. It goes only after the job's `clean` is durable: renamed first, so that what is half removed is
never taken for a shell's directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Final, cast

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, dothex, parse_jobid
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


def exists(path: str) -> bool:
    """Whether there is such a directory. A look at a local disk: quick enough for the event loop."""
    return os.path.isdir(path)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the directory `path`, closed at the end. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def make(statedir: str, jobid: JobId, rank: int) -> str:
    """Make the directory if it is not there, durably, and return its path. Raises OSError."""
    path = job_path(statedir, jobid, rank)
    if not os.path.isdir(path):
        os.makedirs(path, mode=PRIVATE, exist_ok=True)
        for parent in (os.path.dirname(path), os.path.join(statedir, JOBS)):
            _sync_directory(parent)
    return path


def write_spec(path: str, spec: bytes) -> None:
    """Write the spec into the directory `path`, durably, unless there is one already. Raises OSError."""
    if os.path.exists(os.path.join(path, SPEC)):
        return
    new = os.path.join(path, SPEC_NEW)
    with open(new, "wb") as file:
        file.write(spec)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, os.path.join(path, SPEC))
    _sync_directory(path)


def spec_identity(path: str) -> tuple[str, str] | None:
    """The (nonce, instance id) that the spec in `path` names; None where there is none, or it cannot be read."""
    try:
        with open(os.path.join(path, SPEC), "rb") as file:
            spec = cast("object", json.loads(file.read(SPEC_MAX)))
    except (FileNotFoundError, ValueError):
        return None
    if isinstance(spec, dict) and isinstance(spec.get("nonce"), str) and isinstance(spec.get("instance"), str):
        return spec["nonce"], spec["instance"]
    return None


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
    """Remove a shell's directory; nothing happens where there is none. Raises FluxresError."""
    path = job_path(statedir, jobid, rank)
    trash = os.path.join(statedir, TRASH)
    try:
        os.makedirs(trash, mode=PRIVATE, exist_ok=True)
        os.rename(path, os.path.join(trash, f"{dothex(jobid)}-{rank}"))
        with contextlib.suppress(OSError):  # other ranks of the job may lie there too
            os.rmdir(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise FluxresError(f"cannot discard {path}: {error.strerror}") from error
    empty_trash(statedir)


def empty_trash(statedir: str) -> None:
    """Remove what was discarded, now or before a crash."""
    trash = os.path.join(statedir, TRASH)
    for name in os.listdir(trash) if os.path.isdir(trash) else []:
        shutil.rmtree(os.path.join(trash, name), ignore_errors=True)


def _sync_directory(path: str) -> None:
    with opened(path) as fd:
        os.fsync(fd)
