"""The processes of `fluxres start`: its brokers and its COMMAND, in one poll loop.

All of them are children, so SIGCHLD and waitpid(2) tell of every end. A broker says `READY=1` by
sd_notify(3), on a datagram socket in the abstract namespace; the kernel vouches for the sender's pid. Brokers
have sessions of their own and never see the terminal's Ctrl-C. This process is a child subreaper, so that brokers
are its children also where a forker has forked them (`fluxres.broker.forker`), and that job shells whose launcher
died are reaped here; it never signals those.

Which pid a forked broker has, it reports on a pipe before it does anything else. So whatever happens to a pid that
we do not know, the pipe is read first: then it is a broker's, or none of ours.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.last_words import last_words
from fluxres.cli.supervisor import FORKER, SHUTDOWN_TIMEOUT, Do, Phase, Reports, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fluxres.cli.instancedir import InstanceDir
    from fluxres.cli.supervisor import Effect, Supervisor

ENDING: Final = ((0.0, signal.SIGTERM), (1.0, signal.SIGHUP), (5.0, signal.SIGKILL))
"""How a COMMAND is ended whose instance ends: after seconds, by a signal (shells ignore SIGTERM)."""
LOG_MAX: Final = 16 * 1024 * 1024
"""Bytes of a broker's log, above which its next start moves it to `.old`."""
MESSAGE_MAX: Final = 4096
"""Bytes of an sd_notify message."""
REPORT_MAX: Final = 65536
"""Bytes that are read of the forker's pipe at once."""
PROBE_TIMEOUT: Final = 1.0
"""Seconds that connecting to a broker that is not our child may take."""
NOT_FOUND, NOT_EXECUTABLE = 127, 126
_CREDENTIALS: Final = struct.Struct("3i")
_PR_SET_CHILD_SUBREAPER: Final = 36
_CAUGHT: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_RESET: Final = (*_CAUGHT, signal.SIGPIPE)


