"""The jobs of a picture as `fluxres top` lists them: in sections, filtered, in columns, and one in detail. Pure.

A job is a document of the status feed (docs/status-messages.md): job-list's attributes, states and results by name.
"""

from __future__ import annotations

import time
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.cli.common import printable
from fluxres.cli.feed_jobs import as_entry
from fluxres.cli.format import duration_text
from fluxres.cli.jobinfo import JobInfo
from fluxres.cli.spans import Line, Span, cells, clip, column, wrapped
from fluxres.cli.uptime import short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fluxres.base.json import JsonObject
    from fluxres.cli.top_keys import Controls

_SECTION_OF: Final = {"RUN": "running", "CLEANUP": "running", "INACTIVE": "ended"}
LIMIT_CELLS: Final = 10
"""Cells of the bar of a time limit."""
SOON: Final = 0.9
"""The part of a time limit after which it stands out."""
NAME_CELLS: Final = 10
"""Cells that the name of a job has at least; columns are left out for it."""
MAX_NAME_CELLS: Final = 30
"""Cells that it has at most where the last column needs them."""
INFO_CELLS: Final = 22
"""Cells of the last column at least; with fewer, beside a mark, there is no bar of the time limit."""
BESIDE_MARK: Final = 9
"""Cells of the last column that a mark in words leaves for what else is there."""


class Column(NamedTuple):
    """A column of the table; one with a higher `keep` is left out later where the screen is narrow."""

    title: str
    cells: int
    keep: int
    right: bool
    text: Callable[[JobInfo], str]


COLUMNS: Final = (
    Column("JOBID", 12, 9, True, lambda job: str(job("id"))),
    Column("USER", 8, 3, False, JobInfo.username),
    Column("ST", 2, 8, True, lambda job: job.status(1)),
    Column("TASKS", 6, 1, True, lambda job: job.text("ntasks")),
    Column("NODES", 5, 2, True, lambda job: job.text("nnodes")),
    Column("TIME", 7, 5, True, lambda job: _time(job)),
)
"""What comes before the name, which takes the cells that are left, and the section's own last column."""


def sections(
    jobs: Mapping[str, JsonObject], controls: Controls, now: float, username: Callable[[int], str]
) -> dict[str, list[JobInfo]]:
    """The jobs to be shown by section: running and ended ones newest first, pending ones by priority."""
    found: dict[str, list[JobInfo]] = {"running": [], "pending": [], "ended": []}
    words = controls.filter.lower().split()
    for document in jobs.values():
        section = _SECTION_OF.get(str(document.get("state")), "pending")
        if controls.section not in ("", section) or controls.queue not in ("", document.get("queue", "")):
            continue
        job = JobInfo(as_entry(document), now, username)
        if not words or _matches(job, words):
            found[section].append(job)
    found["running"].sort(key=lambda job: (job.number("t_run"), job.id), reverse=True)
    found["pending"].sort(key=lambda job: (-job.number("priority"), job.id))
    found["ended"].sort(key=lambda job: (job.number("t_inactive"), job.id), reverse=True)
    return found


def _matches(job: JobInfo, words: Sequence[str]) -> bool:
    texts = (str(job("id")), str(job.id), job.text("name"), job.username(), job.text("queue"), job.status())
    whole = " ".join(texts).lower()
    return all(word in whole for word in words)


class Table:
    """The columns that fit into a width."""

    def __init__(self, width: int) -> None:
        self.width = width
        kept = [*COLUMNS]
        info = INFO_CELLS
        while kept and _taken(kept) + info + 1 + NAME_CELLS > width:
            if info and width < INFO_CELLS + 40:
                info = 0
            else:
                kept.remove(min(kept, key=attrgetter("keep")))
        self._columns = kept
        room = max(0, width - _taken(kept))
        self._name = min(MAX_NAME_CELLS, room - info - 1) if info else room
        self._info = room - self._name - 1 if info else 0

    def titles(self) -> Line:
        """The line above all."""
        texts = [column(each.title, each.cells, right=each.right) for each in self._columns]
        texts += [column("NAME", self._name), *([column("LIMIT/INFO", self._info)] if self._info else [])]
        return (Span(" ".join(texts), "title"),)

    def row(self, job: JobInfo, now: float) -> Line:
        """One job."""
        before = "".join(column(each.text(job), each.cells, right=each.right) + " " for each in self._columns)
        name = clip(printable(job.text("name")), self._name)
        behind, beside = self._place(_marks(job), self._name - cells(name) - 1)
        behind = f" {behind}" if behind else ""
        beside += " " if beside else ""
        info = (Span(" "), Span(beside, "mark"), *_info(job, now, self._info - len(beside))) if self._info else ()
        return (
            Span(before, _style(job)),
            Span(name, "name"),
            Span(behind, "mark"),
            Span(" " * (self._name - cells(name) - len(behind))),
            *info,
        )

    def _place(self, marks: Sequence[str], room: int) -> tuple[str, str]:
        """The mark behind the name, which has so much room there, or else the one in the last column."""
        for mark in marks:
            if len(mark) <= room:
                return mark, ""
            if self._info and (mark == marks[-1] or len(mark) + 1 + BESIDE_MARK <= self._info):
                return "", mark
        return "", ""


