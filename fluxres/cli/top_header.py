"""The upper part of `fluxres top`: the instance, how it fares, what it has, and what befell it. Pure.

Lines in order: the state of the connection where it is not as it should be; instance and size; health; a recovery that
is under way, or the latest one; bars of nodes, cores and gpus beside the counts of jobs; what is stopped.
"""

from __future__ import annotations

import re
import time
from math import ceil
from typing import TYPE_CHECKING, Final

from fluxres.base.idset import IdSet
from fluxres.cli.common import printable
from fluxres.cli.spans import Line, Span, apart, fitted, line, restyled
from fluxres.cli.uptime import short

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxres.base.json import JsonObject
    from fluxres.cli.feed import Link

    Topics = Mapping[str, Mapping[str, JsonObject]]
    """The documents of a picture: topic, key, document."""

BACK_FOR: Final = 5.0
"""Seconds for which it is said that the broker is back."""
COUNTS_CELLS: Final = 30
"""Cells of the counts of jobs."""
COUNT_DIGITS: Final = 6
"""Cells of the first number in each line of them."""
MAX_BAR: Final = 80
"""Cells of a bar with its name and numbers at most, as flux-top(1) has it."""
RECOVERY: Final = "recovery"
ID_CELLS: Final = 8
"""Characters of an instance's id that tell it from others."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def header(docs: Topics, link: Link, now: float, width: int, *, details: bool) -> list[Line]:
    """The lines above the jobs, each of at most `width` cells."""
    lines = [*_connection(link, width), _title(docs, now, width), fitted(_health(docs), width)]
    recovery = _recovery(docs, now)
    if recovery:
        lines.append(fitted(recovery, width))
    lines += _bars(docs, width)
    if details:
        lines.append(fitted(_ended(docs), width))
    queue = _queue(docs)
    return [*lines, *([fitted(queue, width)] if queue else [])]


def number(document: JsonObject, key: str) -> float:
    """A number of a document, 0 where it is missing."""
    value = document.get(key)
    return value if isinstance(value, int | float) else 0


def count(document: JsonObject, key: str) -> int:
    """A whole number of a document, 0 where it is missing."""
    return int(number(document, key))


def text(document: JsonObject, key: str) -> str:
    """A text of a document, fit to be shown, empty where it is missing."""
    value = document.get(key)
    return "" if value is None else printable(str(value))


def clock(seconds: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def instance(docs: Topics, key: str) -> JsonObject:
    """A document of the topic `instance`, empty where there is none."""
    return docs.get("instance", {}).get(key, {})


# --- lines


def _connection(link: Link, width: int) -> list[Line]:
    if link.away_for is not None:
        since = f"since {clock(link.lost_at)} ({short(link.away_for)})"
        said = f"The broker is away {since}, its last picture is shown" if link.first else f"No broker {since}"
        return [restyled(line(f" {said}: {printable(link.why)}"), "alarm", width)]
    if link.back_for is not None and link.back_for < BACK_FOR:
        return [restyled(line(f" The broker is back after {short(link.gap)}"), "back", width)]
    if not link.first:
        return [restyled(line(" Waiting for the first picture"), "dim", width)]
    return []


def _title(docs: Topics, now: float, width: int) -> Line:
    about = instance(docs, "about")
    name, host = text(about, "instance") or "instance", text(about, "host")
    parts = [Span(name[:ID_CELLS] if _UUID.fullmatch(name) else name, "heading"), Span(f" on {host}" if host else "")]
    if "size" in about:
        parts.append(Span(f"  size {count(about, 'size')}"))
    if number(about, "started"):
        parts.append(Span(f"  up {short(now - number(about, 'started'))}"))
    if count(about, "incarnations") > 1:
        parts.append(Span(f"  incarnation {count(about, 'incarnations')}"))
    return apart(tuple(parts), line(Span(f"{text(about, 'version')} {clock(now)}".lstrip(), "dim")), width)


def _health(docs: Topics) -> Line:
    """In words, worst first: which ranks are lost (in the tree, or declared so), torpid, offline, drained."""
    resources, tree = docs.get("resources", {}).values(), docs.get("overlay", {}).values()
    lost = _ranks(each for each in resources if "lost" in each) | _ranks(
        each for each in tree if each.get("status") == "lost"
    )
    torpid = _ranks(each for each in (*resources, *tree) if each.get("torpid") is True)
    offline = _ranks(each for each in resources if each.get("online") is False)
    found = (
        ("bad", "lost", lost),
        ("warn", "torpid", torpid - lost),
        ("warn", "offline", offline - lost),
        ("dim", "drained", _ranks(each for each in resources if "drained" in each)),
    )
    words = [Span(f"{len(ranks)} {what} ({ranks})", style) for style, what, ranks in found if ranks]
    serious = any(style in ("bad", "warn") for _, style in words)
    state = Span("degraded" if serious else "healthy" if resources else "", "bad" if serious else "good")
    return (state, *(part for word in words for part in (Span("  "), word)))


def _ranks(documents: Iterable[JsonObject]) -> IdSet:
    return IdSet(rank for each in documents if isinstance(rank := each.get("rank"), int) and rank >= 0)


def _recovery(docs: Topics, now: float) -> Line:
    """The recovery that is under way, else the latest that is over."""
    current = instance(docs, RECOVERY)
    if current:
        away, detached, pending = text(current, "away"), count(current, "detached"), count(current, "pending")
        said = f"recovery of {_ranks_text(current)} for {short(now - number(current, 'began'))}"
        said += f": away {away}" if away else ""
        said += f", {detached} shell{_s(detached)} not attached yet" if detached else ""
        said += f", {pending} job{_s(pending)} waiting" if pending else ""
        why = text(current, "why")
        return line(Span(said, "alarm"), Span(f"; {why}" if why else "", "warn"))
    last = latest_recovery(docs)
    return () if last is None else line(Span(f"{clock(number(last, 't'))} ", "dim"), *recovered(last))


def latest_recovery(docs: Topics) -> JsonObject | None:
    """The event of the recovery that is told: the latest, unless one is under way."""
    done = [event for event in docs.get("events", {}).values() if event.get("name") == RECOVERY]
    return max(done, key=lambda event: number(event, "t")) if done and not instance(docs, RECOVERY) else None


def recovered(event: JsonObject) -> Line:
    """What a recovery that is over came to: which ranks restarted, how long it took, what became of their jobs.

    One in which no rank came back has been given up.
    """
    context = event.get("context")
    if not isinstance(context, dict):
        return line("recovered")
    restarted, panicked = text(context, "restarted"), text(context, "panicked")
    ranks, took = _ranks_text(context), short(number(context, "seconds"))
    came_back = bool(restarted or panicked)
    said = f"recovered {ranks} in {took}" if came_back else f"given up on {ranks} after {took}"
    parts = [Span(said, "heading" if came_back else "bad")]
    running, lost, finished = (count(context, key) for key in ("running", "lost", "finished"))
    if running or lost:
        parts.append(Span(f": {lost or 'none'} lost", "bad" if lost else "good"))
        said = f", {count(context, 'rediscovered')} of {running} running job{_s(running)} rediscovered"
        parts.append(Span(said + (f", {finished} ended meanwhile" if finished else "")))
    else:
        parts.append(Span(": no job ran there"))
    how = [f"restarted {restarted}" if restarted else "", f"panicked {panicked}" if panicked else ""]
    return tuple([*parts, Span(f" ({', '.join(filter(None, how))})")] if any(how) else parts)


def _bars(docs: Topics, width: int) -> list[Line]:
    resources, jobs = instance(docs, "resources"), instance(docs, "jobs")
    ranks = docs.get("resources", {}).values()
    nodes = max(count(resources, "nodes"), len(ranks))
    used = sum(1 for each in ranks if count(each, "cores_used") or count(each, "gpus_used"))
    down = sum(1 for each in ranks if each.get("online") is False or "drained" in each or "lost" in each)
    room = min(MAX_BAR, width - COUNTS_CELLS) if width >= 2 * COUNTS_CELLS else width
    bars = [
        _bar("nodes", used, down, nodes, room),
        _bar("cores", count(resources, "cores_used"), count(resources, "cores_down"), count(resources, "cores"), room),
    ]
    if count(resources, "gpus"):
        bars.append(_bar("gpus", count(resources, "gpus_used"), 0, count(resources, "gpus"), room))
    counts = _counts(jobs, 0 if room == width else COUNT_DIGITS)
    if room == width:
        return [*bars, fitted(tuple(span for each in counts for span in (*each, Span("  "))), width)]
    bars += [(Span(" " * room),)] * (len(counts) - len(bars))
    return [apart(bar, told, width) for bar, told in zip(bars, counts, strict=True)]


def _bar(name: str, used: int, down: int, total: int, width: int) -> Line:
    """`name [|||    |||3/8]`: what is used from the left, what is down from the right."""
    prefix, suffix = f"{name:>5} [", f"{min(used, total)}/{total}]"
    slots = max(0, width - len(prefix) - len(suffix))
    filled = min(slots, ceil(used / total * slots)) if total else 0
    missing = min(slots - filled, ceil(down / total * slots)) if total else 0
    space = " " * (slots - filled - missing)
    return line(prefix, Span("|" * filled, "used"), space, Span("|" * missing, "down"), suffix)


def _counts(jobs: JsonObject, digits: int) -> list[Line]:
    """How many jobs are pending, run, and have ended since this life of rank 0 began; a timeout is a failure."""
    pending = sum(count(jobs, state) for state in ("depend", "priority", "sched"))
    running = count(jobs, "run") + count(jobs, "cleanup")
    complete, canceled = count(jobs, "completed"), count(jobs, "canceled")
    failed = count(jobs, "failed") + count(jobs, "timeout")
    return [
        line(f"{pending:{digits}} pending, ", Span(f"{running}", "used" if running else ""), " running"),
        line(Span(f"{complete:{digits}}", "good" if complete else ""), " complete"),
        line(
            Span(f"{failed:{digits}}", "bad" if failed else ""), " failed, ",
            Span(f"{canceled}", "warn" if canceled else ""), " canceled",
        ),
    ]  # fmt: skip


def _ended(jobs_of: Topics) -> Line:
    jobs = instance(jobs_of, "jobs")
    told = ", ".join(f"{count(jobs, result)} {result}" for result in ("completed", "failed", "canceled", "timeout"))
    waits = ", ".join(f"{count(jobs, state)} in {state.upper()}" for state in ("depend", "priority", "sched"))
    return line(Span(f"{count(jobs, 'inactive')} inactive; since rank 0 began: {told}; {waits}", "dim"))


def _queue(docs: Topics) -> Line:
    queue = instance(docs, "queue")
    stopped = [said for key, said in (("enabled", "submission is disabled"), ("started", "scheduling is stopped"))
               if queue.get(key) is False]  # fmt: skip
    if not stopped:
        return ()
    reason = text(queue, "reason")
    return line(Span(", ".join(stopped) + (f": {reason}" if reason else ""), "warn"))


def _ranks_text(document: JsonObject) -> str:
    ranks = text(document, "ranks")
    return f"rank {ranks}" if ranks.isdigit() else f"ranks {ranks}"


def _s(number_of: int) -> str:
    return "" if number_of == 1 else "s"
