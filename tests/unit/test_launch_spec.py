"""The spec that the broker writes is one that the shell reads, with the same meaning."""

from __future__ import annotations

import json

import pytest

from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject, JsonValue
from fluxres.exec.spec import ExecSettings, build_spec
from fluxres_shell.spec import ShellSpec, TaskSpec, parse_spec

LAYOUT = {2: [0, 1], 5: [2], 7: [3, 4, 5]}
R: JsonObject = {"version": 1, "execution": {"R_lite": [{"rank": "2,5,7", "children": {"core": "0-3"}}]}}


def jobspec(**system: JsonValue) -> JsonObject:
    return {
        "version": 1,
        "resources": [{"type": "slot", "count": 6, "label": "task", "with": [{"type": "core", "count": 1}]}],
        "tasks": [{"command": ["/bin/prog", "-v"], "slot": "task", "count": {"per_slot": 1}}],
        "attributes": {"system": dict(system)},
    }


def build(rank: int = 5, *, settings: ExecSettings | None = None, **system: JsonValue) -> bytes:
    return build_spec(
        jobid=JobId(0x1234),
        rank=rank,
        nonce="abc",
        instance="inst",
        userid=1000,
        jobspec=jobspec(**system),
        resources=R,
        layout=LAYOUT,
        taskmap=[[0, 1, 2, 1]],
        uri="local:///run/sock",
        t_submit=12.5,
        settings=settings or ExecSettings(),
    )


def read(rank: int = 5, *, settings: ExecSettings | None = None, **system: JsonValue) -> ShellSpec:
    return parse_spec(build(rank, settings=settings, **system))


def test_what_the_shell_reads() -> None:
    spec = read(duration=60.0, cwd="/work", environment={"A": "1"})
    assert (spec.id, spec.rank, spec.nonce, spec.instance, spec.userid) == (0x1234, 5, "abc", "inst", 1000)
    assert (spec.command, spec.name) == (("/bin/prog", "-v"), "prog")
    assert (spec.ranks, spec.nnodes, spec.ntasks_total) == ((2, 5, 7), 3, 6)
    assert (spec.time_limit, spec.cwd, spec.env, spec.t_submit) == (60.0, "/work", {"A": "1"}, 12.5)
    assert (spec.uri, spec.namespace) == ("local:///run/sock", "job-0000.0000.0000.1234")
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


def test_the_settings_of_the_instance() -> None:
    settings = ExecSettings(
        journal_limit=1 << 20, segment_size=1 << 18, tmpdir_base="/scratch", cgroup_parent="/sys/fs/cgroup/x"
    )
    spec = read(settings=settings)
    assert (spec.journal_limit, spec.segment_size) == (1 << 20, 1 << 18)
    assert (spec.tmpdir_base, spec.cgroup_parent) == ("/scratch", "/sys/fs/cgroup/x")
    assert read().cgroup_parent is None


def test_the_whole_jobspec_and_r_are_in_it() -> None:
    spec = json.loads(build(duration=1))
    assert spec["R"] == R
    assert spec["jobspec"] == jobspec(duration=1)
