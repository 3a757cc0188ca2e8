"""What is committed with a job's `alloc` event: everything that a start needs to be found again. Pure.

One transaction: R, the guest namespace and its link (RFC 16), the first execution events (RFC 50), and for each rank
the progress record, which binds the start to that rank's statedir before anything is sent there.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from fluxres.base.eventlog import Event, encode
from fluxres.base.jobid import JobId
from fluxres.exec.progress import Progress, guest_namespace, progress_key
from fluxres.exec.translate import EXEC_EVENTLOG_KEY, OUTPUT_KEY, output_header
from fluxres.job.keys import guest_key, r_key
from fluxres.job.resources import ResourceSet
from fluxres.job.value import Job
from fluxres.kvs.ops import PRIMARY, Append, CreateNamespace, Link, Op, Put


def allocation_ops(
    job: Job, resources: ResourceSet, *, ntasks: int, now: float, statedir_of: Callable[[int], str]
) -> list[Op]:
    """The operations that go with `alloc`."""
    jobid = JobId(job.id)
    guest = guest_namespace(jobid)
    events = "".join(encode(Event(now, name)) for name in ("init", "starting", "recoverable"))
    ops: list[Op] = [
        Put(PRIMARY, r_key(jobid), msgspec.json.encode(resources.encode())),
        CreateNamespace(guest, job.userid),
        Link(PRIMARY, guest_key(jobid), guest, "."),
        Append(guest, EXEC_EVENTLOG_KEY, events.encode()),
        Append(guest, OUTPUT_KEY, output_header(time=now, tasks=ntasks).encode()),
    ]
    for rank in resources.ranks():
        progress = Progress(statedir=statedir_of(rank))
        ops.append(Put(PRIMARY, progress_key(jobid, rank), progress.encode()))
    return ops
