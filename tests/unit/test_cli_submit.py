"""`fluxres submit`: options to requests, pipelining, keys, waiting."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from fakejobs import FakeInstance, cancelled_job, ended_job

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import f58
from fluxres.cli import run, submit
from fluxres.cli.common import parser
from fluxres.cli.submit_args import (
    add_job_options,
    check,
    jobspec_of,
    parse_flags,
    parse_key,
    parse_urgency,
    uses_cc,
)
from fluxres.wire.payload import WireMap


def spec(*argv: str, cc: int | None = None) -> dict[str, object]:
    options = parser("submit", "")
    add_job_options(options)
    args = options.parse_args(list(argv))
    check(args, options)
    return jobspec_of(args, cc)  # type: ignore[return-value]


def at(jobspec: object, path: str) -> object:
    for key in path.split("/"):
        jobspec = jobspec[int(key)] if isinstance(jobspec, list) else jobspec[key]  # type: ignore[index]
    return jobspec


@pytest.mark.parametrize(
    ("argv", "path", "expected"),
    [
        (["a", "-n", "b"], "tasks/0/command", ["a", "-n", "b"]),
        (["--", "-x"], "tasks/0/command", ["-x"]),
        (["-n3", "a"], "resources/0/count", 3),
        (["-n3", "-c2", "a"], "resources/0/with/0", {"type": "core", "count": 2}),
        (["-N2", "a"], "resources/0/type", "node"),
        (["-N2", "-n4", "-x", "a"], "resources/0/exclusive", True),
        (["-g1", "a"], "resources/0/with/1", {"type": "gpu", "count": 1}),
        (["-t", "2", "a"], "attributes/system/duration", 120.0),
        (["-t", "30s", "a"], "attributes/system/duration", 30.0),
        (["--queue=q", "a"], "attributes/system/queue", "q"),
        (["--job-name=me", "a"], "attributes/system/job/name", "me"),
        (["--cwd=/tmp", "a"], "attributes/system/cwd", "/tmp"),
        (["--output=/o", "a"], "attributes/system/shell/options/output/stdout/path", "/o"),
        (["--setattr=x.y=2", "a"], "attributes/system/x/y", 2),
        (["-overbose=2", "a"], "attributes/system/shell/options/verbose", 2),
        (["--env=-*", "--env=A=b", "a"], "attributes/system/environment", {"A": "b"}),
        (["--env-remove=*", "--env=A=b", "a"], "attributes/system/environment", {"A": "b"}),
        (["--dependency=after:f2", "a"], "attributes/system/dependencies/0/scheme", "after"),
        (["--requires=rank:1", "a"], "attributes/system/constraints", {"ranks": ["1"]}),
    ],
)
def test_options_make_the_jobspec(argv: list[str], path: str, expected: object) -> None:
    assert at(spec(*argv), path) == expected


def test_the_environment_and_directory_are_ours() -> None:
    made = spec("a")
    assert at(made, "attributes/system/environment") == dict(os.environ)
    assert at(made, "attributes/system/cwd") == os.getcwd()


@pytest.mark.parametrize("argv", [[], ["--"], ["-n0", "a"], ["--urgency=32", "a"], ["--flags=x", "a"], ["--key=", "a"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        submit.main(argv)
    assert error.value.code == 2


@pytest.mark.parametrize("argv", [["-N3", "-n2", "a"], ["-t", "x", "a"], ["--dependency=x", "a"]])
def test_what_no_jobspec_can_be_made_of(argv: list[str]) -> None:
    with pytest.raises(FluxresError, match="cannot"):
        run.main(argv)


def test_values_of_options() -> None:
    assert [parse_urgency(text) for text in ("hold", "default", "expedite", "7")] == [0, 16, 31, 7]
    assert parse_flags("debug,waitable") == 6
    assert parse_key("x" * 128)
    with pytest.raises(ValueError, match="129"):
        parse_key("x" * 129)


def test_cc_stands_for_its_id_everywhere() -> None:
    made = spec("--output=o.{cc}", "echo", "{cc}", cc=7)
    assert at(made, "tasks/0/command") == ["echo", "7"]
    assert at(made, "attributes/system/shell/options/output/stdout/path") == "o.7"


def test_dry_run_prints_jobspecs(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--dry-run", "--cc=1-2", "echo", "{cc}"]) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [at(each, "tasks/0/command") for each in made] == [["echo", "1"], ["echo", "2"]]
    assert [at(each, "attributes/system/environment/FLUX_JOB_CC") for each in made] == ["1", "2"]


def ingest(broker: FakeInstance) -> dict[str, int]:
    """Serve submissions as the broker does: the same key gives the same jobid."""
    known: dict[str, int] = {}

    def take(payload: WireMap) -> WireMap:
        return {"id": known.setdefault(str(payload["key"]), len(known) + 1)}

    broker.services["job-ingest.submit"] = take
    return known


@pytest.mark.parametrize("cuts", [[], [0], [1], [300, 100], [5] * 20])
def test_many_jobs_are_submitted_once_each_and_in_order(
    cuts: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeInstance(tmp_path, cuts=cuts) as broker:
        known = ingest(broker)
        assert submit.main(["--uri", broker.uri, "--cc=0-599", "--key=k", "true"]) == 0
    assert capsys.readouterr().out.split() == [f58(known[f"k#{each}"]) for each in range(600)]
    assert len(known) == 600


def test_bcc_does_not_tell_the_id(tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker:
        ingest(broker)
        assert submit.main(["--uri", broker.uri, "--bcc=0-1", "--quiet", "true"]) == 0
        asked = broker.payloads("job-ingest.submit")
    assert len(asked) == 2
    assert "FLUX_JOB_CC" not in str(asked)


def test_a_refused_job_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def take(payload: WireMap) -> WireMap:
        if str(payload["key"]).endswith("#2"):
            raise RpcError(errno.EINVAL, "no")
        return {"id": 1}

    with FakeInstance(tmp_path) as broker:
        broker.services["job-ingest.submit"] = take
        assert submit.main(["--uri", broker.uri, "--cc=1-3", "true"]) == 1
    out, err = capsys.readouterr()
    assert out == "ƒ2\nƒ2\n"
    assert err == "fluxres-submit: cannot submit: no\n"


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_waiting_for_many(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path, cuts=[cut]) as broker:
        ingest(broker)
        broker.jobs = {1: ended_job(), 2: ended_job(status=3 << 8), 3: cancelled_job("enough")}
        assert submit.main(["--uri", broker.uri, "--cc=1-3", "--wait", "true"]) == 3
    out, err = capsys.readouterr()
    assert out.split() == ["ƒ2", "ƒ3", "ƒ4"]
    assert sorted(err.splitlines()) == [
        "fluxres-submit: ƒ3: task(s) exited with exit code 3",
        "fluxres-submit: ƒ4: fatal exception type=cancel enough",
    ]


def test_waiting_for_an_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        ingest(broker)
        broker.jobs = {1: ended_job(status=256), 2: cancelled_job()}
        assert submit.main(["--uri", broker.uri, "--wait-event=start", "true"]) == 0
        assert submit.main(["--uri", broker.uri, "--wait-event=start", "true"]) == 1
    assert capsys.readouterr().err == "fluxres-submit: ƒ3: event 'start' never came\n"


def test_a_common_jobspec_is_built_once() -> None:
    options = parser("submit", "")
    add_job_options(options)
    assert not uses_cc(options.parse_args(["echo", "x"]))
    assert uses_cc(options.parse_args(["--env=A={cc}", "echo", "x"]))