class Supervision:
    """Runs what a Supervisor decides, until the instance and the COMMAND have ended."""

    def __init__(
        self,
        supervisor: Supervisor,
        where: InstanceDir,
        broker: Sequence[str],
        *,
        command: list[str] | None,
        verbose: bool,
        announce: Callable[[], None],
    ) -> None:
        """Supervise brokers, `broker` being their program and first arguments.

        `command` is started once all ranks are online (None: there is none, and the instance runs until it is
        shut down); `announce` is called then. With `verbose` brokers write to our stderr instead of their
        logs.
        """
        self._supervisor = supervisor
        self._where = where
        self._broker = list(broker)
        self._command = command
        self._verbose = verbose
        self._announce = announce
        self._reporting: int | None = None
        self._reports = Reports()
        self._poller = select.poll()
        self._pids: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        self._log_start: dict[int, int] = {}
        self._command_pid: int | None = None
        self._ending_since: float | None = None
        self._ending_step = 0
        self._interrupted = 0
        self._status: int | None = None
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Run the instance; returns the exit status. Raises FluxresError if it cannot start."""
        try:
            return self._run()
        except BaseException:
            for pid in self._ranks:
                os.kill(pid, signal.SIGTERM)
            raise

    def _run(self) -> int:
        self._notify.setblocking(False)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind("")  # the kernel picks a name in the abstract namespace
        for signum in _CAUGHT:
            signal.signal(signum, lambda _signum, _frame: None)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        self._do(self._supervisor.begin())
        become_subreaper()  # not before: it takes a while, in which a broker can be starting
        self._poller.register(self._notify, select.POLLIN)
        self._poller.register(self._wakeup[0], select.POLLIN)
        while self._supervisor.phase is not Phase.DONE or self._command_pid is not None:
            self._poller.poll(self._poll_timeout())
            self._take_signals()
            self._take_reports()
            self._take_notifications()
            self._reap()
            self._do(self._supervisor.tick(time.monotonic()))
            self._end_command()
        return self._exit_status()

    # --- what has happened

    def _poll_timeout(self) -> float | None:
        due = [self._supervisor.due()]
        if self._ending_since is not None and self._command_pid is not None and self._ending_step < len(ENDING):
            due.append(self._ending_since + ENDING[self._ending_step][0])
        first = min((at for at in due if at is not None), default=None)
        return None if first is None else max(0.0, first - time.monotonic()) * 1000 + 1

    def _take_signals(self) -> None:
        try:
            caught = set(os.read(self._wakeup[0], 4096))
        except BlockingIOError:
            return
        ends = caught & {signal.SIGTERM, signal.SIGHUP}
        if signal.SIGINT in caught and self._command_pid is None and self._status is None:
            ends.add(signal.SIGINT)  # while a COMMAND runs, Ctrl-C is meant for it
        if not ends:
            return
        self._interrupted = min(ends)
        if self._command_pid is None:
            self._do(self._supervisor.stop(time.monotonic()))
        elif self._ending_since is None:
            self._ending_since = time.monotonic()  # and when it has ended, the instance is shut down

    def _take_reports(self) -> None:
        """Read which brokers have been forked; at the end of the pipe, no further ones will be."""
        while self._reporting is not None:
            try:
                data = os.read(self._reporting, REPORT_MAX)
            except BlockingIOError:
                return
            for rank, pid in self._reports.feed(data):
                self._pids[rank] = pid
                self._ranks[pid] = rank
                self._do(self._supervisor.forked(rank))
            if not data:
                self._end_reports()

    def _end_reports(self) -> None:
        if self._reporting is not None:
            self._poller.unregister(self._reporting)
            os.close(self._reporting)
            self._reporting = None
            self._do(self._supervisor.forker_ended())

    def _rank_of(self, pid: int) -> int | None:
        """The rank of our child `pid`; None where it is no broker."""
        if pid not in self._ranks:
            self._take_reports()
        return self._ranks.get(pid)

    def _take_notifications(self) -> None:
        while True:
            try:
                data, ancillary, _flags, _address = self._notify.recvmsg(
                    MESSAGE_MAX, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    pid, _uid, _gid = _CREDENTIALS.unpack_from(value)
                    rank = self._rank_of(pid)
                    if rank is not None and b"READY=1" in data.split(b"\n"):
                        self._do(self._supervisor.ready(rank))

    def _reap(self) -> None:
        """Collect every child that has ended, those that we were given as a subreaper included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._command_pid:
                self._command_ended(code)
            elif (rank := self._rank_of(pid)) is not None:
                del self._ranks[pid], self._pids[rank]
                self._ended(rank, code)

    def _ended(self, rank: int, code: int) -> None:
        """The broker of `rank`, or the forker, has ended."""
        if rank == FORKER:
            if code != 0 and self._supervisor.phase is Phase.BRING_UP:
                self._say(f"{_name(rank)} {describe(code)}: starting the rest singly")
            return  # the end of its pipe is what counts
        effects = self._supervisor.exited(rank, code, time.monotonic())
        if effects and effects[0] == (Do.SPAWN, rank):
            self._say(f"broker {rank} {describe(code)}: starting it again")
        self._do(effects)

    # --- what is to be done

    def _do(self, effects: list[Effect]) -> None:
        for do, rank in effects:
            if do is Do.SPAWN and rank == FORKER:
                self._start_forker()
            elif do is Do.SPAWN:
                self._spawn(rank)
            elif do is Do.TERMINATE and rank in self._pids:
                os.kill(self._pids[rank], signal.SIGTERM)  # not reaped yet, so the pid is still the broker's
            elif do is Do.KILL:
                self._kill(rank)
            elif do is Do.ASK:
                ask_shutdown(f"local://{self._where.socket(rank)}")
            elif do is Do.ANNOUNCE:
                self._announce()
                if self._command is not None:
                    self._start_command(self._command)

    def _kill(self, rank: int) -> None:
        if rank in self._pids:
            self._say(f"{_name(rank)} does not end: killing it")
            os.kill(self._pids[rank], signal.SIGKILL)
        if rank == FORKER:  # a broker that has not reported by now is none: it cannot any more, and ends
            self._take_reports()
            self._end_reports()

    def _spawn(self, rank: int) -> None:
        log = self._open_log(rank)
        try:
            self._launch(rank, log, "--rank", str(rank))
        except OSError as error:
            self._say(f"cannot start {self._broker[0]}: {error.strerror}")
            self._do(self._supervisor.exited(rank, NOT_FOUND, time.monotonic()))

    def _start_forker(self) -> None:
        """Start the process that forks all brokers. Its own words go where those of rank 0 will go."""
        become_subreaper()  # before any of them can lose its parent
        size = self._supervisor.size
        for rank in range(1, size):
            os.close(self._open_log(rank))
        log = self._open_log(0)
        self._reporting, writing = os.pipe()
        os.set_blocking(self._reporting, False)
        os.set_inheritable(writing, True)
        self._poller.register(self._reporting, select.POLLIN)
        arguments = ["--fork-ranks", f"0-{size - 1}", "--report", str(writing)]
        logs = [] if self._verbose else ["--logs", self._where.rundir]
        try:
            # Where it cannot be started, no broker can, and they will say so: this is the end of the pipe.
            with contextlib.suppress(OSError):
                self._launch(FORKER, log, *arguments, *logs)
        finally:
            os.close(writing)

    def _launch(self, rank: int, log: int, *arguments: str) -> None:
        """Start our program, in a session of its own, with `log` as its output; closes that. Raises OSError."""
        name = self._notify.getsockname()
        environment = {**os.environ, "NOTIFY_SOCKET": "@" + os.fsdecode(name[1:])}
        actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        ]
        if not self._verbose:
            actions += [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        try:
            pid = os.posix_spawnp(
                self._broker[0],
                [*self._broker, "--config", self._where.config, *arguments],
                environment,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=_RESET,
            )
        finally:
            os.close(log)
        self._pids[rank] = pid
        self._ranks[pid] = rank

    def _open_log(self, rank: int) -> int:
        """Open a rank's log, having moved it out of the way where it is too long; its end now is where to look."""
        path = self._where.log(rank)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size > LOG_MAX:
                os.replace(path, f"{path}.old")
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._log_start[rank] = os.fstat(log).st_size
        return log

    def _start_command(self, command: list[str]) -> None:
        environment = {**os.environ, "FLUXRES_URI": self._where.uri}
        environment.pop("NOTIFY_SOCKET", None)
        ours = os.path.dirname(self._broker[0])
        path = environment.get("PATH", os.defpath).split(os.pathsep)
        if ours not in path:  # so that COMMAND finds `fluxres`; last, so that it finds nothing else here
            environment["PATH"] = os.pathsep.join([*path, ours])
        try:
            self._command_pid = os.posix_spawnp(command[0], command, environment, setsigmask=(), setsigdef=_RESET)
        except OSError as error:
            self._say(f"cannot run {command[0]}: {error.strerror}")
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            self._command_ended(NOT_FOUND if missing else NOT_EXECUTABLE)

    def _end_command(self) -> None:
        """The instance has ended, or is to end, but COMMAND has not: end it step by step."""
        if self._command_pid is None:
            return
        if self._ending_since is None and self._supervisor.phase in (Phase.STOPPING_REST, Phase.DONE):
            self._ending_since = time.monotonic()
        while self._ending_since is not None and self._ending_step < len(ENDING):
            after, signum = ENDING[self._ending_step]
            if time.monotonic() < self._ending_since + after:
                return
            os.kill(self._command_pid, signum)
            self._ending_step += 1

    def _command_ended(self, code: int) -> None:
        self._command_pid = None
        self._status = code if code >= 0 else 128 - code
        self._do(self._supervisor.stop(time.monotonic()))

    def _exit_status(self) -> int:
        failure = self._supervisor.failure
        if failure is not None:
            raise FluxresError(f"cannot start the instance: {failure}{self._last_words(failure)}")
        if self._status is not None:
            return self._status
        return 128 + self._interrupted if self._interrupted and self._command is not None else 0

    def _last_words(self, failure: str) -> str:
        """What a broker said before it failed, and where the rest is."""
        words = failure.split()
        if words[0] != "broker" or self._verbose:
            return ""
        rank = int(words[1])
        if rank not in self._log_start:
            return ""
        last = last_words(self._where.log(rank), self._log_start[rank], self._where.config)
        return last if self._where.temporary else f"{last} (see {self._where.log(rank)})"

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # there may be nobody left to tell
            os.write(2, f"fluxres-start: {text}\n".encode())


def _name(rank: int) -> str:
    return "the process that forks the brokers" if rank == FORKER else f"broker {rank}"


def ask_shutdown(uri: str) -> None:
    """Shut down the broker at `uri`, which is no child of ours, and wait for its end."""
    from fluxres.client import Client, wait_ended

    pidfd = -1
    with contextlib.suppress(FluxresError), Client.connect(uri, PROBE_TIMEOUT, restart_gap=0) as client:
        pidfd = client.broker_pidfd()
        client.call("broker.shutdown", {}, timeout=SHUTDOWN_TIMEOUT)
        client.receive(SHUTDOWN_TIMEOUT)  # raises Disconnected as soon as it has gone
    if pidfd >= 0:
        wait_ended(pidfd, SHUTDOWN_TIMEOUT)
        os.close(pidfd)


def become_subreaper() -> None:
    """Adopt the orphans among our descendants. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
