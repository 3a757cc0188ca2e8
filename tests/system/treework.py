"""Jobs on a tree that go on whatever becomes of its brokers, and what must be true of them in the end.

Each task prints numbered lines, one after another, until it is told to end; tasks of jobs with `puts` also put
something into the job's guest namespace, with the `fluxres` command: once at their beginning, once when they end.
`Work` knows which processes they are, and `finish` compares all that they did with what the instance has of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, cast

from kit import Expect, birth, check_invariants, eventually, process_gone, wait_status
from treekit import Tree

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.job.value import JobState

CODE: Final = 7
"""The exit code of all tasks."""
_COUNTER: Final = """
import subprocess
number, puts = 0, sys.argv[1] == "puts"
def say():
    global number
    number += 1
    print(number, flush=True)
    if number % 5 == 0:
        mark("lines", number)
    time.sleep(0.05)
def put(when):
    word = f"{when}.{os.environ['FLUX_TASK_RANK']}={os.getpid()}"
    while subprocess.run([sys.executable, "-m", "fluxres.cli.main", "kvs", "put", word]).returncode:
        time.sleep(0.1)
    mark("put", when)
if puts:
    put("before")
while not os.path.exists("end"):
    say()
for _ in range(5):
    say()
if puts:
    put("after")
mark("end", number)
sys.exit(7)
"""

Task = tuple[JobId, int]
"""A job and the number of a task of it."""


class Work:
    """Jobs of one tree. Those of `queue` are short; whether they have to wait is the test's affair."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._tasks: dict[JobId, int] = {}
        self._putting: set[JobId] = set()
        self._queued: dict[JobId, Expect] = {}
        self._births: dict[Task, tuple[int, int]] = {}

    # --- jobs

    def begin(self, *ranks: int, tasks: int = 1, cores: int = 1, puts: bool = False) -> JobId:
        """Submit a job over all of `ranks`, with `tasks` on each, that runs until `finish`."""
        count = tasks * len(ranks)
        spec = self._tree.job(
            _COUNTER,
            "puts" if puts else "",
            nodes=len(ranks),
            ntasks=count,
            cores_per_task=cores,
            constraint={"ranks": [str(IdSet(ranks))]},
        )
        jobid = self._tree.submit(spec)
        self._tasks[jobid] = count
        if puts:
            self._putting.add(jobid)
        return jobid

    def queue(self, *ranks: int, nodes: int = 1, cores: int = 1) -> JobId:
        """Submit a job on `nodes` of `ranks`, or of all, that says that it ran and ends."""
        where = {"ranks": [str(IdSet(ranks))]} if ranks else None
        spec = self._tree.job(
            "print('ran'); sys.exit(3)", nodes=nodes, ntasks=nodes, cores_per_task=cores, constraint=where
        )
        jobid = self._tree.submit(spec)
        outputs = dict.fromkeys(range(nodes), b"ran\n")
        self._queued[jobid] = Expect(status=wait_status(3), output=outputs, tasks=nodes)
        return jobid

    def states(self) -> dict[JobId, JobState]:
        """The state of each job, as rank 0 has it."""
        return {jobid: JobState(cast("int", job["state"])) for jobid, job in self._tree.jobs().items()}

    # --- tasks

    def wait_running(self) -> None:
        """Wait until every task of the running jobs has printed some lines; from then on they are known."""
        self._wait_lines(dict.fromkeys(self._all_tasks(), 0))
        for marker in self._tree.marked():
            jobid = self._find(marker.jobid)
            if jobid in self._tasks:
                self._births[jobid, marker.task] = birth(marker.pid)

    def wait_progress(self) -> None:
        """Wait until every task of the running jobs has printed more than until now."""
        self._wait_lines(self._lines())

    def check_same(self) -> None:
        """Fail unless every task is the process that it was, and lives."""
        for (jobid, task), (pid, start) in self._births.items():
            what = f"task {task} of {f58(jobid)}, pid {pid},"
            assert birth(pid) == (pid, start), f"{what} is another process"
            assert not process_gone(pid), f"{what} is dead"

    def finish(self, *, extra: Mapping[JobId, Expect] | None = None) -> None:
        """Let the tasks end, wait for all jobs, and check the invariants and what tasks wrote and put.

        `extra` are the jobs that others submitted.
        """
        self.check_same()
        (self._tree.path / "end").touch()
        self._tree.wait_inactive(*self._tasks, *self._queued)
        ends: dict[JobId, dict[int, int]] = {jobid: {} for jobid in self._tasks}
        for marker in self._tree.marked(word="end"):
            jobid = self._find(marker.jobid)
            ends[jobid][marker.task] = int(marker.rest[0])
            assert self._births[jobid, marker.task][0] == marker.pid, f"task {marker.task} of {f58(jobid)} is another"
        expect = {**self._queued, **(extra or {})}
        for jobid, tasks in self._tasks.items():
            assert len(ends[jobid]) == tasks, f"{len(ends[jobid])} of {tasks} tasks of {f58(jobid)} came to their end"
            outputs = {task: lines(number) for task, number in ends[jobid].items()}
            expect[jobid] = Expect(status=wait_status(CODE), output=outputs, tasks=tasks)
        check_invariants(self._tree, expect)
        self._check_puts()

    # --- inside

    def _all_tasks(self) -> list[Task]:
        return [(jobid, task) for jobid, tasks in self._tasks.items() for task in range(tasks)]

    def _find(self, text: str) -> JobId:
        known = {f58(jobid, ascii=True): jobid for jobid in (*self._tasks, *self._queued)}
        return known[text]

    def _lines(self) -> Counter[Task]:
        """How often each task has marked that it printed more."""
        return Counter((self._find(marker.jobid), marker.task) for marker in self._tree.marked(word="lines"))

    def _wait_lines(self, than: dict[Task, int]) -> None:
        def more() -> bool:
            now = self._lines()
            return all(now[task] > than[task] for task in self._all_tasks())

        eventually(more, what="more lines of every task")

    def _check_puts(self) -> None:
        for jobid in self._putting:
            for task in range(self._tasks[jobid]):
                pid = str(self._births[jobid, task][0])
                for when in ("before", "after"):
                    found = self._tree.lookup(jobid, f"guest.{when}.{task}")
                    assert found == pid, f"{when}.{task} in the guest namespace of {f58(jobid)} is {found}, not {pid}"


def lines(count: int) -> bytes:
    """What a task prints."""
    return b"".join(b"%d\n" % number for number in range(1, count + 1))
