"""The tree: brokers of `fluxres start -s N --fanout 2` come up, answer over hops, die and come back, and run jobs.

Every broker is a process of this machine, so that the figures of larger trees are those of its cores, shared. The
peers' figures are flux-core's on two cores (0.88; for what is lost see also issue 3).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from fluxres.client import Client
from tests.bench.jobs import wait_all
from tests.bench.measure import Measurement, seconds
from tests.system.kit import PATIENCE, Instance, eventually

SIZES: Final = (1, 4, 16, 32)
SIZE: Final = 16
HOPS: Final = (0, 1, 3, 7)
"""The rank that is so many hops below rank 0."""
CALLS: Final = 1000
RUNNING: Final = 64
REQUESTS: Final = 1000
JOBS: Final = 200
TIMES: Final = 5
DEAD_CHILD, DEAD_PARENT, ITS_CHILDREN = 3, 1, (3, 4)


class Tree(Instance):
    """An instance of `size` brokers that `fluxres start` supervises, each of which has `cores`."""

    def __init__(self, path: Path, *, size: int, cores: int = 2) -> None:
        super().__init__(path)
        self.size = size
        self._cores = cores

    def bring_up(self) -> None:
        """Start it; returns when all ranks are online."""
        script = Path(sys.executable).with_name("fluxres")
        where: list[str | Path] = ["--statedir", self.base, "--rundir", self.rundir]
        options = ["-s", str(self.size), "--fanout", "2", "--conf", f"resource.cores={self._cores}", "--background"]
        begin = [script, "start", *options, *where]
        subprocess.run(begin, env=self.environ, cwd="/", check=True, stdout=subprocess.DEVNULL)

    def client_of(self, rank: int) -> Client:
        """A connection to the broker of one rank."""
        return Client.connect(f"local://{self.rundir}/local-{rank}")

    def kill_rank(self, rank: int) -> float:
        """SIGKILL a broker, which its supervisor then starts again; returns when."""
        with self.client_of(rank) as client:
            pidfd = client.broker_pidfd()
        try:
            begun = time.perf_counter()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        return begun

    def online(self) -> bool:
        """Whether all ranks are online."""
        return self.rpc("resource.status")["offline"] == ""

    def attached(self) -> int:
        """How many shells are attached, on all ranks."""
        with self.client() as client:
            tags = [client.open("exec.stats-get", nodeid=rank, streaming=False) for rank in range(self.size)]
            replies = [client.receive_for(tag, PATIENCE) for tag in tags]
        counts = [reply.payload["attached"] for reply in replies if reply is not None and reply.error is None]
        return sum(count for count in counts if isinstance(count, int))


@contextlib.contextmanager
def tree(path: Path, size: int, *, cores: int = 2) -> Iterator[Tree]:
    """A tree that is online, killed at the end."""
    made = Tree(path, size=size, cores=cores)
    try:
        made.bring_up()
        yield made
    finally:
        made.clean_up()


def bring_up(path: Path, *, size: int) -> float:
    """`fluxres start` until all ranks are online, in seconds."""
    made = Tree(path, size=size)
    try:
        return seconds(made.bring_up)
    finally:
        made.clean_up()


def round_trip(path: Path, *, hops: int) -> float:
    """The median time of one ping after the other to a rank `hops` below, in milliseconds."""
    with tree(path, 1 + HOPS[-1]) as made, made.client() as client:
        ping = partial(client.call, "broker.ping", {"seq": 1}, nodeid=HOPS[hops])
        return statistics.median(seconds(ping) for _ in range(CALLS)) * 1e3


def recover(path: Path) -> float:
    """From SIGKILL of rank 0 until all ranks are online and all running jobs are attached again, in seconds."""
    with tree(path, SIZE, cores=RUNNING // SIZE) as made:
        jobids = made.submit_many([made.jobspec("sleep", "600") for _ in range(RUNNING)])
        eventually(lambda: made.attached() == RUNNING, what="the running jobs")
        begun = made.kill_rank(0)
        eventually(made.online, what="all ranks")
        eventually(lambda: made.attached() == RUNNING, what="the running jobs again")
        taken = time.perf_counter() - begun
        assert all("reattach" in made.events(jobid, "guest.exec.eventlog") for jobid in jobids)
        return taken


def unreachable(path: Path) -> float:
    """From SIGKILL of a rank two hops away until each of many requests there has had its EHOSTUNREACH, in ms."""
    with tree(path, 1 + HOPS[-1]) as made, made.client() as client:
        for _ in range(REQUESTS):
            client.open("event.subscribe", {"topic": "none-is-called-so"}, nodeid=DEAD_CHILD)
        _receive(client, REQUESTS, 0)
        begun = made.kill_rank(DEAD_CHILD)
        _receive(client, REQUESTS, errno.EHOSTUNREACH)
        return (time.perf_counter() - begun) * 1e3


def _receive(client: Client, count: int, errnum: int) -> None:
    for _ in range(count):
        reply = client.receive(PATIENCE)
        assert reply is not None, "no answer"
        assert errnum == (reply.error.errnum if reply.error else 0), reply


def notice(path: Path) -> float:
    """From SIGKILL of an interior rank until its children have ended their incarnations, in ms."""
    return _noticed(path, 1 + HOPS[-1], DEAD_PARENT, ITS_CHILDREN)


def cascade(path: Path) -> float:
    """From SIGKILL of rank 0 until all others have, in ms."""
    return _noticed(path, SIZE, 0, range(1, SIZE))


def _noticed(path: Path, size: int, dead: int, ranks: tuple[int, ...] | range) -> float:
    """A client of each broker sees its incarnation end: that closes the connection."""
    with tree(path, size) as made, contextlib.ExitStack() as stack:
        poller = select.poll()
        left = {stack.enter_context(made.client_of(rank)).fileno() for rank in ranks}
        for fd in left:
            poller.register(fd, select.POLLRDHUP)
        begun = made.kill_rank(dead)
        while left:
            for fd, _ in poller.poll(PATIENCE * 1e3):
                poller.unregister(fd)
                left.discard(fd)
        return (time.perf_counter() - begun) * 1e3


def wide_job(path: Path) -> float:
    """From `submit` to `clean` of a job on all ranks, in milliseconds; the median after the first."""
    return statistics.median(_wide_jobs(path, TIMES)[1:])


def wide_job_cold(path: Path) -> float:
    """The same of the first job, for which every rank has to start its launcher."""
    return _wide_jobs(path, 1)[0]


def _wide_jobs(path: Path, times: int) -> list[float]:
    spans = []
    with tree(path, SIZE) as made, made.client() as client:
        for _ in range(times):
            jobid = made.submit(made.jobspec("true", nodes=SIZE, ntasks=SIZE))
            events = wait_all(client, [jobid])
            spans.append((events[-1].timestamp - events[0].timestamp) * 1e3)
    return spans


def throughput(path: Path) -> float:
    """Trivial jobs a second on four ranks, from the first submit to the last `clean`."""
    with tree(path, 4) as made, made.client() as client:
        spec = made.jobspec("true")
        wait_all(client, made.submit_many([spec] * made.size * 2))  # every rank has its launcher
        return JOBS / seconds(lambda: wait_all(client, made.submit_many([spec] * JOBS)))


def _bring_up(size: int, peer: float) -> Measurement:
    run: Callable[[Path], float] = partial(bring_up, size=size)
    goal = f"< {peer:g}"
    return Measurement(
        what=f"fluxres start -s {size} --fanout 2, online",
        run=run,
        unit="s",
        goal=goal,
        peers=f"flux {peer:g}",
        digits=2,
    )


def _round_trip(hops: int, peer: float) -> Measurement:
    run: Callable[[Path], float] = partial(round_trip, hops=hops)
    return Measurement(
        what=f"RPC round trip over {hops} hops", run=run, unit="ms", goal="", peers=f"flux {peer:g}", digits=2, runs=2
    )


MEASURED: Final = {
    **{f"up{size}": _bring_up(size, peer) for size, peer in zip(SIZES, (0.44, 0.77, 2.0, 3.5), strict=True)},
    **{f"hops{hops}": _round_trip(hops, peer) for hops, peer in enumerate((0.2, 0.5, 0.9, 1.2))},
    "panic": Measurement(
        what=f"SIGKILL of rank 0: {SIZE} ranks, {RUNNING} jobs back",
        run=recover,
        unit="s",
        goal="< 2",
        peers="flux 3.8 (4 ranks, all jobs lost)",
        digits=2,
    ),
    "unreachable": Measurement(
        what=f"dead child: {REQUESTS} requests answered",
        run=unreachable,
        unit="ms",
        goal="< 50",
        peers="flux 100–900",
    ),
    "notice": Measurement(
        what="dead parent: its children notice",
        run=notice,
        unit="ms",
        goal="< 50",
        peers="flux: when it is back, else 300 s",
    ),
    "cascade": Measurement(what=f"dead rank 0: all {SIZE - 1} others notice", run=cascade, unit="ms", goal=""),
    "wide": Measurement(what=f"job on {SIZE} ranks, submit to clean", run=wide_job, unit="ms", goal="", digits=0),
    "wide-cold": Measurement(
        what=f"the first one: {SIZE} launchers start", run=wide_job_cold, unit="ms", goal="", digits=0
    ),
    "jobs4": Measurement(
        what=f"{JOBS} trivial jobs on 4 ranks, submit to inactive", run=throughput, unit="/s", goal="", digits=0
    ),
}
