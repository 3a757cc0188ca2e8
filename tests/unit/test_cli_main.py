"""fluxres.cli.main: which module a command is, and how errors come out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clikit import Run

from fluxres.base.errors import FluxresError, RpcError
from fluxres.cli.main import COMMANDS, find, main


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit status, stdout and stderr."""

    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert callable(find(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, run: Run) -> None:
    status, out, _err = run(name, "--help")
    assert status == 0
    assert out.startswith("usage: fluxres")


def test_help_lists_the_commands(run: Run) -> None:
    status, out, _err = run("--help")
    assert status == 0
    assert set(re.findall(r"^  (\w+)", out, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["--nonsense"], ["ping", "--nonsense"], ["kvs"], ["kvs", "nonsense"]]
)
def test_wrong_usage_is_one_line_and_2(argv: list[str], run: Run) -> None:
    status, out, err = run(*argv)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1


def test_wrong_usage_of_the_broker_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fluxres.broker.main import main as broker_main

    monkeypatch.setattr("sys.argv", ["fluxres-broker", "--config=/x", "--rank=x"])
    with pytest.raises(SystemExit) as ended:
        broker_main()
    assert ended.value.code == 2
    said = "fluxres-broker: argument --rank: invalid int value: 'x' (see fluxres-broker --help)\n"
    assert capfd.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FluxresError("cannot do it: no\nreally"), "fluxres-version: cannot do it: no really\n"),
        (RpcError(113), "fluxres-version: cannot version: No route to host\n"),
        (FileNotFoundError(2, "No such file", "x"), "fluxres-version: cannot version 'x': No such file\n"),
        (ZeroDivisionError("oops"), "fluxres-version: internal error: ZeroDivisionError: oops\n"),
    ],
)
def test_errors_are_one_line_and_1(error: Exception, line: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("fluxres.cli.version.main", fail)
    assert run("version") == (1, "", line)
    assert ("Traceback" in run("version", "-v")[2]) == ("internal error" in line)
    monkeypatch.setenv("FLUXRES_DEBUG", "1")
    assert "Traceback" in run("version")[2]


def test_uri_before_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXRES_URI", "local:///else")
    for argv in (["--uri", "local:///nowhere"], ["--uri=local:///nowhere"]):
        status, _out, err = run(*argv, "uptime")
        assert (status, err) == (
            1,
            "fluxres-uptime: cannot connect to local:///nowhere: No such file or directory\n",
        )


def test_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fluxres.cli.version.main", interrupted)
    assert run("version") == (130, "", "")


def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fluxres.cli.main", "version"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        cwd=tmp_path,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


HEAVY = ("trio", "msgspec", "asyncio", "subprocess", "logging")


@pytest.mark.parametrize("module", ["run", "submit", "start", "kvs", "attr", "job"])
def test_nothing_heavy_is_imported(module: str) -> None:
    """A command's start is most of its run time."""
    code = f"import sys, fluxres.cli.main, fluxres.cli.{module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == "\n"
