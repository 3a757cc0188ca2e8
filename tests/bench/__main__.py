"""`make bench`: how fast and how small fluxres is, as a table of medians. Never a test: machines differ and are noisy.

    python -m tests.bench [--runs N] [SECTION | NAME …]

SECTION `scale` is the report of simulated instances (`fluxres.testing.scale`), the last that is run and no table.

Each line says what was measured, the median of its runs with their range, the goal, and what peers do on the same kind
of machine (flux-core 0.88 built from source, Slurm 22.05 from Debian: figures of this project's issues 2 and 3, not
measured here). The fsync time of the disk is measured first, because durable commits stand on it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench import jobs, memory, rpc, startup, status, tree
from tests.bench.measure import Measurement

SECTIONS = {
    "rpc": rpc.MEASURED,
    "jobs": jobs.MEASURED,
    "startup": startup.MEASURED,
    "memory": memory.MEASURED,
    "tree": tree.MEASURED,
    "status": status.MEASURED,
}
SCALE = "scale"
SCALE_SIZES = ("1000", "10000")
ALL = {name: measurement for section in SECTIONS.values() for name, measurement in section.items()}


def main() -> int:
    """Run the chosen measurements, all by default, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure fluxres.")
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement (default 3)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {_known()}")
    args = parser.parse_args()
    unknown = set(args.names) - set(SECTIONS) - set(ALL) - {SCALE}
    if unknown:
        parser.error(f"cannot measure {', '.join(sorted(unknown))}: unknown")
    chosen = args.names or [*SECTIONS, SCALE]
    names = [each for name in chosen if name != SCALE for each in SECTIONS.get(name, [name])]
    if names:
        _measure(names, args.runs)
    if SCALE in chosen:
        return subprocess.run([sys.executable, "-m", "fluxres.testing.scale", *SCALE_SIZES], check=False).returncode
    return 0


def _measure(names: list[str], runs: int) -> None:
    """Print the table."""
    print(f"{'measured':<46} {'median':>10} {'range':>19}  {'goal':<12} peers")
    for name in names:
        measurement = ALL[name]
        values = []
        for _ in range(measurement.runs or runs):
            with tempfile.TemporaryDirectory(prefix="fluxres-bench-") as directory:
                values.append(measurement.run(Path(directory)))
        _print(measurement, values)


def _known() -> str:
    sections = [f"{section} ({', '.join(measured)})" for section, measured in SECTIONS.items()]
    return "; ".join([*sections, SCALE])


def _print(measurement: Measurement, values: list[float]) -> None:
    median = statistics.median(values)
    spread = f"{min(values):,.{measurement.digits}f}–{max(values):,.{measurement.digits}f}"
    shown = f"{median:,.{measurement.digits}f} {measurement.unit}"
    print(f"{measurement.what:<46} {shown:>10} {spread:>19}  {measurement.goal:<12} {measurement.peers}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
