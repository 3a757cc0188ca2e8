"""What a broker process shows of itself over all its incarnations: metrics, and the endpoint that serves its status.

Both outlive incarnations, so that health is told and counters go on while there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import trio

from fluxres import __version__
from fluxres.broker.platform import Platform
from fluxres.status.endpoint import Attached
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
        self._endpoint = platform.endpoint(self.metrics.expose)
        if self._endpoint is not None:
            self.metrics.serve(self._endpoint)

    @property
    def is_served(self) -> bool:
        """Whether this broker serves its status, now or as soon as it can."""
        return self._endpoint is not None

    @property
    def uri(self) -> str:
        """Where browsers find the status; "" for nowhere."""
        return "" if self._endpoint is None else self._endpoint.uri

    def panicked(self, cause: Cause) -> None:
        """An incarnation has ended so."""
        self._panics[cause.value] += 1

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        if self._endpoint is None:
            task_status.started()
        else:
            await self._endpoint.run(task_status)

    @contextmanager
    def showing(self, incarnation: Attached) -> Iterator[None]:
        """Show an incarnation that is online inside the block."""
        if self._endpoint is None:
            yield
        else:
            with self._endpoint.attached(incarnation):
                yield
