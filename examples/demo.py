"""`make demo`: jobs outlive the brokers of a whole tree, as a story on the terminal.

Eight brokers form a tree. One job runs on all of them, eight run on one each, twenty wait. Rank 0 is killed with
SIGKILL: all other brokers panic, the tasks go on without any, and when rank 0 is back the tree comes together again.
Then an interior broker is killed: its subtree panics, the others do not. Everything ends as if nothing had happened.
Each claim is checked; exit status 0 when all hold, 1 when not.

It needs the installed package and nothing else, takes about 20 seconds, and leaves nothing behind: its instance lives
in a directory of its own that is removed at the end, with every process that was started.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from demo_screen import BOLD, FAINT, GREEN, RED, Screen
from demo_tree import PATIENCE, GaveUp, Task, Tree, wait_until

from fluxres.base.errors import FluxresError
from fluxres.overlay.topology import Topology

SIZE: Final = 8
FANOUT: Final = 2
CORES: Final = 2
"""Of each rank; the job that runs everywhere has one of them."""
TASKS: Final = SIZE * CORES
PENDING: Final = 20
ROUTER: Final = 1
"""The interior rank that is killed after rank 0."""
WATCHING: Final = 7
"""The rank, below that one, to which somebody's `fluxres job attach` is connected."""
LINES: Final = 350
"""Numbered lines of each long task, one every 40 ms: fourteen seconds."""
EXIT_CODE: Final = 7
LINES_BEFORE: Final = 15
LINES_WITHOUT_ROOT: Final = 40
LINES_WITHOUT_ROUTER: Final = 15
"""How many lines the slowest task writes before the first broker is killed, and while each is away."""
SHORT: Final = 8
"""Characters of a UUID that are shown."""
WIDTH: Final = 100
"""Characters of a log line that are shown."""

LONG_TASK: Final = f"""
import os, sys, time
with open(sys.argv[1], "a") as marks:
    marks.write(f"{{os.environ['FLUX_JOB_ID']}} {{os.environ['FLUX_TASK_RANK']}} {{os.getpid()}}\\n")
due = time.monotonic()
for number in range(1, {LINES} + 1):
    print("line", number, flush=True)
    due += 0.04
    time.sleep(max(0.0, due - time.monotonic()))
sys.exit({EXIT_CODE})
"""
SHORT_TASK: Final = 'echo "$FLUX_JOB_ID $FLUX_TASK_RANK $$" >> "$0"; echo done'
WHOLE = [f"line {number}" for number in range(1, LINES + 1)]
"""What each long task prints."""

Identities = dict[int, tuple[str, int]]
"""The incarnation and the process of each rank."""


def alive(task: int) -> bool:
    """Whether the process of a pidfd lives. A pidfd never means another process, however pids are reused."""
    return not select.select([task], [], [], 0)[0]


def by_task(output: str) -> dict[str, list[str]]:
    """The lines of `fluxres job attach --label-io`, by the label: the number of the task."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        task, _, text = line.partition(": ")
        found.setdefault(task, []).append(text)
    return found


def clipped(text: str) -> str:
    """The beginning of a line."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


