"""Command line to jobspec: what flux submit --dry-run prints, and the option values it is made of."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.json import JsonObject, JsonValue
from fluxres.job.build import Facts, attribute_path, build_jobspec, set_dotted
from fluxres.job.jobspec import parse_jobspec
from fluxres.job.options import MAX_ENV_FILES, filter_environment, parse_keyval, parse_time_limit, parse_uri
from fluxres.job.requires import MAX_NESTING, parse_all_requires, parse_requires
from fluxres.sched.constraint import parse_constraint

FACTS = Facts(command=["app", "-x"], environment={"HOME": "/h"}, cwd="/d")
CORE: JsonObject = {"type": "core", "count": 1}


def slot(count: int, *below: JsonValue) -> JsonObject:
    return {"type": "slot", "count": count, "with": [*(below or (CORE,))], "label": "task"}


def test_the_simplest_jobspec() -> None:
    assert build_jobspec(FACTS) == {
        "resources": [slot(1)],
        "tasks": [{"command": ["app", "-x"], "slot": "task", "count": {"per_slot": 1}}],
        "attributes": {"system": {"duration": 0.0, "cwd": "/d", "environment": {"HOME": "/h"}}},
        "version": 1,
    }


@pytest.mark.parametrize(
    ("changes", "resource", "count"),
    [
        ({"ntasks": 4}, slot(4), {"per_slot": 1}),
        ({"cores_per_task": 3}, slot(1, {"type": "core", "count": 3}), {"per_slot": 1}),
        ({"gpus_per_task": 2}, slot(1, CORE, {"type": "gpu", "count": 2}), {"per_slot": 1}),
        (
            {"nodes": 2},
            {"type": "node", "count": 2, "exclusive": True, "with": [slot(1)]},
            {"per_slot": 1},
        ),
        ({"nodes": 2, "ntasks": 4}, {"type": "node", "count": 2, "with": [slot(2)]}, {"per_slot": 1}),
        ({"nodes": 4, "ntasks": 5}, {"type": "node", "count": 4, "with": [slot(2)]}, {"total": 5}),
        (
            {"nodes": 1, "ntasks": 1, "exclusive": True},
            {"type": "node", "count": 1, "exclusive": True, "with": [slot(1)]},
            {"per_slot": 1},
        ),
    ],
)
def test_resources(changes: dict[str, int], resource: JsonObject, count: JsonObject) -> None:
    jobspec = build_jobspec(FACTS._replace(**changes))  # type: ignore[arg-type]
    assert jobspec["resources"] == [resource]
    assert jobspec["tasks"] == [{"command": ["app", "-x"], "slot": "task", "count": count}]
    assert parse_jobspec(jobspec).ntasks == (changes.get("ntasks") or changes.get("nodes") or 1)


def test_attributes() -> None:
    facts = FACTS._replace(
        env_expand={"R": "{{rank}}"},
        rlimits={"core": -1},
        duration=90.0,
        name="fred",
        queue="q",
        bank="b",
        input="in",
        output="out",
        error="kvs",
        label_io=True,
        unbuffered=True,
        taskmap={"scheme": "cyclic", "value": ""},
        dependencies=[{"scheme": "after", "value": "ƒ1"}],
        constraint={"ranks": ["0"]},
        shell_options=[("verbose", 2), ("output.mode", "append")],
        attributes=[
            ("foo.bar", 1),
            ("system.queue", "z"),
            (".user.x", 2),
            ("user.y", 3),
            ("attributes.user.z", 4),
        ],
    )
    attributes = build_jobspec(facts)["attributes"]
    assert attributes == {
        "system": {
            "duration": 90.0,
            "cwd": "/d",
            "environment": {"HOME": "/h"},
            "shell": {
                "options": {
                    "env-expand": {"R": "{{rank}}"},
                    "rlimit": {"core": -1},
                    "input": {"stdin": {"type": "file", "path": "in"}, "batch-timeout": 0.0},
                    "output": {
                        "stdout": {"type": "file", "path": "out", "label": True, "buffer": {"type": "none"}},
                        "stderr": {"buffer": {"type": "none"}},
                        "batch-timeout": 0.05,
                        "mode": "append",
                    },
                    "taskmap": {"scheme": "cyclic", "value": ""},
                    "verbose": 2,
                }
            },
            "job": {"name": "fred"},
            "queue": "z",
            "bank": "b",
            "dependencies": [{"scheme": "after", "value": "ƒ1"}],
            "constraints": {"ranks": ["0"]},
            "foo": {"bar": 1},
        },
        "user": {"x": 2, "y": 3, "z": 4},
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"command": []}, "the command is missing"),
        ({"command": [""]}, "the command is missing"),
        ({"ntasks": 0}, "the number of tasks must be 1 or more, not 0"),
        ({"nodes": 0}, "the number of tasks must be 1 or more, not 0"),
        ({"nodes": 0, "ntasks": 1}, "the number of nodes must be 1 or more, not 0"),
        ({"cores_per_task": 0}, "cores per task"),
        ({"gpus_per_task": -1}, "gpus per task must be 0 or more"),
        ({"nodes": 3, "ntasks": 2}, "3 nodes are more than 2 tasks"),
        ({"exclusive": True}, "exclusive needs a number of nodes"),
        ({"duration": -1.0}, "the duration must be finite and not negative, not -1"),
        ({"duration": float("nan")}, "the duration"),
        ({"environment": {"BAD": "\udc80"}}, "variable 'BAD' is not valid UTF-8 .*--env=-BAD"),
        ({"shell_options": [("a", 1), ("a.b", 2)]}, "cannot set shell.options.a.b: a is 1, not an object"),
        ({"attributes": [("a..b", 1)]}, "a part of the key is empty"),
    ],
)
def test_facts_that_cannot_be(changes: dict[str, JsonValue], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        build_jobspec(FACTS._replace(**changes))  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 2),
    st.booleans(),
)
def test_what_is_built_is_accepted(
    nodes: int | None, ntasks: int | None, cores: int, gpus: int, exclusive: bool
) -> None:
    facts = FACTS._replace(nodes=nodes, ntasks=ntasks, cores_per_task=cores, gpus_per_task=gpus, exclusive=exclusive)
    try:
        built = build_jobspec(facts)
    except ValueError:
        assert (nodes or 1) > (ntasks or nodes or 1) or (exclusive and nodes is None)
        return
    jobspec = parse_jobspec(built)
    assert jobspec.ntasks == (ntasks or nodes or 1)
    assert (jobspec.cores_per_slot, jobspec.gpus_per_slot, jobspec.nnodes) == (cores, gpus, nodes or 0)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("foo", "attributes.system.foo"),
        ("system.foo", "attributes.system.foo"),
        ("user.foo", "attributes.user.foo"),
        ("attributes.system.foo", "attributes.system.foo"),
        (".foo", "attributes.foo"),
    ],
)
def test_attribute_path(key: str, path: str) -> None:
    assert attribute_path(key) == path


def test_set_dotted_without_dots() -> None:
    into: JsonObject = {}
    set_dotted(into, "a", 1)
    assert into == {"a": 1}


def no_file(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory", path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1", 60.0), ("1.5", 90.0), ("0", 0.0), ("30s", 30.0), ("2h", 7200.0), ("inf", 0.0)]
)
def test_time_limit(text: str, seconds: float) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["-1", "nan", "1x", ""])
def test_wrong_time_limits(text: str) -> None:
    with pytest.raises(ValueError, match=text or "''"):
        parse_time_limit(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 1)),
        ("a=2", ("a", 2)),
        ("a.b=x=y", ("a.b", "x=y")),
        ('a={"b":[1]}', ("a", {"b": [1]})),
        ("a=", ("a", "")),
        ("^a=file", ("a", {"from": "file"})),
    ],
)
def test_keyval(text: str, expected: tuple[str, JsonValue]) -> None:
    assert parse_keyval(text, lambda path: f'{{"from":"{path}"}}') == expected


def test_keyval_files_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match=r"cannot read 'f' for a: .*No such file"):
        parse_keyval("^a=f", no_file)
    with pytest.raises(ValueError, match="cannot read 'f' for a"):
        parse_keyval("^a=f", lambda path: "{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("afterok:ƒ123", {"scheme": "afterok", "value": "ƒ123"}),
        ("begin-time:", {"scheme": "begin-time", "value": ""}),
        ("block", {"scheme": "block", "value": ""}),
        (
            "string:a:b?x=1&y=2.5&z=q&z=3",
            {"scheme": "string", "value": "a:b", "x": 1, "y": 2.5, "z": ["q", 3]},
        ),
    ],
)
def test_uri(text: str, expected: JsonObject) -> None:
    assert parse_uri(text, "dependency") == expected


@pytest.mark.parametrize("text", ["", ":x", "4:x", "a b:x"])
def test_wrong_uris(text: str) -> None:
    with pytest.raises(ValueError, match="cannot use dependency"):
        parse_uri(text, "dependency")


ENVIRON = {"HOME": "/h", "PATH": "/bin", "LD_A": "1", "LD_B": "2"}


@pytest.mark.parametrize(
    ("rules", "environment", "expand"),
    [
        ([], ENVIRON, {}),
        (["-LD_*"], {"HOME": "/h", "PATH": "/bin"}, {}),
        (["-/LD_[A]/"], {"HOME": "/h", "PATH": "/bin", "LD_B": "2"}, {}),
        (["-*", "PATH"], {"PATH": "/bin"}, {}),
        (["-*", "LD_*", "LD_A=9"], {"LD_A": "9", "LD_B": "2"}, {}),
        (["-*", "PATH=$PATH:/x", "PATH=$PATH:/y"], {"PATH": "/bin:/x:/y"}, {}),
        (["-*", "A=$$1"], {"A": "$1"}, {}),
        (["-*", "A={{rank}}"], {}, {"A": "{{rank}}"}),
        (["-*", "^rules"], {"HOME": "/h", "B": "2"}, {}),
    ],
)
def test_environment(rules: list[str], environment: dict[str, str], expand: dict[str, str]) -> None:
    assert filter_environment(rules, ENVIRON, lambda path: "HOME\n\n B=2 \n") == (environment, expand)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("A=$NONE", "there is no variable NONE"),
        ("A=$ 5", "it has a \\$ that names no variable"),
        ("=5", "it has no name before ="),
        ("-/[/", "cannot use --env pattern '/\\[/'"),
        ("^rules", "cannot read --env rules from 'rules': .*No such file"),
    ],
)
def test_wrong_environment_rules(rule: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        filter_environment([rule], ENVIRON, no_file)


def test_a_rule_file_that_names_itself_ends() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_ENV_FILES} files"):
        filter_environment(["^f"], {}, lambda path: "^f")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssd", {"properties": ["ssd"]}),
        ("a,b", {"properties": ["a", "b"]}),
        ("a b", {"properties": ["a", "b"]}),
        ("a & b && c and d", {"properties": ["a", "b", "c", "d"]}),
        ("^a", {"properties": ["^a"]}),
        ("host:n[0-3]", {"hostlist": ["n[0-3]"]}),
        ("hosts:a,b rank:0-3", {"and": [{"hostlist": ["a,b"]}, {"ranks": ["0-3"]}]}),
        ("a|b", {"or": [{"properties": ["a"]}, {"properties": ["b"]}]}),
        ("a or b || c", {"or": [{"properties": [p]} for p in "abc"]}),
        ("a b|c", {"or": [{"properties": ["a", "b"]}, {"properties": ["c"]}]}),
        ("a (b|c)", {"and": [{"properties": ["a"]}, {"or": [{"properties": ["b"]}, {"properties": ["c"]}]}]}),
        ("-a b", {"and": [{"not": [{"properties": ["a"]}]}, {"properties": ["b"]}]}),
        ("not (a|b)", {"not": [{"or": [{"properties": ["a"]}, {"properties": ["b"]}]}]}),
        ("notable", {"properties": ["notable"]}),
        ("my-prop", {"properties": ["my-prop"]}),
        ("'and'", {"properties": ["and"]}),
        ('host:"a,b"', {"hostlist": ["a,b"]}),
    ],
)
def test_requires(text: str, expected: JsonObject) -> None:
    assert parse_requires(text) == expected
    parse_constraint(expected)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it ends too soon"),
        ("a &", "it ends too soon"),
        ("| a", "'\\|' is not expected here"),
        ("(a", "a parenthesis is not closed"),
        ("a)", "'\\)' is not expected here"),
        ("'a", "the quote ' is not closed"),
        ("host:", "'host' has no value"),
        ("ho!st:a", "'ho!st' is no operator"),
        ("(" * 100 + "a", f"nested deeper than {MAX_NESTING}"),
    ],
)
def test_wrong_requires(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_requires(text)


def test_all_requires() -> None:
    assert parse_all_requires(["a|b", "c", "d"]) == parse_requires("(a|b) and c and d")
    assert parse_all_requires(["a"]) == {"properties": ["a"]}
    with pytest.raises(ValueError, match=r"^cannot parse constraint '\(\(': it ends too soon$"):
        parse_all_requires(["a", "(("])


def test_commands_do_not_import_what_is_slow() -> None:
    code = (
        "import sys, fluxres.job.build, fluxres.job.options, fluxres.job.requires, fluxres.job.result\n"
        "print(sorted({'msgspec', 'trio', 'asyncio', 'subprocess'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
