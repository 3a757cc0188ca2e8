"""`fluxres submit`: submit one job, or one for each id of --cc, print the jobids, and wait where asked to.

Submissions are pipelined: up to `SUBMITS_AT_ONCE` are out at a time, over one connection. Each carries a key,
so that one whose answer was lost with its broker is simply asked again and gives the same jobid.
"""

from __future__ import annotations

import sys
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId
from fluxres.cli.common import argument, id_text, parser
from fluxres.cli.submit_args import (
    add_job_options,
    check,
    draw_key,
    jobspec_of,
    submit_request,
    uses_cc,
    with_cc,
)
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Iterator

    from fluxres.base.errors import RpcError
    from fluxres.base.json import JsonObject
    from fluxres.cli.outcome import Outcome
    from fluxres.wire.payload import WireMap

SUBMIT: Final = "job-ingest.submit"
SUBMITS_AT_ONCE: Final = 256
"""Submissions that are out without an answer; also the most answers kept for an earlier one to come first."""


def main(argv: list[str]) -> int:
    """`fluxres submit`."""
    options = parser("submit", "Submit a job and print its jobid.", usage="[OPTIONS] COMMAND …")
    add = options.add_argument
    add(
        "--cc",
        metavar="IDSET",
        type=argument(_ids),
        help="one job for each id; {cc} and FLUX_JOB_CC are the id",
    )
    add("--bcc", metavar="IDSET", type=argument(_ids), help="like --cc, without FLUX_JOB_CC")
    add("--wait", dest="wait_event", action="store_const", const="clean", help="wait for the jobs to end")
    add("--wait-event", metavar="EVENT", help="wait for EVENT of each job")
    add("--quiet", action="store_true", help="print no jobids")
    add_job_options(options)
    args = options.parse_args(argv)
    check(args, options)
    if args.cc is not None and args.bcc is not None:
        options.error("--cc and --bcc exclude each other")
    if args.dry_run:
        return _dry_run(args)
    requests = _requests(args)
    first = list(islice(requests, 1))  # what no jobspec can be made of needs no instance to be refused
    with Session(args.uri) as session:
        jobids, failures = _submit(session, chain(first, requests), quiet=args.quiet)
        if args.wait_event is None:
            return 1 if failures else 0
        return max(1 if failures else 0, _wait(session, jobids, args.wait_event))


def submit_all(session: Session, requests: Iterable[WireMap]) -> Iterator[JobId | RpcError]:
    """Submit each request; what became of each, in order. Raises FluxresError as `Session` does."""
    source = enumerate(requests)
    handles: dict[int, int] = {}
    done: dict[int, JobId | RpcError] = {}
    asked = given = 0
    more = True
    while more or given < asked:
        while more and asked - given < SUBMITS_AT_ONCE:
            entry = next(source, None)
            if entry is None:
                more = False
            else:
                handles[session.begin(SUBMIT, entry[1])] = entry[0]
                asked += 1
        if given in done:
            yield done.pop(given)
            given += 1
        elif given < asked and (reply := session.receive()) is not None and reply.matchtag in handles:
            done[handles.pop(reply.matchtag)] = reply.error or jobid_of(reply.payload)


def jobid_of(payload: WireMap) -> JobId:
    """The jobid in the answer to a submission. Raises FluxresError where there is none."""
    value = payload.get("id")
    if not isinstance(value, int):
        raise FluxresError("cannot submit: the broker's answer has no jobid")
    return JobId(value)


def _submit(session: Session, requests: Iterable[WireMap], *, quiet: bool) -> tuple[list[JobId], int]:
    """Submit everything, printing each jobid when it is known; returns them, and how many failed."""
    jobids: list[JobId] = []
    failures = 0
    for outcome in submit_all(session, requests):
        if isinstance(outcome, int):
            jobids.append(outcome)
            if not quiet:
                print(id_text(outcome))
        else:
            failures += 1
            print(f"fluxres-submit: {_why(outcome)}", file=sys.stderr)
    sys.stdout.flush()
    return jobids, failures


def _requests(args: Namespace) -> Iterator[WireMap]:
    key = args.key or draw_key()
    ids = args.cc if args.cc is not None else args.bcc
    if ids is None:
        yield submit_request(args, jobspec_of(args), key)
        return
    tell = args.cc is not None
    common: JsonObject | None = None if uses_cc(args) else jobspec_of(args)
    for each in ids:
        jobspec = common or jobspec_of(args, each)
        yield submit_request(args, with_cc(jobspec, each) if tell else jobspec, f"{key}#{each}")


def _wait(session: Session, jobids: list[JobId], event: str) -> int:
    """Wait for `event` of each job; the highest exit code."""
    from fluxres.cli.job_wait import outcomes

    highest = 0
    for jobid, outcome in outcomes(session, jobids, until=event):
        code = _exit_code(outcome, event)
        if code:
            why = outcome.words() if event == "clean" or event in outcome.seen else f"event {event!r} never came"
            print(f"fluxres-submit: {id_text(jobid)}: {why}", file=sys.stderr)
        highest = max(highest, code)
    return highest


def _exit_code(outcome: Outcome, event: str) -> int:
    if event in outcome.seen and outcome.status is None and outcome.exception is None:
        return 0  # it was there and the job goes on
    return outcome.exit_code()


def _dry_run(args: Namespace) -> int:
    import json

    ids = args.cc if args.cc is not None else args.bcc
    for each in [None] if ids is None else ids:
        jobspec = jobspec_of(args, each)
        print(json.dumps(jobspec if each is None or args.cc is None else with_cc(jobspec, each)))
    return 0


def _why(error: RpcError) -> str:
    return error.text if error.text.startswith("cannot ") else f"cannot submit: {error.text}"


def _ids(text: str) -> list[int]:
    from fluxres.base.idset import IdSet

    return list(IdSet.parse(text))