class Story:
    """The chapters, in order; `run` tells them."""

    def __init__(self, screen: Screen, tree: Tree) -> None:
        self._screen = screen
        self._tree = tree
        self._below = set(Topology.kary(SIZE, FANOUT).subtree(ROUTER))
        self._everywhere = ""
        """The job with a task on each rank; `_running` has it too."""
        self._running: list[str] = []
        self._pending: list[str] = []
        self._pids: dict[Task, int] = {}
        self._tasks: dict[Task, int] = {}  # the same as pidfds
        self._lives: list[Identities] = []
        """Who the brokers were at first, after the death of rank 0, and after that of the router."""
        self._watcher: subprocess.Popen[str] | None = None

    def run(self) -> bool:
        """Tell the story; whether every claim of it holds."""
        self._bring_up()
        self._submit()
        self._kill_root()
        self._return_root()
        self._kill_router()
        self._finish()
        return self._verdict()

    # --- chapters

    def _bring_up(self) -> None:
        self._screen.step(f"An instance of {SIZE} brokers, each with {CORES} cores")
        self._tree.start(range(SIZE))
        took = self._tree.wait_whole()
        self._lives.append(self._tree.identities())
        self._screen.tell([f"all online after {took:.2f} s: fluxres overlay status", *self._tree.drawing()])

    def _submit(self) -> None:
        screen, tree = self._screen, self._tree
        screen.step(f"{1 + SIZE + PENDING} jobs")
        (tree.directory / "task.py").write_text(LONG_TASK)
        long: tuple[str | Path, ...] = (sys.executable, tree.directory / "task.py", tree.marks)
        (self._everywhere,) = tree.submit(f"-N{SIZE}", f"-n{SIZE}", *long)
        self._running = [self._everywhere, *tree.submit(f"--cc=0-{SIZE - 1}", *long)]
        self._pending = tree.submit(f"--cc=0-{PENDING - 1}", "sh", "-c", SHORT_TASK, tree.marks)
        wait_until(lambda: len(tree.started()) == TASKS, f"{TASKS} tasks have started")
        self._pids = {task: pids[0] for task, pids in tree.started().items()}
        self._tasks = {task: os.pidfd_open(pid) for task, pid in self._pids.items()}
        self._watcher = subprocess.Popen(
            tree.command("job", "attach", "--label-io", self._everywhere, rank=WATCHING),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it says there that the exit code is not 0
            text=True,
        )
        screen.tell(
            [
                f"one runs on all {SIZE} ranks, {SIZE} run on one rank each; each task prints a numbered line",
                f"every 40 ms, {LINES} in all, and ends with exit code {EXIT_CODE}",
                "task pids: " + " ".join(map(str, sorted(self._pids.values()))),
                f"{PENDING} are pending: there is no core left for them",
                f"and somebody on rank {WATCHING} watches the first: fluxres job attach {self._everywhere}",
            ]
        )
        first = dict.fromkeys(self._tasks, LINES_BEFORE)
        wait_until(lambda: self._all_at_least(first), f"each task has said {LINES_BEFORE} lines")

    def _kill_root(self) -> None:
        screen, tree = self._screen, self._tree
        screen.step(f"kill -9 {tree.pid(0)}: rank 0 is gone", RED)
        tree.kill(0)
        others = range(1, SIZE)
        wait_until(lambda: all(map(tree.panics, others)), "all other brokers have panicked")
        screen.tell(["the panic goes down the tree; each broker ends its incarnation, and says why:"])
        for rank in others:
            uuid, _ = self._lives[0][rank]
            screen.tell([clipped(f"{rank} {uuid[:SHORT]}  {tree.panics(rank)[-1]}")])
        screen.tell(["there is no instance now: fluxres overlay status"])
        screen.tell(tree.drawing(), FAINT)
        self._tell_tasks(LINES_WITHOUT_ROOT)

    def _tell_tasks(self, lines: int) -> None:
        """Wait until each task has written `lines` more, with nobody to take them, and say so."""
        before = self._tree.written(self._running)

        def more() -> dict[Task, int]:
            now = self._tree.written(self._running)
            return {task: now[task] - before[task] for task in self._tasks}

        def gone_on() -> bool:
            written = more()
            return all(written[task] >= lines or not alive(fd) for task, fd in self._tasks.items())

        wait_until(gone_on, "the tasks have gone on for a while")
        living = sum(map(alive, self._tasks.values()))
        self._screen.tell(
            [
                f"{living} of {TASKS} tasks go on; lines that each wrote to its journal since:",
                " ".join(f"+{number}" for _, number in sorted(more().items())),
            ]
        )

    def _return_root(self) -> None:
        screen, tree = self._screen, self._tree
        screen.step("Rank 0 is started again")
        written = tree.written(self._running)
        begun = time.monotonic()
        tree.start([0])
        took = tree.wait_whole()
        wait_until(lambda: self._all_at_least(written), "the output of the time without brokers is stored")
        caught_up = time.monotonic() - begun
        self._lives.append(tree.identities())
        screen.tell([f"all {SIZE} brokers online after {took:.2f} s, as new incarnations in their old processes:"])
        for rank in range(SIZE):
            (old, old_pid), (new, pid) = self._lives[0][rank], self._lives[1][rank]
            process = f"pid {pid}" if pid == old_pid else f"pid {old_pid} -> {pid}"
            screen.tell([f"{rank} {old[:SHORT]} -> {new[:SHORT]}  {process}"])
        screen.tell(tree.drawing())
        screen.tell([f"every shell found again, and all that it had to say is stored: after {caught_up:.2f} s"])
        self._tell_states()

    def _tell_states(self) -> None:
        states = [state for state, _ in self._tree.states().values()]
        self._screen.tell(f"{states.count(state):>2} jobs in {state}" for state in sorted(set(states), reverse=True))

    def _kill_router(self) -> None:
        screen, tree = self._screen, self._tree
        below = sorted(self._below - {ROUTER})
        screen.step(f"kill -9 {tree.pid(ROUTER)}: rank {ROUTER}, with {below} below it, is gone", RED)
        panicked = {rank: len(tree.panics(rank)) for rank in below}
        tree.kill(ROUTER)
        wait_until(
            lambda: all(len(tree.panics(rank)) > panicked[rank] for rank in below), "the brokers below have panicked"
        )
        screen.tell(["those below panic, the others do not: fluxres overlay status", *tree.drawing()])
        before = tree.stored(self._running)
        wait_until(lambda: self._gone_on(before, LINES_WITHOUT_ROUTER), "the tasks elsewhere have gone on for a while")
        tree.start([ROUTER])
        took = tree.wait_whole()
        self._lives.append(tree.identities())
        screen.tell([f"rank {ROUTER} is started again; all online after {took:.2f} s"])
        screen.tell([f"new incarnations: {sorted(self._renewed(1))}; undisturbed: {sorted(self._kept(1))}"])

    def _finish(self) -> None:
        self._screen.step("To the end of all jobs")
        self._tree.fluxres("job", "wait", *self._running, *self._pending)
        self._tell_states()

    def _verdict(self) -> bool:
        tree = self._tree
        watched, watcher_code = self._watched()
        attached = {job: tree.fluxres("job", "attach", "--label-io", job) for job in self._running}
        recorded, listed, marks = tree.exited(self._running), tree.states(), tree.started()
        everything = [*self._running, *self._pending]
        starts = sum(map(len, marks.values()))
        tasks = {**self._pids, **{(job, 0): 0 for job in self._pending}}
        expected = {job: {str(task): WHOLE for of, task in self._pids if of == job} for job in self._running}
        same_processes = all(self._lives[0][rank][1] == self._lives[1][rank][1] for rank in range(1, SIZE))
        claims = [
            (
                self._renewed(0) == set(range(SIZE)) and same_processes,
                f"rank 0 died: {SIZE - 1} brokers began a new incarnation, none a new process",
            ),
            (self._renewed(1) == self._below, f"rank {ROUTER} died: exactly its subtree began a new incarnation"),
            (
                recorded == {task: (pid, EXIT_CODE) for task, pid in self._pids.items()},
                f"the {TASKS} processes of before are those that ended, each with exit code {EXIT_CODE}",
            ),
            (
                all(by_task(done.stdout) == expected[job] for job, done in attached.items()),
                f"{TASKS} x {LINES} lines are stored, once and in order",
            ),
            (
                {done.returncode for done in attached.values()} == {EXIT_CODE}
                and all(listed.get(job) == ("INACTIVE", str(EXIT_CODE)) for job in self._running),
                f"{len(self._running)} running jobs ended with {EXIT_CODE}",
            ),
            (
                (by_task(watched), watcher_code) == (expected[self._everywhere], EXIT_CODE),
                f"who watched on rank {WATCHING} saw every line once, and the exit code",
            ),
            (
                all(listed.get(job) == ("INACTIVE", "0") for job in self._pending),
                f"{PENDING} pending jobs ran, and ended with 0",
            ),
            (
                marks.keys() == tasks.keys() and starts == len(tasks) and listed.keys() == set(everything),
                f"{starts} starts of {len(tasks)} tasks in {len(everything)} jobs: none was lost, none ran twice",
            ),
        ]
        self._screen.step("Verdict")
        found = [self._screen.check(holds, text) for holds, text in claims]  # all are shown
        return all(found)

    # --- what the chapters ask

    def _all_at_least(self, lines: Mapping[Task, int]) -> bool:
        """Whether so many lines of each task are stored."""
        stored = self._tree.stored(self._running)
        return all(stored[task] >= lines.get(task, 0) for task in self._tasks)

    def _gone_on(self, before: Mapping[Task, int], lines: int) -> bool:
        """Whether as many tasks as there are outside of the lost subtree have said `lines` more, or all."""
        now = self._tree.stored(self._running)
        some = sum(now[task] >= min(before[task] + lines, LINES) for task in self._tasks)
        return some >= (SIZE - len(self._below)) * CORES

    def _renewed(self, life: int) -> set[int]:
        """The ranks that began a new incarnation between `life` and the next."""
        return {rank for rank in range(SIZE) if self._lives[life][rank][0] != self._lives[life + 1][rank][0]}

    def _kept(self, life: int) -> set[int]:
        return set(range(SIZE)) - self._renewed(life)

    def _watched(self) -> tuple[str, int]:
        """What the one who watched has seen, and the exit status of its command."""
        if self._watcher is None:
            return "", -1
        output, _ = self._watcher.communicate(timeout=PATIENCE)
        return output, self._watcher.returncode

    def close(self) -> None:
        """Let go of what the story holds."""
        if self._watcher is not None and self._watcher.poll() is None:
            self._watcher.kill()
            self._watcher.wait()
        for task in self._tasks.values():
            os.close(task)


