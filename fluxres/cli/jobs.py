"""`fluxres jobs`: list jobs, in columns, a format of one's own, or JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.fsd import parse_fsd
from fluxres.base.jobid import parse_jobid
from fluxres.cli.cancel import STATES, USERID_ALL, userid_of
from fluxres.cli.common import Explain, argument, parser, whole_number
from fluxres.cli.format import OutputFormat, cut_line, parse_sort, sort_rows
from fluxres.cli.jobinfo import JobInfo, attrs_of, title
from fluxres.cli.joblist import find_jobs, list_jobs, unknown
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from fluxres.base.json import JsonObject
    from fluxres.cli.common import Parser
    from fluxres.cli.format import Row
    from fluxres.wire.payload import WireMap

_LEAD: Final = "{id.f58:>12} ?:{queue:<8.8} +:{username:<8} {name:<10.10+} "
FORMATS: Final = {
    "default": _LEAD + "{status_abbrev:>2.2} {ntasks:>6} {nnodes:>6h} {contextual_time!F:>8h} {contextual_info}",
    "long": _LEAD
    + "{status:>9.9} {ntasks:>6} {nnodes:>6h} {t_submit!d:%b%d %R::>12} {t_remaining!F:>12h} "
    + "{contextual_time!F:>8h} {contextual_info}",
    "deps": "{id.f58:>12} ?:{queue:<8.8} {name:<10.10+} {urgency:<3} {priority:<12} {state:<8.8} " + "{dependencies}",
    "endreason": _LEAD + "{status_abbrev:>2.2} {t_inactive!d:%b%d %R::>12h} {inactive_reason}",
}
"""Named formats, with flux-jobs(1)'s names and columns."""
COUNT: Final = 1000
"""Jobs listed at most, unless --count says otherwise."""
FILTER_STATES: Final = {**STATES, "inactive": 64}
FILTER_RESULTS: Final = {"completed": 1, "failed": 2, "canceled": 4, "cancelled": 4, "timeout": 8}
ACTIVE: Final = ("pending", "running")


def main(argv: list[str]) -> int:
    """`fluxres jobs`."""
    options = _options()
    args = options.parse_args(argv)
    args.jobids = list(dict.fromkeys(args.jobids))
    if args.stats_only:
        return _stats(args)
    if args.format == "help":
        print("\n".join(f"{name}: {text}" for name, text in FORMATS.items()))
        return 0
    shown = OutputFormat(FORMATS.get(args.format, args.format), title)
    order = shown.sort if args.sort is None else parse_sort(args.sort, title)
    attrs = ["all"] if args.json else attrs_of([*shown.fields, *(field for field, _ in order)])
    with Session(args.uri) as session, Explain("list jobs"):
        entries, missing, truncated = _fetch(session, args, attrs)
        if args.stats:
            print(_stats_line(session.call("job-list.job-stats", {}, idempotent=True)))
    names: dict[int, str] = {}
    now = time.time()
    rows = [JobInfo(entry, now, lambda userid: _username(userid, names)) for entry in entries]
    if args.json:
        _print_json(rows, single=len(args.jobids) == 1)
    elif rows or not args.jobids:  # else it has been said that there is nothing to list
        shown.fit(rows, with_header=not args.no_header)
        _print_rows(shown, sort_rows(rows, order), args)
    if truncated and not args.no_header:
        print(f"fluxres-jobs: only {args.count} jobs are shown (-c 0 shows all)", file=sys.stderr)
    return 1 if missing else 0


def _options() -> Parser:
    options = parser("jobs", "List jobs.", usage="[OPTIONS] [JOBID …]")
    add = options.add_argument
    add("-a", dest="all_states", action="store_true", help="jobs in all states (pending and running)")
    add("-A", dest="all_users", action="store_true", help="jobs of all users")
    add(
        "-c",
        "--count",
        metavar="N",
        type=whole_number,
        default=COUNT,
        help=f"at most N jobs ({COUNT}, 0: all)",
    )
    add("-f", "--filter", metavar="STATE|RESULT", action="append", type=argument(parse_filter), default=[])
    add("-n", "--no-header", action="store_true", help="no titles")
    add("-u", "--user", metavar="USER", help="jobs of USER, or of 'all'")
    add("-q", "--queue", metavar="QUEUE", action="append", default=[], help="jobs in QUEUE")
    add("-o", "--format", metavar="FORMAT", default=os.environ.get("FLUX_JOBS_FORMAT_DEFAULT", "default"))
    add("-w", "--width", metavar="N", nargs="?", type=int, default=-1, const=0, help="cut lines to N columns")
    add("--name", metavar="NAME", help="jobs with this name")
    add(
        "--since",
        metavar="WHEN",
        type=argument(parse_since),
        default=0.0,
        help="active since (-FSD, seconds)",
    )
    add("--sort", metavar="[-]KEY,…", help="sort by these fields")
    add("--json", action="store_true", help="print JSON")
    add("--stats", action="store_true", help="print statistics first")
    add("--stats-only", action="store_true", help="print statistics; exit 1 if no job is active")
    add("jobids", metavar="JOBID", nargs="*", type=argument(parse_jobid), help="these jobs")
    return options


