"""The shells of a real node: directories, locks, sockets, pidfds and processes, behind the protocols of `exec.host`.

A shell is found as `fluxres_shell.find` says, and held by its pidfd from then on: after its death that still tells how
it died. Most of this is a few quick calls on a local disk, made in the event loop (`exec.jobdir` says why). A dead
shell's processes are searched for in a thread; and discarded directories are removed by `rm`, because removing trees
call by call in a thread would take the interpreter's lock from the event loop each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Generator
from typing import Final

import trio

from fluxres.base.jobid import JobId, f58
from fluxres.exec import jobdir
from fluxres.exec.host import Identity, Records
from fluxres.exec.launcher import Launcher
from fluxres.exec.link import SocketLink
from fluxres.exec.reattach import Facts
from fluxres_shell import claim, pidfd
from fluxres_shell.find import SPEC, Found, Kind, PeerMismatch, connect, find
from fluxres_shell.leftover import kill_marked
from fluxres_shell.segments import SegmentReader, exit_record, list_segments

log = logging.getLogger("fluxres.exec")

BATCH_BYTES: Final = 512 * 1024
"""Bytes of records that are read from a dead shell's journal at a time."""
CLEANUP_ROUNDS: Final = 100
CLEANUP_PAUSE: Final = 0.02
"""How often, and how many seconds apart, the processes of a dead shell are looked for and killed."""
REAP_ROUNDS: Final = 25
REAP_PAUSE: Final = 0.02
"""How often, and how many seconds apart, the kernel is asked how a dead shell ended."""
MAX_ARGUMENTS: Final = 1000
"""Directories removed by one `rm`; the rest follow in later rounds."""


class LocalShellHost:
    """The shells of rank `rank` in the directory `statedir`; `launcher` starts them, and is its owner's to run."""

    def __init__(self, statedir: str, rank: int, launcher: Launcher) -> None:
        self._statedir = statedir
        self._rank = rank
        self._launcher = launcher

    def inventory(self) -> list[JobId]:
        """As `host.ShellHost` says, and so are the others."""
        return jobdir.inventory(self._statedir, self._rank)

    def identity(self, jobid: JobId) -> Identity | None:
        """Read the spec."""
        return jobdir.spec_identity(self._path(jobid))

    def prepare(self, jobid: JobId, spec: bytes) -> bool:
        """Write the spec, unsynced: the shell syncs it before its claim."""
        return jobdir.prepare(self._statedir, jobid, self._rank, spec)

    def shell(self, jobid: JobId, nonce: str | None = None) -> LocalShellDir:
        """Nothing is opened yet."""
        return LocalShellDir(self._path(jobid), jobid, self._rank, nonce, self._launcher)

    def discard(self, jobid: JobId) -> None:
        """Rename the directory into the trash."""
        jobdir.discard(self._statedir, jobid, self._rank)

    async def empty_trash(self) -> None:
        """Remove it with `rm`."""
        trash = jobdir.trash_path(self._statedir)
        paths = jobdir.discarded(self._statedir)[:MAX_ARGUMENTS]
        if not paths:
            return
        for path in paths:
            with contextlib.suppress(OSError):  # `rm` will say what is wrong
                os.unlink(os.path.join(path, SPEC))  # before the claim: see `fluxres_shell.run`
        command = ["rm", "-rf", "--", *paths]
        try:
            done = await trio.run_process(command, check=False, capture_stderr=True, stdin=subprocess.DEVNULL)
        except OSError as error:  # no process to be had, say: it is tried again with the next directory
            log.warning("cannot empty %s: %s", trash, error)
            return
        if done.returncode:
            log.warning("cannot empty %s: %s", trash, done.stderr.decode(errors="replace").strip())

    def _path(self, jobid: JobId) -> str:
        return jobdir.job_path(self._statedir, jobid, self._rank)


