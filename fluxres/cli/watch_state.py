"""What `fluxres watch` knows of the jobs it watches: how far each is, what is said of it, and of all of them. Pure.

Phases of a job: PENDING -> RUNNING -> COMPLETE or FAILED; a job may end without having run.
"""

from __future__ import annotations

import time
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Final

from fluxres.cli.common import id_text, printable
from fluxres.cli.exitcode import exit_code
from fluxres.cli.jobinfo import INACTIVE, RUNNING_STATES, JobInfo
from fluxres.cli.uptime import short

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxres.base.json import JsonObject

MIN_BAR: Final = 10
"""Cells of the progress bar; where the terminal has no room for them there is none."""
MAX_BAR: Final = 40
FAILED: Final = 1
"""The exit status for a job that failed without having one."""


class Phase(Enum):
    """How far a job is."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class WatchedJob:
    """One job by its latest entry, as job-list has it."""

    __slots__ = ("given_up", "info", "said")

    def __init__(self, entry: JsonObject) -> None:
        self.info = JobInfo(entry, 0.0)
        self.said: set[Phase] = set()
        """The phases that have been told."""
        self.given_up = False
        """Whether it cannot be watched: it counts as failed then."""

    @property
    def id(self) -> int:
        """The jobid."""
        return self.info.id

    @property
    def phase(self) -> Phase:
        """How far it is."""
        if self.given_up:
            return Phase.FAILED
        if self.info.state & RUNNING_STATES:
            return Phase.RUNNING
        if self.info.state != INACTIVE:
            return Phase.PENDING
        return Phase.COMPLETE if self.info.result_name() == "COMPLETED" else Phase.FAILED

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.info.state == INACTIVE

    @property
    def ran(self) -> bool:
        """Whether it has begun to run: whether there can be output."""
        return self.info.number("t_run") > 0

    @property
    def exit_code(self) -> int:
        """What it adds to the exit status: the highest exit code of its tasks, 1 where it failed without one."""
        status = self.info.entry.get("waitstatus")
        code = exit_code(status) if isinstance(status, int) else 0
        return max(code, FAILED) if self.phase is Phase.FAILED else code

    def update(self, entry: JsonObject) -> None:
        """Take a later entry; a job that is over stays as it is."""
        if not self.ended:
            self.info = JobInfo(entry, 0.0)

    def exception(self) -> str:
        """What to say of the fatal exception that ended it; empty where none did."""
        info = self.info
        if not info.entry.get("exception_occurred") or info.number("exception_severity") or not self.ended:
            return ""
        note = info.text("exception_note")
        return printable(
            f"{id_text(self.id)}: exception type={info.text('exception_type')}" + (f": {note}" if note else "")
        )

    def news(self, zero: float) -> list[str]:
        """Lines on the phases that have not been told yet, with times from `zero` on."""
        lines = []
        if self.ran and self._tell(Phase.RUNNING):
            where = self.info.text("nodelist")
            lines.append(self._line(self.info.number("t_run") - zero, f"running{f' on {where}' if where else ''}"))
        if self.ended and self._tell(self.phase):
            how = f": {self.info.inactive_reason()}" if self.phase is Phase.FAILED else ""
            lines.append(self._line(self.info.number("t_inactive") - zero, f"{self.phase.value}{how}"))
        return lines

    def _tell(self, phase: Phase) -> bool:
        new = phase not in self.said
        self.said.add(phase)
        return new

    def _line(self, at: float, said: str) -> str:
        return printable(f"{id_text(self.id)}: {max(at, 0.0):.3f}s: {said}")


def count(jobs: Iterable[WatchedJob]) -> Counter[Phase]:
    """How many jobs are in each phase."""
    return Counter(job.phase for job in jobs)


def progress(counts: Counter[Phase], elapsed: float, width: int, *, jps: bool = False, away: str = "") -> str:
    """The line of `--progress`, at most `width` characters: counts, a bar, percent, and the time or jobs per second."""
    total = sum(counts.values())
    over = counts[Phase.COMPLETE] + counts[Phase.FAILED]
    left = " ".join(f"{phase.value}:{counts[phase]}" for phase in Phase)
    rate = f"{over / elapsed if elapsed > 0 else 0.0:.1f} job/s"
    right = f"{over / total * 100 if total else 100.0:5.1f}% {rate if jps else elapsed_text(elapsed)}"
    right += f" (broker away: {away})" if away else ""
    room = min(MAX_BAR, width - len(left) - len(right) - 4)
    if room < MIN_BAR:
        return f"{left} {right}"[:width]
    filled = over * room // total if total else room
    return f"{left} [{'=' * filled}{' ' * (room - filled)}] {right}"


def elapsed_text(seconds: float) -> str:
    """Minutes and seconds, from a day on in short."""
    if seconds >= 86400:
        return short(seconds)
    return time.strftime("%H:%M:%S", time.gmtime(max(0.0, seconds)))
