"""Jobs of a simulated instance: submitting, waiting, and reading what the store has of them.

What calls a broker here survives its death, as commands do: it waits for the next life and asks again.
"""

from __future__ import annotations

import base64
import errno
import itertools
from collections.abc import Mapping
from typing import Final, Protocol, cast

import trio

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.exec.progress import guest_namespace
from fluxres.exec.translate import EXEC_EVENTLOG_KEY, OUTPUT_KEY
from fluxres.job.build import Facts, build_jobspec
from fluxres.job.keys import eventlog_key
from fluxres.job.state import fold
from fluxres.job.value import URGENCY_DEFAULT, Job
from fluxres.kvs.ops import PRIMARY
from fluxres.testing.store import MemoryStore
from fluxres.wire.payload import WireMap

RETRY: Final = 0.05
"""Seconds after which a call is made again that a broker's death has ended."""
LOST: Final = frozenset({errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENOSYS, errno.ECANCELED})
"""What a call ends with when a broker on its way dies, or has not come up yet."""


class Caller(Protocol):
    """What this needs of an instance."""

    @property
    def store(self) -> MemoryStore:
        """The store of its rank 0."""

    async def call(self, topic: str, payload: WireMap | None = None, *, rank: int = 0) -> WireMap:
        """A call by a client of `rank`. Raises RpcError."""


class Jobs:
    """The jobs of one instance, all of its owner."""

    def __init__(self, instance: Caller) -> None:
        self.ids: list[JobId] = []
        """All that were submitted, in order."""
        self._instance = instance
        self._keys = itertools.count()

    # --- asking brokers

    async def submit(
        self,
        *command: str,
        nodes: int | None = None,
        tasks: int | None = None,
        cores: int = 1,
        duration: float = 0.0,
        environment: Mapping[str, str] | None = None,
        urgency: int = URGENCY_DEFAULT,
        rank: int = 0,
    ) -> JobId:
        """Submit a job by way of `rank`, once, however often its brokers die meanwhile; returns its id."""
        jobspec = build_jobspec(
            Facts(
                command=command,
                environment=environment or {},
                cwd="/",
                nodes=nodes,
                ntasks=tasks,
                cores_per_task=cores,
                duration=duration,
            )
        )
        payload: WireMap = {
            "jobspec": cast("WireMap", jobspec),
            "key": f"simulated-{next(self._keys)}",
            "urgency": urgency,
        }
        answer = await self._call("job-ingest.submit", payload, rank)
        jobid = JobId(cast("int", answer["id"]))
        self.ids.append(jobid)
        return jobid

    async def cancel(self, jobid: JobId, rank: int = 0) -> None:
        """Raise an exception of type cancel, as flux-cancel(1) does."""
        await self._call("job-manager.raise", {"id": int(jobid), "type": "cancel", "severity": 0, "note": ""}, rank)

    async def kill(self, jobid: JobId, signum: int, rank: int = 0) -> None:
        """Signal the tasks of a job."""
        await self._call("job-manager.kill", {"id": int(jobid), "signum": signum}, rank)

    async def _call(self, topic: str, payload: WireMap, rank: int) -> WireMap:
        while True:
            try:
                return await self._instance.call(topic, payload, rank=rank)
            except RpcError as error:
                if error.errnum not in LOST:
                    raise
            await trio.sleep(RETRY)

    async def wait(self, jobid: JobId, event: str = "clean") -> list[Event]:
        """Wait until an event is in the job's eventlog, durably; returns the eventlog."""
        await trio.lowlevel.checkpoint()
        while True:
            log = self.eventlog(jobid)
            if any(each.name == event for each in log):
                return log
            await self._instance.store.committed()

    # --- what the store has

    def eventlog(self, jobid: JobId) -> list[Event]:
        """The job's eventlog, [] where there is none yet."""
        return decode(self._instance.store.get(PRIMARY, eventlog_key(jobid)) or b"")

    def exec_eventlog(self, jobid: JobId) -> list[Event]:
        """The execution eventlog in its guest namespace."""
        return decode(self._instance.store.get(guest_namespace(jobid), EXEC_EVENTLOG_KEY) or b"")

    def job(self, jobid: JobId) -> Job:
        """The job as its eventlog says it is."""
        return fold(jobid, self.eventlog(jobid))

    def output(self, jobid: JobId) -> dict[tuple[int, str], bytes]:
        """What each task (by its rank among the job's) wrote to each stream, as the guest namespace has it."""
        found: dict[tuple[int, str], bytes] = {}
        for event in decode(self._instance.store.get(guest_namespace(jobid), OUTPUT_KEY) or b""):
            context = cast("JsonObject", event.context)
            text = context.get("data")
            if event.name == "data" and isinstance(text, str):
                data = base64.b64decode(text) if context.get("encoding") == "base64" else text.encode()
                where = int(str(context["rank"])), str(context["stream"])
                found[where] = found.get(where, b"") + data
        return found