class LocalShellDir:
    """One shell's directory on disk, as `host.ShellDir` says.

    `look` opens it anew, and what follows is about the directory that was opened, wherever it is renamed to. It owns
    that descriptor, and the pidfd in the last `Found` that was alive.
    """

    def __init__(self, path: str, jobid: JobId, rank: int, nonce: str | None, launcher: Launcher) -> None:
        self._path = path
        self._jobid = jobid
        self._rank = rank
        self._nonce = nonce
        self._launcher = launcher
        self._dirfd = -1
        self._alive: Found | None = None

    def close(self) -> None:
        """Give the descriptors back."""
        self._close_directory()
        if self._alive is not None:
            self._alive.close()
            self._alive = None

    def _close_directory(self) -> None:
        dirfd, self._dirfd = self._dirfd, -1
        if dirfd >= 0:
            os.close(dirfd)

    # --- looking

    def look(self) -> Facts:
        """Open the directory, and find the shell."""
        self._close_directory()
        try:
            self._dirfd = jobdir.open_directory(self._path)
        except FileNotFoundError:
            return Facts(kind=Kind.NOTHING)
        found = find(self._dirfd)
        kind, nonce = found.kind, None if found.claim is None else found.claim.nonce
        if kind is Kind.ALIVE:
            self._keep(found)
        elif kind is Kind.UNCLAIMED:
            nonce = self._nonce_of_spec()
            kind = Kind.NOTHING if nonce is None else kind
        if self._nonce is None:
            self._nonce = self._nonce_of_spec() if nonce is None else nonce
        return Facts(
            kind=kind,
            nonce_matches=nonce in (None, self._nonce),
            locked=found.locked,
            rebooted=found.rebooted,
            reason=found.reason,
        )

    def _nonce_of_spec(self) -> str | None:
        identity = jobdir.spec_identity(self._path)
        return None if identity is None else identity.nonce

    def _keep(self, found: Found) -> None:
        """Hold on to the living shell's pidfd; an earlier one is better than none."""
        if self._alive is not None:
            if found.pidfd is None:
                return
            self._alive.close()
        self._alive = found

    @property
    def _pidfd(self) -> int | None:
        return None if self._alive is None else self._alive.pidfd

    def dial(self) -> SocketLink | None:
        """Connect to the socket in the directory, and see that it is the shell's."""
        if self._alive is None or self._dirfd < 0:
            return None
        try:
            sock = connect(self._dirfd, self._alive)
        except (PeerMismatch, OSError) as error:
            log.warning("job %s: %s", f58(self._jobid), error)
            return None
        return None if sock is None else SocketLink(sock)

    def ask_to_bind(self) -> None:
        """SIGUSR1, through the pidfd."""
        self._signal(signal.SIGUSR1)

    def has_exit_record(self) -> bool:
        """Read the end of the journal."""
        return self._dirfd >= 0 and exit_record(self._dirfd) is not None

    def journal(self, from_seq: int) -> Generator[Records, None, None]:
        """Read the segments, `BATCH_BYTES` at a time."""
        resume = from_seq if self._dirfd >= 0 else None
        while resume is not None:
            reader = SegmentReader(self._dirfd, resume)
            try:
                while batch := reader.read(BATCH_BYTES):
                    yield Records(batch[0].seq, [stored.payload for stored in batch])
                later = [first for first in list_segments(self._dirfd) if first > reader.next_seq]
                resume = min(later, default=None)
                if resume is not None:
                    log.error("job %s: the journal is damaged: %s", f58(self._jobid), reader.stop)
            finally:
                reader.close()

    # --- acting

    def void(self, reason: str) -> bool:
        """Link a void claim."""
        os.makedirs(self._path, mode=jobdir.PRIVATE, exist_ok=True)
        with jobdir.opened(self._path) as dirfd:
            # Without a spec nobody knows the nonce, and nothing can start.
            return claim.void(dirfd, self._nonce or "", reason)

    async def launch(self) -> None:
        """Ask the launcher."""
        await self._launcher.launch(self._path, self._jobid, self._rank)

    async def death(self) -> None:
        """Wait for the pidfd."""
        if self._pidfd is None:
            await trio.sleep_forever()
        else:
            await trio.lowlevel.wait_readable(self._pidfd)

    async def how_it_died(self) -> str:
        """What the kernel tells once somebody has reaped it: soon, or never."""
        if self._pidfd is None:
            return ""
        for _ in range(REAP_ROUNDS):
            info = pidfd.exit_info(self._pidfd)
            if info is not None and info.status is not None:
                return _how(info.status)
            await trio.sleep(REAP_PAUSE)
        return ""

    def kill(self) -> None:
        """SIGKILL, through the pidfd; the kernel then kills its tasks (PDEATHSIG)."""
        self._signal(signal.SIGKILL)

    def _signal(self, signum: signal.Signals) -> None:
        if self._pidfd is not None:
            pidfd.send_signal(self._pidfd, signum)

    async def kill_tasks(self) -> int:
        """Kill its cgroup, and all that has its marks in the environment, until there is nothing left."""
        name = f58(self._jobid, ascii=True)
        left: list[int] = []
        for _ in range(CLEANUP_ROUNDS):
            dying = jobdir.kill_cgroup(self._path, f"job-{name}-{self._rank}")
            if self._nonce is not None:
                left = await trio.to_thread.run_sync(kill_marked, name, self._nonce)
            if not left and not dying:
                return 0
            await trio.sleep(CLEANUP_PAUSE)
        return max(1, len(left))


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"by signal {os.WTERMSIG(status)}"
    return f"it exited with code {os.waitstatus_to_exitcode(status)}"
