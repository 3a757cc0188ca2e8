"""The `job-ingest` service: takes submissions, each answered when it is durable, each counted once.

`job-ingest.submit {jobspec, urgency, flags, key}` answers `{id}`. The key names the submission, per user: it is
committed with the jobid in one transaction, so that a client that lost its answer asks again and gets the same id.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from typing import Annotated, Final, cast

import msgspec

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event, encode
from fluxres.base.failpoint import hit
from fluxres.base.jobid import FluidClock, JobId
from fluxres.base.json import JsonObject, JsonValue
from fluxres.job import keys
from fluxres.job.jobspec import Jobspec, parse_jobspec
from fluxres.job.manager import Manager
from fluxres.job.state import fold
from fluxres.job.value import URGENCY_DEFAULT, URGENCY_EXPEDITE
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CommitResult, Op, Put, Require
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service

MAX_KEY: Final = 128
"""Characters of a submission key."""
NONCE_BYTES: Final = 16
USER_MAX_URGENCY: Final = URGENCY_DEFAULT
"""The highest urgency that a guest may ask for (RFC 30)."""


class _Submit(msgspec.Struct, frozen=True, kw_only=True):
    jobspec: dict[str, object]
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY)]
    urgency: Annotated[int, msgspec.Meta(ge=0, le=URGENCY_EXPEDITE)] = URGENCY_DEFAULT
    flags: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)] = 0


class Ingest:
    """Takes submissions for the manager. `clock` draws jobids, above every one that was ever given."""

    def __init__(
        self, *, router: Router, kvs: Kvs, manager: Manager, clock: FluidClock, now: Callable[[], float]
    ) -> None:
        self._kvs = kvs
        self._manager = manager
        self._clock = clock
        self._now = now
        self.enabled = True
        self.disabled_reason = ""
        self.service = Service("job-ingest", router)
        self.service.deferred("submit", self._submit)

    def _submit(self, request: Request) -> None:
        ask = request.parse(_Submit)
        if not self.enabled and (known := self._known(request.userid, ask.key)) is not None:
            request.respond({"id": int(known)})
            return
        self._check(request, ask)
        try:
            jobspec = parse_jobspec(cast("JsonValue", ask.jobspec))
        except FluxresError as error:
            raise RpcError(errno.EINVAL, str(error)) from error
        _refuse_unknown(jobspec)
        now = self._now()
        jobid = self._clock.next(int(now * 1000))
        events = self._first_events(jobid, request, ask, now)
        job = fold(jobid, events)
        self._manager.records.remember(jobid, jobspec, cast("JsonObject", ask.jobspec))
        ops = _submit_ops(jobid, request.userid, ask, events)

        def durable(result: CommitResult) -> None:
            if result.error is None:
                hit("submit-commit.after")
                hit("submit-answer.before")
                request.respond({"id": int(jobid)})
                hit("submit-answer.after")
                self._manager.take_in(job, events)
            elif (earlier := self._known(request.userid, ask.key)) is not None:
                request.respond({"id": int(earlier)})
            else:
                request.fail(result.error.errnum, f"cannot submit: {result.error.text}")

        hit("submit-commit.before")
        self._kvs.submit(ops, durable)

    def _known(self, userid: int, key: str) -> JobId | None:
        data = self._kvs.get(PRIMARY, keys.submit_key(userid, key))
        return None if data is None else JobId(int(data))

    def _check(self, request: Request, ask: _Submit) -> None:
        if not self.enabled:
            why = f": {self.disabled_reason}" if self.disabled_reason else ""
            raise RpcError(errno.EINVAL, f"cannot submit: job submission is disabled{why}")
        if not request.is_owner and os.geteuid() != 0:
            raise RpcError(errno.EPERM, "cannot submit: this instance is an ordinary user's, and runs only his jobs")
        if ask.urgency > USER_MAX_URGENCY and not request.is_owner:
            raise RpcError(errno.EPERM, f"cannot submit: urgency {ask.urgency} is for the instance owner")

    def _first_events(self, jobid: JobId, request: Request, ask: _Submit, now: float) -> list[Event]:
        submit = Event(
            now,
            "submit",
            {"userid": request.userid, "urgency": ask.urgency, "flags": ask.flags, "version": 1},
        )
        events = [submit, Event(now, "validate")]
        return events + self._manager.owed_events(fold(jobid, events))


def _refuse_unknown(jobspec: Jobspec) -> None:
    """Refuse what would have to be ignored. Raises RpcError EINVAL."""
    if jobspec.system.queue:
        raise RpcError(errno.EINVAL, f"cannot submit: there is no queue named {jobspec.system.queue!r}")
    for dependency in jobspec.system.dependencies:
        uri = f"{dependency.scheme}:{dependency.value}"
        raise RpcError(errno.EINVAL, f"cannot submit: dependency scheme {dependency.scheme!r} ({uri}) is not known")


def _submit_ops(jobid: JobId, userid: int, ask: _Submit, events: list[Event]) -> list[Op]:
    key = keys.submit_key(userid, ask.key)
    return [
        Require(PRIMARY, key),
        Put(PRIMARY, key, str(int(jobid)).encode()),
        Put(PRIMARY, keys.jobspec_key(jobid), msgspec.json.encode(ask.jobspec)),
        Put(PRIMARY, keys.nonce_key(jobid), secrets.token_hex(NONCE_BYTES).encode()),
        Append(PRIMARY, keys.eventlog_key(jobid), "".join(map(encode, events)).encode()),
        Put(PRIMARY, keys.active_key(jobid), b""),
        Put(PRIMARY, keys.all_key(jobid), b""),
    ]
