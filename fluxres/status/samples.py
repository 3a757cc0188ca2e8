"""The numbers of `catalog`, read from `facts` when somebody asks. Imported at the first scrape only.

Of each part there are two functions: what `count`s only grows while the part lives, and can be read even when it is
over; what `gauge`s is of this moment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from fluxres.base.errors import RpcError
from fluxres.overlay.health import Health
from fluxres.status import catalog
from fluxres.status.census import census

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject
    from fluxres.base.meter import Histogram
    from fluxres.status.catalog import Family
    from fluxres.status.facts import BrokerFacts, LeaderFacts, ProcessFacts

STATES: Final = ("join", "init", "run", "shutdown")
"""The states of a broker."""


class Buckets(NamedTuple):
    """A histogram of one moment: the bounds, how many values were at most each and at all, and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @classmethod
    def of(cls, histogram: Histogram) -> Buckets:
        """What it has now."""
        return cls(histogram.bounds, histogram.cumulative(), histogram.sum)


class Sample(NamedTuple):
    """One series of a metric, with the values of its labels."""

    family: Family
    value: float | Buckets
    labels: tuple[str, ...] = ()


def _by(family: Family, counts: Mapping[str, float]) -> Iterator[Sample]:
    return (Sample(family, count, (label,)) for label, count in counts.items())


class Served(Protocol):
    """The endpoint, as far as it is counted (`status.endpoint`)."""

    @property
    def connections(self) -> int:
        """How many there are."""

    @property
    def readers(self) -> int:
        """How many of them are WebSockets."""

    @property
    def follows(self) -> int:
        """Jobs that they follow."""

    @property
    def refused(self) -> Mapping[str, int]:
        """Requests that were refused, by HTTP status."""


class Recovered(Protocol):
    """The recoveries of this life of rank 0 (`broker.recovery`): how long they took, and what became of jobs."""

    rediscovered: int
    finished: int
    lost: int
    seconds: Histogram

    def current(self) -> JsonObject | None:
        """The one under way, with when it `began`."""


def count_process(it: ProcessFacts) -> Iterator[Sample]:
    """Panics and refusals."""
    yield from _by(catalog.PANICS, it.panics())
    if it.endpoint is not None:
        yield from _by(catalog.REFUSED, it.endpoint.refused)


def gauge_process(it: ProcessFacts) -> Iterator[Sample]:
    """The build and the endpoint."""
    yield Sample(catalog.BUILD, 1, (it.version, ".".join(map(str, sys.version_info[:3]))))
    if it.endpoint is not None:
        yield Sample(catalog.CONNECTIONS, it.endpoint.connections)
        yield Sample(catalog.READERS, it.endpoint.readers)
        yield Sample(catalog.FOLLOWS, it.endpoint.follows)


def count_broker(it: BrokerFacts) -> Iterator[Sample]:
    """Stalls, requests, and what went over links."""
    yield Sample(catalog.STALLS, Buckets.of(it.stalls))
    yield from _by(catalog.RPC_REQUESTS, {service.name: service.taken for service in it.services})
    yield Sample(catalog.LOST, it.overlay.lost)
    for peer, traffic in zip(("parent", "child"), it.overlay.traffic(), strict=True):
        yield Sample(catalog.MESSAGES, traffic.sent, (peer, "sent"))
        yield Sample(catalog.MESSAGES, traffic.received, (peer, "received"))
        yield Sample(catalog.BYTES, traffic.bytes_sent, (peer, "sent"))
        yield Sample(catalog.BYTES, traffic.bytes_received, (peer, "received"))


def gauge_broker(it: BrokerFacts) -> Iterator[Sample]:
    """Who the broker is, and what is under way. (The count of incarnations is the statedir's: it is never added up.)"""
    hello, now_in = it.overlay.hello, it.state()
    yield Sample(catalog.BROKER, 1, (it.instance(), str(hello.rank), str(hello.size), hello.host))
    yield from _by(catalog.STATE, {state: float(state == now_in) for state in STATES})
    yield Sample(catalog.STARTED, it.started)
    yield Sample(catalog.BOOTS, it.incarnations)
    yield from _rpc(it)
    yield from _peers(it)


