"""Reads the active jobs back at the start of an incarnation: state = fold(eventlog).

Only active jobs are read; inactive ones when they are asked for. A record that cannot be read is quarantined: noted in
the store and reported, its job left as it is, and the rest load.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.exec.progress import decode, progress_key
from fluxres.job import keys
from fluxres.job.records import JobRecords
from fluxres.job.resources import ResourceSet
from fluxres.job.value import PENDING, Job, JobState
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Put, Unlink
from fluxres.sched.request import Request

log = logging.getLogger("fluxres.job-manager")

BATCH = 256
"""Records read before other tasks get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What the store had.

    `jobs` are the active ones, in order, and `requests` what the pending ones ask of the scheduler; `quarantined` the
    ids of those that cannot be read, and `held` what they may hold; `last` is the highest jobid ever given. `farthest`
    is the highest rank that an active job has something of, and that job; None where none has anything.
    """

    jobs: list[Job]
    requests: dict[JobId, Request]
    quarantined: frozenset[JobId]
    held: dict[JobId, ResourceSet]
    last: int
    farthest: tuple[int, JobId] | None = None


async def replay(kvs: Kvs) -> Replayed:
    """Read all active jobs. Raises what the store raises."""
    records = JobRecords(kvs)
    jobs: list[Job] = []
    requests: dict[JobId, Request] = {}
    bad: dict[JobId, str] = {}
    farthest: tuple[int, JobId] | None = None
    for count, jobid in enumerate(_ids(kvs, keys.ACTIVE_INDEX)):
        try:
            job, request, ranks = _read(records, jobid)
        except (FluxresError, ValueError) as error:
            log.error("quarantining job %s: %s", f58(jobid), error)
            bad[jobid] = str(error)
        else:
            if job.state is not JobState.INACTIVE:
                jobs.append(job)
            if job.state & PENDING:
                requests[jobid] = request
            if ranks and (farthest is None or max(ranks) > farthest[0]):
                farthest = (max(ranks), jobid)
        if count % BATCH == BATCH - 1:
            await trio.lowlevel.checkpoint()
    for jobid, why in bad.items():
        await kvs.commit(
            Put(PRIMARY, keys.quarantine_key(jobid), why.encode()),
            Unlink(PRIMARY, keys.active_key(jobid)),
            hold=True,
        )
    quarantined = frozenset(_ids(kvs, keys.QUARANTINE)) | frozenset(bad)
    newest = kvs.list_range(PRIMARY, keys.ALL_INDEX, before=None, limit=1)
    return Replayed(
        jobs=jobs,
        requests=requests,
        quarantined=quarantined,
        held={jobid: resources for jobid in quarantined if (resources := _held(records, jobid)) is not None},
        last=int(keys.from_index_name(newest[0])) if newest else 0,
        farthest=farthest,
    )


def _read(records: JobRecords, jobid: JobId) -> tuple[Job, Request, IdSet]:
    """One job with all that a restart needs of it, so that what cannot be read is found now; and the ranks it has."""
    job = records.job(jobid)
    request = records.jobspec(jobid).request()
    ranks = IdSet()
    if job.allocated:
        ranks = records.resources(jobid).ranks()
        if job.needs_exec:
            records.start_request(job, reattach=True)
            for rank in ranks:
                decode(records.read(progress_key(jobid, rank), f"progress record of {f58(jobid)} on rank {rank}"))
    return job, request, ranks


def _held(records: JobRecords, jobid: JobId) -> ResourceSet | None:
    """The R of a job in quarantine, where that at least can be read."""
    with contextlib.suppress(FluxresError, ValueError):
        return records.resources(jobid)
    return None


def _ids(kvs: Kvs, index: str) -> list[JobId]:
    if not kvs.exists(PRIMARY, index):
        return []
    return [keys.from_index_name(entry.name) for entry in kvs.list(PRIMARY, index)]
