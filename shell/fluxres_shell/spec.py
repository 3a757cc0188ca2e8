"""A shell's `spec`: what to run, as the broker wrote it into the shell's directory, parsed strictly.

The file is one JSON object; every field of `ShellSpec` is one of its keys, under the same name unless its
docstring says otherwise. It carries the whole jobspec (RFC 25) and R (RFC 20), of which the shell only needs
the command and the name. Anything of the wrong type is a SpecError that names the key; unknown keys are
ignored, so that an older shell can run a newer broker's job.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject, JsonValue
from fluxres_shell.find import SPEC

VERSION: Final = 1
MAX_SPEC: Final = 8 * 1024 * 1024
"""Bytes of a spec."""
MIN_JOURNAL_LIMIT: Final = 64 * 1024
"""The least journal limit that keeps output moving: a few reads of a pipe."""

T = TypeVar("T")


class SpecError(FluxresError):
    """A spec that cannot be read or followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task of this shell: `rank` among all the job's tasks, `local` among this shell's."""

    rank: int
    local: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StdioSpec:
    """Where a task's standard streams go; None is the default: the journal, and stdin sent by the broker.

    The paths are templates (see `environment.render`). Keys `options.input` and `options.output`
    (flux-shell(1)).
    """

    stdin_path: str | None = None
    stdin_null: bool = False
    stdout_path: str | None = None
    stderr_path: str | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellSpec:
    """What one shell is to run."""

    id: int
    rank: int
    """The broker rank that the shell runs for."""
    nonce: str
    instance: str
    userid: int
    name: str
    """The job's name, or the last part of its command's first word."""
    command: tuple[str, ...]
    ranks: tuple[int, ...]
    """The broker ranks of the job, in order (a list, or an RFC 22 idset); the first one's shell is the leader."""
    nnodes: int
    ntasks_total: int
    tasks: tuple[TaskSpec, ...]
    taskmap: JsonValue
    """RFC 34 block list of the whole job, None where the broker gave none."""
    env: dict[str, str]
    cwd: str
    time_limit: float
    """Seconds from the start of the tasks; 0 is none."""
    t_submit: float
    """When the job was submitted (seconds since 1970, 0 unknown): older output files are truncated."""
    uri: str
    namespace: str
    tmpdir_base: str
    cgroup_parent: str | None
    cpus: tuple[int, ...]
    """The CPUs that the tasks are bound to; empty for no binding."""
    journal_limit: int
    segment_size: int
    stdio: StdioSpec = field(default_factory=StdioSpec)

    @property
    def leader(self) -> bool:
        """Whether this is the shell of the job's first rank."""
        return self.ranks[0] == self.rank


