"""`fluxres job info`, `job last` and `job id`: look things up about jobs."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from typing import Final

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import dothex, f58, kvs_path, parse_jobid
from fluxres.cli.common import argument, id_text, parser
from fluxres.cli.joblist import own_jobs
from fluxres.cli.watch import full_path
from fluxres.session import Session

FORMS: Final[Mapping[str, Callable[[int], str]]] = {
    "f58": id_text,
    "f58plain": lambda jobid: f58(jobid, ascii=True),
    "dec": str,
    "hex": lambda jobid: f"{jobid:#x}",
    "dothex": dothex,
    "kvs": lambda jobid: kvs_path(jobid),
}
"""The text forms of a jobid (RFC 19)."""
LATEST: Final = (None, 1, None)
"""The slice that is the latest job alone."""
CURRENT: Final = 2
"""flux-core's lookup flag: with the updates that the eventlog has made."""
_SLICE: Final = re.compile(r"\[(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?\]")


def info_main(argv: list[str]) -> int:
    """`fluxres job info`."""
    options = parser("job", "Show an object of a job.", usage="info [--base] JOBID KEY")
    options.add_argument("-b", "--base", action="store_true", help="jobspec or R as first made, without updates")
    options.add_argument("jobid", metavar="JOBID", type=argument(parse_jobid))
    options.add_argument(
        "key", metavar="KEY", help="jobspec, R, eventlog, guest.exec.eventlog, guest.input, guest.output"
    )
    args = options.parse_args(argv)
    key = full_path(args.key)
    with Session(args.uri) as session:
        try:
            request = {"id": args.jobid, "keys": [key], "flags": 0 if args.base else CURRENT}
            found = session.call("job-info.lookup", request, idempotent=True)
        except RpcError as error:
            why = "no such job, or it has none" if error.errnum == errno.ENOENT else error.text
            raise FluxresError(f"cannot show {key} of {id_text(args.jobid)}: {why}") from error
    text = found.get(key)
    if not isinstance(text, str):
        raise FluxresError(f"cannot show {key} of {id_text(args.jobid)}: the broker's answer is without it")
    print(text.removesuffix("\n"))
    return 0


def last_main(argv: list[str]) -> int:
    """`fluxres job last`."""
    options = parser("job", "Show the latest jobids.", usage="last [N | [START:STOP:STEP]]")
    options.add_argument("which", metavar="N|SLICE", nargs="?", type=argument(parse_which), default=LATEST)
    args = options.parse_args(argv)
    with Session(args.uri) as session:
        jobids = own_jobs(session)
    if not jobids:
        raise FluxresError("cannot show the last job: there is none")
    start, stop, step = args.which
    for jobid in jobids[start:stop:step]:
        print(id_text(jobid))
    return 0


def id_main(argv: list[str]) -> int:
    """`fluxres job id`."""
    options = parser("job", "Convert jobids.", usage="id [--to FORM] JOBID…", connects=False)
    options.add_argument("--to", choices=FORMS, default="dec", help=", ".join(FORMS))
    options.add_argument("jobids", metavar="JOBID", nargs="+", type=argument(parse_jobid))
    args = options.parse_args(argv)
    for jobid in args.jobids:
        print(FORMS[args.to](jobid))
    return 0


def parse_which(text: str) -> tuple[int | None, int | None, int | None]:
    """Which of the jobs, the latest first: a number, or the slice [START:STOP:STEP]. Raises ValueError."""
    if text.isascii() and text.isdigit():
        return None, int(text), None
    match = _SLICE.fullmatch(text)
    if match is None or match[3] == "0":
        raise ValueError(f"{text!r} is neither a number nor a slice such as [0:4]")
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    return start, stop, step
