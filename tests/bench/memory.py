"""Memory: an idle broker, and what each running job costs in shell processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tests.bench.measure import Measurement, instance

JOBS: Final = 10


def idle(path: Path) -> float:
    """Resident memory of a broker that has done nothing, in MB."""
    with instance(path) as made:
        return rss(made.pid)


def per_job(path: Path) -> float:
    """Proportional memory (PSS) of the shell of one running job, in MB: the mean of ten."""
    with instance(path, cores=JOBS) as made:
        jobids = [made.submit(made.job("time.sleep(600)")) for _ in range(JOBS)]
        for jobid in jobids:
            made.wait_marked(jobid)
        return sum(_pss(made.shell_pid(jobid)) for jobid in jobids) / JOBS


def rss(pid: int) -> float:
    """Resident memory of a process, in MB."""
    return _kilobytes(f"/proc/{pid}/status", "VmRSS") / 1024


def _pss(pid: int) -> float:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") / 1024


def _kilobytes(path: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"no {name} in {path}"
    return float(found[1])


MEASURED: Final = {
    "idle": Measurement(what="idle broker, resident", run=idle, unit="MB", goal="< 40", peers="flux 23", digits=0),
    "shell": Measurement(
        what="shell of a running job, PSS",
        run=per_job,
        unit="MB",
        goal="< 6",
        peers="flux 3–4, slurmstepd 1.5",
        runs=1,
    ),
}