def _taken(columns: Iterable[Column]) -> int:
    return sum(each.cells + 1 for each in columns)


def _marks(job: JobInfo) -> list[str]:
    """What befell a job: no broker reads some of its shells, or it was started over; in words, in fewer, in letters."""
    ranks, restarts = job.text("detached"), int(job.number("restarts"))
    if not ranks and not restarts:
        return []
    again = f"{restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    marks = (
        (f"detached {ranks}" if ranks else "", again),
        ("detached" if ranks else "", again),
        ("D" if ranks else "", f"R{restarts}" if restarts else ""),
    )
    return [f"[{', '.join(filter(None, parts))}]" for parts in marks]


def _style(job: JobInfo) -> str:
    if job.result_name() not in ("", "COMPLETED"):
        return "bad"
    return "good" if job.result_name() else ""


def _time(job: JobInfo) -> str:
    value = job("contextual_time")
    seconds = value if isinstance(value, int | float) else 0.0
    return short(seconds) if seconds > 0 else "-"


def _info(job: JobInfo, now: float, width: int) -> Line:
    """The last column: the time limit of a job that runs, why one waits, how one ended."""
    if job.state_name() == "INACTIVE":
        return (Span(column(job.inactive_reason(), width), _style(job)),)
    if job.state_name() in ("RUN", "CLEANUP"):
        return _limit(job, now, width)
    return (Span(column(job.contextual_info(), width), "dim"),)


def _limit(job: JobInfo, now: float, width: int) -> Line:
    """How much of its time limit a job has used, and what is left."""
    spent = limit_spent(job, now)
    if spent is None:
        return (Span(column(job.text("nodelist"), width), "dim"),)
    filled = int(spent * LIMIT_CELLS)
    style = "warn" if spent >= SOON else "used"
    left = f" {short(job.remaining())}" if job.remaining() else ""
    if width < INFO_CELLS:
        return (Span(column(f"{spent * 100:.0f}%{left}", width), "warn" if spent >= SOON else ""),)
    text = column(f"{spent * 100:3.0f}%{left}", width - LIMIT_CELLS - 2)
    return (
        Span("["),
        Span("=" * filled, style),
        Span(" " * (LIMIT_CELLS - filled) + "]"),
        Span(text, "warn" if spent >= SOON else ""),
    )


def limit_spent(job: JobInfo, now: float) -> float | None:
    """The part of its time limit that a job has run for, 0 to 1; None where it has no limit."""
    began, expiration = job.number("t_run"), job.number("expiration")
    if began <= 0 or expiration <= began:
        return None
    return min(1.0, max(0.0, (now - began) / (expiration - began)))


def details(job: JobInfo, width: int) -> list[Line]:
    """All that is known of one job, in a few lines."""
    title = Span(f"{job('id')} ({job.id})", "heading")
    pairs = [("name", job.text("name")), ("user", job.username()), ("state", job.status())]
    pairs += [(name, job.text(name)) for name in ("queue", "urgency", "priority", "ntasks", "nnodes", "ncores")]
    pairs += [("limit", duration_text(job.number("duration")) if job.number("duration") else "")]
    pairs += [("hosts", job.text("nodelist")), ("ranks", job.text("ranks")), ("detached", job.text("detached"))]
    pairs += [("restarts", job.text("restarts") if job.number("restarts") else "")]
    pairs += [("depends", job.dependencies()), ("cwd", job.text("cwd")), ("ended", job.inactive_reason())]
    pairs += [("exception", _exception(job))]
    words = [Span(printable(f"{name}={value}"), _pair_style(name)) for name, value in pairs if value]
    lines = wrapped([title, *words], width, 2)
    times = [(name, job.number(f"t_{name}")) for name in ("submit", "depend", "sched", "run", "cleanup", "inactive")]
    lines += wrapped([Span(f"{name} {_clock(at)}", "dim") for name, at in times if at], width, 2)
    return lines


def _exception(job: JobInfo) -> str:
    if not job.entry.get("exception_occurred"):
        return ""
    return f"{job.text('exception_type')}: {job.text('exception_note')}".rstrip(": ")


def _pair_style(name: str) -> str:
    return {"detached": "mark", "restarts": "mark", "exception": "bad"}.get(name, "")


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
