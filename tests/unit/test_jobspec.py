"""Jobspec V1: what is accepted, what is refused and in which words, and what follows from one."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job.jobspec import MAX_COUNT, JobspecError, apply_updates, parse_jobspec
from fluxres.job.resources import ResourceSet, ResourceSetError, Target
from fluxres.sched.constraint import parse_constraint
from fluxres.sched.request import Request

CORE: JsonObject = {"type": "core", "count": 2}
GPU: JsonObject = {"type": "gpu", "count": 1}


TOMORROW: JsonObject = {"preemptible-after": 5, "an-attribute-of-tomorrow": [1]}


def slot(count: int = 1, *below: JsonValue, **more: JsonValue) -> JsonObject:
    return {"type": "slot", "count": count, "label": "task", "with": [*(below or (CORE,))], **more}


def node(count: int, below: JsonValue, **more: JsonValue) -> JsonObject:
    return {"type": "node", "count": count, "with": [below], **more}


def spec(resource: JsonValue = None, count: JsonValue = None, **system: JsonValue) -> JsonObject:
    """A jobspec of `hostname` with this resource, task count and further system attributes."""
    return {
        "version": 1,
        "resources": [resource or slot()],
        "tasks": [{"command": ["/bin/hostname", "-f"], "slot": "task", "count": count or {"per_slot": 1}}],
        "attributes": {"system": {"duration": 0, **system}},
    }


def changed(path: str, value: JsonValue) -> JsonValue:
    """`spec()` with the value at a dotted path replaced, numbers being indices; at "" the whole."""
    whole: list[JsonValue] = [spec()]
    place: JsonValue = whole
    keys = ["0", *path.split(".")] if path else ["0"]
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place[key]  # type: ignore[index]
    if isinstance(place, list):
        place[int(keys[-1])] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    return whole[0]


@pytest.mark.parametrize(
    ("value", "request_", "ntasks", "ncores"),
    [
        (spec(), Request(cores_per_slot=2), 1, 2),
        (spec(slot(10, CORE, GPU)), Request(nslots=10, cores_per_slot=2, gpus_per_slot=1), 10, 20),
        (spec(slot(1, GPU, CORE)), Request(cores_per_slot=2, gpus_per_slot=1), 1, 2),
        (spec(node(4, slot(4))), Request(nnodes=4, nslots=16, cores_per_slot=2), 16, 32),
        (spec(node(4, slot(2)), {"total": 5}), Request(nnodes=4, nslots=8, cores_per_slot=2), 5, 16),
        (
            spec(node(2, slot(1), exclusive=True)),
            Request(nnodes=2, nslots=2, cores_per_slot=2, exclusive=True),
            2,
            None,
        ),
    ],
)
def test_what_follows(value: JsonObject, request_: Request, ntasks: int, ncores: int | None) -> None:
    jobspec = parse_jobspec(value)
    assert jobspec.request() == request_
    assert (jobspec.ntasks, jobspec.ncores) == (ntasks, ncores)


def test_attributes() -> None:
    jobspec = parse_jobspec(
        spec(
            duration=3600.5,
            cwd="/home",
            environment={"HOME": "/home", "GONE": None},
            queue="batch",
            dependencies=[{"scheme": "after", "value": "ƒ1", "more": 1}],
            constraints={"ranks": ["0-3"]},
            job={"name": "fred"},
            shell={"options": {"verbose": 1}},
            **TOMORROW,
        )
    )
    system = jobspec.system
    assert (system.duration, system.cwd, system.queue, jobspec.name) == (3600.5, "/home", "batch", "fred")
    assert system.environment == {"HOME": "/home", "GONE": None}
    assert [(each.scheme, each.value) for each in system.dependencies] == [("after", "ƒ1")]
    assert jobspec.request().constraint == parse_constraint({"ranks": ["0-3"]})
    assert system.shell.options == {"verbose": 1}
    assert system.preemptible_after == 5.0


def test_the_name_is_that_of_the_program_where_none_is_given() -> None:
    assert parse_jobspec(spec()).name == "hostname"
    assert parse_jobspec(changed("tasks.0.command", ["dir/"])).name == "dir/"


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("", [], "expected object, got []"),
        ("version", 2, "version: invalid enum value 2, got 2"),
        ("extra", 1, "object contains unknown field extra"),
        ("resources", [], "resources: expected array of length >= 1, got []"),
        ("resources", [slot(), slot()], "resources: expected array of length <= 1"),
        ("resources.0.count", 0, "resources[0].count: expected an integer of 1 or more, got 0"),
        ("resources.0.count", -1, "resources[0].count: expected int >= 0, got -1"),
        ("resources.0.count", True, "resources[0].count: expected int, got true"),
        ("resources.0.count", "4", 'resources[0].count: expected int, got "4"'),
        ("resources.0.count", MAX_COUNT + 1, f"resources[0].count: expected int <= {MAX_COUNT}"),
        ("resources.0.type", "rack", 'resources[0].type: invalid enum value rack, got "rack"'),
        ("resources.0", CORE, 'resources[0].type: expected node or slot, got "core"'),
        ("resources.0", node(2, CORE), 'resources[0].with[0].type: expected slot, got "core"'),
        ("resources.0", {"type": "node", "count": 1}, "resources[0].with: expected one slot, got []"),
        (
            "resources.0",
            node(2**11, slot(2**11)),
            "resources[0].with[0].count: expected at most 1048576 slots in all",
        ),
        (
            "resources.0",
            slot(1, GPU),
            'resources[0].with: expected core, and at most one gpu beside it, got ["gpu"]',
        ),
        ("resources.0", slot(1, CORE, CORE), "resources[0].with: expected core, and at most one gpu"),
        (
            "resources.0",
            slot(1, {**CORE, "with": [GPU]}),
            "resources[0].with[0]: expected only type, count and unit",
        ),
        (
            "resources.0",
            slot(1, {**CORE, "count": 0}),
            "resources[0].with[0].count: expected an integer of 1 or more",
        ),
        ("resources.0.label", "", "resources[0].label: expected a label for the slot"),
        ("tasks", [], "tasks: expected array of length >= 1, got []"),
        ("tasks.0.command", "ls", 'tasks[0].command: expected array, got "ls"'),
        ("tasks.0.command", [], "tasks[0].command: expected array of length >= 1, got []"),
        ("tasks.0.command", [1], "tasks[0].command[0]: expected str, got 1"),
        ("tasks.0.command", ["a\0b"], "tasks[0].command: expected text without NUL"),
        ("tasks.0.command", ["\udc80"], "tasks[0].command: expected text without NUL"),
        ("tasks.0.command", [""], "tasks[0].command[0]: expected the name of a program"),
        ("tasks.0.slot", "other", "tasks[0].slot: expected the slot's label 'task', got \"other\""),
        ("tasks.0.count", {}, "tasks[0].count: expected either per_slot or total, got {}"),
        ("tasks.0.count", {"per_slot": 1, "total": 1}, "tasks[0].count: expected either per_slot or total"),
        ("tasks.0.count", {"per_slot": 2}, "tasks[0].count.per_slot: expected 1, got 2"),
        ("tasks.0.count", {"total": 2}, "tasks[0].count.total: expected 1 to 1"),
        ("tasks.0.count", {"per_resource": {}}, "tasks[0].count: object contains unknown field per_resource"),
        ("attributes", {}, "attributes: object missing required field system"),
        ("attributes.system", {}, "attributes.system: object missing required field duration"),
        ("attributes.other", {}, "attributes: object contains unknown field other"),
        ("attributes.system.duration", -1, "attributes.system.duration: expected float >= 0.0, got -1"),
        ("attributes.system.duration", "1h", 'attributes.system.duration: expected float, got "1h"'),
        ("attributes.system.duration", float("inf"), "attributes.system.duration: expected a finite number"),
        ("attributes.system.cwd", "tmp", 'attributes.system.cwd: expected an absolute path, got "tmp"'),
        ("attributes.system.environment", {"A=": "x"}, "attributes.system.environment: expected names"),
        (
            "attributes.system.environment",
            {"A": "x\0"},
            "attributes.system.environment.A: expected text without NUL",
        ),
        ("attributes.system.environment", {"A": 3}, "attributes.system.environment"),
        (
            "attributes.system.dependencies",
            [{"scheme": "after"}],
            "attributes.system.dependencies[0]: object missing",
        ),
        ("attributes.system.job", {"name": 7}, "attributes.system.job"),
        (
            "attributes.system.constraints",
            {"or": [{"xor": []}]},
            "attributes.system.constraints: cannot parse constraint: or[0].xor: unknown operator",
        ),
        (
            "attributes.system.shell",
            {"options": {"per-resource": {"type": "rack"}}},
            "attributes.system.shell.options.per-resource: invalid enum value rack",
        ),
    ],
)
def test_errors_name_the_path_and_the_value(path: str, value: JsonValue, text: str) -> None:
    with pytest.raises(JobspecError) as caught:
        parse_jobspec(changed(path, value))
    said = str(caught.value)
    assert said.startswith("cannot accept jobspec: ")
    assert text in said.replace("'rack'", "rack")


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(JobspecError) as caught:
        parse_jobspec(changed("resources.0.count", "9" * 10_000))
    assert len(str(caught.value)) < 200


def test_node_counts_bound_the_total() -> None:
    with pytest.raises(JobspecError, match="expected 4 to 8, from one a node to one a slot, got 3"):
        parse_jobspec(spec(node(4, slot(2)), {"total": 3}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
PATHS = st.sampled_from(
    [
        "",
        "version",
        "resources",
        "resources.0",
        "resources.0.count",
        "resources.0.with",
        "resources.0.with.0",
        "tasks.0",
        "tasks.0.command",
        "tasks.0.count",
        "attributes.system",
        "attributes.system.environment",
        "attributes.system.constraints",
        "attributes.system.shell",
        "attributes.system.job",
    ]
)


@settings(max_examples=300, deadline=None)
@given(PATHS, JSON)
def test_anything_is_accepted_or_refused_in_our_words(path: str, value: JsonValue) -> None:
    said = ""
    try:
        jobspec = parse_jobspec(changed(path, value))
    except JobspecError as error:
        said = str(error)
    assert said.startswith("cannot accept jobspec: ") or (jobspec.name and jobspec.request().nslots)


def r_of(*cores: int) -> ResourceSet:
    return ResourceSet(
        targets=tuple(Target(rank=i, host="a", cores=IdSet(range(count))) for i, count in enumerate(cores))
    )


@pytest.mark.parametrize(
    ("value", "cores", "counts"),
    [
        (spec(slot(4)), (6, 2), [3, 1]),
        (spec(node(2, slot(2)), {"total": 3}), (4, 4), [2, 1]),
        (spec(node(2, slot(1), exclusive=True)), (16, 16), [1, 1]),
        (spec(slot(4), shell={"options": {"per-resource": {"type": "node", "count": 3}}}), (6, 2), [3, 3]),
        (spec(slot(4), shell={"options": {"per-resource": {"type": "core"}}}), (6, 2), [6, 2]),
    ],
)
def test_tasks_per_target(value: JsonObject, cores: tuple[int, ...], counts: list[int]) -> None:
    assert parse_jobspec(value).tasks_per_target(r_of(*cores)) == counts


def test_an_r_that_is_too_small_is_refused() -> None:
    with pytest.raises(ResourceSetError, match="cannot lay out 4 tasks"):
        parse_jobspec(spec(slot(4))).tasks_per_target(r_of(6))


@pytest.mark.parametrize(
    ("resource", "option", "ntasks"),
    [
        (node(2, slot(1)), {"type": "node", "count": 3}, 6),
        (slot(2), {"type": "node", "count": 3}, None),
        (slot(2), {"type": "core", "count": 3}, 12),
        (node(2, slot(1)), {"type": "core"}, None),
    ],
)
def test_tasks_per_resource(resource: JsonObject, option: JsonValue, ntasks: int | None) -> None:
    jobspec = parse_jobspec(spec(resource, shell={"options": {"per-resource": option}}))
    assert jobspec.ntasks == ntasks


def test_updates_are_set_by_path_in_a_copy() -> None:
    before = spec(queue="a")
    kept = copy.deepcopy(before)
    after = apply_updates(before, {"attributes.system.queue": "b", "attributes.user.x.y": [1]})
    assert before == kept
    assert parse_jobspec(after).system.queue == "b"
    assert after["attributes"] == {"system": {"duration": 0, "queue": "b"}, "user": {"x": {"y": [1]}}}


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("version", "'version' is not below one of attributes, resources, tasks"),
        ("attributes.system.duration.x", "duration is not an object"),
        ("resources.0", "resources is not an object"),
    ],
)
def test_updates_that_lead_nowhere_are_refused(key: str, why: str) -> None:
    with pytest.raises(JobspecError, match=why):
        apply_updates(spec(), {key: 1})


def test_json_round_trip() -> None:
    value = spec(node(4, slot(2)), environment={"A": "ƒ"})
    assert parse_jobspec(json.loads(json.dumps(value))) == parse_jobspec(value)