def read_spec(dirfd: int) -> tuple[ShellSpec, bytes]:
    """Read and parse the spec in the directory `dirfd`; also returns its bytes, for the claim's digest.

    Raises SpecError, FileNotFoundError and other OSErrors.
    """
    fd = os.open(SPEC, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_SPEC:
            raise SpecError(f"cannot read the spec: longer than {MAX_SPEC} bytes")
        text = os.read(fd, size)  # a file that was renamed into place: its size does not change
    finally:
        os.close(fd)
    return parse_spec(text), text


def make_durable(dirfd: int) -> None:
    """Sync the spec in the directory `dirfd`, and the two directories above: a claim must not outlive its spec.

    The directory itself is synced with the claim. Raises OSError.
    """
    for name, kind in ((SPEC, 0), ("..", os.O_DIRECTORY), ("../..", os.O_DIRECTORY)):
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | kind, dir_fd=dirfd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def parse_spec(text: bytes) -> ShellSpec:
    """Parse a spec. Raises SpecError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SpecError(f"cannot read the spec: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"cannot read the spec: it must be an object, not {type(value).__name__}")
    if _get(value, "version", int) != VERSION:
        raise SpecError(f"cannot read the spec: version {value['version']!r} is not {VERSION}")
    return _build(value)


def _build(spec: JsonObject) -> ShellSpec:
    command = _command(_get(spec, "jobspec", dict))
    tasks = tuple(_task(item) for item in _items(spec, "tasks", dict))
    ranks = _ranks(spec)
    rank = _get(spec, "rank", int)
    if not tasks or rank not in ranks:
        raise SpecError(f"cannot read the spec: rank {rank} has {len(tasks)} tasks, and the job's ranks are {ranks}")
    if _get(spec, "nnodes", int) != len(ranks) or _get(spec, "ntasks_total", int) < len(tasks):
        raise SpecError(f"cannot read the spec: 'nnodes' {spec['nnodes']} or 'ntasks_total' is not so")
    env = _get(spec, "env", dict)
    for name, setting in env.items():
        if not isinstance(setting, str) or "\0" in name + setting or not name or "=" in name:
            raise SpecError(f"cannot read the spec: {name!r}={setting!r} is no environment variable")
    limit = _get(spec, "journal_limit", int)
    if limit < MIN_JOURNAL_LIMIT:
        raise SpecError(f"cannot read the spec: 'journal_limit' {limit} is less than {MIN_JOURNAL_LIMIT}")
    return ShellSpec(
        id=_get(spec, "id", int),
        rank=rank,
        nonce=_get(spec, "nonce", str),
        instance=_get(spec, "instance", str),
        userid=_get(spec, "userid", int),
        name=_job_name(spec, command),
        command=command,
        ranks=ranks,
        nnodes=_get(spec, "nnodes", int),
        ntasks_total=_get(spec, "ntasks_total", int),
        tasks=tasks,
        taskmap=spec.get("taskmap"),
        env={name: str(setting) for name, setting in env.items()},
        cwd=_get(spec, "cwd", str),
        time_limit=_seconds(spec, "time_limit"),
        t_submit=_seconds(spec, "t_submit"),
        uri=_get(spec, "uri", str),
        namespace=_get(spec, "namespace", str),
        tmpdir_base=_get(spec, "tmpdir_base", str),
        cgroup_parent=_get(spec, "cgroup_parent", str) if spec.get("cgroup_parent") is not None else None,
        cpus=tuple(_items(spec, "cpus", int)) if "cpus" in spec else (),
        journal_limit=limit,
        segment_size=_get(spec, "segment_size", int),
        stdio=_stdio(spec),
    )


def _get(table: JsonObject, key: str, kind: type[T]) -> T:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SpecError(f"cannot read the spec: {key!r} must be {kind.__name__}, not {value!r}")
    return value


def _items(table: JsonObject, key: str, kind: type[T]) -> list[T]:
    items: list[T] = []
    for value in _get(table, key, list):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SpecError(f"cannot read the spec: {key!r} must hold {kind.__name__} only, not {value!r}")
        items.append(value)
    return items


def _ranks(spec: JsonObject) -> tuple[int, ...]:
    ranks = spec.get("ranks")
    if not isinstance(ranks, str):
        return tuple(_items(spec, "ranks", int))
    try:
        return tuple(IdSet.parse(ranks))
    except ValueError as error:
        raise SpecError(f"cannot read the spec: 'ranks' must be a list or an idset: {error}") from error


def _seconds(table: JsonObject, key: str) -> float:
    value = table.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise SpecError(f"cannot read the spec: {key!r} must be seconds, not {value!r}")
    return float(value)


def _task(item: JsonObject) -> TaskSpec:
    return TaskSpec(rank=_get(item, "rank", int), local=_get(item, "local", int))


def _command(jobspec: JsonObject) -> tuple[str, ...]:
    tasks = _items(jobspec, "tasks", dict)
    command = _items(tasks[0], "command", str) if len(tasks) == 1 else []
    if not command or not command[0] or any("\0" in word for word in command):
        raise SpecError(f"cannot read the spec: {command!r} is no command of exactly one task")
    return tuple(command)


def _job_name(spec: JsonObject, command: tuple[str, ...]) -> str:
    name = _descend(spec, "jobspec", "attributes", "system", "job", "name")
    return name if isinstance(name, str) else command[0].rpartition("/")[2]


def _descend(value: JsonValue, *keys: str) -> JsonValue:
    """The value under `keys`, None where there is none."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _stdio(spec: JsonObject) -> StdioSpec:
    options = spec.get("options")
    stdin_type = _descend(options, "input", "stdin", "type")
    stdout_path = _file(options, "output", "stdout")
    # As in flux: stderr goes where stdout goes unless something is said of it.
    follows = _descend(options, "output", "stderr", "type") is None
    return StdioSpec(
        stdin_path=_file(options, "input", "stdin"),
        stdin_null=stdin_type in ("null", "none"),
        stdout_path=stdout_path,
        stderr_path=stdout_path if follows else _file(options, "output", "stderr"),
        truncate=_descend(options, "output", "mode") != "append",
    )


def _file(options: JsonValue, direction: str, stream: str) -> str | None:
    if _descend(options, direction, stream, "type") != "file":
        return None
    path = _descend(options, direction, stream, "path")
    if not isinstance(path, str) or not path or "\0" in path:
        raise SpecError(f"cannot read the spec: options.{direction}.{stream}.path {path!r} is no file name")
    return path