def _rpc(it: BrokerFacts) -> Iterator[Sample]:
    now = trio.current_time()
    for service in it.services:
        waiting, since = service.queue()
        yield Sample(catalog.RPC_IN_FLIGHT, service.under_way, (service.name,))
        yield Sample(catalog.RPC_WAITING, waiting, (service.name,))
        yield Sample(catalog.RPC_OLDEST, now - since if waiting else 0, (service.name,))
    yield Sample(catalog.RPC_CALLS, it.handle.under_way)
    tracker, up = it.router.tracker, it.overlay.up
    upward = tracker.over(up.link.id) if up is not None and up.link is not None else 0
    yield from _by(catalog.RPC_TRACKED, {"parent": upward, "child": len(tracker) - upward})


def _peers(it: BrokerFacts) -> Iterator[Sample]:
    counts = dict.fromkeys((health.word for health in Health), 0)
    for _rank, health, _since in it.overlay.health.children():
        counts[health.word] += 1
    yield from _by(catalog.PEERS, counts)
    yield Sample(catalog.TORPID, it.overlay.torpid)
    if it.overlay.up is not None:
        yield Sample(catalog.PARENT, it.overlay.up.link is not None)


def count_leader(it: LeaderFacts) -> Iterator[Sample]:
    """Jobs, recoveries and commits."""
    stats, meters = it.stats, it.kvs.meters
    yield Sample(catalog.SUBMITTED, stats.submitted)
    yield from _by(catalog.FINISHED, {how.name.lower(): count for how, count in stats.ended.items()})
    yield Sample(catalog.SCHEDULING, Buckets.of(stats.scheduling))
    yield Sample(catalog.LAUNCHING, Buckets.of(stats.launching))
    yield from _found_again(it)
    yield Sample(catalog.COMMITS, Buckets.of(meters.commits))
    yield Sample(catalog.TRANSACTIONS, Buckets.of(meters.transactions))
    yield Sample(catalog.COMMITS_FAILED, meters.failed)


def gauge_leader(it: LeaderFacts) -> Iterator[Sample]:
    """Jobs, shells, resources and the store."""
    yield from _by(catalog.JOBS, {state.name.lower(): count for state, count in it.stats.active.items()})
    yield Sample(catalog.JOBS_QUARANTINED, it.quarantined)
    yield Sample(catalog.SCHED_QUEUE, len(it.scheduler))
    shells = it.attachments
    yield from _by(catalog.SHELLS, {"attached": shells.attached_count, "detached": shells.detached_count})
    yield Sample(catalog.RECOVERING, _recovering(it))

    nodes, cores, gpus = census(it.scheduler.pool, it.ranks, it.size)
    yield from chain(_by(catalog.NODES, nodes), _by(catalog.CORES, cores), _by(catalog.GPUS, gpus))
    yield from _store(it)


def _found_again(it: LeaderFacts) -> Iterator[Sample]:
    shells, recoveries = it.attachments, it.recoveries
    fates = {"attached": shells.rediscovered, "finished": shells.finished, "lost": shells.lost}
    yield from _by(catalog.REATTACHED, fates)
    yield Sample(catalog.DETACHED_TIME, Buckets.of(shells.seconds))
    yield Sample(catalog.RECOVERIES, Buckets.of(recoveries.seconds))
    found = {"rediscovered": recoveries.rediscovered, "finished": recoveries.finished, "lost": recoveries.lost}
    yield from _by(catalog.RECOVERED_JOBS, found)


def _recovering(it: LeaderFacts) -> float:
    """For how long a recovery has been under way."""
    began = (it.recoveries.current() or {}).get("began")
    return max(0.0, it.now() - began) if isinstance(began, float) else 0.0


def _store(it: LeaderFacts) -> Iterator[Sample]:
    yield Sample(catalog.COMMITS_QUEUED, it.kvs.queued_commits)
    yield Sample(catalog.BYTES_QUEUED, it.kvs.queued_bytes)
    yield Sample(catalog.COMMITS_HELD, it.kvs.held_commits)
    with contextlib.suppress(RpcError):  # a store that cannot be read is told by everything else
        size = it.kvs.size()
        yield from _by(catalog.STORE, {"used": size.used, "free": size.free, "log": size.log})
