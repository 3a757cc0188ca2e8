"""Jobspec version 1: reading one that somebody else wrote (RFC 14, RFC 25), and what follows from it.

`parse_jobspec` takes any JSON value and returns an immutable `Jobspec`, or raises JobspecError whose text
names the path and the value, as in `cannot accept jobspec: tasks[0].command: expected array, got "ls"`.
Keys of `attributes.system` that are not known here are let through, as RFC 14 asks; everywhere else they
are refused.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Final, Literal, NoReturn

import msgspec

from fluxres.base.errors import FluxresError
from fluxres.job.resources import ResourceSet, deal, slots_per_target
from fluxres.sched.constraint import ANY_RANK, Constraint, parse_constraint
from fluxres.sched.request import Request

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue

MAX_COUNT: Final = 1 << 20
"""The largest count of nodes, slots, cores, GPUs or tasks, and the most slots in all."""

MAX_DEPENDENCIES: Final = 4096
"""The most dependencies of one job."""

UPDATABLE: Final = ("attributes", "resources", "tasks")
"""The keys below which a `jobspec-update` event may change a jobspec."""

_MAX_SHOWN: Final = 80
_UNFIT: Final = re.compile("[\0\ud800-\udfff]")

_Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
_NotNegative = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class JobspecError(FluxresError):
    """A jobspec that is not acceptable; the text names the path and the value."""


class Vertex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"below": "with"}):
    """A resource vertex: a node, a slot, cores or GPUs, with what is below it."""

    type: Literal["node", "slot", "core", "gpu"]
    count: _NotNegative
    unit: str = ""
    label: str = ""
    exclusive: bool = False
    below: tuple[Vertex, ...] = ()


class TaskCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many tasks: one per slot, or a total."""

    per_slot: _Positive | None = None
    total: _Positive | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to run: `command` and its arguments, in slots with label `slot`."""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    slot: str
    count: TaskCount


class Dependency(msgspec.Struct, frozen=True, kw_only=True):
    """One dependency (RFC 26); a scheme may define further keys."""

    scheme: str
    value: str


class Shell(msgspec.Struct, frozen=True, kw_only=True):
    """Options for the job shell."""

    options: dict[str, object] = {}


class System(msgspec.Struct, frozen=True, kw_only=True, rename={"preemptible_after": "preemptible-after"}):
    """The attributes that fluxres knows. `duration` is in seconds, 0 for no limit."""

    duration: _Seconds
    cwd: str | None = None
    environment: dict[str, str | None] = {}
    queue: str | None = None
    bank: str | None = None
    project: str | None = None
    preemptible_after: _Seconds | None = None
    dependencies: Annotated[tuple[Dependency, ...], msgspec.Meta(max_length=MAX_DEPENDENCIES)] = ()
    constraints: dict[str, object] = {}
    job: dict[str, str] = {}
    shell: Shell = Shell()


class Attributes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`system` is for the instance, `user` for whoever wants it."""

    system: System
    user: dict[str, object] = {}


class PerResource(msgspec.Struct, frozen=True, kw_only=True):
    """The shell option `per-resource`: so many tasks for each node or core, whatever the task count says."""

    type: Literal["node", "core"]
    count: _Positive = 1


