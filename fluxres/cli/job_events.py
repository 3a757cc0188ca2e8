"""`fluxres job eventlog` and `fluxres job wait-event`: show a job's events, or wait for one."""

from __future__ import annotations

import errno
import json
import time
from typing import TYPE_CHECKING, NamedTuple

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event, decode
from fluxres.base.fsd import parse_fsd
from fluxres.base.jobid import JobId, parse_jobid
from fluxres.cli.common import argument, id_text, parser, positive
from fluxres.cli.eventfmt import TIME_FORMATS, EventFormat
from fluxres.cli.watch import END_EVENTS, WAITCREATE, WATCH, event_of, full_path, watch_payload
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.base.json import JsonValue
    from fluxres.cli.common import Parser


class Match(NamedTuple):
    """The event to wait for: the `times`th of this name, with `key` being `value` in its context."""

    name: str
    key: str | None = None
    value: str = ""
    times: int = 1

    def fits(self, event: Event) -> bool:
        """Whether an event is one of those that count."""
        if event.name != self.name:
            return False
        if self.key is None:
            return True
        if self.key not in event.context:
            return False
        found = event.context[self.key]
        return self.value in (found, json.dumps(found, separators=(",", ":")))


def eventlog_main(argv: list[str]) -> int:
    """`fluxres job eventlog`."""
    options = parser("job", "Show a job's eventlog.", usage="eventlog [OPTIONS] JOBID")
    options.add_argument("-F", "--follow", action="store_true", help="show events as they come, to the last")
    _add_format_options(options)
    options.add_argument("jobid", metavar="JOBID", type=argument(parse_jobid))
    args = options.parse_args(argv)
    path, shown = full_path(args.path), _format(args)
    with Session(args.uri) as session:
        if args.follow:
            _watch(session, args.jobid, path, shown, match=None, show_all=True, flags=WAITCREATE)
            return 0
        for event in _lookup(session, args.jobid, path):
            print(shown.line(event))
    return 0


def wait_event_main(argv: list[str]) -> int:
    """`fluxres job wait-event`."""
    options = parser("job", "Wait for an event of a job.", usage="wait-event [OPTIONS] JOBID EVENT")
    add = options.add_argument
    add("-t", "--timeout", metavar="FSD", type=argument(parse_fsd), help="give up after this long")
    add("-m", "--match-context", metavar="KEY=VAL", type=argument(_key_value), help="only with this context")
    add("-c", "--count", metavar="N", type=positive, default=1, help="wait for the Nth such event (1)")
    add("-q", "--quiet", action="store_true", help="do not print the event")
    add("-W", "--waitcreate", action="store_true", help="wait for the eventlog to be there")
    _add_format_options(options)
    add("jobid", metavar="JOBID", type=argument(parse_jobid))
    add("event", metavar="EVENT")
    args = options.parse_args(argv)
    key, value = args.match_context or (None, "")
    match = Match(args.event, key, value, args.count)
    with Session(args.uri) as session:
        found = _watch(
            session,
            args.jobid,
            full_path(args.path),
            _format(args),
            match=match,
            show_all=args.verbose > 0,
            quiet=args.quiet,
            timeout=args.timeout,
            flags=WAITCREATE if args.waitcreate else 0,
        )
    if not found:
        raise FluxresError(f"cannot wait for event {args.event!r} of {id_text(args.jobid)}: it never came")
    return 0


def _add_format_options(options: Parser) -> None:
    add = options.add_argument
    add("-f", "--format", metavar="FORMAT", choices=("text", "json"), default="text", help="text or json")
    add("-T", "--time-format", choices=TIME_FORMATS, default="raw", help="raw, offset, iso or human")
    add("-H", "--human", action="store_true", help="the same as --time-format=human")
    add("-p", "--path", metavar="PATH", default="eventlog", help="another eventlog: exec, output, or its path")


def _format(args: Namespace) -> EventFormat:
    return EventFormat("human" if args.human else args.time_format, as_json=args.format == "json")


def _lookup(session: Session, jobid: JobId, path: str) -> list[Event]:
    try:
        found = session.call("job-info.lookup", {"id": jobid, "keys": [path], "flags": 0}, idempotent=True)
    except RpcError as error:
        raise _no_log(f"show {path}", jobid, path, error) from error
    log: JsonValue | object = found.get(path, "")
    try:
        return decode(log) if isinstance(log, str) else []
    except ValueError as error:
        raise FluxresError(f"cannot show {path} of {id_text(jobid)}: {error}") from error


def _watch(
    session: Session,
    jobid: JobId,
    path: str,
    shown: EventFormat,
    *,
    match: Match | None,
    show_all: bool,
    quiet: bool = False,
    timeout: float | None = None,
    flags: int = 0,
) -> bool:
    """Show events up to the one that matches, or to the eventlog's end; whether one matched."""
    deadline = None if timeout is None else time.monotonic() + timeout
    handle = session.begin(WATCH, watch_payload(jobid, path, flags), streaming=True)
    matches = 0
    while True:
        reply = session.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if reply is None:
            name = match.name if match is not None else END_EVENTS.get(path, "end")
            raise FluxresError(f"cannot wait any longer for event {name!r} of {id_text(jobid)}: {timeout:g}s are over")
        if reply.matchtag != handle:
            continue
        if reply.error is not None:
            if reply.error.errnum == errno.ENODATA:
                return False
            what = f"show {path}" if match is None else f"wait for event {match.name!r}"
            raise _no_log(what, jobid, path, reply.error) from reply.error
        event = event_of(reply.payload)[0]
        matched = match is not None and match.fits(event)
        matches += matched
        last = match is not None and matches == match.times
        if show_all or (last and not quiet):
            print(shown.line(event), flush=True)
        else:
            shown.skip(event)
        if last:
            session.end(handle)
            return True


def _no_log(what: str, jobid: JobId, path: str, error: RpcError) -> FluxresError:
    if error.errnum != errno.ENOENT:
        why = error.text
    else:
        why = "no such job" if path == "eventlog" else "the job is unknown or has none (yet)"
    return FluxresError(f"cannot {what} of {id_text(jobid)}: {why}")


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is not KEY=VAL")
    return key, value
