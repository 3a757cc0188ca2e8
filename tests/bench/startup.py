"""Starting: an instance from nothing, and a broker that finds everything again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bench.measure import Measurement, instance, seconds
from tests.bench.memory import rss
from tests.system.kit import Instance, eventually

RUNNING: Final = 100


def start_online(path: Path) -> float:
    """`fluxres start` of size 1 until it is online, in seconds: its command is `true`, killed nothing."""
    script = Path(sys.executable).with_name("fluxres")
    state = path / "state"
    begin: list[str | Path] = [script, "start", "--background", "--statedir", state, "--rundir", path / "run"]
    try:
        return seconds(lambda: subprocess.run(begin, check=True, stdout=subprocess.DEVNULL))
    finally:
        uri = f"local://{path}/run/local-0"
        subprocess.run([script, "shutdown"], env={"FLUXRES_URI": uri}, check=True, stdout=subprocess.DEVNULL)


def recover(path: Path) -> float:
    """SIGKILL with 100 running and 1,000 pending jobs; from start to all attached and scheduling, in seconds."""
    return _recovered(path, running=RUNNING, pending=1000)[0]


def recover_pending(path: Path) -> float:
    """The same with 10,000 pending jobs and none running, in seconds."""
    return _recovered(path, running=0, pending=10_000)[0]


def recover_pending_rss(path: Path) -> float:
    """The broker's memory after that, in MB."""
    return _recovered(path, running=0, pending=10_000)[1]


def _recovered(path: Path, *, running: int, pending: int) -> tuple[float, float]:
    with instance(path, cores=max(1, running)) as made:
        for _ in range(running):
            made.submit(made.jobspec("sleep", "600"))
        eventually(lambda: _attached(made) == running, what="the running jobs")
        made.rpc("job-manager.queue-start", {"start": running > 0})
        made.submit_many([made.jobspec("true") for _ in range(pending)])
        made.kill()

        def restart() -> None:
            made.start()
            eventually(lambda: _attached(made) == running and _pending(made) >= pending, what="everything again")

        return seconds(restart), rss(made.pid)


def _attached(made: Instance) -> int:
    count = made.rpc("exec.stats-get")["attached"]
    return count if isinstance(count, int) else 0


def _pending(made: Instance) -> int:
    count = made.rpc("job-manager.stats-get")["pending_jobs"]
    return count if isinstance(count, int) else 0


MEASURED: Final = {
    "start": Measurement(
        what="fluxres start, size 1, online", run=start_online, unit="s", goal="< 0.5", peers="flux 0.43", digits=2
    ),
    "recover": Measurement(
        what="restart: 100 running, 1,000 pending",
        run=recover,
        unit="s",
        goal="< 1",
        peers="flux 2.8 (none running)",
        digits=2,
        runs=1,
    ),
    "recover10k": Measurement(
        what="restart: 10,000 pending",
        run=recover_pending,
        unit="s",
        goal="< 2.5",
        peers="flux 13–20",
        digits=2,
        runs=1,
    ),
    "rss10k": Measurement(
        what="broker memory with 10,000 pending",
        run=recover_pending_rss,
        unit="MB",
        goal="< 150",
        peers="flux 500",
        digits=0,
        runs=1,
    ),
}