class Jobspec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A valid jobspec; made by `parse_jobspec` only."""

    version: Literal[1]
    resources: Annotated[tuple[Vertex, ...], msgspec.Meta(min_length=1, max_length=1)]
    tasks: Annotated[tuple[Task, ...], msgspec.Meta(min_length=1, max_length=1)]
    attributes: Attributes

    @property
    def command(self) -> tuple[str, ...]:
        """The program and its arguments."""
        return self.tasks[0].command

    @property
    def system(self) -> System:
        """The system attributes."""
        return self.attributes.system

    @property
    def name(self) -> str:
        """The name that was given, or the last part of the program's path."""
        return self.system.job.get("name") or self.command[0].rpartition("/")[2] or self.command[0]

    @property
    def nnodes(self) -> int:
        """How many nodes are asked for, 0 for any number."""
        top = self.resources[0]
        return top.count if top.type == "node" else 0

    @property
    def exclusive(self) -> bool:
        """True when whole nodes are asked for."""
        return self.nnodes > 0 and self.resources[0].exclusive

    @property
    def nslots(self) -> int:
        """How many slots are asked for in all."""
        return self._slot.count * max(1, self.nnodes)

    @property
    def cores_per_slot(self) -> int:
        """How many cores a slot has."""
        return self._below_slot("core")

    @property
    def gpus_per_slot(self) -> int:
        """How many GPUs a slot has."""
        return self._below_slot("gpu")

    @property
    def ntasks(self) -> int | None:
        """How many tasks will run; None while only R can tell."""
        per_resource = self.per_resource
        if per_resource is None:
            return self.tasks[0].count.total or self.nslots
        if per_resource.type == "node":
            return self.nnodes * per_resource.count or None
        return None if self.nnodes else self.nslots * self.cores_per_slot * per_resource.count

    @property
    def ncores(self) -> int | None:
        """How many cores are asked for; None when nodes are exclusive, since only R can tell."""
        return None if self.exclusive else self.nslots * self.cores_per_slot

    @property
    def per_resource(self) -> PerResource | None:
        """The shell option of that name, if it is given."""
        option = self.system.shell.options.get("per-resource")
        return None if option is None else msgspec.convert(option, PerResource)

    def request(self) -> Request:
        """What the scheduler is asked for."""
        return Request(
            nnodes=self.nnodes,
            nslots=self.nslots,
            cores_per_slot=self.cores_per_slot,
            gpus_per_slot=self.gpus_per_slot,
            exclusive=self.exclusive,
            constraint=_constraint(self.system),
        )

    def tasks_per_target(self, r: ResourceSet) -> list[int]:
        """How many tasks each target of R gets, by rank; raises ResourceSetError when R is too small."""
        per_resource = self.per_resource
        if per_resource is not None and per_resource.type == "node":
            return [per_resource.count] * len(r.targets)
        if per_resource is not None:
            return [len(target.cores) * per_resource.count for target in r.targets]
        ntasks = self.tasks[0].count.total or self.nslots
        return deal(ntasks, slots_per_target(r, self.cores_per_slot, self.gpus_per_slot))

    @property
    def _slot(self) -> Vertex:
        top = self.resources[0]
        return top.below[0] if top.type == "node" else top

    def _below_slot(self, kind: str) -> int:
        return sum(vertex.count for vertex in self._slot.below if vertex.type == kind)


def parse_jobspec(value: JsonValue) -> Jobspec:
    """Read a jobspec that may be anything; raises JobspecError with the path and the value that is wrong."""
    try:
        jobspec = msgspec.convert(value, Jobspec)
    except msgspec.ValidationError as error:
        raise _translated(error, value) from error
    _check_shape(jobspec.resources[0])
    _check_tasks(jobspec)
    _check_system(jobspec.system)
    return jobspec


def apply_updates(jobspec: JsonObject, updates: Mapping[str, JsonValue]) -> JsonObject:
    """A copy of `jobspec` with the dotted keys of `jobspec-update` events set (RFC 21).

    Raises JobspecError for a key that is not below attributes, resources or tasks, or leads through a value.
    """
    updated = copy.deepcopy(jobspec)
    for key, value in updates.items():
        *parents, last = key.split(".")
        if (parents or [last])[0] not in UPDATABLE:
            raise JobspecError(f"cannot update jobspec: {key!r} is not below one of {', '.join(UPDATABLE)}")
        place = updated
        for parent in parents:
            below = place.setdefault(parent, {})
            if not isinstance(below, dict):
                raise JobspecError(f"cannot update jobspec: {key!r}: {parent} is not an object")
            place = below
        place[last] = copy.deepcopy(value)
    return updated


# -- what the types alone do not say


def _check_shape(top: Vertex) -> None:
    """slot > core[, gpu], or the same below one node (RFC 25)."""
    slot, path = top, "resources[0]"
    if top.type == "node":
        if len(top.below) != 1:
            _refuse(f"{path}.with", "expected one slot", [vertex.type for vertex in top.below])
        slot, path = top.below[0], f"{path}.with[0]"
    if slot.type != "slot":
        _refuse(f"{path}.type", "expected slot" if slot is not top else "expected node or slot", slot.type)
    kinds = [vertex.type for vertex in slot.below]
    if sorted(kinds) not in (["core"], ["core", "gpu"]):
        _refuse(f"{path}.with", "expected core, and at most one gpu beside it", kinds)
    if not slot.label:
        _refuse(f"{path}.label", "expected a label for the slot", slot.label)
    for index, vertex in enumerate(slot.below):
        if vertex.below or vertex.exclusive or vertex.label:
            _refuse(f"{path}.with[{index}]", f"expected only type, count and unit for {vertex.type}", vertex.type)
    counted = [
        ("resources[0]", top),
        (path, slot),
        *((f"{path}.with[{i}]", v) for i, v in enumerate(slot.below)),
    ]
    for where, vertex in counted:
        if vertex.count < 1 and vertex.type != "gpu":
            _refuse(f"{where}.count", "expected an integer of 1 or more", vertex.count)
    if slot is not top and top.count * slot.count > MAX_COUNT:
        _refuse(f"{path}.count", f"expected at most {MAX_COUNT} slots in all", top.count * slot.count)


