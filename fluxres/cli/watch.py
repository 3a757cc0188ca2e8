"""Watching eventlogs of jobs (`job-info.eventlog-watch`), one or many, over a session."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fluxres.base.errors import RpcError
    from fluxres.session import Session
    from fluxres.wire.payload import Wire, WireMap

WATCH: Final = "job-info.eventlog-watch"
WAITCREATE: Final = 1
"""Watch flag: where the eventlog is not there yet, wait for it."""
WATCHES_AT_ONCE: Final = 128
"""Jobs that `watch_jobs` watches at a time; the next follow as these end."""
PATHS: Final = {"exec": "guest.exec.eventlog", "output": "guest.output", "input": "guest.input"}
"""Short names of a job's eventlogs, as flux-job(1) has them."""
END_EVENTS: Final = {"eventlog": "clean", "guest.exec.eventlog": "done"}
"""The event that ends an eventlog, where one does."""


class JobEvent(NamedTuple):
    """An event of a job's eventlog; None at its end, with the error where that was not its normal one."""

    jobid: int
    event: Event | None
    line: str = ""
    error: RpcError | None = None


def full_path(name: str) -> str:
    """An eventlog's path from its short name or path."""
    return PATHS.get(name, name)


def watch_payload(jobid: int, path: str, flags: int = 0) -> WireMap:
    """The request for a watch."""
    return {"id": jobid, "path": path, "flags": flags}


def event_of(payload: WireMap) -> tuple[Event, str]:
    """The event in an answer of a watch, and its RFC 18 line. Raises FluxresError where there is none."""
    line: Wire = payload.get("event")
    if not isinstance(line, str):
        raise FluxresError("cannot follow the job: the broker answered without an event")
    line = line if line.endswith("\n") else line + "\n"
    try:
        return decode(line)[0], line
    except (ValueError, IndexError) as error:
        raise FluxresError(f"cannot follow the job: {error}") from error


def watch_jobs(session: Session, jobids: Iterable[int], *, until: str = "clean") -> Iterator[JobEvent]:
    """The events of each job's eventlog up to the event `until`, jobs side by side in a window.

    Each job ends with a JobEvent without event: after `until`, at the log's end, or with an error.
    """
    waiting = iter(dict.fromkeys(jobids))
    handles: dict[int, int] = {}
    exhausted = False
    while True:
        while not exhausted and len(handles) < WATCHES_AT_ONCE:
            jobid = next(waiting, None)
            if jobid is None:
                exhausted = True
            else:
                payload = watch_payload(jobid, "eventlog")
                handles[session.begin(WATCH, payload, streaming=True)] = jobid
        if not handles:
            return
        reply = session.receive()
        if reply is None or reply.matchtag not in handles:
            continue
        jobid = handles[reply.matchtag]
        if reply.error is None:
            event, line = event_of(reply.payload)
            yield JobEvent(jobid, event, line)
            if event.name != until:
                continue
            session.end(reply.matchtag)
        del handles[reply.matchtag]
        failed = reply.error if reply.error is not None and reply.error.errnum != errno.ENODATA else None
        yield JobEvent(jobid, None, error=failed)
