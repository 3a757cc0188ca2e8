"""`make demo`: a job outlives its broker, as a story on the terminal.

Eight jobs run, twenty wait. The broker is killed with SIGKILL, the tasks go on without it, a new broker finds them
again, and everything ends as if nothing had happened. Each claim is checked; exit status 0 when all hold, 1 when not.

It needs the installed package and nothing else, takes about 15 seconds, and leaves nothing behind: its instance lives
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
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import dothex, parse_jobid
from fluxres.client import Client
from fluxres_shell import pidfd, records
from fluxres_shell.find import find
from fluxres_shell.segments import SegmentReader

CORES: Final = 8
PENDING: Final = 20
LINES: Final = 450
"""Numbered lines of each long job, one every 20 ms: nine seconds."""
EXIT_CODE: Final = 7
LINES_BEFORE_KILL: Final = 60
LINES_WITHOUT_BROKER: Final = 100
"""How many lines the slowest task writes while there is no broker: two seconds."""
PATIENCE: Final = 60.0
"""Seconds that any step may take before the demo gives up."""
POLL: Final = 0.02
LAST_WORDS: Final = 20
"""Lines of the broker's log that are shown when the demo gives up."""

TASK: Final = f"""
import os, sys, time
with open(sys.argv[1], "a") as marks:
    marks.write(f"{{os.environ['FLUX_JOB_ID']}} {{os.getpid()}}\\n")
due = time.monotonic()
for number in range(1, {LINES} + 1):
    print("line", number, flush=True)
    due += 0.02
    time.sleep(max(0.0, due - time.monotonic()))
sys.exit({EXIT_CODE})
"""
SHORT_TASK: Final = 'echo "$FLUX_JOB_ID $$" >> "$0"; echo done'
CONFIG: Final = """
[bootstrap]
size = 1
[broker]
statedir = "{dir}/state"
rundir = "{dir}/run"
[resource]
cores = {cores}
[exec]
tmpdir = "{dir}"
"""


class GaveUp(Exception):
    """The demo cannot go on; the text says why."""


