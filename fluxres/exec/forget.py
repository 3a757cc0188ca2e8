"""Discards the directories of jobs that have ended, in rounds, so that many short jobs share the work.

A directory goes when its shell has: released shells end by themselves within milliseconds, one that does not is killed
after a grace. The directory is put into the trash, which is emptied in one go.

Other shells are *put down*: rank 0 has given up this rank's part of their job, as an administrator had it declared
dead. Those are killed at once, with their tasks, and nobody may have the resources that they used before that is done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Final

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, f58
from fluxres.exec.host import ShellHost
from fluxres_shell.find import Kind

log = logging.getLogger("fluxres.exec")

MAX_WAITING: Final = 100_000
"""Directories that may wait to be discarded; what does not fit is found again by the next report."""
ROUND: Final = 0.25
"""Seconds between two looks at the shells that have not ended yet."""
GRACE: Final = 10.0
"""Seconds that a shell has to end by itself before it is killed."""
RETRY_MIN: Final = 0.1
RETRY_MAX: Final = 10.0
"""Seconds between two attempts at what would not die; doubled from the one to the other."""
GIVEN_UP: Final = "rank 0 has given up this rank's part of the job"


class Forgetting:
    """The directories on this rank that are to go."""

    def __init__(self, host: ShellHost) -> None:
        self._host = host
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
        await self._host.empty_trash()
        while True:
            await self._some.wait()
            await trio.sleep(ROUND)
            gone = [jobid for jobid, deadline in self._waiting.items() if self._discarded(jobid, deadline)]
            for jobid in gone:
                del self._waiting[jobid]
            if not self._waiting:
                self._some = trio.Event()
            if gone:
                await self._host.empty_trash()

    def _discarded(self, jobid: JobId, deadline: float) -> bool:
        """Discard the directory unless its shell lives; whether there is nothing left to wait for."""
        try:
            with contextlib.closing(self._host.shell(jobid)) as shell:
                kind = shell.look().kind
                if kind is Kind.ALIVE:
                    if trio.current_time() > deadline:
                        log.warning("killing the shell of job %s: the job has ended", f58(jobid))
                        shell.kill()
                    return False
                if kind is Kind.UNCLAIMED:
                    shell.void("the job has ended")
            self._host.discard(jobid)
        except (OSError, FluxresError) as error:
            log.error("cannot discard the directory of job %s: %s", f58(jobid), error)
        return True

    # --- what rank 0 has given up

    async def put_down(self, jobids: Sequence[JobId]) -> None:
        """Kill the shells of these jobs, and their tasks, and discard the directories; return when all are dead."""
        async with trio.open_nursery() as nursery:
            for jobid in jobids:
                nursery.start_soon(self._put_down, jobid, name=f"put down {f58(jobid)}")
        if jobids:
            await self._host.empty_trash()

    async def _put_down(self, jobid: JobId) -> None:
        retry = RETRY_MIN
        while not await self._ended(jobid, retry):
            await trio.sleep(retry)
            retry = min(2 * retry, RETRY_MAX)
        try:
            self._host.discard(jobid)
        except FluxresError as error:  # what matters is done; the next report finds the directory again
            log.error("cannot discard the directory of job %s: %s", f58(jobid), error)

    async def _ended(self, jobid: JobId, patience: float) -> bool:
        """One attempt; whether nothing of the job lives here, and nothing will."""
        try:
            with contextlib.closing(self._host.shell(jobid)) as shell:
                facts = shell.look()
                if facts.kind is Kind.UNCLAIMED:
                    shell.void(GIVEN_UP)
                    facts = shell.look()
                if facts.kind is Kind.ALIVE:
                    shell.kill()
                    with trio.move_on_after(patience):
                        await shell.death()
                    facts = shell.look()
                if facts.kind in (Kind.NOTHING, Kind.VOID):
                    return True
                left = await shell.kill_tasks() if facts.dead else 0
        except OSError as error:
            log.error("cannot put down job %s: %s", f58(jobid), error)
            return False
        if left or not facts.dead:
            log.warning("job %s does not die: its shell %s, %d other processes", f58(jobid), facts.kind.name, left)
        return facts.dead and not left
