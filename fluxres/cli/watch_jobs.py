"""`fluxres watch`: show the output of jobs, and how far they are, until they have ended (flux-watch(1)).

Which jobs are watched is settled at the beginning. States come from the status feed (`fluxres.cli.feed`), one stream
for all jobs; output comes from `job-info.eventlog-watch`, for `STREAMS` jobs at a time, each as soon as it runs. A job
that has left the feed, which has only the latest of those that ended, is looked up once more. When the broker dies,
that is said, and all goes on where it was once it is back.

Exit status: the highest of the jobs', 0 where there are none to watch, 1 for a job that cannot be watched.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import RpcError
from fluxres.base.jobid import parse_jobid
from fluxres.cli.common import Explain, UsageError, argument, id_text, parser, printable, whole_number
from fluxres.cli.eventfmt import EventFormat
from fluxres.cli.feed import Feed
from fluxres.cli.feed_jobs import as_entry
from fluxres.cli.joblist import IDS_AT_ONCE, find_jobs, list_jobs, unknown
from fluxres.cli.jobs import COUNT, FILTER_STATES, parse_filter, parse_since
from fluxres.cli.uptime import short
from fluxres.cli.watch import WAITCREATE, WATCH, event_of, watch_payload
from fluxres.cli.watch_output import JobOutput, Sink
from fluxres.cli.watch_state import WatchedJob, count, progress
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterable

    from fluxres.base.json import JsonObject
    from fluxres.cli.common import Parser
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import WireMap

PROG: Final = "fluxres-watch"
STREAMS: Final = 256
"""Jobs whose output is followed at a time; the next ones follow as these end."""
REDRAW: Final = 0.25
"""Seconds between two lines of progress."""
EVENTLOG: Final = "eventlog"
OUTPUT: Final = "guest.output"
FAILED: Final = 1
ATTRS: Final = ["all"]
_STATES: Final = ("active", "pending", "running", "inactive", "all")
"""Options that choose jobs by state."""


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _options().parse_args(argv)
    filtered = bool(args.filter or args.since or any(getattr(args, f"only_{name}") for name in _STATES))
    if not args.jobids and not filtered:
        raise UsageError("cannot choose jobs: give jobids, --active, --all, --filter or --since")
    if args.since > time.time():
        raise UsageError("cannot choose jobs: --since is in the future")
    sink = Sink(progress=args.progress and os.isatty(1))
    if args.jobids and filtered:
        sink.say(f"{PROG}: the options that choose jobs are ignored where jobids are given")
    if args.progress and not sink.progress:
        sink.say(f"{PROG}: standard output is no terminal: --progress is ignored")
    with Session(args.uri) as session:
        with Explain("choose jobs"):
            entries, status = _choose(session, args, sink)
            began = _began(session, args, entries)
        watching = Watching(session, sink, entries, began, args)
        try:
            return max(status, watching.run())
        finally:
            sink.close()


def _options() -> Parser:
    made = parser("watch", "Show the output of jobs until they have ended.", usage="[OPTIONS] [JOBID …]")
    add = made.add_argument
    add("-a", "--active", dest="only_active", action="store_true", help="jobs that are active now")
    add("-A", "--all", dest="only_all", action="store_true", help="all jobs, those that have ended included")
    for name in ("pending", "running", "inactive"):
        add(f"--{name}", dest=f"only_{name}", action="store_true", help=f"{name} jobs")
    add("-c", "--count", metavar="N", type=whole_number, default=COUNT, help=f"at most N jobs ({COUNT}, 0: all)")
    add("-f", "--filter", metavar="STATE|RESULT", action="append", type=argument(parse_filter), default=[])
    add("--since", metavar="WHEN", type=argument(parse_since), default=0.0, help="active since (-FSD, seconds)")
    add("--progress", action="store_true", help="show how many jobs wait, run and have ended")
    add("--jps", action="store_true", help="with --progress: jobs per second, not the time")
    add("-l", "--label-io", action="store_true", help="put each line's job and task rank before it")
    add("jobids", metavar="JOBID", nargs="*", type=argument(parse_jobid), help="these jobs")
    return made


# --- which jobs


def _choose(session: Session, args: Namespace, sink: Sink) -> tuple[list[JsonObject], int]:
    """The entries of the jobs to watch, oldest first, and 1 where some that were asked for are not there."""
    if args.jobids:
        jobids = list(dict.fromkeys(args.jobids))
        found = list(zip(jobids, find_jobs(session, jobids, ATTRS), strict=True))
        for jobid, answer in found:
            if isinstance(answer, RpcError):
                sink.say(f"{PROG}: {unknown(jobid, answer)}")
        entries = [answer for _, answer in found if not isinstance(answer, RpcError)]
        return entries, FAILED if len(entries) < len(found) else 0
    limit = args.count + 1 if args.count else 0
    entries = list_jobs(session, attrs=ATTRS, constraint=constraint_of(args), max_entries=limit, since=args.since)
    if args.count and len(entries) > args.count:
        del entries[args.count :]
        sink.say(f"{PROG}: only the latest {args.count} jobs are watched (-c 0 watches all)")
    return sorted(entries, key=lambda entry: cast("int", entry["id"])), 0


def constraint_of(args: Namespace) -> WireMap:
    """The constraint of `job-list.list` that the options make: this user's jobs in these states or with these results.

    `--since` alone means all jobs.
    """
    states = results = 0
    for some_states, some_results in args.filter:
        states, results = states | some_states, results | some_results
    for name in _STATES:
        if getattr(args, f"only_{name}"):
            states |= _mask(name)
    states = states or (0 if results else _mask("all"))
    wanted: list[WireMap] = [{"states": [states]}] if states else []
    wanted += [{"results": [results]}] if results else []
    return {"and": [{"userid": [os.getuid()]}, {"or": [*wanted]}]}


def _mask(name: str) -> int:
    if name == "all":
        return FILTER_STATES["pending"] | FILTER_STATES["running"] | FILTER_STATES["inactive"]
    return FILTER_STATES[name] if name != "active" else FILTER_STATES["pending"] | FILTER_STATES["running"]


def _began(session: Session, args: Namespace, entries: Iterable[JsonObject]) -> float:
    """When the time of `--progress` begins: with the instance for all jobs, else with the first submit."""
    began: float = args.since
    if args.only_all or began:
        answer = session.call("attr.get", {"name": "broker.starttime"}, nodeid=0, idempotent=True)
        return max(float(str(answer.get("value", 0.0))), began)
    return min((WatchedJob(entry).info.number("t_submit") for entry in entries), default=time.time())


# --- watching them


class Watching:
    """Jobs that are watched until they have ended."""

    def __init__(
        self, session: Session, sink: Sink, entries: Iterable[JsonObject], began: float, args: Namespace
    ) -> None:
        self._session = session
        self._sink = sink
        self._args = args
        self._began = began
        self._jobs = {job.id: job for job in map(WatchedJob, entries)}
        self._zero = min((job.info.number("t_submit") for job in self._jobs.values()), default=0.0)
        self._documents: dict[int, JsonObject] = {}
        self._queue: deque[int] = deque()
        self._following: dict[int, set[int]] = {}
        """Jobs that are followed, and the requests for their eventlogs."""
        self._followed: set[int] = set()
        self._missing: deque[int] = deque()
        self._asked: set[int] = set()
        """Jobs that are looked up, those in `_missing` as soon as others have been."""
        self._answers: dict[int, Callable[[Reply], None]] = {}
        self._feed: Feed | None = None
        self._away = False
        self._left = set(self._jobs)
        self._status = 0

    def run(self) -> int:
        """Watch until the last job has ended; the exit status. Raises FluxresError."""
        if self._args.verbose:
            self._sink.say(f"{PROG}: watching {len(self._jobs)} job{'' if len(self._jobs) == 1 else 's'}")
        if any(not job.ended for job in self._jobs.values()):
            self._feed = Feed(self._session, ["jobs"])
        for job in list(self._jobs.values()):
            self._advance(job)
        redraw = 0.0
        while self._left:
            now = time.monotonic()
            if self._sink.progress and now >= redraw:
                self._show()
                redraw = now + REDRAW
            self._take(self._session.receive(self._wait(redraw)))
        self._show()
        return self._status

    def _wait(self, redraw: float) -> float | None:
        waits = [max(0.0, redraw - time.monotonic())] if self._sink.progress else []
        retry = None if self._feed is None else self._feed.poll_timeout()
        return min([*waits, *([retry] if retry is not None else [])], default=None)

    def _show(self) -> None:
        if self._sink.progress:
            away = None if self._feed is None else self._feed.link().away_for
            said = "" if away is None else short(away)
            elapsed = time.time() - self._began
            counts = count(self._jobs.values())
            self._sink.show(progress(counts, elapsed, self._sink.width, jps=self._args.jps, away=said))

    def _take(self, reply: Reply | None) -> None:
        feed = self._feed
        if feed is not None:
            feed.tick()
        if reply is None:
            return
        take = self._answers.get(reply.matchtag)
        if take is not None:
            if reply.last:
                del self._answers[reply.matchtag]
            take(reply)
        elif feed is not None and feed.take(reply):
            self._notice(feed)
            if feed.first and not feed.away:
                self._look(feed)

    # --- states

    def _notice(self, feed: Feed) -> None:
        """Say that the broker is away, or that it is back."""
        if feed.away == self._away:
            return
        self._away = feed.away
        if self._sink.progress:
            self._show()
        elif self._away:
            self._sink.say(f"{PROG}: the broker is away ({printable(feed.why)}); waiting for it")
        else:
            self._sink.say(f"{PROG}: the broker is back after {short(feed.link().gap)}")

    def _look(self, feed: Feed) -> None:
        """See how far the jobs are by now."""
        documents = feed.docs.get("jobs", {})
        for jobid in list(self._left):
            job = self._jobs[jobid]
            if job.ended:
                continue
            document = documents.get(str(jobid))
            if document is None:
                self._look_up(job)
            elif self._documents.get(jobid) is not document:
                self._documents[jobid] = document
                job.update(as_entry(document))
                self._advance(job)

    def _look_up(self, job: WatchedJob) -> None:
        """Ask what became of a job that the feed does not show any more, or not yet."""
        if job.id in self._asked:
            return
        self._asked.add(job.id)
        self._missing.append(job.id)
        self._ask_more()

    def _ask_more(self) -> None:
        while self._missing and len(self._asked) - len(self._missing) < IDS_AT_ONCE:
            self._ask(self._jobs[self._missing.popleft()])

    def _ask(self, job: WatchedJob) -> None:
        def take(reply: Reply) -> None:
            self._asked.discard(job.id)
            self._ask_more()
            entry = reply.payload.get("job")
            if reply.error is not None or not isinstance(entry, dict):
                why = "no such job" if reply.error is None or reply.error.errnum == errno.ENOENT else reply.error.text
                self._fail(job, why)
                return
            job.update(cast("JsonObject", entry))
            self._advance(job)

        self._answers[self._session.begin("job-list.list-id", {"id": job.id, "attrs": ATTRS})] = take

    def _advance(self, job: WatchedJob) -> None:
        """Do what follows from the phase that a job is in."""
        if job.ran and job.id not in self._followed:
            self._followed.add(job.id)
            self._queue.append(job.id)
            self._follow_more()
        if self._args.verbose and not job.ended:
            self._tell(job)
        self._finish(job)

    def _tell(self, job: WatchedJob) -> None:
        for said in job.news(self._zero):
            self._sink.say(said)

    def _finish(self, job: WatchedJob) -> None:
        """Let go of a job that has ended, once all of its output has been seen."""
        if not job.ended or job.id in self._following or job.id in self._queue or job.id not in self._left:
            return
        self._left.discard(job.id)
        self._status = max(self._status, job.exit_code)
        if self._args.verbose:
            self._tell(job)
        if job.exception():
            self._sink.say(f"{PROG}: {job.exception()}")

    def _fail(self, job: WatchedJob, why: str) -> None:
        """Let go of a job that cannot be watched, whatever becomes of it."""
        self._sink.say(f"{PROG}: cannot watch {id_text(job.id)}: {printable(why)}")
        self._status = max(self._status, FAILED)
        job.given_up = True
        self._left.discard(job.id)
        for handle in self._following.pop(job.id, ()):
            del self._answers[handle]
            self._session.end(handle)
        self._follow_more()

    # --- output

    def _follow_more(self) -> None:
        while self._queue and len(self._following) < STREAMS:
            job = self._jobs[self._queue.popleft()]
            if job.given_up:
                continue
            paths = [OUTPUT, *([EVENTLOG] if self._args.verbose > 1 else [])]
            self._following[job.id] = {self._follow(job, path) for path in paths}

    def _follow(self, job: WatchedJob, path: str) -> int:
        """Begin to show one of a job's eventlogs; the request for it."""
        zero, label = job.info.number("t_submit"), self._args.label_io
        output = JobOutput(job.id, zero, label=label, by_lines=self._sink.progress)
        shown = EventFormat("offset")

        def take(reply: Reply) -> None:
            if reply.error is None:
                event = event_of(reply.payload)[0]
                if path == EVENTLOG:
                    self._sink.say(printable(f"{id_text(job.id)}: {shown.line(event)}"))
                    return
                for descriptor, data in output.take(event):
                    self._sink.write(descriptor, data)
                return
            for descriptor, data in output.finish():
                self._sink.write(descriptor, data)
            self._unfollow(job, handle, reply.error)

        payload = watch_payload(job.id, path, WAITCREATE)
        handle = self._session.begin(WATCH, payload, streaming=True)
        self._answers[handle] = take
        return handle

    def _unfollow(self, job: WatchedJob, handle: int, error: RpcError) -> None:
        """An eventlog has ended, or what is left of it cannot be had."""
        self._following[job.id].discard(handle)
        if error.errnum not in (errno.ENODATA, errno.ENOENT):
            self._fail(job, error.text)
        elif not self._following[job.id]:
            del self._following[job.id]
            self._follow_more()
            self._finish(job)
