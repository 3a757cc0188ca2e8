"""How a job turned out, in the words and numbers of flux-jobs(1): status, result, return code.

Pure, and importable by commands: the functions take what a job-list entry holds, so that broker and
command line cannot differ.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from fluxres.job.value import JobState

if TYPE_CHECKING:
    from fluxres.job.value import Job

CANCELED_RETURNCODE: Final = -128
"""The return code of a job that was canceled before any of it ran."""

FAILED_RETURNCODE: Final = 1
"""The return code of a job that failed before any of it ran."""

_TIMEOUT_TYPES: Final = frozenset({"timeout", "timelimit"})
"""The exception of an exceeded time limit: as flux-core raises it, and as RFC 21 names it."""


class JobResult(IntEnum):
    """The result of an inactive job, with the bits that flux-core gives it on the wire."""

    COMPLETED = 1
    FAILED = 2
    CANCELED = 4
    TIMEOUT = 8


_ABBREVIATIONS: Final = {
    JobResult.COMPLETED: "CD",
    JobResult.FAILED: "F",
    JobResult.CANCELED: "CA",
    JobResult.TIMEOUT: "TO",
}


def result(job: Job) -> JobResult | None:
    """The result of a job; None while it is active."""
    if job.state is not JobState.INACTIVE:
        return None
    if job.success:
        return JobResult.COMPLETED
    cause = job.exception.type if job.exception is not None else ""
    if cause == "cancel":
        return JobResult.CANCELED
    return JobResult.TIMEOUT if cause in _TIMEOUT_TYPES else JobResult.FAILED


def returncode(result: JobResult | None, waitstatus: int | None) -> int | None:
    """The highest exit code of its shells, or the negative signal number; None while there is neither.

    A job that ended without a wait status has -128 when it was canceled, 1 when it failed.
    """
    if waitstatus is not None and os.WIFSIGNALED(waitstatus):
        return -os.WTERMSIG(waitstatus)
    if waitstatus is not None and os.WIFEXITED(waitstatus):
        return os.WEXITSTATUS(waitstatus)
    if result is JobResult.CANCELED:
        return CANCELED_RETURNCODE
    return FAILED_RETURNCODE if result is JobResult.FAILED else None


def exit_status(result: JobResult | None, waitstatus: int | None) -> int:
    """What a command that waited for the job exits with: 128+N for signal N, and 1 where nothing ran."""
    code = returncode(result, waitstatus)
    if code is None or code == CANCELED_RETURNCODE:
        return 0 if result is JobResult.COMPLETED else FAILED_RETURNCODE
    return 128 - code if code < 0 else code


def status_text(state: JobState, result: JobResult | None) -> str:
    """The state of an active job, the result of an inactive one: `RUN`, `COMPLETED`."""
    return state.name if result is None else result.name


def status_abbrev(state: JobState, result: JobResult | None) -> str:
    """The same in short: `R`, `CD`."""
    return state.name[0] if result is None else _ABBREVIATIONS[result]
