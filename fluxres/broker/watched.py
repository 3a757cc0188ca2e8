"""What a broker process shows of itself over all its incarnations: metrics, and the endpoint that serves its status.

Both outlive incarnations, so that health is told and counters go on while there is none.
"""

from __future__ import annotations

from enum import Enum

import trio

from fluxres import __version__
from fluxres.broker.platform import Platform
from fluxres.status.facts import ProcessFacts
from fluxres.status.metrics import Metrics


class Cause(Enum):
    """What ended an incarnation, coarsely."""

    PARENT_LOST = "parent-lost"
    ERROR = "error"


class Watched:
    """One for each process."""

    def __init__(self, platform: Platform) -> None:
        self._panics = {cause.value: 0 for cause in Cause}
        self.metrics = Metrics(ProcessFacts(version=__version__, panics=lambda: self._panics))
        self.endpoint = platform.endpoint(self.metrics.expose)
        """Where this broker serves its status; None for nowhere."""
        if self.endpoint is not None:
            self.metrics.serve(self.endpoint)

    @property
    def uri(self) -> str:
        """Where browsers find the status; "" for nowhere."""
        return "" if self.endpoint is None else self.endpoint.uri

    def panicked(self, cause: Cause) -> None:
        """An incarnation has ended so."""
        self._panics[cause.value] += 1

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        if self.endpoint is None:
            task_status.started()
        else:
            await self.endpoint.run(task_status)
