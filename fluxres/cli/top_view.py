"""What `fluxres top` shows, as lines: the whole picture for a screen of a given size, or all of it for a file. Pure.

From top to bottom: the header, the titles of the table, one section each of jobs that run, wait, and have ended, the
details of the selected job, the latest events, and a line that says what keys there are. Sections share the lines that
there are: none gets more than it needs while another lacks some; each shows the part around the selected job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fluxres.cli.spans import Line, Span, clip, fitted, line, restyled
from fluxres.cli.top_header import RECOVERY, clock, header, latest_recovery, number, recovered, text
from fluxres.cli.top_jobs import Table, details, sections

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fluxres.base.json import JsonObject
    from fluxres.cli.feed import Link
    from fluxres.cli.jobinfo import JobInfo
    from fluxres.cli.top_header import Topics
    from fluxres.cli.top_keys import Controls

EVENTS: Final = 3
"""Latest events shown."""
EVENTS_FROM: Final = 24
"""Lines of a screen from which on there are events on it."""
MIN_WIDTH: Final = 20
"""Cells of a screen below which nothing is laid out any more."""
KEYS: Final = "q quit  h help  d details  / filter  tab section"
HELP: Final = (
    ("j, down / k, up", "next / previous job"),
    ("page down / page up", "ten jobs on / back"),
    ("home / end", "first / last job"),
    ("tab, right / left", "all jobs, only running, pending, or ended ones"),
    ("/", "filter by id, name, user, queue, state (enter: keep it, escape: drop it)"),
    ("d, enter", "details of the selected job, and of the counts"),
    ("escape", "no filter, no selection"),
    ("control-l", "draw the screen anew"),
    ("h, ?", "this help; any key closes it"),
    ("q", "quit"),
    ("[D], [R2] of a job", "some shells are detached, it was restarted twice"),
)
_SHOWN_CONTEXT: Final = ("idset", "ranks", "nodelist", "reason", "why", "hostname")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that a picture depends on but the size: documents, the connection, what is wanted, and the time."""

    docs: Topics
    link: Link
    controls: Controls
    now: float
    jobs: Mapping[str, Sequence[JobInfo]]

    @property
    def rows(self) -> list[str]:
        """The jobs that can be selected, in order, by their ids in decimal."""
        return [str(job.id) for section in self.jobs.values() for job in section]


def scene(docs: Topics, link: Link, controls: Controls, now: float, username: Callable[[int], str]) -> Scene:
    """Sort the jobs of a picture into what is to be shown of them."""
    jobs = sections(docs.get("jobs", {}), controls, now, username)
    return Scene(docs=docs, link=link, controls=controls, now=now, jobs=jobs)


def screen(shown: Scene, width: int, height: int) -> list[Line]:
    """The picture in exactly `height` lines of at most `width` cells."""
    if width < MIN_WIDTH or height < 1:
        return [line(clip("too small", width))] * min(1, height) + [()] * (height - 1)
    controls = shown.controls
    if controls.help:
        return _filled([*_help(width)], height)
    above = header(shown.docs, shown.link, shown.now, width, details=controls.details)
    below = [_footer(shown, width)]
    if height >= EVENTS_FROM:
        below = [*_events(shown.docs, width), *below]
    if controls.details:
        below = [*_selected(shown, width), *below]
    room = height - len(above) - len(below)
    if room < 2:  # hardly a job fits: what stands above matters more than events and details
        below = below[-1:]
        room = max(0, height - len(above) - len(below))
    body = _filled(_body(shown, width, room), room)
    return _filled([*above, *body, *below], height)


def page(shown: Scene, width: int) -> list[Line]:
    """The whole picture, as many lines as it takes."""
    above = header(shown.docs, shown.link, shown.now, width, details=shown.controls.details)
    room = 1 + sum(len(section) + 1 for section in shown.jobs.values())
    body = _body(shown, width, room)
    return [*above, *body, *_events(shown.docs, width)]


