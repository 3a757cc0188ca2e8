"""`fluxres cancel` and `fluxres job cancel`: raise a fatal exception of type `cancel` on jobs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import parse_jobid
from fluxres.cli.common import Explain, argument, parser
from fluxres.cli.job_control import act, exception
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.wire.payload import WireMap

STATES: Final = {
    "depend": 2,
    "priority": 4,
    "sched": 8,
    "run": 16,
    "cleanup": 32,
    "pending": 2 | 4 | 8,
    "running": 16 | 32,
    "active": 2 | 4 | 8 | 16 | 32,
}
"""Job states by name, as the masks that they are on the wire."""
USERID_ALL: Final = 0xFFFFFFFF
"""Stands for all users."""


def main(argv: list[str], command: str = "cancel") -> int:
    """`fluxres cancel`."""
    options = parser(command, "Cancel jobs.", usage="[OPTIONS] JOBID… | --all")
    add = options.add_argument
    add("--all", action="store_true", help="cancel all jobs of yours")
    add("-n", "--dry-run", action="store_true", help="only say how many would be cancelled")
    add("-q", "--quiet", action="store_true", help="say nothing when there is no job to cancel")
    add("-u", "--user", metavar="USER", help="with --all: jobs of USER, or of 'all'")
    add("-S", "--states", metavar="STATES", type=argument(parse_states), help="with --all: jobs in STATES")
    add("-m", "--message", metavar="NOTE", help="why")
    add("jobids", metavar="JOBID", nargs="*", type=argument(parse_jobid))
    args = options.parse_args(argv)
    everything = args.all or args.user is not None or args.states is not None
    if bool(args.jobids) == everything:
        options.error("give either jobids or --all")
    if everything:
        return _cancel_all(args, command)
    if args.dry_run:
        print(f"fluxres-{command}: would cancel {_jobs(len(args.jobids))}", file=sys.stderr)
        return 0
    with Session(args.uri) as session:
        requests = [exception(jobid, "cancel", 0, args.message) for jobid in args.jobids]
        return act(session, "job-manager.raise", args.jobids, requests, f"fluxres-{command}", "cancel")


def parse_states(text: str) -> int:
    """The mask of states separated by commas. Raises ValueError."""
    mask = 0
    for name in text.lower().split(","):
        if name not in STATES:
            raise ValueError(f"state {name!r} is none of {', '.join(STATES)}")
        mask |= STATES[name]
    return mask


def userid_of(user: str | None) -> int:
    """A user's id from the name or number, this user's by default. Raises FluxresError."""
    if user is None:
        return os.getuid()
    if user == "all":
        return USERID_ALL
    if user.isascii() and user.isdigit():
        return int(user)
    from pwd import getpwnam

    try:
        return getpwnam(user).pw_uid
    except KeyError as error:
        raise FluxresError(f"cannot find user {user!r}: there is no such user") from error


def _cancel_all(args: Namespace, command: str) -> int:
    request: WireMap = {
        "dry_run": args.dry_run,
        "userid": userid_of(args.user),
        "states": STATES["active"] if args.states is None else args.states,
        "severity": 0,
        "type": "cancel",
    }
    if args.message:
        request["note"] = args.message
    with Session(args.uri) as session, Explain("cancel jobs"):
        answer = session.call("job-manager.raiseall", request, idempotent=True)
    count, errors = _number(answer.get("count")), _number(answer.get("errors"))
    if count or not args.quiet:
        did = "would cancel" if args.dry_run else "cancelled"
        failed = f", {_jobs(errors)} could not be" if errors else ""
        print(f"fluxres-{command}: {did} {_jobs(count)}{failed}", file=sys.stderr)
    return 1 if errors else 0


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"
