"""Which documents a reader wants: a constraint of `job-list.list` (RFC 31 syntax), applied to documents of jobs. Pure.

What the operators mean is told once, in `fluxres.job.select`: here a document is only shown to it as the job that it is
of. Other topics are not filtered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fluxres.job.result import JobResult
from fluxres.job.select import Selection, parse_constraint
from fluxres.job.value import Job, JobException, JobState

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject

JOBS: Final = "jobs"
MAX_TEXT: Final = 16_384
"""Characters of a constraint in its canonical form."""
_CAUSES: Final = {
    JobResult.CANCELED.name: JobException(0, "cancel", ""),
    JobResult.TIMEOUT.name: JobException(0, "timeout", ""),
}
"""What a job must have had for `fluxres.job.result` to call it that."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A constraint that has been read. Two of the same `text` select the same."""

    text: str
    _selection: Selection = field(compare=False, repr=False)

    @classmethod
    def parse(cls, constraint: JsonObject) -> Filter | None:
        """Read a constraint; None for `{}`, which selects everything. Raises ValueError naming what is wrong."""
        if not constraint:
            return None
        try:
            selection = parse_constraint(constraint)
        except RecursionError as error:  # pragma: no cover - what reads messages bounds their depth
            raise ValueError("cannot select jobs: the constraint is nested too deeply") from error
        text = json.dumps(constraint, sort_keys=True, separators=(",", ":"))
        if len(text) > MAX_TEXT:
            raise ValueError(f"cannot select jobs: the constraint has {len(text)} characters, the bound is {MAX_TEXT}")
        return cls(text, selection)

    def matches(self, topic: str, document: JsonObject) -> bool:
        """Whether the document is of a job that is selected, or of no job."""
        return topic != JOBS or self._selection.matches(as_job(document))


def as_job(document: JsonObject) -> Job:
    """The job of a document, as far as constraints look at it: id, state, user and result."""
    state, userid, result = document.get("state"), document.get("userid"), str(document.get("result"))
    return Job(
        id=int(str(document.get("dec", 0))),
        state=JobState.__members__.get(str(state), JobState.NEW),
        userid=userid if isinstance(userid, int) else -1,
        success=result == JobResult.COMPLETED.name,
        exception=_CAUSES.get(result),
    )
