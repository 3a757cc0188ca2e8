"""Building the jobspec of a command line: the object that `flux submit --dry-run` prints (RFC 14, RFC 25).

Pure, and free of heavy imports for the command line's sake. It refuses only what a person can get wrong
here; whoever accepts the jobspec checks it again (`fluxres.job.jobspec`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue

JOBSPEC_VERSION: Final = 1

NO_FILE: Final = frozenset({"none", "kvs"})
"""Values of `--output` and `--error` that name no file: output goes to the job's guest namespace."""

UNBUFFERED_OUTPUT_SECONDS: Final = 0.05
"""The batch timeout of output that is to appear at once."""

_SLOT_LABEL: Final = "task"
_ATTRIBUTE_ROOTS: Final = ("attributes.", "user.", "system.")


class Facts(NamedTuple):
    """What a command line says about a job, already read (`fluxres.job.options`); always built by keywords.

    A named tuple, because importing dataclasses would cost every `fluxres run` 10 ms.

    `ntasks` None means one, or one a node, exclusively, where `nodes` is given. `duration` is in seconds, 0
    for no limit. `shell_options` and `attributes` have dotted keys; the latter are below `system` unless they
    say otherwise, with a leading dot for `attributes` itself.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    cwd: str
    env_expand: Mapping[str, str] | None = None
    rlimits: Mapping[str, int] | None = None
    nodes: int | None = None
    ntasks: int | None = None
    cores_per_task: int = 1
    gpus_per_task: int = 0
    exclusive: bool = False
    duration: float = 0.0
    name: str | None = None
    queue: str | None = None
    bank: str | None = None
    input: str | None = None
    output: str | None = None
    error: str | None = None
    label_io: bool = False
    unbuffered: bool = False
    taskmap: Mapping[str, JsonValue] | None = None
    dependencies: Sequence[JsonObject] = ()
    constraint: JsonObject | None = None
    shell_options: Sequence[tuple[str, JsonValue]] = ()
    attributes: Sequence[tuple[str, JsonValue]] = ()


def build_jobspec(facts: Facts) -> JsonObject:
    """The jobspec as a JSON object; raises ValueError saying what of the facts cannot be."""
    if not facts.command or not facts.command[0]:
        raise ValueError("cannot build jobspec: the command is missing")
    system: JsonObject = {"duration": _duration(facts.duration)}
    attributes: JsonObject = {"system": system}
    resources, count = _resources(facts)
    jobspec: JsonObject = {
        "resources": [resources],
        "tasks": [{"command": [*facts.command], "slot": _SLOT_LABEL, "count": count}],
        "attributes": attributes,
        "version": JOBSPEC_VERSION,
    }
    system["cwd"] = facts.cwd
    system["environment"] = _environment(facts.environment)
    for key, value in _shell_options(facts):
        set_dotted(system, f"shell.options.{key}", value)
    if facts.name is not None:
        system["job"] = {"name": facts.name}
    if facts.queue is not None:
        system["queue"] = facts.queue
    if facts.bank is not None:
        system["bank"] = facts.bank
    if facts.dependencies:
        system["dependencies"] = [*facts.dependencies]
    if facts.constraint is not None:
        system["constraints"] = facts.constraint
    for key, value in facts.attributes:
        set_dotted(jobspec, attribute_path(key), value)
    return jobspec


def attribute_path(key: str) -> str:
    """The full dotted path of a `--setattr` key: `foo` is attributes.system.foo, `.foo` is attributes.foo."""
    if key.startswith("."):
        return f"attributes{key}"
    if not key.startswith(_ATTRIBUTE_ROOTS):
        key = f"system.{key}"
    return key if key.startswith("attributes.") else f"attributes.{key}"


def set_dotted(into: JsonObject, key: str, value: JsonValue) -> None:
    """Set `value` at a dotted key, making objects on the way; raises ValueError where a value is in it."""
    *parents, last = key.split(".")
    place = into
    for parent in parents:
        below = place.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ValueError(f"cannot set {key}: {parent} is {below!r}, not an object")
        place = below
    if not last or not all(parents):
        raise ValueError(f"cannot set {key!r}: a part of the key is empty")
    place[last] = value


def _resources(facts: Facts) -> tuple[JsonObject, JsonObject]:
    """The resource vertex and the task count."""
    nodes, exclusive = facts.nodes, facts.exclusive
    ntasks = facts.ntasks
    if ntasks is None:
        ntasks = 1 if nodes is None else nodes
        exclusive = exclusive or nodes is not None
    for what, number, least in (
        ("tasks", ntasks, 1),
        ("cores per task", facts.cores_per_task, 1),
        ("gpus per task", facts.gpus_per_task, 0),
        ("nodes", 1 if nodes is None else nodes, 1),
    ):
        if number < least:
            raise ValueError(f"cannot build jobspec: the number of {what} must be {least} or more, not {number}")
    below: list[JsonValue] = [{"type": "core", "count": facts.cores_per_task}]
    if facts.gpus_per_task:
        below.append({"type": "gpu", "count": facts.gpus_per_task})
    slot: JsonObject = {"type": "slot", "count": ntasks, "with": below, "label": _SLOT_LABEL}
    if nodes is None:
        if exclusive:
            raise ValueError("cannot build jobspec: exclusive needs a number of nodes")
        return slot, {"per_slot": 1}
    if nodes > ntasks:
        raise ValueError(f"cannot build jobspec: {nodes} nodes are more than {ntasks} tasks")
    slot["count"] = -(-ntasks // nodes)
    node: JsonObject = {"type": "node", "count": nodes}
    if exclusive:
        node["exclusive"] = True
    node["with"] = [slot]
    return node, {"total": ntasks} if ntasks % nodes else {"per_slot": 1}


def _duration(seconds: float) -> float:
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"cannot build jobspec: the duration must be finite and not negative, not {seconds}")
    return seconds


def _environment(environment: Mapping[str, str]) -> JsonObject:
    for name, value in environment.items():
        if any("\ud800" <= char <= "\udfff" for char in name + value):
            raise ValueError(
                f"cannot build jobspec: environment variable {name!r} is not valid UTF-8 (--env=-{name} leaves it out)"
            )
    return {**environment}


def _shell_options(facts: Facts) -> list[tuple[str, JsonValue]]:
    """All shell options as dotted keys, the ones given by hand last."""
    options: list[tuple[str, JsonValue]] = []
    if facts.env_expand:
        options.append(("env-expand", {**facts.env_expand}))
    if facts.rlimits:
        options.append(("rlimit", {**facts.rlimits}))
    options += _stream("input.stdin", facts.input, label=False)
    if facts.output not in NO_FILE:
        options += _stream("output.stdout", facts.output, label=facts.label_io)
    if facts.error not in NO_FILE:
        options += _stream("output.stderr", facts.error, label=facts.label_io)
    if facts.unbuffered:
        options.append(("output.stdout.buffer.type", "none"))
        options.append(("output.stderr.buffer.type", "none"))
        options.append(("output.batch-timeout", UNBUFFERED_OUTPUT_SECONDS))
        options.append(("input.batch-timeout", 0.0))
    if facts.taskmap:
        options.append(("taskmap", {**facts.taskmap}))
    return [*options, *facts.shell_options]


def _stream(stream: str, path: str | None, *, label: bool) -> list[tuple[str, JsonValue]]:
    """The options that redirect a stream to a file; none when there is no file."""
    if path is None:
        return []
    options: list[tuple[str, JsonValue]] = [(f"{stream}.type", "file"), (f"{stream}.path", path)]
    if label:
        options.append((f"{stream}.label", True))
    return options
