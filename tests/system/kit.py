"""What the system tests share: a real broker as a process, jobs on it, and what must be true of them in the end.

`Instance` starts `fluxres-broker` on directories of its own, kills it, starts it again, and asks it things. Every
process that comes of it, and every task submitted with `job`, carries a mark in its environment, by which the clean-up
finds it through a pidfd, so that nothing else is ever hit. `check_invariants` is DESIGN §12 for jobs: I1 to I4.

Tasks are small Python programs (`job`): each begins by appending a line to the instance's marker file, which tells a
test that it ran, its pid, and whether it ran twice.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import JobId, dothex, f58
from fluxres.base.json import JsonObject, JsonValue
from fluxres.client import Client
from fluxres.job.build import Facts, build_jobspec
from fluxres.job.state import fold
from fluxres.job.value import JobState
from fluxres.wire.payload import WireMap
from fluxres_shell import claim

T = TypeVar("T")

PATIENCE: Final = 60.0
"""Seconds that a test waits for what has to come; reached only when something is wrong."""
POLL: Final = 0.02
BROKER_PLACES: Final = (
    "submit-commit",
    "submit-answer",
    "alloc",
    "start-request",
    "launch",
    "start-durable",
    "ack",
    "exit-commit",
    "finish",
    "release",
    "clean",
)
"""The failpoints that brokers pass; the others are of launchers and shells."""
MARK: Final = "FLUXRES_SYSTEM_TEST"
"""The variable in the environment of all that belongs to one instance."""
PYTHON: Final = (sys.executable, "-S", "-E", "-c")
"""Starts a Python program fast."""
CODE_SHIFT: Final = 8
"""An exit code in a wait status."""

_PRELUDE: Final = """
import os, sys, time
def mark(*words):
    line = " ".join(map(str, (os.environ["FLUX_JOB_ID"], os.environ["FLUX_TASK_RANK"], os.getpid(), *words)))
    fd = os.open(os.environ["MARKERS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, (line + "\\n").encode())
    os.close(fd)
mark("start")
"""


def eventually(check: Callable[[], T | None], *, timeout: float = PATIENCE, what: str = "it") -> T:
    """Poll until `check` returns something true, and return that; fails after `timeout` seconds.

    A broker that is away, or has no such thing yet, is no answer.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            found = check()
        except (RpcError, FluxresError) as error:
            last = error
        else:
            if found:
                return found
            last = found
        assert time.monotonic() < deadline, f"{what} never came about: {last!r}"
        time.sleep(POLL)


def wait_status(code: int) -> int:
    """The wait status of a task that exits with `code`."""
    return code << CODE_SHIFT


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """One line of the marker file: a task said `word`, `start` first of all."""

    jobid: str
    task: int
    pid: int
    word: str
    rest: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What is to become of a job. `status` is the wait status of `finish`, None where any will do.

    `exception` is the type of the fatal exception, None for none. `output` is standard output, by task where there are
    several, None where it is not compared. `tasks` is how many task starts there must be; None: at most one a task.
    """

    status: int | None = 0
    exception: str | None = None
    output: bytes | Mapping[int, bytes] | None = None
    tasks: int | None = 1


class Instance:
    """A broker of an instance of size 1, on `path`/state and `path`/run. Use the fixtures of conftest.py."""

    def __init__(
        self,
        path: Path,
        *,
        cores: int = 4,
        settings: Mapping[str, Mapping[str, str | int | bool]] | None = None,
        env: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.mark = uuid.uuid4().hex
        self.markers = path / "markers"
        self.logfile = path / "broker.log"
        self.base = state or path / "state"
        self.statedir = self.base / "0"
        self.rundir = path / "run"
        self.uri = f"local://{self.rundir}/local-0"
        self.tolerated: list[str] = []
        """Regular expressions of panics and tracebacks that the test expects in the log."""
        self._env = dict(env or {})
        self._config = path / "config.toml"
        tables: dict[str, dict[str, str | int | bool]] = {
            "broker": {"statedir": str(self.base), "rundir": str(self.rundir)},
            "resource": {"cores": cores},
            "exec": {"tmpdir": str(path / "tmp"), "kill-timeout": "1s"},
        }
        for name, table in (settings or {}).items():
            tables.setdefault(name, {}).update(table)
        self._config.write_text(_toml(tables), encoding="utf-8")
        self.broker: subprocess.Popen[bytes] | None = None
        self._others: list[subprocess.Popen[bytes]] = []

    # --- the broker

    @property
    def pid(self) -> int:
        """The broker's pid."""
        assert self.broker is not None, "no broker is running"
        return self.broker.pid

    @property
    def log(self) -> str:
        """What brokers, launchers and shells wrote so far."""
        return self.logfile.read_text(encoding="utf-8", errors="replace") if self.logfile.exists() else ""

    @property
    def environ(self) -> dict[str, str]:
        """The environment of everything that is started here."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("FLUX", "XDG_"))}
        return {**own, MARK: self.mark, "FLUXRES_URI": self.uri}

    def start(self, *, env: Mapping[str, str] | None = None, wait: bool = True) -> None:
        """Start a broker, and wait until it says that it is ready."""
        assert self.broker is None, "a broker is running already"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.logfile.open("ab") as log:
            notify.bind("")  # an abstract address that the kernel chooses
            address = cast("bytes", notify.getsockname())
            extra = {"NOTIFY_SOCKET": "@" + address[1:].decode()} if wait else {}
            self.broker = subprocess.Popen(
                self.command(),
                env={**self.environ, **self._env, **(env or {}), **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
            if wait:
                self._wait_ready(notify)

    def command(self) -> list[str]:
        """The command that starts a broker on this instance's directories."""
        return [sys.executable, "-m", "fluxres.broker.main", "--config", str(self._config)]

    def _wait_ready(self, notify: socket.socket) -> None:
        assert self.broker is not None
        pidfd = os.pidfd_open(self.broker.pid)
        try:
            ready, _, _ = select.select([notify.fileno(), pidfd], [], [], PATIENCE)
        finally:
            os.close(pidfd)
        assert notify.fileno() in ready, f"the broker did not come up:\n{self.log}"
        assert notify.recv(4096).startswith(b"READY=1")

    def kill(self) -> None:
        """SIGKILL the broker, and reap it."""
        assert self.broker is not None, "no broker is running"
        self.broker.kill()
        self.died()

    def died(self) -> int:
        """Wait for the broker's own end (a failpoint, a clean stop); its return code, -9 for SIGKILL."""
        assert self.broker is not None, "no broker is running"
        status = self.broker.wait(PATIENCE)
        self.broker = None
        return status

    def stop(self) -> int:
        """Shut down cleanly with SIGTERM; the exit status."""
        assert self.broker is not None, "no broker is running"
        self.broker.terminate()
        return self.died()

    def restart(self, *, env: Mapping[str, str] | None = None) -> None:
        """Kill the broker and start another."""
        self.kill()
        self.start(env=env)

    # --- asking it

    def client(self) -> Client:
        """A new connection to the broker; a context manager."""
        return Client.connect(self.uri)

    def rpc(self, topic: str, payload: WireMap | None = None) -> WireMap:
        """One call over a connection of its own. Raises RpcError, FluxresError."""
        with self.client() as client:
            return client.call(topic, payload, timeout=PATIENCE)

    def fluxres(
        self, *args: str, data: bytes | None = None, timeout: float = PATIENCE, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a `fluxres` command to its end, `data` as its standard input."""
        done = subprocess.run(
            [sys.executable, "-m", "fluxres.cli.main", *args],
            env=self.environ,
            input=data or b"",
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{args}: {done.returncode}: {done.stderr.decode()}"
        return done

    def popen(self, *args: str, stdout: int | None = None, stdin: int | None = None) -> subprocess.Popen[bytes]:
        """Start a `fluxres` command; it is killed at the end of the test."""
        process = subprocess.Popen(
            [sys.executable, "-m", "fluxres.cli.main", *args],
            env=self.environ,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
        )
        self._others.append(process)
        return process

    # --- jobs

    def job(self, body: str = "", *words: str, **facts: object) -> JsonObject:
        """The jobspec of a Python program that marks its start and then runs `body`, `words` in sys.argv[1:]."""
        return self.jobspec(*PYTHON, _PRELUDE + body, *words, **facts)

    def jobspec(self, *command: str, **facts: object) -> JsonObject:
        """The jobspec of a command; `facts` as in `fluxres.job.build.Facts`."""
        environment = {"PATH": os.environ["PATH"], "MARKERS": str(self.markers), MARK: self.mark}
        values: dict[str, object] = {"environment": environment, "cwd": str(self.path), **facts}
        return build_jobspec(Facts(command=command, **values))  # type: ignore[arg-type]

    def submit(self, jobspec: JsonObject, *, key: str | None = None, urgency: int = 16) -> JobId:
        """Submit a job; its jobid, which is durable."""
        return JobId(cast("int", self.rpc("job-ingest.submit", submission(jobspec, key=key, urgency=urgency))["id"]))

    def submit_many(self, jobspecs: Sequence[JsonObject]) -> list[JobId]:
        """Submit jobs over one connection, all at once; their jobids in order."""
        with self.client() as client:
            tags = [client.open("job-ingest.submit", submission(j), streaming=False) for j in jobspecs]
            replies = [client.receive_for(tag, PATIENCE) for tag in tags]
        assert all(reply is not None and reply.error is None for reply in replies), replies
        return [JobId(cast("int", reply.payload["id"])) for reply in replies if reply is not None]

    def insist(self, jobspec: JsonObject, *, key: str) -> JobId:
        """Submit a job as often as it takes to get an answer."""
        return eventually(lambda: self.submit(jobspec, key=key), what="an answer")

    def cancel(self, jobid: JobId, note: str = "") -> None:
        """Cancel a job; returns when the exception is durable."""
        self.rpc("job-manager.raise", {"id": int(jobid), "type": "cancel", "severity": 0, "note": note})

    def lookup(self, jobid: JobId, key: str = "eventlog") -> str:
        """A record of a job, as text. Raises RpcError ENOENT."""
        return cast("str", self.rpc("job-info.lookup", {"id": int(jobid), "keys": [key], "flags": 0})[key])

    def eventlog(self, jobid: JobId, key: str = "eventlog") -> list[Event]:
        """An eventlog of a job: `eventlog`, `guest.exec.eventlog`, `guest.output`."""
        return decode(self.lookup(jobid, key))

    def events(self, jobid: JobId, key: str = "eventlog") -> list[str]:
        """The names of the events of an eventlog."""
        return [event.name for event in self.eventlog(jobid, key)]

    def output(self, jobid: JobId, stream: str = "stdout", task: int = 0) -> bytes:
        """What a task wrote to a stream, as far as it is stored."""
        return b"".join(_data(event, stream, task) for event in self.eventlog(jobid, "guest.output"))

    def exception(self, jobid: JobId) -> Mapping[str, JsonValue] | None:
        """The context of the job's first fatal exception."""
        for event in self.eventlog(jobid):
            if event.name == "exception" and event.context["severity"] == 0:
                return event.context
        return None

    def status(self, jobid: JobId) -> int | None:
        """The wait status that `finish` has."""
        for event in self.eventlog(jobid):
            if event.name == "finish":
                return cast("int", event.context["status"])
        return None

    def jobs(self) -> dict[JobId, WireMap]:
        """All jobs that the instance lists."""
        listed: dict[JobId, WireMap] = {}
        with self.client() as client:
            for response in client.stream("job-list.list", {"max_entries": 0, "attrs": ["all"]}):
                for job in cast("list[WireMap]", response["jobs"]):
                    jobid = JobId(cast("int", job["id"]))
                    assert jobid not in listed, f"{f58(jobid)} is listed twice"
                    listed[jobid] = job
        return listed

    def wait_event(self, jobid: JobId, name: str, key: str = "eventlog") -> None:
        """Wait for an event of a job."""
        eventually(lambda: name in self.events(jobid, key), what=f"{name} of {f58(jobid)}")

    def wait_output(self, jobid: JobId, output: bytes) -> None:
        """Wait until `output` is all that is stored of the job's standard output."""
        eventually(lambda: self.output(jobid) == output, what=f"the output of {f58(jobid)}")

    def wait_inactive(self, *jobids: JobId) -> None:
        """Wait until the jobs, or all where none are named, are INACTIVE."""

        def ended() -> bool:
            states = {jobid: job["state"] for jobid, job in self.jobs().items()}
            return all(states[jobid] == JobState.INACTIVE for jobid in jobids or states)

        eventually(ended, what="the end of the jobs")

    # --- shells and tasks

    def jobdir(self, jobid: JobId) -> Path:
        """The directory of the job's shell."""
        return self.statedir / "jobs" / dothex(jobid) / "0"

    def directories(self, jobid: JobId) -> list[Path]:
        """The directories that there are of the job's shells."""
        return [self.jobdir(jobid)] if self.jobdir(jobid).exists() else []

    def claim(self, jobid: JobId) -> claim.ClaimRecord | None:
        """The claim in the job's directory; None where there is none."""
        try:
            dirfd = os.open(self.jobdir(jobid), os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            return claim.read(dirfd)
        finally:
            os.close(dirfd)

    def shell_pid(self, jobid: JobId) -> int:
        """The pid of the job's shell, waiting for its claim."""
        return eventually(lambda: self.claim(jobid), what=f"the claim of {f58(jobid)}").pid

    def marked(self, jobid: JobId | None = None, word: str = "start") -> list[Marker]:
        """The markers that tasks have left, of one job or all."""
        text = self.markers.read_text(encoding="utf-8") if self.markers.exists() else ""
        found = []
        for line in text.splitlines():
            job, task, pid, said, *rest = line.split()
            if said == word and jobid in (None, _parse(job)):
                found.append(Marker(jobid=job, task=int(task), pid=int(pid), word=said, rest=tuple(rest)))
        return found

    def wait_marked(self, jobid: JobId, word: str = "start") -> Marker:
        """Wait until the job's task has left a marker."""
        return eventually(lambda: self.marked(jobid, word), what=f"{word} of {f58(jobid)}")[0]

    def processes(self, **variables: str) -> list[int]:
        """The living processes of this instance that also have `variables` in their environment."""
        wanted = {f"{name}={value}".encode() for name, value in {MARK: self.mark, **variables}.items()}
        return [pid for pid in _all_pids() if wanted <= _environment_of(pid) and not process_gone(pid)]

    # --- the end

    def clean_up(self) -> None:
        """Kill whatever is left of the instance. Nothing else has its mark."""
        if self.broker is not None:
            self.kill()
        for process in self._others:
            process.kill()
            process.communicate()
        eventually(self._all_killed, what="the end of the instance's processes")

    def _all_killed(self) -> bool:
        left = self.processes()
        for pid in left:
            _kill_marked(pid, f"{MARK}={self.mark}".encode())
        return not left

    def check_log(self) -> None:
        """Fail where the log has a panic or a traceback that the test did not expect."""
        bad = [line for line in self.log.splitlines() if re.search(r"panic:|Traceback|cannot go on", line)]
        unexpected = [line for line in bad if not any(re.search(known, line) for known in self.tolerated)]
        assert not unexpected, f"unexpected in the log: {unexpected}\n{self.log[-20_000:]}"


# --- invariants


def check_invariants(instance: Instance, jobs: Mapping[JobId, Expect], *, exact: bool = True) -> None:
    """Wait for the end of `jobs`, and check I1 to I4 for each; `exact`: the instance has no others."""
    instance.wait_inactive(*jobs)
    listed = instance.jobs()
    assert set(jobs) <= set(listed), "I1: a job whose submission was answered is gone"
    assert not exact or set(jobs) == set(listed), "there are jobs that nobody submitted"
    for jobid, expect in jobs.items():
        check_job(instance, jobid, expect)
    eventually(lambda: not any(instance.directories(jobid) for jobid in jobs), what="the end of the directories")
    for jobid in jobs:
        assert not instance.processes(FLUX_JOB_ID=f58(jobid, ascii=True)), f"{f58(jobid)} left processes behind"


def check_job(instance: Instance, jobid: JobId, expect: Expect) -> None:
    """Check I1 to I4 for one job that has ended."""
    events = instance.eventlog(jobid)
    names = Counter(event.name for event in events)
    story = f"{f58(jobid)}: {[(event.name, event.context) for event in events]}"
    assert fold(jobid, events).state is JobState.INACTIVE, story  # and that every event was legal
    once = ("submit", "alloc", "start", "finish", "free", "clean")
    assert all(names[name] <= 1 for name in once), story
    fatal = instance.exception(jobid)
    assert (fatal or {}).get("type") == expect.exception, story
    if expect.status is not None and names["start"]:
        assert instance.status(jobid) == expect.status, story
    if names["start"]:
        inside = Counter(instance.events(jobid, "guest.exec.eventlog"))
        assert inside["complete"] == inside["done"] == 1, f"{story}, {inside}"
        assert all(inside[name] <= 1 for name in ("shell.init", "shell.start")), f"{story}, {inside}"
    if expect.exception is None:
        assert names["finish"] == 1, f"I1: neither a finish nor an exception: {story}"
    starts = Counter(marker.task for marker in instance.marked(jobid))
    assert all(count == 1 for count in starts.values()), f"I2: a task ran twice: {starts}, {story}"
    assert expect.tasks in (None, len(starts)), f"{len(starts)} tasks ran: {story}"
    outputs = {0: expect.output} if isinstance(expect.output, bytes) else expect.output or {}
    for task, output in outputs.items():
        assert instance.output(jobid, task=task) == output, f"I3: task {task} of {story}"


# --- processes


def process_gone(pid: int) -> bool:
    """Whether a process is dead; a zombie is."""
    return process_state(pid) in "ZX"


def process_state(pid: int) -> str:
    """The letter of proc_pid_stat(5), X where there is no such process."""
    return _stat(pid)[0]


def birth(pid: int) -> tuple[int, int]:
    """A pid and its start time: the same process, if both are the same."""
    fields = _stat(pid)
    return pid, int(fields[19]) if len(fields) > 1 else -1


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X"]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process stopped."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: process_state(pid) == "T", what=f"the stop of {pid}")
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _environment_of(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _kill_marked(pid: int, mark: bytes) -> None:
    """SIGKILL `pid` where it is (still) a process with this mark."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if mark in _environment_of(pid):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


# --- small things


def submission(jobspec: JsonObject, *, key: str | None = None, urgency: int = 16) -> WireMap:
    """The payload of `job-ingest.submit`."""
    return {"jobspec": cast("WireMap", jobspec), "key": key or uuid.uuid4().hex, "urgency": urgency, "flags": 0}


def _data(event: Event, stream: str, task: int) -> bytes:
    context = event.context
    if event.name != "data" or context["stream"] != stream or context["rank"] != str(task):
        return b""
    data = cast("str", context.get("data", ""))
    return base64.b64decode(data) if context.get("encoding") == "base64" else data.encode()


def _parse(text: str) -> JobId:
    from fluxres.base.jobid import parse_jobid

    return parse_jobid(text)


def _toml(tables: Mapping[str, Mapping[str, JsonValue]]) -> str:
    """TOML of tables of plain values, whose JSON is the same."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
