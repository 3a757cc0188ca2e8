"""All metrics: names, kinds, labels and what they mean. Pure. `docs/metrics.md` says the same: a test sees to it.

Names follow Prometheus: base units, `_total` for counters, `_info` for what never changes. The values of a label are
few and known beforehand, or are services of the broker: none is a job's, a user's or another rank's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

PREFIX: Final = "fluxres_"


class Kind(Enum):
    """The kind of a metric, in Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric: all its series. `meaning` is its help text."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()


_made: dict[str, Family] = {}
CATALOG: Final[Mapping[str, Family]] = _made
"""By name, in the order in which they are shown."""


def _family(kind: Kind, name: str, meaning: str, *labels: str) -> Family:
    family = _made[PREFIX + name] = Family(name=PREFIX + name, kind=kind, meaning=meaning, labels=labels)
    return family


def _counter(name: str, meaning: str, *labels: str) -> Family:
    return _family(Kind.COUNTER, name, meaning, *labels)


def _gauge(name: str, meaning: str, *labels: str) -> Family:
    return _family(Kind.GAUGE, name, meaning, *labels)


def _histogram(name: str, meaning: str, *labels: str) -> Family:
    return _family(Kind.HISTOGRAM, name, meaning, *labels)


def _info(name: str, meaning: str, *labels: str) -> Family:
    return _family(Kind.INFO, name, meaning, *labels)


# --- the process

BUILD: Final = _info("build_info", "The software that runs", "version", "python")
PANICS: Final = _counter("panics_total", "Incarnations that ended in a panic in this process", "cause")

# --- the endpoint

CONNECTIONS: Final = _gauge("status_connections", "Connections to the status endpoint")
READERS: Final = _gauge("status_readers", "WebSockets open at the status endpoint")
FOLLOWS: Final = _gauge("status_follows", "Jobs that WebSockets follow")
REFUSED: Final = _counter("status_refused_total", "Requests that the status endpoint refused", "code")

# --- the broker

BROKER: Final = _info("broker_info", "Who this broker is", "instance_id", "rank", "size", "host")
STATE: Final = _gauge("broker_state", "1 for the state that the broker is in, 0 for the others", "state")
STARTED: Final = _gauge(
    "incarnation_start_time_seconds", "When the incarnation began, in seconds since 1970 (the process: process_…)"
)
BOOTS: Final = _counter("incarnations_total", "Incarnations begun on this broker's statedir, in all its lives")
STALLS: Final = _histogram("event_loop_stall_seconds", "How late the event loop came back to a task, every half second")

# --- RPC

RPC_REQUESTS: Final = _counter("rpc_requests_total", "Requests that the broker's services were sent", "service")
RPC_IN_FLIGHT: Final = _gauge(
    "rpc_in_flight",
    "Requests to the broker's services that have not ended, streams included",
    "service",
)
RPC_WAITING: Final = _gauge("rpc_waiting", "Those of them that have had no response at all yet", "service")
RPC_OLDEST: Final = _gauge("rpc_oldest_seconds", "How long the oldest of these has waited, 0 for none", "service")
RPC_CALLS: Final = _gauge("rpc_calls_in_flight", "Calls that the broker itself has made, and that have not ended")
RPC_TRACKED: Final = _gauge(
    "rpc_tracked", "Requests that are tracked, as they have left for another broker and have not ended", "peer"
)

# --- the overlay

PARENT: Final = _gauge("overlay_parent_connected", "Whether the parent is connected: 1 or 0 (not of rank 0)")
PEERS: Final = _gauge("overlay_peers", "Children in the tree, by the status of their subtrees", "state")
TORPID: Final = _gauge("overlay_torpid_peers", "Neighbours in the tree that are torpid: silent, but not given up")
LOST: Final = _counter("overlay_peers_lost_total", "How often a child was lost")
MESSAGES: Final = _counter("overlay_messages_total", "Messages to and from neighbours in the tree", "peer", "direction")
BYTES: Final = _counter("overlay_bytes_total", "Bytes of these messages, without framing and TLS", "peer", "direction")

# --- rank 0: jobs

JOBS: Final = _gauge("jobs", "Active jobs by state", "state")
JOBS_QUARANTINED: Final = _gauge("jobs_quarantined", "Jobs whose records cannot be read")
SUBMITTED: Final = _counter("jobs_submitted_total", "Jobs taken in")
FINISHED: Final = _counter("jobs_finished_total", "Jobs that have become INACTIVE", "result")
SCHED_QUEUE: Final = _gauge("sched_queue_jobs", "Jobs that wait for the scheduler to find resources")
SCHEDULING: Final = _histogram("job_scheduling_seconds", "From a job's first SCHED until it has resources")
LAUNCHING: Final = _histogram("job_launch_seconds", "From a job's resources until all its shells have started")

# --- rank 0: recovery

SHELLS: Final = _gauge(
    "shells", "Shells of running jobs: attached, or detached, which run but are read by no broker", "state"
)
DETACHED_TIME: Final = _histogram("shell_detached_seconds", "How long shells were detached that are so no more")
REATTACHED: Final = _counter(
    "shells_reattached_total", "Detached shells: attached again, finished (their exit was read out), or lost", "how"
)
RECOVERING: Final = _gauge("recovery_age_seconds", "For how long a recovery has been under way, 0 for none")
RECOVERIES: Final = _histogram("recovery_seconds", "How long recoveries took that are over")
RECOVERED_JOBS: Final = _counter(
    "recovered_jobs_total", "Jobs that ran where a recovery is over: rediscovered, finished meanwhile, or lost", "how"
)

# --- rank 0: resources

NODES: Final = _gauge("nodes", "Nodes by state", "state")
CORES: Final = _gauge("cores", "Cores by state", "state")
GPUS: Final = _gauge("gpus", "GPUs by state", "state")

# --- rank 0: the store

COMMITS: Final = _histogram("kvs_commit_seconds", "From the submission of a commit until it is durable")
TRANSACTIONS: Final = _histogram("kvs_transaction_seconds", "From the beginning of a transaction until it is durable")
COMMITS_FAILED: Final = _counter("kvs_commits_failed_total", "Commits that were refused, or have failed")
COMMITS_QUEUED: Final = _gauge("kvs_queued_commits", "Commits under way")
BYTES_QUEUED: Final = _gauge("kvs_queued_bytes", "Bytes of the commits under way")
COMMITS_HELD: Final = _gauge("kvs_held_commits", "Commits of the instance itself that wait for room on the disk")
STORE: Final = _gauge("kvs_store_bytes", "What the store takes on the disk: used, free to be used again, log", "part")
