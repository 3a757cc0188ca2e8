"""Where the job room keeps things in the primary namespace (RFC 16, and indexes of our own). Pure."""

from __future__ import annotations

import hashlib
from typing import Final

from fluxres.base.jobid import JobId, kvs_path

ACTIVE_INDEX: Final = "job-index.active"
"""One key for each job that is not INACTIVE: what a restart replays."""
ALL_INDEX: Final = "job-index.all"
"""One key for each job: what a listing goes through, newest first."""
QUARANTINE: Final = "job-index.quarantine"
"""One key for each job whose record cannot be read; its value says why."""


RESERVED: Final = frozenset({"job", "job-index", "job-submit", "job-manager", "resource"})
"""Top-level keys that only the instance itself may write: what is lost there are jobs and drains."""


def index_name(jobid: JobId) -> str:
    """A job's name in the indexes: of fixed width, so that it sorts as the jobid does."""
    return f"{jobid:016x}"


def from_index_name(name: str) -> JobId:
    """The jobid of a name in an index."""
    return JobId(int(name, 16))


def active_key(jobid: JobId) -> str:
    """The job's key in the index of active jobs."""
    return f"{ACTIVE_INDEX}.{index_name(jobid)}"


def all_key(jobid: JobId) -> str:
    """The job's key in the index of all jobs."""
    return f"{ALL_INDEX}.{index_name(jobid)}"


def quarantine_key(jobid: JobId) -> str:
    """The job's key in the index of records that cannot be read."""
    return f"{QUARANTINE}.{index_name(jobid)}"


def submit_key(userid: int, key: str) -> str:
    """Where the jobid is kept that a user's submission key got; keys are text of any kind, so they are hashed."""
    return f"job-submit.{userid}.{hashlib.sha256(key.encode()).hexdigest()}"


def eventlog_key(jobid: JobId) -> str:
    """The job's eventlog."""
    return kvs_path(jobid, "eventlog")


def jobspec_key(jobid: JobId) -> str:
    """The job's jobspec, as it was submitted."""
    return kvs_path(jobid, "jobspec")


def r_key(jobid: JobId) -> str:
    """The job's R."""
    return kvs_path(jobid, "R")


def nonce_key(jobid: JobId) -> str:
    """The nonce that the job drew at submit."""
    return kvs_path(jobid, "nonce")


def guest_key(jobid: JobId) -> str:
    """The link to the job's guest namespace."""
    return kvs_path(jobid, "guest")
