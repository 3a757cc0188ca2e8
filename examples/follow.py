"""Follow jobs from a program: submit some, and print each event as it becomes durable, over any broker deaths.

    FLUXRES_URI=… python examples/follow.py COUNT COMMAND…

A `Session` comes back when its broker does: streams go on behind the last event taken, and a submission whose answer
was lost is sent again with the same key. So this program has no code for broken connections. Kill the broker meanwhile
to see it. Exit status: 0 when all jobs ended with exit code 0.
"""

from __future__ import annotations

import errno
import os
import sys

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import decode
from fluxres.base.jobid import f58
from fluxres.job.build import Facts, build_jobspec
from fluxres.session import Session
from fluxres.wire.payload import WireMap


def submit(session: Session, command: list[str]) -> int:
    """Submit one job; its jobid."""
    jobspec = build_jobspec(Facts(command=command, environment=dict(os.environ), cwd=os.getcwd()))
    request: WireMap = {"jobspec": jobspec, "key": os.urandom(16).hex()}
    answer = session.call("job-ingest.submit", request, idempotent=True)
    jobid = answer["id"]
    if not isinstance(jobid, int):
        raise TypeError(f"a jobid was to come, not {jobid!r}")
    return jobid


def follow(session: Session, jobids: list[int]) -> bool:
    """Print the events of all jobs side by side; whether all succeeded."""
    streams = {session.begin("job-info.eventlog-watch", {"id": job}, streaming=True): job for job in jobids}
    succeeded = 0
    while streams:
        reply = session.receive()
        if reply is None or reply.matchtag not in streams:
            continue
        job = streams[reply.matchtag]
        if reply.error is not None:
            if reply.error.errnum != errno.ENODATA:  # which is the normal end of a log
                raise reply.error
            del streams[reply.matchtag]
            continue
        (event,) = decode(str(reply.payload["event"]).encode())
        print(f"{event.timestamp:.3f} {f58(job)} {event.name}", flush=True)
        succeeded += event.name == "finish" and event.context.get("status") == 0
    return succeeded == len(jobids)


def main() -> int:
    """Run the example; its exit status."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with Session() as session:
            jobids = [submit(session, sys.argv[2:]) for _ in range(int(sys.argv[1]))]
            return 0 if follow(session, jobids) else 1
    except FluxresError as error:
        print(f"follow: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
