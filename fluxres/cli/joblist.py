"""Asking `job-list` for jobs. A listing whose connection was lost is asked for again as a whole."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import JobId
from fluxres.cli.common import id_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluxres.base.json import JsonObject
    from fluxres.session import Session
    from fluxres.wire.payload import Wire, WireMap

LIST_TRIES: Final = 10
"""How often a listing is begun before its being cut off counts as an error."""
IDS_AT_ONCE: Final = 256
"""Single jobs asked for at a time."""


def list_jobs(
    session: Session,
    *,
    attrs: Sequence[str],
    constraint: WireMap,
    max_entries: int = 0,
    since: float = 0.0,
) -> list[JsonObject]:
    """The jobs that meet `constraint`, in job-list's order. Raises RpcError, FluxresError.

    `max_entries` 0 means all; `since` leaves out what became inactive before.
    """
    payload: WireMap = {
        "max_entries": max_entries,
        "attrs": list(attrs),
        "since": since,
        "constraint": constraint,
    }
    for _ in range(LIST_TRIES):
        try:
            return _list_once(session, payload)
        except RpcError as error:
            if error.errnum != errno.ECONNRESET:
                raise
    raise FluxresError(f"cannot list jobs: the connection was lost {LIST_TRIES} times")


def find_jobs(session: Session, jobids: Sequence[JobId], attrs: Sequence[str]) -> list[JsonObject | RpcError]:
    """The entry of each job, or the error for one that is not known."""
    found: dict[int, JsonObject | RpcError] = {}
    waiting = list(enumerate(jobids))[::-1]
    handles: dict[int, int] = {}
    while waiting or handles:
        while waiting and len(handles) < IDS_AT_ONCE:
            index, jobid = waiting.pop()
            handles[session.begin("job-list.list-id", {"id": jobid, "attrs": list(attrs)})] = index
        reply = session.receive()
        if reply is not None and reply.matchtag in handles:
            found[handles.pop(reply.matchtag)] = reply.error or _entry(reply.payload.get("job"))
    return [found[index] for index in range(len(jobids))]


def own_jobs(session: Session, *, states: int = 0) -> list[JobId]:
    """The jobids of this user's jobs, the latest first: those in `states` (a mask), or all that there are."""
    constraint: WireMap = {"userid": [os.getuid()]}
    if states:
        constraint = {"and": [constraint, {"states": [states]}]}
    jobs = list_jobs(session, attrs=[], constraint=constraint)
    return sorted((jobid for job in jobs if (jobid := _id(job)) is not None), reverse=True)


def unknown(jobid: JobId, error: RpcError) -> str:
    """What to say of a job that was asked for and not found."""
    return f"cannot find {id_text(jobid)}: {'no such job' if error.errnum == errno.ENOENT else error.text}"


def _list_once(session: Session, payload: WireMap) -> list[JsonObject]:
    jobs: list[JsonObject] = []
    handle = session.begin("job-list.list", payload, streaming=True, resend=False)
    while True:
        reply = session.receive()
        if reply is None or reply.matchtag != handle:
            continue
        if reply.error is None:
            batch = reply.payload.get("jobs")
            jobs += [_entry(job) for job in batch] if isinstance(batch, list) else []
        elif reply.error.errnum == errno.ENODATA:
            return jobs
        else:
            raise reply.error


def _id(job: JsonObject) -> JobId | None:
    value = job.get("id")
    return JobId(value) if isinstance(value, int) else None


def _entry(value: Wire) -> JsonObject:
    if not isinstance(value, dict):
        raise FluxresError("cannot list jobs: the broker's answer is not a list of jobs")
    return cast("JsonObject", value)  # payloads are what JSON can carry