def tell(screen: Screen, tree: Tree) -> bool:
    """Tell the story, and end everything; whether every claim of it holds."""
    story = Story(screen, tree)
    try:
        return story.run()
    except (GaveUp, FluxresError, subprocess.TimeoutExpired) as error:
        screen.say(screen.paint(f"1;{RED}", f"\ncannot go on: {error}"))
        screen.say("The end of the brokers' logs:")
        screen.tell(tree.last_words())
    except KeyboardInterrupt:
        screen.say("\ninterrupted")
    finally:
        story.close()
        tree.close()
    return False


def main() -> int:
    """Run the demo; its exit status."""
    screen = Screen()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda _signum, _frame: sys.exit(1))
    directory = Path(tempfile.mkdtemp(prefix="fluxres-demo-"))
    screen.say(screen.paint(BOLD, "fluxres: jobs outlive the brokers of a whole tree"))
    try:
        holds = tell(screen, Tree(directory, size=SIZE, fanout=FANOUT, cores=CORES))
    finally:
        shutil.rmtree(directory)
    took = time.monotonic() - begun
    if holds:
        screen.say(
            "\n" + screen.paint(f"1;{GREEN}", f"Every broker died or panicked, and no job noticed. ({took:.0f} s)")
        )
    else:
        screen.say("\n" + screen.paint(f"1;{RED}", f"The demo failed. ({took:.0f} s)"))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
