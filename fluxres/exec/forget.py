"""Discards the directories of jobs that have ended, in rounds, so that many short jobs share the work.

A directory goes when its shell has: released shells end by themselves within milliseconds, one that does not is killed
after a grace. The directory is renamed into the trash, and `rm` empties that: a process of its own, because removing
trees call by call in a thread would take the interpreter's lock from the event loop each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from typing import Final

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, f58
from fluxres.exec import jobdir
from fluxres_shell import pidfd
from fluxres_shell.find import SPEC, Kind, find

log = logging.getLogger("fluxres.exec")

MAX_WAITING: Final = 100_000
"""Directories that may wait to be discarded; what does not fit is found again by the next report."""
ROUND: Final = 0.25
"""Seconds between two looks at the shells that have not ended yet."""
GRACE: Final = 10.0
"""Seconds that a shell has to end by itself before it is killed."""
MAX_ARGUMENTS: Final = 1000
"""Directories removed by one `rm`; the rest follow in later rounds."""


class Forgetting:
    """The directories on this rank that are to go."""

    def __init__(self, statedir: str, rank: int) -> None:
        self._statedir = statedir
        self._rank = rank
        self._waiting: dict[JobId, float] = {}
        self._some = trio.Event()

    def add(self, jobid: JobId) -> None:
        """The job's `clean` is durable: its directory may go."""
        if len(self._waiting) >= MAX_WAITING:
            log.warning("leaving the directory of job %s for later: too many wait", f58(jobid))
            return
        self._waiting.setdefault(jobid, trio.current_time() + GRACE)
        self._some.set()

    async def run(self) -> None:
        """Discard until cancelled."""
        await self._empty_trash()
        while True:
            await self._some.wait()
            await trio.sleep(ROUND)
            gone = [jobid for jobid, deadline in self._waiting.items() if self._discarded(jobid, deadline)]
            for jobid in gone:
                del self._waiting[jobid]
            if not self._waiting:
                self._some = trio.Event()
            if gone:
                await self._empty_trash()

    def _discarded(self, jobid: JobId, deadline: float) -> bool:
        """Discard the directory unless its shell lives; whether there is nothing left to wait for."""
        path = jobdir.job_path(self._statedir, jobid, self._rank)
        if not jobdir.exists(path):
            return True
        try:
            with jobdir.opened(path) as dirfd, find(dirfd) as found:
                if found.kind is Kind.ALIVE:
                    if trio.current_time() > deadline and found.pidfd is not None:
                        log.warning("killing the shell of job %s: the job has ended", f58(jobid))
                        pidfd.send_signal(found.pidfd, signal.SIGKILL)
                    return False
            jobdir.discard(self._statedir, jobid, self._rank)
        except (OSError, FluxresError) as error:
            log.error("cannot discard the directory of job %s: %s", f58(jobid), error)
        return True

    async def _empty_trash(self) -> None:
        """Remove what was discarded, now or before a crash."""
        trash = jobdir.trash_path(self._statedir)
        if jobdir.exists(trash) and (names := os.listdir(trash)):
            for name in names:
                with contextlib.suppress(OSError):  # `rm` will say what is wrong
                    os.unlink(os.path.join(trash, name, SPEC))  # before the claim: see `fluxres_shell.run`
            command = ["rm", "-rf", "--", *(os.path.join(trash, name) for name in names[:MAX_ARGUMENTS])]
            try:
                done = await trio.run_process(command, check=False, capture_stderr=True, stdin=subprocess.DEVNULL)
            except OSError as error:  # no process to be had, say: it is tried again with the next directory
                log.warning("cannot empty %s: %s", trash, error)
                return
            if done.returncode:
                log.warning("cannot empty %s: %s", trash, done.stderr.decode(errors="replace").strip())
