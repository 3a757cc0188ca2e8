"""fluxres.broker.forker: forks that are brokers, and what ps(1) shows of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import FluxresError
from fluxres.broker import forker
from fluxres.cli.instancedir import InstanceDir

SCRIPT = """
import json, os, random, sys
from fluxres.broker import forker
ours = random.Random()
report, logs = int(sys.argv[1]), sys.argv[2]
rank = forker.fork_each([0, 1, 2], report, logs or None)
if rank is None:
    statuses = [os.wait()[1] for _ in range(3)]
    os._exit(any(statuses))
forker.show_arguments(["--rank", str(rank)])
seen = {
    "rank": rank,
    "leads": os.getsid(0) == os.getpid(),
    "arguments": open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0)),
    "chance": [ours.random(), random.random()],
    "reports": str(report) in os.listdir("/proc/self/fd"),
}
os.write(1, json.dumps(seen).encode() + bytes([10]))
"""


def run(tmp_path: Path, logs: str) -> tuple[subprocess.CompletedProcess[str], list[list[int]]]:
    """Fork three ranks; what they write to our output, and what they have reported."""
    (tmp_path / "script.py").write_text(SCRIPT)
    reading, writing = os.pipe()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(writing), logs, "room for other arguments"],
        pass_fds=[writing],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        return done, [[int(word) for word in line.split()] for line in pipe]


@pytest.mark.parametrize("with_logs", [True, False])
def test_each_fork_is_a_broker_of_its_own(tmp_path: Path, with_logs: bool) -> None:
    done, reports = run(tmp_path, str(tmp_path) if with_logs else "")
    assert sorted(rank for rank, _ in reports) == [0, 1, 2]
    assert len({pid for _, pid in reports}) == 3
    if with_logs:
        assert (done.stdout, done.stderr) == ("", "")
        seen = [json.loads(Path(forker.log_path(str(tmp_path), rank)).read_text()) for rank in range(3)]
    else:
        seen = sorted((json.loads(line) for line in done.stdout.splitlines()), key=itemgetter("rank"))
    for rank, each in enumerate(seen):
        assert (each["rank"], each["leads"], each["reports"]) == (rank, True, False)
        assert each["arguments"] == [sys.executable, str(tmp_path / "script.py"), "--rank", str(rank)]
    assert len({number for each in seen for number in each["chance"]}) == 6


def test_a_broker_that_nobody_supervises_ends(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = "import os, sys; from fluxres.broker import forker; print(forker.fork_each([0], int(sys.argv[1]), None))"
    status = "; print(os.waitstatus_to_exitcode(os.wait()[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script + status, str(writing)],
        pass_fds=[writing],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    os.close(writing)
    assert done.stdout.split() == ["None", str(forker.NOT_SUPERVISED)]


def test_a_fork_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr("gc.freeze", lambda: None)
    with pytest.raises(FluxresError, match="cannot fork the broker of rank 3: Resource temporarily unavailable"):
        forker.fork_each([3], -1, None)


def test_the_supervisor_looks_for_logs_where_they_are(tmp_path: Path) -> None:
    where = InstanceDir(None, str(tmp_path / "run"))
    assert forker.log_path(where.rundir, 12) == where.log(12)
    where.abandon()


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)), st.integers(0, 64)
)
def test_a_command_line_fills_its_room_or_is_none(arguments: list[str], room: int) -> None:
    line = forker.command_line(arguments, room)
    length = sum(len(os.fsencode(each)) + 1 for each in arguments)
    if line is None:
        assert length > room
    else:
        assert len(line) == room
        assert line[:length].split(b"\0")[:-1] == [os.fsencode(each) for each in arguments]
        assert not line[length:].strip(b"\0")
