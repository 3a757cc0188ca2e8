"""The claim: who runs a job on this rank. At most one process ever holds it (invariant I2).

`claim` in the shell's directory is a JSON record, written whole under a temporary name, synced,
locked with flock(2), and only then linked to its name: link(2) fails where the name is taken, so one
of any number of racers wins, and whatever can be seen under the name is complete and is locked for
as long as its shell lives. The descriptor closes at exec and no child is left without one, so the lock
is free when the shell is dead: a zombie, a reused pid or a reboot makes no difference to it.

| state of the directory          | meaning                                                     |
|---------------------------------|-------------------------------------------------------------|
| no `claim`                      | nobody may have started anything; who links it decides      |
| `claim`, locked                 | its shell lives                                             |
| `claim`, not locked             | its shell is dead                                           |
| `claim` with `void` true        | a broker made sure that nothing will ever start here        |
| `claim.<pid>.<random>`, locked  | a racer, or the winner just before it unlinks its temporary |
| the same, not locked            | left by a racer that was killed: `sweep` removes it         |

Every function takes a descriptor of the directory, so that a directory that is renamed meanwhile stays
the same one. See flock(2), link(2), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.failpoint import hit

if TYPE_CHECKING:
    from types import TracebackType

CLAIM: Final = "claim"
"""The file's name."""
TEMPORARY_PREFIX: Final = f"{CLAIM}."
"""What the names of temporaries begin with."""
CLAIM_VERSION: Final = 1
CLAIM_MAX: Final = 4096
"""Bytes that a claim may have."""
REASON_MAX: Final = 512
"""Characters of a void claim's reason that are kept."""
TAKE_ATTEMPTS: Final = 8
"""How often a temporary may vanish (a `sweep` between its creation and its lock) before that is an error."""
BOOT_ID_FILE: Final = "/proc/sys/kernel/random/boot_id"
PID_NAMESPACE_FILE: Final = "/proc/self/ns/pid"
PID_MAX: Final = 2**31 - 1
_RANDOM_BYTES: Final = 8
_SHA256_DIGITS: Final = 64
_DIRECTORY_ONLY: Final = 0o600


class ClaimLost(FluxresError):
    """Somebody else has the claim: this process must not run anything."""


class ClaimCorrupt(FluxresError):
    """The claim cannot be read; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRecord:
    """What a claim says.

    `pid` means something only in the boot `boot_id` and in the pid namespace whose inode number is
    `pid_ns`. `nonce` is the job's, `spec_sha256` the hex digest of the spec that the shell read (empty in
    a void claim). `void` claims run nothing, and `reason` says why.
    """

    version: int
    pid: int
    pid_ns: int
    boot_id: str
    nonce: str
    spec_sha256: str
    void: bool
    reason: str

    def encode(self) -> bytes:
        """The file's content: JSON and a newline. ValueError if it is longer than `CLAIM_MAX`."""
        content = json.dumps(asdict(self)).encode("ascii") + b"\n"
        if len(content) > CLAIM_MAX:
            raise ValueError(f"cannot write a claim of {len(content)} bytes: the bound is {CLAIM_MAX}")
        return content


class Claim:
    """The claim that this process holds: as long as `fd` is open here, the world sees it alive."""

    def __init__(self, fd: int, record: ClaimRecord) -> None:
        self.fd = fd
        self.record = record

    def close(self) -> None:
        """Let go of the lock, which tells the world that this shell is dead. Once only."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@functools.cache
def read_boot_id() -> str:
    """The id of this boot of the kernel (random(4))."""
    with open(BOOT_ID_FILE, encoding="ascii") as file:
        return file.read().strip()


@functools.cache
def read_pid_namespace() -> int:
    """The inode number of this process's pid namespace: what makes a pid comparable."""
    return os.stat(PID_NAMESPACE_FILE).st_ino


def take(dirfd: int, nonce: str, spec_sha256: str, *, boot_id: str | None = None) -> Claim:
    """Become the one shell of this directory, durably, and return the claim, locked.

    Raises ClaimLost, leaving no trace, if there is a claim already; OSError if the directory
    cannot be written. After an OSError of the last sync the claim exists and its lock is let
    go, which reads as a shell that died before it ran anything.
    """
    record = _record(nonce, spec_sha256, boot_id=boot_id)
    fd = _link(dirfd, record)
    if fd is None:
        raise ClaimLost("cannot take the claim: another process has it, or it is void")
    return Claim(fd, record)


def void(dirfd: int, nonce: str, reason: str, *, boot_id: str | None = None) -> bool:
    """Claim the directory for nobody, durably. True: nothing has run and nothing will.

    False: there is a claim already, a shell's or a void one. Raises OSError: then ask again.
    """
    fd = _link(dirfd, _record(nonce, "", boot_id=boot_id, void=True, reason=reason[:REASON_MAX]))
    if fd is None:
        return False
    os.close(fd)
    return True


