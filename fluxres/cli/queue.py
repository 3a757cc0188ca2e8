"""`fluxres queue`: the job queue's status, and control of it (flux-queue(1)).

There is one queue, which has no name. It takes submissions while it is enabled, and gives resources to its jobs while
it is started; both survive restarts.

- `drain` waits until the queue is empty: no job is active.
- `idle` waits until nothing is under way: no job runs, and, unless the queue is stopped, none waits for resources
  (a held job, of priority 0, does not).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.cancel import STATES
from fluxres.cli.common import Explain, Parser, argument, field, parser, subcommands
from fluxres.cli.format import OutputFormat
from fluxres.cli.joblist import list_jobs
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction
    from collections.abc import Callable

    from fluxres.base.json import JsonObject
    from fluxres.cli.format import FieldValue
    from fluxres.wire.payload import WireMap

POLL_EVERY: Final = 0.2
"""Seconds between looks at the jobs, while waiting for their end."""
DISABLED: Final = "disabled by administrator"
"""The reason that is given for a disabled queue where none was said."""
TITLES: Final = {
    "queue": "QUEUE",
    "queuem": "QUEUE",
    "submission": "SUBMIT",
    "scheduling": "SCHED",
    "enabled": "EN",
    "started": "ST",
    "enabled.ascii": "EN",
    "started.ascii": "ST",
}
"""The fields of `list`, with flux-queue(1)'s names; there are no limits to show."""
FORMAT: Final = "{submission:>8} {scheduling:>8}"


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("queue", "Show and control the job queue")
    sub = subcommands(made)
    _add(sub, "status", "show whether the queue is enabled and started", _status)
    for name, what, run in (
        ("start", "give resources to jobs", _start),
        ("stop", "give no more resources to jobs; running ones run on", _stop),
        ("enable", "take submissions", _enable),
        ("disable", "take no more submissions", _disable),
    ):
        each = _add(sub, name, what, run)
        each.add_argument("-a", "--all", action="store_true", help="all queues: there is but one")
        each.add_argument("--quiet", action="store_true", help="do not show the new status")
        if name in ("stop", "disable"):
            each.add_argument("-m", "--message", metavar="REASON", help="why, as REASON does")
            each.add_argument("words", nargs="*", metavar="REASON", help="why: users are told")
    listing = _add(sub, "list", "list queues", _list)
    listing.add_argument("-n", "--no-header", action="store_true", help="no titles")
    listing.add_argument("-o", "--format", metavar="FORMAT", default=FORMAT, help=f"fields: {', '.join(TITLES)}")
    for name, what, run in (("idle", "wait until nothing is under way", _idle), ("drain", "wait until empty", _drain)):
        each = _add(sub, name, what, run)
        each.add_argument("--quiet", action="store_true", help="do not say how many jobs are left")
        each.add_argument(
            "--timeout", type=argument(parse_fsd), default=float("inf"), metavar="FSD", help="wait at most this long"
        )
    args = made.parse_args(argv)
    run_it: Callable[[Session, Namespace], int] = args.run
    with Session(args.uri) as session, Explain(f"{args.subcommand} the queue"):
        return run_it(session, args)


def _add(sub: _SubParsersAction[Parser], name: str, what: str, run: Callable[[Session, Namespace], int]) -> Parser:
    made = sub.add_parser(name, help=what, description=what.capitalize(), allow_abbrev=False)
    made.set_defaults(run=run)
    return made


# --- its status


def _ask(session: Session) -> WireMap:
    return session.call("job-manager.queue-status", {}, nodeid=0, idempotent=True)


def _status(session: Session, _args: Namespace) -> int:
    status = _ask(session)
    print(submission(status))
    print(scheduling(status))
    return 0


def submission(status: WireMap) -> str:
    """Words for whether submissions are taken."""
    return _words(
        "Job submission", "enabled" if field(status, "enable", bool) else "disabled", status, "disable_reason"
    )


def scheduling(status: WireMap) -> str:
    """Words for whether resources are given out."""
    return _words("Scheduling", "started" if field(status, "start", bool) else "stopped", status, "stop_reason")


def _words(what: str, how: str, status: WireMap, reason: str) -> str:
    why = status.get(reason)
    return f"{what} is {how}: {why}" if isinstance(why, str) and why else f"{what} is {how}"


def _list(session: Session, args: Namespace) -> int:
    shown = OutputFormat(args.format, TITLES.get)
    status = _ask(session)
    enabled, started = field(status, "enable", bool), field(status, "start", bool)
    values: dict[str, FieldValue] = {
        "queue": "",
        "queuem": "",
        "submission": "enabled" if enabled else "disabled",
        "scheduling": "started" if started else "stopped",
        "enabled": "✔" if enabled else "✗",
        "started": "✔" if started else "✗",
        "enabled.ascii": "y" if enabled else "n",
        "started.ascii": "y" if started else "n",
    }
    shown.fit([values.__getitem__], with_header=not args.no_header)
    if not args.no_header:
        print(shown.header())
    print(shown.row(values.__getitem__))
    return 0


# --- control


def _start(session: Session, args: Namespace) -> int:
    return _change(session, args, "start", True, scheduling)


def _stop(session: Session, args: Namespace) -> int:
    return _change(session, args, "start", False, scheduling, _reason(args))


def _enable(session: Session, args: Namespace) -> int:
    return _change(session, args, "enable", True, submission)


def _disable(session: Session, args: Namespace) -> int:
    return _change(session, args, "enable", False, submission, _reason(args) or DISABLED)


def _reason(args: Namespace) -> str:
    if args.words and args.message is not None:
        raise FluxresError(f"cannot {args.subcommand} the queue: the reason is given twice")
    return " ".join(args.words) if args.message is None else str(args.message)


def _change(
    session: Session, args: Namespace, key: str, on: bool, show: Callable[[WireMap], str], reason: str = ""
) -> int:
    """Set the queue's `key`, and say how it is then."""
    payload: WireMap = {key: on, **({"reason": reason} if reason else {})}
    session.call(f"job-manager.queue-{key}", payload, nodeid=0, idempotent=True)
    if not args.quiet:
        print(show(_ask(session)))
    return 0


# --- waiting


def _drain(session: Session, args: Namespace) -> int:
    _wait(lambda: not _jobs(session, "active", limit=1), args, "be empty")
    return 0


def _idle(session: Session, args: Namespace) -> int:
    _wait(lambda: _is_idle(session), args, "be idle")
    left = len(_jobs(session, "active"))
    if left or not args.quiet:
        print(f"{left} jobs")
    return 0


def _is_idle(session: Session) -> bool:
    """Whether nothing is under way. Jobs go from waiting to running meanwhile, so what runs is asked for last, too."""
    if _jobs(session, "running", limit=1):
        return False
    if field(_ask(session), "start", bool) and any(job.get("priority") for job in _jobs(session, "sched")):
        return False
    return not _jobs(session, "running", limit=1)


def _jobs(session: Session, states: str, limit: int = 0) -> list[JsonObject]:
    """All users' jobs in some states."""
    return list_jobs(session, attrs=["priority"], constraint={"states": [STATES[states]]}, max_entries=limit)


def _wait(done: Callable[[], bool], args: Namespace, what: str) -> None:
    """Look until it is done. Raises FluxresError at the deadline."""
    deadline = time.monotonic() + args.timeout
    while not done():
        if time.monotonic() >= deadline:
            raise FluxresError(f"cannot wait longer for the queue to {what}: {format_fsd(args.timeout)} have passed")
        time.sleep(POLL_EVERY)
