"""The directories and the configuration file of an instance that `fluxres start` makes.

    <rundir>/fluxres.toml    the brokers' configuration
    <rundir>/local-<rank>    the brokers' sockets
    <rundir>/broker-<rank>.log, <rundir>/start.log
    <statedir>/<rank>/       what a broker must not lose
    <rundir>/start.lock, <statedir>/start.lock
                             locked by the `fluxres start` that supervises the instance; they hold its pid, and
                             `remove` where the rundir goes with the instance

The rundir of a durable instance follows from its statedir, so that the URI that running jobs and waiting
commands know stays right when the instance is started again. Both directories are the user's own, mode 0700.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    Toml: TypeAlias = "bool | int | float | str | list[Toml] | dict[str, Toml]"

CONFIG: Final = "fluxres.toml"
START_LOG: Final = "start.log"
LOCK: Final = "start.lock"
OURS: Final = ("bootstrap.size", "bootstrap.fanout", "broker.statedir", "broker.rundir", "broker.temporary")
"""Keys that options of `fluxres start` set."""
REMOVE: Final = b"remove"
"""The word in a lock that says that the rundir is the instance's own and temporary."""
LOCK_BYTES: Final = 64
"""More than a lock holds."""
LOCK_TRIES: Final = 10
"""How often a lock is taken anew that a `fluxres start` which gave up has removed meanwhile."""
PROBE_TIMEOUT: Final = 1.0
"""Seconds that a broker may take to answer when we look whether one is still there."""


class InstanceDir:
    """Where an instance lives."""

    def __init__(self, statedir: str | None, rundir: str | None) -> None:
        """Choose and make the directories; without a `statedir` the instance is temporary.

        Raises FluxresError where a directory cannot be made or is not the user's own.
        """
        self.temporary = statedir is None
        self.locks: list[int] = []
        self._made_directories: list[str] = []
        self._made_files: list[str] = []
        if rundir is not None:
            self.rundir = os.path.abspath(rundir)
        elif statedir is not None:
            self.rundir = _durable_rundir(os.path.abspath(statedir))
        else:
            self.rundir = f"{os.environ.get('TMPDIR') or '/tmp'}/fluxres-{os.getuid()}-{os.urandom(5).hex()}"
        self.statedir = f"{self.rundir}/state" if statedir is None else os.path.abspath(statedir)
        try:
            for directory in (self.rundir, self.statedir):
                self._made_directories += _own(directory)
            for directory in (self.statedir, self.rundir):
                self.locks.append(self._take_lock(directory))
            self._refuse_orphans()
        except BaseException:
            self.abandon()
            raise
        self._made_rundir = self.rundir in self._made_directories

    @property
    def uri(self) -> str:
        """The URI of rank 0."""
        return f"local://{self.socket(0)}"

    @property
    def config(self) -> str:
        """The path of the brokers' configuration file."""
        return f"{self.rundir}/{CONFIG}"

    def socket(self, rank: int) -> str:
        """The path of a rank's socket."""
        return f"{self.rundir}/local-{rank}"

    def log(self, rank: int) -> str:
        """The path of a rank's log."""
        return f"{self.rundir}/broker-{rank}.log"

    def write_config(self, size: int, fanout: int | None, settings: dict[str, Toml]) -> None:
        """Write the configuration file: what the options say, and `settings` (see `parse_settings`)."""
        tables: dict[str, Toml] = {"bootstrap": {"size": size}, "broker": {}}
        for key, value in settings.items():
            put(tables, key, value)
        for key, ours in (
            ("broker.statedir", self.statedir),
            ("broker.rundir", self.rundir),
            ("broker.temporary", self.temporary),
            ("bootstrap.fanout", fanout),
        ):
            if ours is not None:
                put(tables, key, ours)
        temporary = f"{self.config}.{os.getpid()}"
        self._made_files.append(temporary)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(dump(tables))
            os.replace(temporary, self.config)
        except UnicodeEncodeError as error:
            raise FluxresError(f"cannot write {self.config}: {error.object!r} is not UTF-8") from error
        except OSError as error:
            raise FluxresError(f"cannot write {self.config}: {error.strerror}") from error

    def sign_locks(self) -> None:
        """Write our pid into the locks, for `fluxres shutdown`: this process is the one that supervises."""
        text = b"%d\n" % os.getpid() + (REMOVE + b"\n" if self.temporary and self._made_rundir else b"")
        for lock in self.locks:
            os.ftruncate(lock, 0)
            try:
                os.pwrite(lock, text, 0)
            except OSError as error:
                raise FluxresError(f"cannot write {LOCK}: {error.strerror}") from error

    def abandon(self) -> None:
        """Remove what we have made, before any broker was started; what was there before stays as it was."""
        for path in self._made_files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for lock in self.locks:
            os.close(lock)
        self.locks.clear()
        for path in reversed(self._made_directories):
            with contextlib.suppress(OSError):  # somebody else has put something there
                os.rmdir(path)

    def remove(self) -> None:
        """Remove what a temporary instance leaves; of a directory that was there before, only ours."""
        import shutil

        if self._made_rundir:
            shutil.rmtree(self.rundir, ignore_errors=True)
            return
        shutil.rmtree(self.statedir, ignore_errors=True)
        for name in os.listdir(self.rundir):
            if name in (CONFIG, START_LOG, LOCK) or name.startswith(("local-", "broker-")):
                os.unlink(f"{self.rundir}/{name}")

    def _take_lock(self, directory: str) -> int:
        """Lock a directory for this process and its forks. Raises FluxresError where it is locked."""
        path = f"{directory}/{LOCK}"
        for _ in range(LOCK_TRIES):
            new = not os.path.exists(path)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _lock(lock):
                os.close(lock)
                break
            if _is_at(lock, path):
                self._made_files += [path] if new else []
                return lock
            os.close(lock)  # its last holder has removed it
        raise FluxresError(f"cannot start: {directory} is in use by another fluxres start (FLUXRES_URI={self.uri})")

    def _refuse_orphans(self) -> None:
        """Raise FluxresError where brokers have outlived their `fluxres start`."""
        for uri in _answering(self.rundir):
            from shlex import quote

            jobs = "" if self.temporary else "; its jobs run on"
            raise FluxresError(
                f"cannot start: a broker of {self.statedir} still runs, but its fluxres start is gone "
                f"(end it first, by fluxres --uri {quote(uri)} shutdown{jobs})"
            )


