"""`fluxres job wait` and `fluxres job status`: wait for jobs to end, and say how they did.

Both only read eventlogs, so they can be repeated, and they survive the death of their broker.
"""

from __future__ import annotations

import errno
import json
import sys
from typing import TYPE_CHECKING, Final

from fluxres.base.jobid import JobId, parse_jobid
from fluxres.cli.cancel import STATES
from fluxres.cli.common import argument, id_text, parser, whole_number
from fluxres.cli.joblist import own_jobs
from fluxres.cli.outcome import Outcome
from fluxres.cli.watch import watch_jobs
from fluxres.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


EXIT_CANNOT_WAIT: Final = 2
"""`job wait`: there is no such job, which is not the same as one that failed."""


def outcomes(session: Session, jobids: Iterable[JobId], *, until: str = "clean") -> Iterator[tuple[JobId, Outcome]]:
    """How each job ended, in the order in which they did; with `until`, as far as that event tells."""
    found: dict[int, Outcome] = {}
    for item in watch_jobs(session, jobids, until=until):
        outcome = found.setdefault(item.jobid, Outcome())
        if item.event is not None:
            outcome.take(item.event)
            continue
        if item.error is not None:
            outcome.error = item.error
        yield JobId(item.jobid), found.pop(item.jobid)


def wait_main(argv: list[str]) -> int:
    """`fluxres job wait`: exit 0 if all succeeded, 1 if one failed, 2 if there is no such job.

    With --all the jobs count that are active when it begins: not those that were over, or that are submitted later.
    """
    options = parser("job", "Wait for jobs to end.", usage="wait [-v] --all | JOBID…")
    options.add_argument("-a", "--all", action="store_true", help="wait for all jobs of yours that are active now")
    options.add_argument("jobids", metavar="JOBID", nargs="*", type=argument(parse_jobid))
    args = options.parse_args(argv)
    if bool(args.jobids) == args.all:
        options.error("give either jobids or --all")
    status = 0
    with Session(args.uri) as session:
        jobids = own_jobs(session, states=STATES["active"]) if args.all else args.jobids
        for jobid, outcome in outcomes(session, jobids):
            if outcome.error is not None and outcome.error.errnum == errno.ENOENT:
                print(f"fluxres-job: cannot wait for {id_text(jobid)}: no such job", file=sys.stderr)
                status = EXIT_CANNOT_WAIT
            elif not outcome.success:
                print(f"fluxres-job: {id_text(jobid)}: {outcome.words()}", file=sys.stderr)
                status = max(status, 1)
            elif args.verbose:
                print(f"fluxres-job: {id_text(jobid)}: {outcome.words()}", file=sys.stderr)
    return status


def status_main(argv: list[str]) -> int:
    """`fluxres job status`: exit with the highest exit code of the jobs."""
    options = parser("job", "Wait for jobs to end and exit with their status.", usage="status [OPTIONS] JOBID…")
    options.add_argument(
        "-e",
        "--exception-exit-code",
        metavar="N",
        type=whole_number,
        default=1,
        help="after an exception (1)",
    )
    options.add_argument("-j", "--json", action="store_true", help="print each result as JSON")
    options.add_argument("jobids", metavar="JOBID", nargs="+", type=argument(parse_jobid))
    args = options.parse_args(argv)
    highest = 0
    with Session(args.uri) as session:
        results = dict(outcomes(session, args.jobids))
    for jobid in dict.fromkeys(args.jobids):
        outcome = results[jobid]
        if outcome.error is not None:
            why = "no such job" if outcome.error.errnum == errno.ENOENT else outcome.error.text
            print(f"fluxres-job: cannot tell the status of {id_text(jobid)}: {why}", file=sys.stderr)
            highest = max(highest, 1)
            continue
        if args.json:
            print(json.dumps(outcome.as_json(jobid)))
        code = outcome.exit_code(args.exception_exit_code)
        if args.verbose > 1 or (args.verbose and code):
            print(f"fluxres-job: {id_text(jobid)}: {outcome.words()}", file=sys.stderr)
        highest = max(highest, code)
    return highest
