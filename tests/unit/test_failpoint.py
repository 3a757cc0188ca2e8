"""fluxres.base.failpoint: an armed process dies at its hit and no other; a wrong name is never silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fluxres.base.failpoint import FAILPOINTS, VARIABLE

HITS = """
from fluxres.base.failpoint import hit
for number in range(3):
    print(number, flush=True)
    hit("claim.after")
    hit("claim.before")
"""


def run(setting: str | None, code: str = HITS) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if setting is not None:
        environ[VARIABLE] = setting
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("setting", "printed"),
    [("claim.before", "0"), ("claim.before@1", "0"), ("claim.before@3", "0 1 2"), ("claim.after@2", "0 1")],
)
def test_an_armed_process_is_killed_at_that_hit(setting: str, printed: str) -> None:
    done = run(setting)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == printed.split()


@pytest.mark.parametrize("setting", [None, "", "fork.before", "claim.before@4"])
def test_a_process_that_is_not_armed_for_the_hit_goes_on(setting: str | None) -> None:
    done = run(setting)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "2"]


def test_an_armed_process_is_stopped_and_goes_on() -> None:
    environ = {**os.environ, VARIABLE: "claim.before@2=stop"}
    process = subprocess.Popen([sys.executable, "-c", HITS], env=environ, stdout=subprocess.PIPE, text=True)
    _pid, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
    os.kill(process.pid, signal.SIGCONT)
    output, _errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.split() == ["0", "1", "2"]


def test_an_armed_hit_raises_once() -> None:
    code = HITS.replace('hit("claim.before")', "try_hit()").replace(
        "for number",
        """
def try_hit():
    try:
        hit("claim.before")
    except Exception as error:
        print(error, flush=True)
for number""",
        1,
    )
    assert run("claim.before@2=panic", code).stdout.splitlines() == ["0", "1", "failpoint claim.before", "2"]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("x", "cannot arm failpoint 'x': unknown, one of submit-commit.before, "),
        ("claim", "cannot arm failpoint 'claim': unknown"),
        ("claim.before@0", "must be a number of hits, 1 or more"),
        ("claim.before@", "must be a number of hits, 1 or more"),
        ("claim.before@x", "must be a number of hits, 1 or more"),
        ("claim.before=sleep", "what follows = must be stop or panic"),
    ],
)
def test_a_wrong_setting_raises_at_import(setting: str, why: str) -> None:
    done = run(setting)
    assert done.returncode == 1
    assert done.stdout == ""
    assert why in done.stderr


def test_hitting_an_unknown_name_raises_when_armed() -> None:
    done = run("claim.before", "from fluxres.base.failpoint import hit; hit('x')")
    assert "cannot hit failpoint 'x': unknown" in done.stderr


def test_names_are_unique_and_come_in_pairs() -> None:
    assert len(set(FAILPOINTS)) == len(FAILPOINTS) == 30
    assert {name.partition(".")[2] for name in FAILPOINTS} == {"before", "after"}
