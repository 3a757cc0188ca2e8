"""`fluxres run`: submit a job, show its output, and exit with its status."""

from __future__ import annotations

import sys

from fluxres.cli.common import Explain, id_text, parser
from fluxres.cli.follow import FollowOptions
from fluxres.cli.job_attach import Attachment
from fluxres.cli.submit import SUBMIT, jobid_of
from fluxres.cli.submit_args import add_job_options, check, draw_key, jobspec_of, submit_request
from fluxres.session import Session


def main(argv: list[str]) -> int:
    """`fluxres run`."""
    options = parser("run", "Run a job and wait for it.", usage="[OPTIONS] COMMAND …")
    options.add_argument("--wait-event", metavar="EVENT", default="finish", help="wait for EVENT (finish)")
    options.add_argument("--quiet", action="store_true", help="do not say where output was redirected")
    add_job_options(options)
    args = options.parse_args(argv)
    check(args, options)
    jobspec = jobspec_of(args)
    if args.dry_run:
        import json

        print(json.dumps(jobspec))
        return 0
    wanted = FollowOptions(
        prog="fluxres-run",
        label=args.label_io,
        quiet=args.quiet,
        show_events=args.verbose > 1,
        show_exec=args.verbose > 2,
        wait_event=args.wait_event,
    )
    with Session(args.uri) as session:
        request = submit_request(args, jobspec, args.key or draw_key())
        with Explain("submit"):
            jobid = jobid_of(session.call(SUBMIT, request, idempotent=True))
        if args.verbose:
            print(f"jobid: {id_text(jobid)}", file=sys.stderr, flush=True)
        # With a key of the user's the job may be one that already had input.
        return Attachment(session, jobid, wanted, stdin=args.input is None, from_start=args.key is None).run()
