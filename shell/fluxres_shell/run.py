"""One shell from its directory to its exit: claim, journal, socket, tasks, loop (DESIGN §9).

    read spec ─▶ claim ─▶ bind ─▶ `ready` closed ─▶ shell.init ─▶ set up ─▶ tasks ─▶ shell.start ─▶ … ─▶ exit record

The shells of a job on several ranks meet between set-up and tasks, in the barrier `start`: no task of a job starts
while the set-up of another rank may still fail (`state` has the rest).

Failure cases:

- No directory, no spec, a spec that makes no sense: nothing is claimed, one line on stderr, exit status 1.
- The claim is somebody else's, or void, or the directory is being removed: exit 0. Nothing has been run.
- From the claim on, whatever fails becomes an exit record with an `exception` for rank 0 to raise, so that
  nobody waits for this shell in vain; even an error of the shell itself (tasks that run then die with it).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, cast

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import f58
from fluxres.wire.payload import Wire, WireMap
from fluxres_shell import cgroup, claim, leftover, records, tasks
from fluxres_shell.events import BarrierEntered, Started, StartFailed
from fluxres_shell.find import SPEC
from fluxres_shell.journal import JournalWriter
from fluxres_shell.loop import CAUGHT, ShellLoop
from fluxres_shell.protocol import START_BARRIER
from fluxres_shell.records import STREAMS
from fluxres_shell.spec import ShellSpec, make_durable, read_spec
from fluxres_shell.state import Phase, ShellState

NAME: Final = "fluxres-shell"
_MAX_NOTE: Final = 4096


def run_shell(dirfd: int, ready: Callable[[], None]) -> int:
    """Be the shell of the directory `dirfd`; the process's exit status.

    `ready` is called once the shell listens, or will not.
    """
    _leave_parent()
    try:
        try:
            spec, text = read_spec(dirfd)
            make_durable(dirfd)
            held = claim.take(dirfd, spec.nonce, hashlib.sha256(text).hexdigest())
        except claim.ClaimLost:
            return 0
        except (FluxresError, OSError) as error:
            print(f"{NAME}: cannot start: {error}", file=sys.stderr)
            return 1
        with held:
            if not _discarded(dirfd):
                _Shell(dirfd, spec).run(ready)
    finally:
        ready()
    return 0


def _discarded(dirfd: int) -> bool:
    """Whether the directory is being removed: its spec goes before its claim, so that a shell which comes so late that
    the claim is to be had again knows better."""
    try:
        os.stat(SPEC, dir_fd=dirfd)
    except FileNotFoundError:
        return True
    return False


def _leave_parent() -> None:
    """Depend on nothing of whoever started this: own session, no working directory, a name of its own.

    From the claim on a broker may send SIGUSR1 (bind the socket again): signals wait until the loop takes them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    with contextlib.suppress(PermissionError):  # a session leader already
        os.setsid()
    os.chdir("/")
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(NAME)  # for ps(1) only


