"""The statedir of one rank: its lock, its own id, and how many incarnations it has seen. All of it is durable.

One broker at a time: the lock is held for the life of the process, so that a second broker on the same statedir refuses
to start. The count orders incarnations: it is written before an incarnation begins.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from typing import Final, Protocol

import msgspec

from fluxres.base.errors import FluxresError, Refusal

LOCK: Final = "lock"
IDENTITY: Final = "identity.json"
STORE: Final = "kvs.sqlite"
PRIVATE: Final = 0o700


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who this statedir is: its own `id`, the `instance` it belongs to, and the incarnations begun on it.

    `instance` is empty for a rank that has never joined one: rank 0 draws it, the others adopt it. `epoch_ms` is when
    it was made, in milliseconds since 1970: the epoch of its jobids (RFC 19).
    """

    id: str
    instance: str
    incarnations: int
    epoch_ms: int


class Identities(Protocol):
    """Where a rank keeps who it is."""

    @property
    def path(self) -> str:
        """The directory."""

    def begin_incarnation(self, *, root: bool) -> Identity:
        """Count one more incarnation, durably, and return the identity; the `root` names its instance."""

    def adopt(self, identity: Identity, instance: str) -> Identity:
        """Belong to `instance` from now on, durably."""


class Statedir:
    """A locked statedir; the lock goes with the process, or with `close`."""

    def __init__(self, path: str) -> None:
        """Make the directory where it is missing, and lock it. Raises FluxresError."""
        self.path = os.path.abspath(path)
        try:
            os.makedirs(self.path, mode=PRIVATE, exist_ok=True)
            self._lock = os.open(os.path.join(self.path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FluxresError(f"cannot use statedir {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise FluxresError(f"cannot use statedir {path}: another broker (pid {holder}) is running on it") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)

    @property
    def store(self) -> str:
        """The path of the KVS."""
        return os.path.join(self.path, STORE)

    def begin_incarnation(self, *, root: bool) -> Identity:
        """Count one more incarnation, durably, and return the identity; the `root` names its instance.

        Raises FluxresError.
        """
        old = self._read()
        fresh = Identity(
            id=old.id if old else str(uuid.uuid4()),
            instance=(old.instance if old else "") or (str(uuid.uuid4()) if root else ""),
            incarnations=old.incarnations + 1 if old else 1,
            epoch_ms=old.epoch_ms if old else int(time.time() * 1000) - 1,
        )
        self._write(fresh)
        return fresh

    def adopt(self, identity: Identity, instance: str) -> Identity:
        """Belong to `instance` from now on, durably. Raises FluxresError."""
        if identity.instance == instance:
            return identity
        adopted = msgspec.structs.replace(identity, instance=instance)
        self._write(adopted)
        return adopted

    def _write(self, identity: Identity) -> None:
        path = os.path.join(self.path, IDENTITY)
        try:
            with open(f"{path}.new", "wb") as file:
                file.write(msgspec.json.encode(identity))
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{path}.new", path)
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise FluxresError(f"cannot write {path}: {error.strerror}") from error

    def _read(self) -> Identity | None:
        path = os.path.join(self.path, IDENTITY)
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=Identity)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise Refusal(
                f"cannot read {path}: {error}; put a copy of it back, or move the statedir away to begin anew"
            ) from error