def parse_filter(text: str) -> tuple[int, int]:
    """A mask of states and one of results from names separated by commas. Raises ValueError."""
    states = results = 0
    for name in text.lower().split(","):
        if name in FILTER_STATES:
            states |= FILTER_STATES[name]
        elif name in FILTER_RESULTS:
            results |= FILTER_RESULTS[name]
        else:
            raise ValueError(f"{name!r} is none of {', '.join([*FILTER_STATES, *FILTER_RESULTS])}")
    return states, results


def parse_since(text: str) -> float:
    """A time in seconds since the epoch: as such, or as a duration before now. Raises ValueError."""
    if text.startswith("-"):
        return time.time() - parse_fsd(text[1:])
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither seconds since the epoch nor a duration such as -2h") from error


def constraint_of(args: Namespace) -> WireMap:
    """The constraint of `job-list.list` that the options make."""
    states = results = 0
    for some_states, some_results in args.filter:
        states, results = states | some_states, results | some_results
    if not args.filter:
        names = (*ACTIVE, "inactive") if args.all_states or args.since else ACTIVE
        states = sum(FILTER_STATES[name] for name in names)
    wanted: list[WireMap] = []
    if states:
        wanted.append({"states": [states]})
    if results:
        wanted.append({"results": [results]})
    both: list[WireMap] = [{"or": [*wanted]} if len(wanted) > 1 else wanted[0]]
    userid = USERID_ALL if args.all_users else userid_of(args.user)
    if userid != USERID_ALL:
        both.append({"userid": [userid]})
    return {"and": [*both]}


def _fetch(session: Session, args: Namespace, attrs: Sequence[str]) -> tuple[list[JsonObject], int, bool]:
    """The entries, how many of the jobs asked for are unknown, and whether --count left some out."""
    if args.jobids:
        entries: list[JsonObject] = []
        for jobid, found in zip(args.jobids, find_jobs(session, args.jobids, attrs), strict=True):
            if isinstance(found, RpcError):
                print(f"fluxres-jobs: {unknown(jobid, found)}", file=sys.stderr)
            else:
                entries.append(found)
        return entries, len(args.jobids) - len(entries), False
    chosen = _chosen_here(args)
    listed = list_jobs(
        session,
        attrs=sorted({*attrs, *chosen}),
        constraint=constraint_of(args),
        max_entries=args.count + 1 if args.count and not chosen else 0,
        since=args.since,
    )
    listed = [entry for entry in listed if all(entry.get(attr) in values for attr, values in chosen.items())]
    truncated = bool(args.count) and len(listed) > args.count
    return listed[: args.count] if truncated else listed, 0, truncated


def _chosen_here(args: Namespace) -> dict[str, list[str]]:
    """The values of attributes that job-list has no operator for, and that jobs are chosen by after listing."""
    chosen: dict[str, list[str]] = {}
    if args.name is not None:
        chosen["name"] = [args.name]
    if args.queue:
        chosen["queue"] = [name for names in args.queue for name in names.split(",")]
    return chosen


def _print_rows(shown: OutputFormat, rows: Sequence[Row], args: Namespace) -> None:
    width = args.width
    if width == 0:
        try:
            width = os.get_terminal_size().columns
        except OSError:  # no terminal: nothing to cut lines to
            width = -1
    lines = [] if args.no_header else [shown.header()]
    lines += [line for row in rows if (line := shown.row(row)).strip()]
    for line in lines:
        print(cut_line(line, width))


def _print_json(rows: Sequence[JobInfo], *, single: bool) -> None:
    objects = [row.as_json() for row in rows]
    if single:
        if objects:
            print(json.dumps(objects[0]))
    else:
        print(json.dumps({"jobs": objects}))


def _stats(args: Namespace) -> int:
    with Session(args.uri) as session, Explain("count jobs"):
        answer = session.call("job-list.job-stats", {}, idempotent=True)
    print(_stats_line(answer))
    states = _states(answer)
    return 0 if states.get("total", 0) - states.get("inactive", 0) > 0 else 1


def _stats_line(answer: WireMap) -> str:
    states = _states(answer)
    failed = sum(_int(answer.get(name)) for name in ("failed", "canceled", "timeout"))
    running = states.get("run", 0) + states.get("cleanup", 0)
    pending = sum(states.get(name, 0) for name in ("depend", "priority", "sched"))
    completed = _int(answer.get("successful"))
    return f"{running} running, {completed} completed, {failed} failed, {pending} pending"


def _states(answer: WireMap) -> dict[str, int]:
    states = answer.get("job_states")
    if not isinstance(states, dict):
        raise FluxresError("cannot count jobs: the broker's answer has no counts")
    return {name: _int(count) for name, count in states.items()}


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _username(userid: int, known: dict[int, str]) -> str:
    if userid not in known:
        from pwd import getpwuid

        try:
            known[userid] = getpwuid(userid).pw_name
        except KeyError:
            known[userid] = str(userid)
    return known[userid]
