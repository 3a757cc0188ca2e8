"""Jobs: throughput, latency, and the commands that people wait for."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fluxres.base.eventlog import Event
from fluxres.client import Client
from fluxres.wire.payload import WireMap
from tests.bench.measure import Measurement, instance, seconds
from tests.bench.rpc import pipelined
from tests.system.kit import Instance, submission

JOBS: Final = 200
SUBMITS: Final = 2000
TIMES: Final = 9


def throughput(path: Path) -> float:
    """Trivial jobs a second, from the first submit to the last `clean`."""
    with instance(path) as made, made.client() as client:
        made.fluxres("run", "true")
        return JOBS / seconds(lambda: wait_all(client, submit(made, client, JOBS)))


def submit_rate(path: Path) -> float:
    """Submissions a second, with the queue stopped."""
    with instance(path) as made, made.client() as client:
        client.call("job-manager.queue-start", {"start": False})
        return SUBMITS / seconds(lambda: submit(made, client, SUBMITS))


def latency(path: Path) -> float:
    """From `submit` to `clean` of one trivial job on an idle instance, in milliseconds."""
    with instance(path) as made, made.client() as client:
        spans = []
        for _ in range(TIMES):
            [jobid] = submit(made, client, 1)
            events = wait_all(client, [jobid])
            spans.append(events[-1].timestamp - events[0].timestamp)
        return statistics.median(spans[1:]) * 1e3


def run_true(path: Path) -> float:
    """The whole process `fluxres run true`, in milliseconds."""
    return _command(path, "run", "true")


def list_jobs(path: Path) -> float:
    """The whole process `fluxres jobs -a` with ten jobs, in milliseconds."""
    return _command(path, "jobs", "-a")


def _command(path: Path, *args: str) -> float:
    script = Path(sys.executable).with_name("fluxres")
    with instance(path) as made, made.client() as client:
        wait_all(client, submit(made, client, 10))
        environ = made.environ

        def once() -> None:
            subprocess.run([script, *args], env=environ, check=True, stdout=subprocess.DEVNULL)

        once()
        return statistics.median(seconds(once) for _ in range(TIMES)) * 1e3


def submit(made: Instance, client: Client, count: int) -> list[int]:
    """Submit trivial jobs, many at a time; returns their ids."""
    jobspec = made.jobspec("true", environment=dict(os.environ))
    answers = pipelined(client, "job-ingest.submit", [submission(jobspec) for _ in range(count)])
    return [jobid for answer in answers if isinstance(jobid := answer["id"], int)]


def wait_all(client: Client, jobids: Sequence[int]) -> list[Event]:
    """Wait until all jobs are clean; returns the events of all, as they came."""
    from fluxres.base.eventlog import decode

    events: list[Event] = []
    for jobid in jobids:
        watch: WireMap = {"id": jobid, "path": "eventlog", "flags": 0}
        for response in client.stream("job-info.eventlog-watch", watch):
            events += decode(str(response["event"]))
    return events


MEASURED: Final = {
    "throughput": Measurement(
        what=f"{JOBS} trivial jobs, submit to inactive",
        run=throughput,
        unit="/s",
        goal="100",
        peers="flux 30–43, Slurm 10–36",
        digits=0,
    ),
    "submit": Measurement(what="submit alone", run=submit_rate, unit="/s", goal="1,000", peers="flux 430", digits=0),
    "latency": Measurement(
        what="one job, submit to clean, in the broker",
        run=latency,
        unit="ms",
        goal="< 60",
        peers="flux 79, Slurm 940–2,900",
        digits=0,
    ),
    "run": Measurement(
        what="fluxres run true, whole process",
        run=run_true,
        unit="ms",
        goal="< 100",
        peers="flux 212, srun 50",
        digits=0,
    ),
    "list": Measurement(
        what="fluxres jobs -a, whole process", run=list_jobs, unit="ms", goal="< 80", peers="flux 176", digits=0
    ),
}
