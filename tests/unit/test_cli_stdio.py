"""What commands do with closed standard streams, with text that is not UTF-8, and with control characters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluxres.base.errors import FluxresError
from fluxres.cli.common import write_some
from fluxres.cli.format import OutputFormat
from fluxres.cli.main import main


def shell(line: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which `$F` is `fluxres`."""
    command = f"{sys.executable} -m fluxres.cli.main"
    return subprocess.run(
        ["sh", "-c", line.replace("$F", command)],
        env={**os.environ, **env},
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )


def test_closed_streams_are_not_reused(tmp_path: Path) -> None:
    """A socket that got the number of a closed stdin would be read as the input of a job."""
    code = "import os, fluxres.cli.main as m; m._prepare_streams(); print(os.open('/', os.O_RDONLY) > 2)"
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{code}" <&- 2>&-'], capture_output=True, check=False, cwd=tmp_path
    )
    assert done.stdout == b"True\n"


def test_a_closed_stdout_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = shell("$F version >&-", tmp_path)
    assert (done.returncode, done.stderr) == (1, b"fluxres-version: cannot write output: Bad file descriptor\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["version", "job id --to=f58 0"])
def test_a_full_disk_is_an_error_in_one_line(command: str, unbuffered: str, tmp_path: Path) -> None:
    done = shell(f"$F {command} >/dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    why = f"fluxres-{command.split()[0]}: cannot write output: No space left on device\n"
    assert (done.returncode, done.stderr.decode()) == (1, why)


def test_bytes_for_a_full_disk() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(FluxresError, match="cannot write output: No space left"):
        write_some(full.fileno(), memoryview(b"x"))


def test_a_closed_stderr_hides_nothing_else(tmp_path: Path) -> None:
    done = shell("$F --help 2>&- <&-", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: ")
    assert shell("$F nonsense 2>&-", tmp_path).returncode == 2


def test_a_terminal_without_florin(tmp_path: Path) -> None:
    done = shell("$F job id --to=f58 0", tmp_path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (0, b"f1\n")
    for form, shown in (("f58", "f1"), ("f58plain", "f1"), ("dec", "0")):
        done = shell(f"$F job id --to={form} 0", tmp_path, FLUX_F58_FORCE_ASCII="1")
        assert done.stdout.decode() == f"{shown}\n"
    assert b"?" in shell("$F --help", tmp_path, PYTHONIOENCODING="ascii").stdout  # the … of the usage


def test_arguments_that_are_not_utf8(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def encode(_argv: list[str]) -> int:
        "x\udcff".encode()
        return 0

    monkeypatch.setattr("fluxres.cli.version.main", encode)
    assert main(["version"]) == 1
    assert capfd.readouterr().err == "fluxres-version: cannot version: 'x\\udcff' is not valid UTF-8\n"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--uri"], "fluxres: --uri needs a URI"),
        (["--bad"], "fluxres: '--bad' is no option"),
        (["start", "--statedir", "", "true"], "fluxres-start: argument --statedir: it is empty"),
        (["start", "--rundir=", "true"], "fluxres-start: argument --rundir: it is empty"),
        (["job", "raise", "--type=a b", "f1"], "fluxres-job: argument -t/--type: type 'a b' is not one word"),
        (["run", "-t", "abc", "true"], "fluxres-run: cannot parse duration 'abc'"),
        (["submit", "-t", "1x", "true"], "fluxres-submit: cannot parse duration '1x'"),
        (["run", "-t", "-1", "true"], "fluxres-run: cannot use time limit '-1'"),
        (["run", "-N2", "-n1", "true"], "fluxres-run: cannot build jobspec: 2 nodes are more than 1 tasks"),
        (["submit", "--setattr=", "true"], "fluxres-submit: cannot set 'attributes.system.'"),
        (["submit", "--cc=1-2", "--requires=(((", "true"], "fluxres-submit: cannot parse constraint"),
        (["run", "--env=/bad[/", "true"], "fluxres-run: cannot use --env pattern '/bad[/'"),
        (["start", "--conf", "resource.cores", "true"], "fluxres-start: cannot set 'resource.cores'"),
        (["kvs", "put", "a"], "fluxres-kvs put: argument KEY=VALUE: cannot put 'a': it must be KEY=VALUE"),
        (["jobs", "-o", "{"], "fluxres-jobs: cannot read format '{'"),
        (["jobs", "-o", "{name:99999999999}"], "fluxres-jobs: cannot read format"),
        (["jobs", "-o", "{t_run!d:%99999d}"], "fluxres-jobs: cannot read format"),
        (["jobs", "--sort=nosuch"], "fluxres-jobs: cannot sort by 'nosuch'"),
    ],
)
def test_usage_errors(argv: list[str], why: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(why)
    assert re.search(r" \(.*--help.*\)\n", err)


def test_a_setting_inside_a_value_is_wrong_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["start", f"--statedir={tmp_path}/a/state", f"--rundir={tmp_path}/run"]
    assert main([*argv, "--conf=x.y=1", "--conf=x.y.z=2", "true"]) == 2
    assert capfd.readouterr().err.startswith("fluxres-start: cannot set x.y.z: y is no table (")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_do_not_reach_the_terminal() -> None:
    form = OutputFormat("{name:<6}|", lambda _field: "NAME")
    assert form.row(lambda _field: "a\n\033[1m") == "a??[1m|"
