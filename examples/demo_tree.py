"""The instance of `make demo`: a broker for each rank, ours to kill, and what can be learned of them from outside.

Everything is in one directory. Files are read where no broker may answer: the shells' journals, and the brokers' logs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, cast

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, decode
from fluxres.base.idset import IdSet
from fluxres.base.jobid import dothex, parse_jobid
from fluxres.client import Client
from fluxres_shell import pidfd, records
from fluxres_shell.find import find
from fluxres_shell.segments import SegmentReader

PATIENCE: Final = 60.0
"""Seconds that any step may take before the demo gives up."""
POLL: Final = 0.02
ENDING: Final = 10.0
"""Seconds in which a broker ends that was asked to, and a process that was killed."""
LAST_WORDS: Final = 20
"""Lines of the brokers' logs that are shown when the demo gives up."""
PANIC: Final = re.compile(r"panic: .*")
CONFIG: Final = """
[bootstrap]
size = {size}
fanout = {fanout}
[broker]
statedir = "{dir}/state"
rundir = "{dir}/run"
temporary = true
[resource]
cores = {cores}
[exec]
tmpdir = "{dir}"
cgroup = "off"
"""

Task = tuple[str, int]
"""A jobid, and the number of one of the job's tasks."""


class GaveUp(Exception):
    """The demo cannot go on; the text says why."""


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Poll until `holds`. Raises GaveUp."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise GaveUp(f"waited {PATIENCE:g} s in vain until {what}")
        time.sleep(POLL)