class _Shell:
    """What a shell needs between its claim and its end."""

    def __init__(self, dirfd: int, spec: ShellSpec) -> None:
        self._dirfd = dirfd
        self._spec = spec
        self._tmpdir = ""
        self._user: tasks.User | None = None
        self._streams = {(task.rank, stream) for task in spec.tasks for stream in _piped(spec)}
        self._journal = JournalWriter(dirfd, segment_size=spec.segment_size, limit=spec.journal_limit)
        state = ShellState(
            f"the shell of {f58(spec.id)} on rank {spec.rank}",
            tasks=len(spec.tasks),
            streams=self._streams,
            time_limit=spec.time_limit,
        )
        self._loop = ShellLoop(dirfd, state=state, journal=self._journal, nonce=spec.nonce)
        self._loop.start_tasks = self._start_tasks
        self._loop.before_exit = self._clean_up

    def run(self, ready: Callable[[], None]) -> None:
        """Run to the end."""
        loop = self._loop
        loop.listen()
        ready()
        _drop_stdio()
        try:
            self._start()
            loop.run()
        except Exception as error:  # the last resort: a bug must not leave rank 0 waiting
            self._record_failure(error)
        finally:
            self._journal.close()

    def _start(self) -> None:
        """Set up, then start the tasks, where there are other shells not before they have come as far.

        What went wrong is the loop's to deal with.
        """
        try:
            self._set_up()
        except (tasks.StartError, OSError) as error:
            self._start_failed(error)
        else:
            if self._spec.nnodes > 1:
                self._loop.apply(BarrierEntered(name=START_BARRIER, seq=0))
            else:
                self._start_tasks()

    def _set_up(self) -> None:
        """Whatever can fail before there is a task. Raises StartError, OSError."""
        spec, loop = self._spec, self._loop
        loop.begin("shell.init", self._init_context())
        self._journal.reserve()
        leftover.become_subreaper()
        self._user = tasks.find_user(spec.userid)
        self._tmpdir = tasks.make_tmpdir(spec.tmpdir_base, _tmpdir_name(spec), self._user)
        loop.take_tasks(tasks.open_streams(spec, self._tmpdir, self._user, self._submitted()))
        self._make_cgroup()
        self._bind()
        if spec.nnodes > 1:
            self._journal.sync()  # others start because this shell has been here: its first record is to say so

    def _start_tasks(self) -> None:
        """Start every task, and read their output."""
        loop = self._loop
        try:
            for task in loop.tasks:
                task.start(self._spec, self._tmpdir, self._user, loop.cgroup.fd if loop.cgroup else None)
        except (tasks.StartError, OSError) as error:
            self._start_failed(error)
        else:
            loop.apply(Started(taskmap=self._taskmap()))
        loop.watch_tasks()

    def _bind(self) -> None:
        """Bind this shell, and so its tasks, to the job's CPUs, if the system has them (flux-shell(1) cpu-affinity)."""
        cpus = os.sched_getaffinity(0).intersection(self._spec.cpus)
        if len(cpus) == len(self._spec.cpus) > 0:
            os.sched_setaffinity(0, cpus)

    def _start_failed(self, error: tasks.StartError | OSError) -> None:
        loop = self._loop
        if isinstance(error, tasks.StartError):
            note, status = str(error), error.status
        else:
            note, status = f"cannot set up the job: {error}", tasks.STATUS_FAILED
        loop.drop_tasks()
        streams = frozenset((task.spec.rank, stream) for task in loop.tasks for stream in task.outputs)
        loop.apply(StartFailed(status=status, note=note, running=len(loop.tasks), streams=streams))

    def _init_context(self) -> WireMap:
        """The context of flux-shell's own `shell.init`."""
        service = f"{self._spec.userid}-shell-{f58(self._spec.id, ascii=True)}"
        return {"service": service, "leader-rank": self._spec.ranks[0], "size": self._spec.nnodes}

    def _submitted(self) -> float:
        """When the job was submitted, or as near to that as this node knows."""
        return self._spec.t_submit or os.stat(SPEC, dir_fd=self._dirfd).st_mtime

    def _make_cgroup(self) -> None:
        parent = self._spec.cgroup_parent
        if parent is not None:
            cgroup.join_shells(parent)
            self._loop.cgroup = cgroup.JobCgroup.create(
                parent, f"job-{f58(self._spec.id, ascii=True)}-{self._spec.rank}"
            )

    def _taskmap(self) -> Wire:
        """RFC 34: as the broker gave it, else tasks in blocks over the nodes."""
        if self._spec.taskmap is not None:
            given = cast("Wire", self._spec.taskmap)
            return {"version": 1, "map": given} if isinstance(given, list) else given
        each, more = divmod(self._spec.ntasks_total, self._spec.nnodes)
        blocks: list[Wire] = [[0, more, each + 1, 1]] if more else []
        if each:
            blocks.append([more, self._spec.nnodes - more, each, 1])
        return {"version": 1, "map": blocks}

    def _clean_up(self) -> None:
        """Before the exit record: nothing of the job is left on this node when it is read."""
        if self._loop.cgroup is not None:
            self._loop.cgroup.remove()
        if self._tmpdir:
            tasks.remove_tmpdir(self._tmpdir)

    def _record_failure(self, error: Exception) -> None:
        """Leave an exit record of an error of the shell itself; its tasks die with it."""
        import traceback  # large, and never needed if all is well

        journal, state = self._journal, self._loop.state
        tasks.signal_all(self._loop.tasks, signal.SIGKILL)
        if state.phase not in (Phase.ENDING, Phase.CLOSING, Phase.DONE):
            text = "".join(traceback.format_exception(error))[-_MAX_NOTE:]
            note = f"the job shell failed: {error}"[:_MAX_NOTE]
            info: WireMap = {
                "exception": {"type": "exec", "severity": 0, "note": note},
                "traceback": text,
            }
            fields = (records.EXIT, tasks.STATUS_FAILED, info)
            journal.add(records.encode(journal.last + 1, time.time(), *fields))
        if journal.flush() or journal.flush_into_reserve():
            with contextlib.suppress(OSError):  # it is written, if not for longer than the node lives
                journal.sync()


def _tmpdir_name(spec: ShellSpec) -> str:
    """As flux-shell's, and with the instance: several on a node may draw the same jobid, and share /tmp."""
    instance = "".join(letter for letter in spec.instance if letter.isalnum())[:8]
    return f"jobtmp-{spec.rank}-{f58(spec.id, ascii=True)}-{instance}"


def _piped(spec: ShellSpec) -> list[str]:
    """The output streams of a task that the shell reads, and does not leave to a file."""
    paths = (spec.stdio.stdout_path, spec.stdio.stderr_path)
    return [stream for stream, path in zip(STREAMS, paths, strict=True) if path is None]


def _drop_stdio() -> None:
    """Hold nobody's terminal or pipe open for as long as a job runs."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:  # the standard descriptors
        os.close(null)
