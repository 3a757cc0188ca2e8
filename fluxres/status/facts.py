"""What the parts of a broker hand over to be measured: the process, one incarnation, rank 0's own services.

All brokers make these when they start, and most are never asked: so there is nothing in here but references. What they
are read for, at a scrape, is in `status.samples`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from fluxres.base.meter import Histogram
    from fluxres.exec.attachments import Attachments
    from fluxres.exec.ranks import Ranks
    from fluxres.job.stats import JobStats
    from fluxres.kvs.kvs import Kvs
    from fluxres.overlay.overlay import Overlay
    from fluxres.rpc.handle import Handle
    from fluxres.rpc.router import Router
    from fluxres.rpc.server import Service
    from fluxres.sched.service import Scheduler
    from fluxres.status.samples import Recovered, Served


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What outlives incarnations. `panics` tells how many there were, by cause: `parent-lost`, `error`."""

    version: str
    panics: Callable[[], Mapping[str, int]]
    endpoint: Served | None = None


class BrokerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What every broker knows of itself. `services` may grow; `started` is in seconds since 1970."""

    router: Router
    handle: Handle
    overlay: Overlay
    services: Sequence[Service]
    stalls: Histogram
    state: Callable[[], str]
    instance: Callable[[], str]
    incarnations: int
    started: float


class LeaderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 knows of the instance, which has `size` ranks. `now` is in seconds since 1970."""

    size: int
    kvs: Kvs
    stats: JobStats
    scheduler: Scheduler
    ranks: Ranks
    quarantined: int
    attachments: Attachments
    recoveries: Recovered
    now: Callable[[], float]
