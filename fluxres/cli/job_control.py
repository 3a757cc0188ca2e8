"""`fluxres job kill`, `job raise` and `job urgency`: act on jobs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from fluxres.base.jobid import parse_jobid
from fluxres.cli.common import Explain, argument, id_text, parser
from fluxres.cli.signals import parse_signal
from fluxres.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluxres.base.errors import RpcError
    from fluxres.base.jobid import JobId
    from fluxres.wire.payload import WireMap

CALLS_AT_ONCE: Final = 256
"""Jobs acted upon at a time."""
SEVERITY_MAX: Final = 7


def kill_main(argv: list[str]) -> int:
    """`fluxres job kill`."""
    options = parser("job", "Send a signal to running jobs.", usage="kill [-s SIG] JOBID…")
    options.add_argument("-s", "--signal", metavar="SIG", type=argument(parse_signal), default=15)
    options.add_argument("jobids", metavar="JOBID", nargs="+", type=argument(parse_jobid))
    args = options.parse_args(argv)
    with Session(args.uri) as session:
        requests: list[WireMap] = [{"id": jobid, "signum": args.signal} for jobid in args.jobids]
        return act(session, "job-manager.kill", args.jobids, requests, "fluxres-job", "signal")


def raise_main(argv: list[str]) -> int:
    """`fluxres job raise`."""
    options = parser("job", "Raise an exception on jobs.", usage="raise [OPTIONS] JOBID… [--] [NOTE…]")
    options.add_argument(
        "-t", "--type", metavar="TYPE", type=argument(parse_type), default="cancel", help="exception type (cancel)"
    )
    options.add_argument(
        "-s", "--severity", metavar="N", type=argument(parse_severity), default=0, help="0 (fatal) to 7 (0)"
    )
    options.add_argument("-m", "--message", metavar="NOTE", help="why")
    options.add_argument("words", metavar="JOBID… NOTE…", nargs="+")
    dashes = argv.index("--") if "--" in argv else len(argv)
    args = options.parse_args(argv[:dashes])
    jobids, note = split_note(args.words, argv[dashes + 1 :])
    if not jobids:
        options.error(f"{args.words[0]!r} is no jobid")
    if note and args.message is not None:
        options.error("the note is given twice")
    note = args.message if args.message is not None else note
    with Session(args.uri) as session:
        requests = [exception(jobid, args.type, args.severity, note) for jobid in jobids]
        return act(session, "job-manager.raise", jobids, requests, "fluxres-job", "raise an exception on")


def urgency_main(argv: list[str]) -> int:
    """`fluxres job urgency`."""
    from fluxres.cli.submit_args import parse_urgency

    options = parser("job", "Change a job's urgency.", usage="urgency [-v] JOBID N")
    options.add_argument("jobid", metavar="JOBID", type=argument(parse_jobid))
    options.add_argument("urgency", metavar="N", type=argument(parse_urgency), help="0 (hold) to 31 (expedite)")
    args = options.parse_args(argv)
    with Session(args.uri) as session, Explain(f"change the urgency of {id_text(args.jobid)}"):
        request: WireMap = {"id": args.jobid, "urgency": args.urgency}
        answer = session.call("job-manager.urgency", request, idempotent=True)
    if args.verbose:
        print(f"fluxres-job: old urgency was {answer.get('old_urgency')!r}", file=sys.stderr)
    return 0


def exception(jobid: JobId, kind: str, severity: int, note: str | None) -> WireMap:
    """The payload of `job-manager.raise`."""
    request: WireMap = {"id": jobid, "type": kind, "severity": severity}
    if note:
        request["note"] = note
    return request


def act(
    session: Session, topic: str, jobids: Sequence[JobId], requests: Sequence[WireMap], prog: str, verb: str
) -> int:
    """Make one call for each job, side by side; say which failed, and return 1 if one did."""
    waiting = list(zip(jobids, requests, strict=True))[::-1]
    handles: dict[int, JobId] = {}
    status = 0
    while waiting or handles:
        while waiting and len(handles) < CALLS_AT_ONCE:
            jobid, request = waiting.pop()
            handles[session.begin(topic, request)] = jobid
        reply = session.receive()
        if reply is None or reply.matchtag not in handles:
            continue
        jobid = handles.pop(reply.matchtag)
        if reply.error is not None:
            print(f"{prog}: {_why(verb, jobid, reply.error)}", file=sys.stderr)
            status = 1
    return status


def split_note(words: Sequence[str], rest: Sequence[str]) -> tuple[list[JobId], str]:
    """Jobids as far as there are some, then the note; `rest` is all note."""
    jobids: list[JobId] = []
    for index, word in enumerate(words):
        try:
            jobids.append(parse_jobid(word))
        except ValueError:
            return jobids, " ".join([*words[index:], *rest])
    return jobids, " ".join(rest)


def parse_severity(text: str) -> int:
    """An exception's severity (RFC 21). Raises ValueError."""
    if text.isascii() and text.isdigit() and int(text) <= SEVERITY_MAX:
        return int(text)
    raise ValueError(f"severity {text!r} is not 0 to {SEVERITY_MAX}")


def parse_type(text: str) -> str:
    """An exception's type (RFC 21): one word. Raises ValueError."""
    if not text or len(text.split()) != 1 or text != text.strip():
        raise ValueError(f"type {text!r} is not one word")
    return text


def _why(verb: str, jobid: JobId, error: RpcError) -> str:
    text = str(error)
    return text if text.startswith("cannot ") else f"cannot {verb} {id_text(jobid)}: {text}"
