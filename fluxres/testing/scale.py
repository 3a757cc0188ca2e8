"""How large instances come up, and recover from a crash of rank 0: `python -m fluxres.testing.scale SIZE…`

All brokers are simulated in one process, on a network with a latency of 0.5 ms and no limit to what it carries. Times
are virtual: they have latencies, back-off and the number of round trips in them, and no work. So they must grow with
the depth of the tree, and not with its size. Real time and memory are those of the simulation.

For each size: jobs run, rank 0 is killed, and started again `DOWN` seconds later; recovered is when every broker is a
new incarnation that is joined and known to rank 0, and no job was harmed.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from fluxres.testing.checks import check_jobs, check_joined, check_new
from fluxres.testing.instance import Instance
from fluxres.testing.network import Traffic
from fluxres.testing.simulate import simulate

FANOUT: Final = 32
JOBS: Final = 64
"""Jobs that run through it, each on one rank."""
JOB_SECONDS: Final = 5
DOWN: Final = 0.5
"""Seconds for which rank 0 is away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one phase took: `seconds` of virtual time, and what was sent meanwhile."""

    seconds: float
    messages: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one size. `real` is in seconds, `memory` in bytes."""

    size: int
    levels: int
    bring_up: Phase
    recovery: Phase
    real: float
    memory: int


async def measure(size: int, *, fanout: int = FANOUT, jobs: int = JOBS) -> Report:
    """Simulate an instance of `size` brokers, and check it."""
    begun = time.monotonic()
    async with Instance(size, fanout=fanout, log_level=logging.CRITICAL) as instance:
        start, sent = trio.current_time(), Traffic()
        await instance.start()
        bring_up, sent = _phase(instance, start, sent)
        for _ in range(jobs):
            await instance.jobs.submit("sleep", str(JOB_SECONDS), cores=instance.config.resource.cores or 1)
        await trio.sleep(1)
        _, sent = _phase(instance, start, sent)
        before, start = instance.uuids(), trio.current_time()
        instance.kill(0)
        await trio.sleep(DOWN)
        await instance.restart(0)
        await instance.online()
        recovery, sent = _phase(instance, start, sent)
        check_joined(instance)
        check_new(instance, before, list(range(size)))
        for jobid in instance.jobs.ids:
            await instance.jobs.wait(jobid)
        check_jobs(instance)
    return Report(
        size=size,
        levels=instance.topology.maxlevel,
        bring_up=bring_up,
        recovery=recovery,
        real=time.monotonic() - begun,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _phase(instance: Instance, start: float, before: Traffic) -> tuple[Phase, Traffic]:
    """What has happened since `start`, when `before` was sent; and what is sent by now."""
    traffic = instance.network.traffic.values()
    now = Traffic(sum(each.frames for each in traffic), sum(each.bytes for each in traffic))
    seconds = trio.current_time() - start
    return Phase(seconds=seconds, messages=now.frames - before.frames, bytes=now.bytes - before.bytes), now


def show(report: Report) -> str:
    """The figures of one size, for people."""
    size, up, back = report.size, report.bring_up, report.recovery
    return "\n".join(
        (
            f"{size} brokers, {report.levels} levels below rank 0, fanout {FANOUT}:",
            f"  bring-up   {up.seconds:8.3f} s of virtual time,"
            f" {up.messages / size:6.1f} messages and {up.bytes / size:8.0f} bytes a broker",
            f"  recovery   {back.seconds:8.3f} s, {back.seconds - DOWN:.3f} s after rank 0 is started again,"
            f" {back.messages / size:6.1f} messages and {back.bytes / size:8.0f} bytes a broker",
            f"  simulation {report.real:8.1f} s of real time, {report.memory / 2**20:.0f} MiB",
        )
    )


def main() -> int:
    """Measure each size, in a process of its own where there are several."""
    parser = argparse.ArgumentParser(prog="fluxres.testing.scale", description="Simulate instances of many brokers.")
    parser.add_argument("size", type=int, nargs="+", metavar="SIZE", help="brokers")
    sizes: list[int] = parser.parse_args().size
    if len(sizes) == 1:
        print(show(simulate(partial(measure, sizes[0]))), flush=True)
        return 0
    return max(
        subprocess.run([sys.executable, "-m", "fluxres.testing.scale", str(size)], check=False).returncode
        for size in sizes
    )


if __name__ == "__main__":
    sys.exit(main())