def open_claim(dirfd: int) -> int | None:
    """A descriptor of the claim, to read it and test its lock; None if there is none.

    Raises ClaimCorrupt if the name is something else than a file.
    """
    try:
        fd = os.open(CLAIM, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dirfd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ClaimCorrupt(f"cannot read the claim: not a regular file ({error.strerror})") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ClaimCorrupt("cannot read the claim: not a regular file")
    return fd


def read_open(fd: int) -> ClaimRecord:
    """The record in an open claim. Raises ClaimCorrupt with the reason."""
    return decode(os.pread(fd, CLAIM_MAX + 1, 0))


def read(dirfd: int) -> ClaimRecord | None:
    """The claim of a directory, None if there is none. Raises ClaimCorrupt with the reason."""
    fd = open_claim(dirfd)
    if fd is None:
        return None
    try:
        return read_open(fd)
    finally:
        os.close(fd)


def decode(content: bytes) -> ClaimRecord:
    """The record in a claim's content, checked field by field. Raises ClaimCorrupt."""
    if len(content) > CLAIM_MAX:
        raise ClaimCorrupt(f"cannot read the claim: longer than {CLAIM_MAX} bytes")
    try:
        fields: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ClaimCorrupt(f"cannot read the claim: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ClaimCorrupt("cannot read the claim: not a JSON object")
    version = _integer(fields, "version")
    if version != CLAIM_VERSION:
        raise ClaimCorrupt(f"cannot read the claim: version {version}, this is for version {CLAIM_VERSION}")
    record = ClaimRecord(
        version=version,
        pid=_integer(fields, "pid"),
        pid_ns=_integer(fields, "pid_ns"),
        boot_id=_text(fields, "boot_id"),
        nonce=_text(fields, "nonce"),
        spec_sha256=_text(fields, "spec_sha256"),
        void=_boolean(fields, "void"),
        reason=_text(fields, "reason"),
    )
    if not 0 < record.pid <= PID_MAX:
        raise ClaimCorrupt(f"cannot read the claim: pid is {record.pid}")
    if not record.void and len(record.spec_sha256) != _SHA256_DIGITS:
        raise ClaimCorrupt(f"cannot read the claim: spec_sha256 is {record.spec_sha256!r}")
    return record


def is_locked(fd: int) -> bool:
    """Whether another open file holds the lock: whether the shell that made this claim lives.

    `fd` must have been opened for this, not duplicated from the holder's. Asking takes a shared lock
    for an instant, so that several who ask do not see one another.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def sweep(dirfd: int) -> list[str]:
    """Remove the temporaries that killed racers left; their names. A living racer that was about to lock
    its temporary makes another. Raises OSError."""
    removed: list[str] = []
    for name in os.listdir(dirfd):
        if name.startswith(TEMPORARY_PREFIX) and _remove_stale(dirfd, name):
            removed.append(name)
    return removed


def _remove_stale(dirfd: int, name: str) -> bool:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dirfd)
    except FileNotFoundError:
        return False
    try:
        if is_locked(fd):
            return False
        with contextlib.suppress(FileNotFoundError):  # its owner, or another sweep, was quicker
            os.unlink(name, dir_fd=dirfd)
            return True
        return False
    finally:
        os.close(fd)


def _record(nonce: str, spec_sha256: str, *, boot_id: str | None, void: bool = False, reason: str = "") -> ClaimRecord:
    return ClaimRecord(
        version=CLAIM_VERSION,
        pid=os.getpid(),
        pid_ns=read_pid_namespace(),
        boot_id=read_boot_id() if boot_id is None else boot_id,
        nonce=nonce,
        spec_sha256=spec_sha256,
        void=void,
        reason=reason,
    )


def _link(dirfd: int, record: ClaimRecord) -> int | None:
    """Link `record` to the claim's name, durably; the locked descriptor. None: the name is taken."""
    for _attempt in range(TAKE_ATTEMPTS):
        name, fd = _write_temporary(dirfd, record)
        try:
            won = _link_temporary(dirfd, name, record)
            if won:
                os.fsync(dirfd)
        except FileNotFoundError:
            os.close(fd)  # swept before it was locked
            continue
        except BaseException:
            os.close(fd)
            raise
        if won:
            return fd
        os.close(fd)
        return None
    raise FileNotFoundError(errno.ENOENT, f"cannot write the claim: swept away {TAKE_ATTEMPTS} times", CLAIM)


def _link_temporary(dirfd: int, name: str, record: ClaimRecord) -> bool:
    """Link a temporary to the claim's name and remove it, whatever comes of that. Whether it won."""
    try:
        if not record.void:  # the failpoint is a shell's
            hit("claim.before")
        os.link(name, CLAIM, src_dir_fd=dirfd, dst_dir_fd=dirfd, follow_symlinks=False)
        if not record.void:
            hit("claim.after")
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):  # swept
            os.unlink(name, dir_fd=dirfd)
    return True


def _write_temporary(dirfd: int, record: ClaimRecord) -> tuple[str, int]:
    """A new temporary with `record` in it, synced and locked: its name and descriptor."""
    name = f"{TEMPORARY_PREFIX}{os.getpid()}.{os.urandom(_RANDOM_BYTES).hex()}"
    content = record.encode()
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _DIRECTORY_ONLY, dir_fd=dirfd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.write(fd, content) != len(content):
            raise OSError(errno.ENOSPC, "cannot write the claim: no room for all of it", name)
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # swept
            os.unlink(name, dir_fd=dirfd)
        os.close(fd)
        raise
    return name, fd


def _integer(fields: dict[object, object], key: str) -> int:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ClaimCorrupt(f"cannot read the claim: {key} is {value!r}, not an integer")
    return value


def _boolean(fields: dict[object, object], key: str) -> bool:
    value = fields.get(key)
    if not isinstance(value, bool):
        raise ClaimCorrupt(f"cannot read the claim: {key} is {value!r}, not true or false")
    return value


def _text(fields: dict[object, object], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ClaimCorrupt(f"cannot read the claim: {key} is {value!r}, not a string")
    return value