class Screen:
    """What the user sees: plain text, with colours on a terminal."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    def paint(self, code: str, text: str) -> str:
        """`text` in a colour (an SGR code), where there are any."""
        return f"\033[{code}m{text}\033[0m" if self._colours else text

    def step(self, text: str) -> None:
        """Begin the next chapter."""
        self._step += 1
        self.say("\n" + self.paint("1", f"{self._step}. {text}"))

    def say(self, text: str = "") -> None:
        """One line, at once."""
        print(text, flush=True)

    def check(self, holds: bool, text: str) -> bool:
        """One line of the verdict; returns `holds`."""
        mark = self.paint("32", "  ok    ") if holds else self.paint("1;31", "  FAILED")
        self.say(f"{mark}  {text}")
        return holds


class Instance:
    """A broker of size 1 on a statedir in `directory`; the broker is ours to kill."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.marks = directory / "marks"
        self.uri = f"local://{directory}/run/local-0"
        self._broker: subprocess.Popen[bytes] | None = None
        (directory / "fluxres.toml").write_text(CONFIG.format(dir=directory, cores=CORES))
        (directory / "task.py").write_text(TASK)

    def start(self) -> float:
        """Start a broker; returns the seconds until it took requests."""
        begun = time.monotonic()
        with open(self.directory / "broker.log", "ab") as log:
            self._broker = subprocess.Popen(
                [sys.executable, "-P", "-m", "fluxres.broker.main", "--config", self.directory / "fluxres.toml"],
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then cleans up
            )
        wait_until(self._is_online, "the broker is online")
        return time.monotonic() - begun

    def _is_online(self) -> bool:
        if self._broker is not None and self._broker.poll() is not None:
            raise GaveUp("the broker has ended")
        try:
            Client.connect(self.uri).close()
        except FluxresError:
            return False
        return True

    @property
    def pid(self) -> int:
        """The broker's pid."""
        return 0 if self._broker is None else self._broker.pid

    def kill(self) -> None:
        """SIGKILL the broker: no handler runs, nothing is flushed, nobody is told."""
        if self._broker is not None:
            self._broker.kill()
            self._broker.wait()

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """The words that run `fluxres ARGUMENTS` with this Python."""
        return [sys.executable, "-P", "-m", "fluxres.cli.main", "--uri", self.uri, *arguments]

    def fluxres(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of fluxres, as a user would."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=PATIENCE, check=False)

    def submit(self, count: int, *command: str | Path) -> list[str]:
        """Submit `count` jobs with one command; their jobids."""
        done = self.fluxres("submit", f"--cc=0-{count - 1}", *command)
        if done.returncode != 0:
            raise GaveUp(f"cannot submit: {done.stderr}")
        return done.stdout.split()

    def states(self) -> dict[str, tuple[str, str]]:
        """Each job's state and return code ("" while it has none), as `fluxres jobs` tells them."""
        listing = self.fluxres("jobs", "-a", "-n", "-o", "{id},{state},{returncode}").stdout
        return {job: (state, code) for job, state, code in (line.split(",") for line in listing.splitlines())}

    def task_pids(self) -> dict[str, list[int]]:
        """Who has ever run: the pids that left their mark, for each job."""
        found: dict[str, list[int]] = {}
        for line in self.marks.read_text().splitlines() if self.marks.exists() else []:
            job, pid = line.split()
            found.setdefault(f"ƒ{job[1:]}", []).append(int(pid))
        return found

    def lines_stored(self, client: Client, job: str) -> int:
        """How many lines of a job's output rank 0 has made durable."""
        return sum(str(event.context.get("data", "")).count("\n") for event in self._log(client, job, "guest.output"))

    def exited_pid(self, client: Client, job: str) -> object:
        """The pid of the task whose exit status was recorded."""
        events = self._log(client, job, "guest.exec.eventlog")
        return next((event.context["pid"] for event in events if event.name == "shell.task-exit"), None)

    def _log(self, client: Client, job: str, key: str) -> list[Event]:
        answer = client.call("job-info.lookup", {"id": parse_jobid(job), "keys": [key]})
        return decode(str(answer[key]).encode())

    def lines_in_journal(self, job: str) -> int:
        """How many lines its shell has written to its journal: read from the file, no broker needed."""
        directory = os.open(self._shell_directory(job), os.O_RDONLY)
        reader = SegmentReader(directory, 1)
        try:
            found = [records.decode(stored.payload) for stored in reader]
        finally:
            reader.close()
            os.close(directory)
        return sum(record.data.count(b"\n") for record in found if isinstance(record, records.DataRecord))

    def _shell_directory(self, job: str) -> Path:
        return self.directory / "state" / "0" / "jobs" / dothex(parse_jobid(job)) / "0"

    def last_words(self) -> str:
        """The end of the broker's log, for when something goes wrong."""
        log = self.directory / "broker.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(f"   {line}" for line in lines[-LAST_WORDS:])

    def close(self) -> None:
        """End everything that was started: the broker, then whatever shells there still are."""
        if self._broker is not None and self._broker.poll() is None:
            self._broker.terminate()
            try:
                self._broker.wait(PATIENCE / 6)
            except subprocess.TimeoutExpired:
                self.kill()
        for path in self.directory.glob("state/0/jobs/*/0"):
            directory = os.open(path, os.O_RDONLY)
            with find(directory) as found:
                if found.pidfd is not None:  # a shell lives: its tasks die with it
                    pidfd.send_signal(found.pidfd, signal.SIGKILL)
                    pidfd.wait_dead(found.pidfd, PATIENCE / 6)
            os.close(directory)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Poll until `holds`. Raises GaveUp."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise GaveUp(f"waited {PATIENCE:g} s in vain until {what}")
        time.sleep(POLL)


def alive(task: int) -> bool:
    """Whether the process of a pidfd lives. A pidfd never means another process, however pids are reused."""
    return not select.select([task], [], [], 0)[0]


class Story:
    """The chapters, in order; `run` tells them."""

    def __init__(self, screen: Screen, instance: Instance) -> None:
        self._screen = screen
        self._instance = instance
        self._running: list[str] = []
        self._pending: list[str] = []
        self._pids: dict[str, int] = {}
        self._tasks: dict[str, int] = {}  # the same as pidfds
        self._watcher: subprocess.Popen[bytes] | None = None

    def run(self) -> bool:
        """Tell the story; whether every claim of it holds."""
        self._submit()
        self._kill()
        self._restart()
        return self._verdict()

    def _submit(self) -> None:
        screen, instance = self._screen, self._instance
        screen.step(f"An instance of one broker, with {CORES} cores")
        took = instance.start()
        screen.say(f"   broker pid {instance.pid}, online after {took:.2f} s")
        screen.step(f"{CORES + PENDING} jobs")
        self._running = instance.submit(CORES, sys.executable, instance.directory / "task.py", instance.marks)
        self._pending = instance.submit(PENDING, "sh", "-c", SHORT_TASK, instance.marks)
        wait_until(lambda: len(instance.task_pids()) == CORES, f"{CORES} tasks have started")
        self._pids = {job: pids[0] for job, pids in instance.task_pids().items()}
        self._tasks = {job: os.pidfd_open(pid) for job, pid in self._pids.items()}
        screen.say(f"   {CORES} running: a numbered line every 20 ms, {LINES} in all, then exit code {EXIT_CODE}")
        screen.say("   task pids: " + " ".join(str(self._pids[job]) for job in self._running))
        screen.say(f"   {PENDING} pending: there is no core left for them")
        self._watcher = subprocess.Popen(
            instance.command("job", "attach", self._running[0]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it says there that the exit code is not 0
        )
        screen.say(f"   and somebody watches the first: fluxres job attach {self._running[0]}")
        with Client.connect(instance.uri) as client:
            wait_until(
                lambda: all(instance.lines_stored(client, job) >= LINES_BEFORE_KILL for job in self._running),
                f"each running job has said {LINES_BEFORE_KILL} lines",
            )

    def _kill(self) -> None:
        screen, instance = self._screen, self._instance
        screen.step(screen.paint("31", f"kill -9 {instance.pid}: the broker is gone"))
        instance.kill()
        said = instance.fluxres("ping", "-c", "1").stderr.strip()
        screen.say(f"   {screen.paint('2', said)}")
        before = {job: instance.lines_in_journal(job) for job in self._running}

        def meanwhile(job: str) -> int:
            return instance.lines_in_journal(job) - before[job]

        wait_until(
            lambda: all(meanwhile(job) >= LINES_WITHOUT_BROKER or not alive(self._tasks[job]) for job in self._running),
            "the tasks have gone on for a while",
        )
        living = sum(alive(task) for task in self._tasks.values())
        screen.say(f"   {living} of {CORES} tasks go on; lines that each wrote to its journal since:")
        screen.say("   " + " ".join(f"+{meanwhile(job)}" for job in self._running))

    def _restart(self) -> None:
        screen, instance = self._screen, self._instance
        screen.step("A new broker on the same statedir")
        written = {job: instance.lines_in_journal(job) for job in self._running}
        begun = time.monotonic()
        took = instance.start()
        with Client.connect(instance.uri) as client:
            wait_until(
                lambda: all(instance.lines_stored(client, job) >= written[job] for job in self._running),
                "the output of the time without a broker is stored",
            )
        caught_up = time.monotonic() - begun
        states = instance.states()
        screen.say(f"   broker pid {instance.pid}, online after {took:.2f} s")
        screen.say(f"   every shell found again, and all that it had to say is stored: after {caught_up:.2f} s")
        for state in sorted({state for state, _ in states.values()}, reverse=True):
            screen.say(f"   {sum(state == other for other, _ in states.values()):>2} jobs in {state}")

    def _verdict(self) -> bool:
        screen, instance = self._screen, self._instance
        screen.step("To the end of all jobs")
        everything = [*self._running, *self._pending]
        instance.fluxres("job", "wait", *everything)
        watched, watcher_code = self._watched()
        ended = [instance.fluxres("job", "attach", job) for job in self._running]
        with Client.connect(instance.uri) as client:
            exited = {job: instance.exited_pid(client, job) for job in self._running}
        listed, marks = instance.states(), instance.task_pids()
        states = {job: listed.get(job, ("gone", "")) for job in everything}
        started = sum(len(pids) for pids in marks.values())
        whole = "".join(f"line {number}\n" for number in range(1, LINES + 1))
        codes = {str(done.returncode) for done in ended} | {states[job][1] for job in self._running}
        claims = [
            (exited == self._pids, f"the {CORES} processes of before the kill are those that ended: same pids"),
            (all(done.stdout == whole for done in ended), f"{CORES} x {LINES} lines are stored, once and in order"),
            (codes == {str(EXIT_CODE)}, f"{CORES} exit codes are {EXIT_CODE}"),
            ((watched, watcher_code) == (whole, EXIT_CODE), "who watched saw every line once, and the exit code"),
            (
                all(states[job] == ("INACTIVE", "0") for job in self._pending),
                f"{PENDING} pending jobs ran, and ended with 0",
            ),
            (
                marks.keys() == set(everything) and started == len(everything),
                f"{started} starts of {len(everything)} jobs: none was lost, none ran twice",
            ),
        ]
        screen.step("Verdict")
        found = [screen.check(holds, text) for holds, text in claims]  # all are shown
        return all(found)

    def _watched(self) -> tuple[str, int]:
        """What the one who watched has seen, and the exit status of its command."""
        if self._watcher is None:
            return "", -1
        output, _ = self._watcher.communicate(timeout=PATIENCE)
        return output.decode(), self._watcher.returncode

    def close(self) -> None:
        """Let go of what the story holds."""
        if self._watcher is not None and self._watcher.poll() is None:
            self._watcher.kill()
            self._watcher.wait()
        for task in self._tasks.values():
            os.close(task)


def main() -> int:
    """Run the demo; its exit status."""
    screen = Screen()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda _signum, _frame: sys.exit(1))
    directory = Path(tempfile.mkdtemp(prefix="fluxres-demo-"))
    screen.say(screen.paint("1", "fluxres: a job outlives its broker"))
    instance = Instance(directory)
    story = Story(screen, instance)
    holds = False
    try:
        holds = story.run()
    except (GaveUp, FluxresError, subprocess.TimeoutExpired) as error:
        screen.say(screen.paint("1;31", f"\ncannot go on: {error}"))
        screen.say(f"The end of the broker's log:\n{instance.last_words()}")
    except KeyboardInterrupt:
        screen.say("\ninterrupted")
    finally:
        story.close()
        instance.close()
        shutil.rmtree(directory)
    took = time.monotonic() - begun
    if holds:
        screen.say("\n" + screen.paint("1;32", f"The broker was killed, and no job noticed. ({took:.0f} s)"))
    else:
        screen.say("\n" + screen.paint("1;31", f"The demo failed. ({took:.0f} s)"))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