def remove_left(rundir: str, lock: int) -> None:
    """Remove the rundir of a temporary instance that has ended, where its `fluxres start` was killed before it could.

    `lock` is the rundir's lock, open; nothing is done where it is held, or is not (any more) that of such an instance.
    """
    ours = os.fstat(lock).st_uid == os.getuid() and REMOVE in os.pread(lock, LOCK_BYTES, 0).split()
    if ours and _lock(lock) and _is_at(lock, f"{rundir}/{LOCK}") and not any(_answering(rundir)):
        import shutil

        shutil.rmtree(rundir, ignore_errors=True)


def _lock(lock: int) -> bool:
    """Lock an open file; False where somebody else has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Whether `path` is the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _durable_rundir(statedir: str) -> str:
    from hashlib import blake2s

    base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return f"{base}/fluxres-{os.getuid()}-{blake2s(os.fsencode(statedir), digest_size=6).hexdigest()}"


def _own(path: str) -> list[str]:
    """Make a directory that is ours alone; returns which were made for that, the outermost first.

    Raises FluxresError where it cannot be made or is not ours alone.
    """
    missing: list[str] = []
    outer = path
    while not os.path.lexists(outer):
        missing.insert(0, outer)
        outer = os.path.dirname(outer)
    try:
        os.makedirs(path, mode=0o700)
    except FileExistsError:
        pass  # then it is checked below
    except OSError as error:
        raise FluxresError(f"cannot make directory {path}: {error.strerror}") from error
    else:
        return missing
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise FluxresError(f"cannot use {path}: {os.strerror(errno.ENOTDIR)}")
    if found.st_uid != os.getuid():
        raise FluxresError(f"cannot use directory {path}: it belongs to user {found.st_uid}")
    if found.st_mode & 0o022:
        raise FluxresError(f"cannot use directory {path}: others can write to it (chmod 700 would do)")
    return []


def _answering(rundir: str) -> Iterator[str]:
    """The URIs at which brokers of a rundir answer."""
    from fluxres.client import Client

    for name in os.listdir(rundir):
        uri = f"local://{rundir}/{name}"
        if name.startswith("local-"):
            with contextlib.suppress(FluxresError):
                Client.connect(uri, PROBE_TIMEOUT, restart_gap=0).close()
                yield uri


# --- settings and TOML


def parse_settings(settings: list[str]) -> dict[str, Toml]:
    """Read `KEY=VALUE` settings: a value is TOML, and plain text where it is none. Raises UsageError."""
    found: dict[str, Toml] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key or not all(key.split(".")):
            raise UsageError(f"cannot set {setting!r}: a setting is TABLE.KEY=VALUE")
        if key in OURS:
            raise UsageError(f"cannot set {key} with --conf: fluxres start sets it itself (see --help)")
        found[key] = _value(value)
    return found


def _value(text: str) -> Toml:
    import tomllib

    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value: Toml = table["value"]
    return value if len(table) == 1 else text


def put(tables: dict[str, Toml], key: str, value: Toml) -> None:
    """Set a dotted key. Raises UsageError where a part of it has a value already."""
    *path, last = key.split(".")
    for part in path:
        inner = tables.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"cannot set {key}: {part} is no table")
        tables = inner
    tables[last] = value


def dump(tables: dict[str, Toml], prefix: str = "") -> str:
    """Write nested tables as TOML."""
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    text = "".join(f"{line}\n" for line in lines)
    for key, value in tables.items():
        if isinstance(value, dict):
            text += f"[{prefix}{_key(key)}]\n{dump(value, f'{prefix}{_key(key)}.')}"
    return text


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _toml(key)


def _toml(value: Toml) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(char):04x}" if char < " " or char == "\x7f" or char in '"\\' else char for char in value
        )
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_toml(each)}' for key, each in value.items())}}}"
    return str(value)
