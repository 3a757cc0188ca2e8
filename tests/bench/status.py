"""The status endpoint under many readers: what 500 of them, some stuck, cost the jobs and the broker's memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.bench.jobs import submit, wait_all
from tests.bench.measure import Measurement, instance, seconds
from tests.bench.memory import rss
from tests.system.kit import Instance

READERS: Final = 490
STUCK: Final = 10
JOBS: Final = 500
"""Jobs of one half of a round; a round is two halves without readers and two with, in turn."""
ROOT: Final = Path(__file__).parents[2]


@contextlib.contextmanager
def readers(made: Instance) -> Iterator[None]:
    """All of them, subscribed to everything; at the end none of those that read may have been ended."""
    where = urlsplit(made.fluxres("getattr", "status.uri").stdout.decode().strip())
    command = [
        sys.executable,
        "-m",
        "tests.bench.readers",
        str(where.hostname),
        str(where.port),
        str(READERS),
        str(STUCK),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()
        told = json.loads(process.stdout.read())
        assert told["gone"] == 0, told
        assert told["messages"] >= READERS, told


def throughput(path: Path) -> float:
    """Jobs a second with readers, in percent of that without: two rounds of each in one instance."""
    with instance(path) as made, made.client() as client:

        def jobs() -> float:
            return seconds(lambda: wait_all(client, submit(made, client, JOBS)))

        jobs()  # the first are slower: nothing is warm
        without = with_readers = 0.0
        for _ in range(2):
            without += jobs()
            with readers(made):
                with_readers += jobs()
        return without / with_readers * 100


def memory(path: Path) -> float:
    """By how much the broker's memory grows by the readers while jobs run, in MB."""
    with instance(path) as made, made.client() as client:
        wait_all(client, submit(made, client, JOBS))
        before = rss(made.pid)
        with readers(made):
            wait_all(client, submit(made, client, JOBS))
            return rss(made.pid) - before


MEASURED: Final = {
    "readers": Measurement(
        what=f"jobs/s with {READERS} readers and {STUCK} stuck ones",
        run=throughput,
        unit="% of none",
        goal="> 90",
        digits=0,
        runs=1,
    ),
    "readers-memory": Measurement(
        what="what they add to the broker's memory", run=memory, unit="MB", goal="bounded", digits=0, runs=1
    ),
}
