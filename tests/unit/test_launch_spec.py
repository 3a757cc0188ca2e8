"""The spec that rank 0 builds and the job's rank completes is one that the shell reads, with the same meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject, JsonValue
from fluxres.exec.spec import MAX_LISTED, LocalSettings, SpecBuilder, complete_spec
from fluxres_shell.spec import ShellSpec, TaskSpec, parse_spec

URI = "local:///run/sock"
LAYOUT = {2: [0, 1], 5: [2], 7: [3, 4, 5]}
R: JsonObject = {"version": 1, "execution": {"R_lite": [{"rank": "2,5,7", "children": {"core": "0-3"}}]}}


def jobspec(**system: JsonValue) -> JsonObject:
    return {
        "version": 1,
        "resources": [{"type": "slot", "count": 6, "label": "task", "with": [{"type": "core", "count": 1}]}],
        "tasks": [{"command": ["/bin/prog", "-v"], "slot": "task", "count": {"per_slot": 1}}],
        "attributes": {"system": dict(system)},
    }


def build(rank: int = 5, *, layout: Mapping[int, list[int]] = LAYOUT, **system: JsonValue) -> bytes:
    return builder(layout=layout, **system).build(rank)


def builder(*, layout: Mapping[int, list[int]] = LAYOUT, **system: JsonValue) -> SpecBuilder:
    return SpecBuilder(
        jobid=JobId(0x1234),
        nonce="abc",
        instance="inst",
        userid=1000,
        jobspec=jobspec(**system),
        resources=R,
        layout=layout,
        taskmap=[[0, 1, 2, 1]],
        t_submit=12.5,
    )


def read(
    rank: int = 5,
    *,
    local: LocalSettings | None = None,
    layout: Mapping[int, list[int]] = LAYOUT,
    **system: JsonValue,
) -> ShellSpec:
    return parse_spec(complete_spec(build(rank, layout=layout, **system), local or LocalSettings(uri=URI)))


def test_what_the_shell_reads() -> None:
    spec = read(duration=60.0, cwd="/work", environment={"A": "1"})
    assert (spec.id, spec.rank, spec.nonce, spec.instance, spec.userid) == (0x1234, 5, "abc", "inst", 1000)
    assert (spec.command, spec.name) == (("/bin/prog", "-v"), "prog")
    assert (spec.ranks, spec.nnodes, spec.ntasks_total) == ((2, 5, 7), 3, 6)
    assert (spec.time_limit, spec.cwd, spec.env, spec.t_submit) == (60.0, "/work", {"A": "1"}, 12.5)
    assert (spec.uri, spec.namespace) == (URI, "job-0000.0000.0000.1234")
    assert spec.taskmap == [[0, 1, 2, 1]]


@pytest.mark.parametrize(
    ("rank", "leader", "tasks"),
    [(2, True, [(0, 0), (1, 1)]), (5, False, [(2, 0)]), (7, False, [(3, 0), (4, 1), (5, 2)])],
)
def test_the_tasks_of_a_rank(rank: int, leader: bool, tasks: list[tuple[int, int]]) -> None:
    spec = read(rank)
    assert spec.leader is leader
    assert spec.tasks == tuple(TaskSpec(rank=task, local=local) for task, local in tasks)


def test_what_a_jobspec_may_leave_out() -> None:
    spec = read()
    assert (spec.time_limit, spec.cwd, spec.env) == (0.0, "/", {})
    assert spec.stdio.stdout_path is None


def test_shell_options_are_passed_on() -> None:
    spec = read(shell={"options": {"output": {"stdout": {"type": "file", "path": "out-{{id}}"}}}})
    assert spec.stdio.stdout_path == "out-{{id}}"


def test_the_name_of_the_job() -> None:
    assert read(job={"name": "mine"}).name == "mine"


def test_the_settings_of_the_rank() -> None:
    local = LocalSettings(
        uri=URI, journal_limit=1 << 20, segment_size=1 << 18, tmpdir_base="/scratch", cgroup_parent="/sys/fs/cgroup/x"
    )
    spec = read(local=local)
    assert (spec.journal_limit, spec.segment_size) == (1 << 20, 1 << 18)
    assert (spec.tmpdir_base, spec.cgroup_parent) == ("/scratch", "/sys/fs/cgroup/x")
    assert read().cgroup_parent is None


def test_tasks_are_bound_to_the_cores_of_r_where_they_can_be() -> None:
    assert read().cpus == (0, 1, 2, 3)
    assert read(local=LocalSettings(uri=URI, bind=False)).cpus == ()
    assert read(shell={"options": {"cpu-affinity": "off"}}).cpus == ()


def test_what_rank_0_builds_names_nothing_of_its_own_node() -> None:
    assert {"uri", "tmpdir_base", "cgroup_parent", "journal_limit", "segment_size"}.isdisjoint(json.loads(build()))


def test_what_is_completed_is_otherwise_as_it_was() -> None:
    """Whatever the keys' values are: also what a newer rank 0 may add."""
    built = json.loads(build(job={"name": "ƒ"})) | {"more": [1.5, None, {"a": "\u2603"}]}
    completed = json.loads(complete_spec(json.dumps(built).encode(), LocalSettings(uri=URI)))
    assert {key: completed[key] for key in built} == built


@pytest.mark.parametrize("spec", [b"", b"[]", b"{", b'{"a":1}}', b"\xff"])
def test_what_is_no_object_cannot_be_completed(spec: bytes) -> None:
    with pytest.raises(ValueError):
        complete_spec(spec, LocalSettings(uri=URI))


@pytest.mark.parametrize("ranks", [range(MAX_LISTED), range(MAX_LISTED + 1), range(1000, 0, -1)])
def test_the_ranks_of_a_large_job_are_in_their_order(ranks: range) -> None:
    """The first one leads."""
    layout = {rank: [task] for task, rank in enumerate(ranks)}
    spec = read(5, layout=layout)
    assert spec.ranks == tuple(ranks)
    assert spec.tasks == (TaskSpec(rank=layout[5][0], local=0),)


def test_the_spec_of_a_very_large_job_is_small() -> None:
    layout = {rank: [rank] for rank in range(10_000)}
    assert len(build(5, layout=layout)) < len(build()) + 100


def test_one_builder_builds_for_all_ranks() -> None:
    made = builder()
    assert [made.build(rank) for rank in LAYOUT] == [build(rank) for rank in LAYOUT]


def test_the_whole_jobspec_and_r_are_in_it() -> None:
    spec = json.loads(build(duration=1))
    assert spec["R"] == R
    assert spec["jobspec"] == jobspec(duration=1)