class Tree:
    """`size` brokers in a tree of `fanout`, each with `cores`. The instance lives in `directory`."""

    def __init__(self, directory: Path, *, size: int, fanout: int, cores: int) -> None:
        self.directory = directory
        self.size = size
        self.marks = directory / "marks"
        self._brokers: dict[int, subprocess.Popen[bytes]] = {}
        (directory / "fluxres.toml").write_text(CONFIG.format(dir=directory, size=size, fanout=fanout, cores=cores))

    # --- brokers

    def start(self, ranks: Iterable[int]) -> None:
        """Start the brokers of these ranks."""
        for rank in ranks:
            with open(self._log(rank), "ab") as log:
                self._brokers[rank] = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "fluxres.broker.main"),
                        *("--config", self.directory / "fluxres.toml", "--rank", str(rank)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the demo, which then cleans up
                )

    def kill(self, rank: int) -> None:
        """SIGKILL a broker: no handler runs, nothing is flushed, nobody is told."""
        self._brokers[rank].kill()
        self._brokers[rank].wait()

    def pid(self, rank: int) -> int:
        """The broker of a rank, a process of ours."""
        return self._brokers[rank].pid

    def uri(self, rank: int = 0) -> str:
        """Where the broker of a rank takes commands."""
        return f"local://{self.directory}/run/local-{rank}"

    def wait_whole(self) -> float:
        """Wait until every rank is online and every subtree full; the seconds that took."""
        begun = time.monotonic()
        wait_until(self._is_whole, "all brokers are online")
        return time.monotonic() - begun

    def _is_whole(self) -> bool:
        for rank, broker in self._brokers.items():
            if broker.poll() is not None:
                raise GaveUp(f"the broker of rank {rank} has ended")
        try:
            with Client.connect(self.uri()) as client:
                online = client.call("resource.status")["online"]
                return online == str(IdSet(range(self.size))) and client.call("overlay.health")["status"] == "full"
        except FluxresError:
            return False

    def identities(self) -> dict[int, tuple[str, int]]:
        """Each rank's incarnation and process, as its broker says when it is asked through the tree."""

        def attribute(rank: int, name: str) -> str:
            return str(client.call("attr.get", {"name": name}, nodeid=rank)["value"])

        with Client.connect(self.uri()) as client:
            ranks = range(self.size)
            return {rank: (attribute(rank, "uuid"), int(attribute(rank, "broker.pid"))) for rank in ranks}

    def panics(self, rank: int) -> list[str]:
        """What the broker of a rank has logged of each panic of its own."""
        log = self._log(rank)
        return PANIC.findall(log.read_text(errors="replace")) if log.exists() else []

    def last_words(self) -> list[str]:
        """The end of all logs, for when something goes wrong."""
        logs = [self._log(rank) for rank in range(self.size)]
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        return sorted(lines)[-LAST_WORDS:]

    def _log(self, rank: int) -> Path:
        return self.directory / f"broker-{rank}.log"

    # --- commands

    def command(self, *arguments: str | Path, rank: int = 0) -> list[str | Path]:
        """The words that run `fluxres ARGUMENTS` with this Python, at the broker of `rank`."""
        return [sys.executable, "-P", "-m", "fluxres.cli.main", "--uri", self.uri(rank), *arguments]

    def fluxres(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of fluxres, as a user would."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=PATIENCE, check=False)

    def submit(self, *arguments: str | Path) -> list[str]:
        """`fluxres submit ARGUMENTS`; the jobids."""
        done = self.fluxres("submit", *arguments)
        if done.returncode != 0:
            raise GaveUp(f"cannot submit: {done.stderr}")
        return done.stdout.split()

    def drawing(self) -> list[str]:
        """What `fluxres overlay status` shows, be it why it cannot."""
        done = self.fluxres("overlay", "status")
        return (done.stdout + done.stderr).splitlines()

    # --- jobs

    def states(self) -> dict[str, tuple[str, str]]:
        """Each job's state and return code ("" while it has none), as `fluxres jobs` tells them."""
        listing = self.fluxres("jobs", "-a", "-n", "-o", "{id},{state},{returncode}").stdout
        return {job: (state, code) for job, state, code in (line.split(",") for line in listing.splitlines())}

    def started(self) -> dict[Task, list[int]]:
        """Who has ever run: the pids that left their mark, for each task."""
        found: dict[Task, list[int]] = {}
        for line in self.marks.read_text().splitlines() if self.marks.exists() else []:
            job, task, pid = line.split()
            found.setdefault((f"ƒ{job[1:]}", int(task)), []).append(int(pid))
        return found

    def stored(self, jobs: Iterable[str]) -> Counter[Task]:
        """How many lines of each task rank 0 has made durable."""
        found: Counter[Task] = Counter()
        with Client.connect(self.uri()) as client:
            for job in jobs:
                for event in self._eventlog(client, job, "guest.output"):
                    if event.name == "data":
                        lines = str(event.context.get("data", "")).count("\n")
                        found[job, int(str(event.context["rank"]))] += lines
        return found

    def exited(self, jobs: Iterable[str]) -> dict[Task, tuple[object, object]]:
        """The pid and the exit code that are recorded of each task."""
        found: dict[Task, tuple[object, object]] = {}
        with Client.connect(self.uri()) as client:
            for job in jobs:
                for event in self._eventlog(client, job, "guest.exec.eventlog"):
                    if event.name == "shell.task-exit":
                        context = event.context
                        found[job, cast("int", context["rank"])] = context["pid"], context.get("exitcode")
        return found

    def _eventlog(self, client: Client, job: str, key: str) -> list[Event]:
        answer = client.call("job-info.lookup", {"id": parse_jobid(job), "keys": [key]})
        return decode(str(answer[key]).encode())

    def written(self, jobs: Iterable[str]) -> Counter[Task]:
        """How many lines of each task are in its shell's journal: read from the files, no broker needed.

        Journals lose what rank 0 has acknowledged, so this is to be compared with itself while rank 0 is away.
        """
        found: Counter[Task] = Counter()
        for job in jobs:
            for path in self.directory.glob(f"state/*/jobs/{dothex(parse_jobid(job))}/*"):
                directory = os.open(path, os.O_RDONLY)
                reader = SegmentReader(directory, 1)
                for stored in reader:
                    record = records.decode(stored.payload)
                    if isinstance(record, records.DataRecord):
                        found[job, record.task] += record.data.count(b"\n")
                reader.close()
                os.close(directory)
        return found

    # --- the end

    def close(self) -> None:
        """End everything that was started: jobs and brokers, then whatever shells there still are."""
        running = {rank: broker for rank, broker in self._brokers.items() if broker.poll() is None}
        if 0 in running:
            self._end(running.pop(0))  # it cancels all jobs: the instance is temporary
        for broker in running.values():
            broker.terminate()
        for broker in running.values():
            self._end(broker)
        for path in self.directory.glob("state/*/jobs/*/*"):
            directory = os.open(path, os.O_RDONLY)
            with find(directory) as found:
                if found.pidfd is not None:  # a shell lives: its tasks die with it
                    pidfd.send_signal(found.pidfd, signal.SIGKILL)
                    pidfd.wait_dead(found.pidfd, ENDING)
            os.close(directory)

    def _end(self, broker: subprocess.Popen[bytes]) -> None:
        broker.terminate()
        try:
            broker.wait(ENDING)
        except subprocess.TimeoutExpired:
            broker.kill()
            broker.wait()