def share(room: int, wants: Sequence[int]) -> list[int]:
    """Deal `room` lines out, to nobody more than wanted, and to nobody more while somebody else lacks some."""
    got = [0] * len(wants)
    while room > 0 and (hungry := [index for index, want in enumerate(wants) if got[index] < want]):
        each = max(1, room // len(hungry))
        for index in hungry:
            take = min(each, wants[index] - got[index], room)
            got[index] += take
            room -= take
    return got


def part(total: int, shown: int, selected: int | None) -> range:
    """Which of `total` rows are shown where there is room for `shown`: the first ones, or those around `selected`."""
    start = 0 if selected is None else min(max(0, selected - shown // 2), total - shown)
    return range(start, start + shown)


def _filled(lines: list[Line], height: int) -> list[Line]:
    return [*lines[:height], *[()] * (height - len(lines))]


def _body(shown: Scene, width: int, room: int) -> list[Line]:
    """The titles, and the sections that have jobs."""
    table = Table(width)
    lines = [table.titles()]
    names = [name for name, jobs in shown.jobs.items() if jobs]
    if not names:
        return [*lines, _nothing(shown, width)]
    got = share(room - 1, [len(shown.jobs[name]) + 1 for name in names])
    for name, share_of in zip(names, got, strict=True):
        if share_of:
            lines += _section(shown, name, table, share_of - 1)
    return lines


def _section(shown: Scene, name: str, table: Table, room: int) -> list[Line]:
    jobs, selected = shown.jobs[name], shown.controls.selected
    index = next((at for at, job in enumerate(jobs) if str(job.id) == selected), None)
    rows = part(len(jobs), room, index)
    shows = f", {rows.start + 1} to {rows.stop} shown" if 0 < room < len(jobs) else ""
    lines = [line(Span(clip(f"{name} ({len(jobs)}{shows})", table.width), "section"))]
    for at in rows:
        row = table.row(jobs[at], shown.now)
        lines.append(restyled(row, "selected", table.width) if at == index else fitted(row, table.width))
    return lines


def _nothing(shown: Scene, width: int) -> Line:
    controls = shown.controls
    what = f"{controls.section} jobs" if controls.section else "jobs"
    where = f" in queue {controls.queue}" if controls.queue else ""
    matching = f" that match {controls.filter!r}" if controls.filter else ""
    return line(Span(clip(f"no {what}{where}{matching}", width), "dim")) if shown.link.first else ()


def _selected(shown: Scene, width: int) -> list[Line]:
    for jobs in shown.jobs.values():
        for job in jobs:
            if str(job.id) == shown.controls.selected:
                return details(job, width)
    return [line(Span(clip("select a job with j and k to see more of it", width), "dim"))]


def _events(docs: Topics, width: int) -> list[Line]:
    """The latest events of the resources, the newest last, without the recovery that the header tells of."""
    newest = sorted(docs.get("events", {}).values(), key=lambda event: number(event, "t"))
    told = latest_recovery(docs)
    return [fitted(_event(event), width) for event in newest if event is not told][-EVENTS:]


def _event(event: JsonObject) -> Line:
    when, name = Span(f"{clock(number(event, 't'))} ", "dim"), text(event, "name")
    if name == RECOVERY:
        return (when, *recovered(event))
    context = event.get("context")
    values = [text(context, key) for key in _SHOWN_CONTEXT if key in context] if isinstance(context, dict) else []
    style = "warn" if name in ("offline", "torpid", "lost", "drain", "restart") else ""
    return line(when, Span(name, style), Span(" " + " ".join(filter(None, values))))


def _footer(shown: Scene, width: int) -> Line:
    controls = shown.controls
    if controls.typing:
        return line(Span(clip(f"filter: {controls.filter}_", width), "heading"))
    chosen = [f"only {controls.section}"] if controls.section else []
    chosen += [f"queue {controls.queue}"] if controls.queue else []
    chosen += [f"filter {controls.filter!r}"] if controls.filter else []
    said = f"  [{', '.join(chosen)}]" if chosen else ""
    return fitted(line(Span(KEYS, "dim"), Span(said, "warn")), width)


def _help(width: int) -> list[Line]:
    lines = [line(Span(clip("Keys of fluxres top", width), "heading")), ()]
    return [*lines, *(fitted(line(Span(f"  {keys:<22}", "used"), what), width) for keys, what in HELP)]