def _check_tasks(jobspec: Jobspec) -> None:
    task = jobspec.tasks[0]
    if task.slot != jobspec._slot.label:
        _refuse("tasks[0].slot", f"expected the slot's label {jobspec._slot.label!r}", task.slot)
    _check_text("tasks[0].command", task.command)
    if not task.command[0]:
        _refuse("tasks[0].command[0]", "expected the name of a program", task.command[0])
    count = task.count
    if (count.per_slot is None) == (count.total is None):
        _refuse("tasks[0].count", "expected either per_slot or total", msgspec.to_builtins(count))
    if count.per_slot not in (None, 1):
        _refuse("tasks[0].count.per_slot", "expected 1", count.per_slot)
    if count.total is not None and not max(1, jobspec.nnodes) <= count.total <= jobspec.nslots:
        expected = f"expected {max(1, jobspec.nnodes)} to {jobspec.nslots}, from one a node to one a slot"
        _refuse("tasks[0].count.total", expected, count.total)


def _check_system(system: System) -> None:
    path = "attributes.system"
    if not math.isfinite(system.duration):
        _refuse(f"{path}.duration", "expected a finite number of seconds", system.duration)
    if system.cwd is not None and not system.cwd.startswith("/"):
        _refuse(f"{path}.cwd", "expected an absolute path", system.cwd)
    _check_text(f"{path}.cwd", [system.cwd or ""])
    for name, value in system.environment.items():
        if not name or "=" in name:
            _refuse(f"{path}.environment", "expected names that are not empty and have no =", name)
        _check_text(f"{path}.environment.{name}", [name, value or ""])
    try:
        _constraint(system)
    except ValueError as error:
        _refuse(f"{path}.constraints", str(error), system.constraints)
    option = system.shell.options.get("per-resource")
    try:
        msgspec.convert(option, PerResource | None)
    except msgspec.ValidationError as error:
        _refuse(f"{path}.shell.options.per-resource", _lowered(str(error)), option)


def _constraint(system: System) -> Constraint:
    value: JsonValue = msgspec.to_builtins(system.constraints)
    return parse_constraint(value) if value else ANY_RANK


def _check_text(path: str, texts: Iterable[str]) -> None:
    """No NUL, which no program can be given, and no lone surrogates, which no message can carry."""
    for text in texts:
        if _UNFIT.search(text):
            _refuse(path, "expected text without NUL that is valid UTF-8", text)


# -- errors


_PATH: Final = re.compile(r"(?P<why>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_STEP: Final = re.compile(r"\[(?P<index>\d+)\]|\.?(?P<key>[^.\[\]]+)")


def _translated(error: msgspec.ValidationError, value: JsonValue) -> JobspecError:
    """msgspec's words with our path, and with the value, which msgspec does not tell."""
    match = _PATH.fullmatch(str(error))
    why, path = (match["why"], match["path"] or "") if match else (str(error), "")
    found: JsonValue = value
    for step in _STEP.finditer(path):
        if isinstance(found, list) and step["index"] is not None and int(step["index"]) < len(found):
            found = found[int(step["index"])]
        elif isinstance(found, dict) and step["key"] in found:
            found = found[step["key"]]
        else:  # a key msgspec writes as `[...]`, whose name it does not tell
            break
    shown = f", got {_shown(found)}" if not isinstance(found, dict) else ""
    reason = _lowered(why.partition(", got")[0])
    return JobspecError(f"cannot accept jobspec: {path + ': ' if path else ''}{reason}{shown}")


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:].replace("`", "")


def _refuse(path: str, why: str, value: object) -> NoReturn:
    raise JobspecError(f"cannot accept jobspec: {path}: {why}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
