"""`/metrics`: what the parts of a broker know, in the text formats of Prometheus and OpenMetrics.

Nothing is read until somebody asks, and what reads and shows it is imported only then: a broker that nobody scrapes
pays for its meters, and for nothing else.

From the first scrape on counters outlive incarnations: when one ends, what it has counted is kept, and added to what
the next one counts. They begin at zero with the process, as Prometheus expects it (`process_start_time_seconds`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from fluxres.status.exposition import Exposition
    from fluxres.status.facts import BrokerFacts, LeaderFacts, ProcessFacts
    from fluxres.status.samples import Served

REUSE: Final = 10
"""An answer serves others who ask for REUSE times as long as it took to make. Any user of this machine may ask, and as
often as they like: all who want one of the formats get a REUSE-th of the broker's time at most, together."""


class Metrics:
    """The metrics of one process.

    `attached` is entered by each incarnation, and `lead` called by that of rank 0 as soon as its services are there.
    """

    def __init__(self, process: ProcessFacts, *, reuse: float = REUSE) -> None:
        self.process = process
        self.reuse = reuse
        self.broker: BrokerFacts | None = None
        self.leader: LeaderFacts | None = None
        self._exposition: Exposition | None = None

    def serve(self, endpoint: Served) -> None:
        """Count the endpoint as well."""
        self.process = msgspec.structs.replace(self.process, endpoint=endpoint)

    @contextlib.contextmanager
    def attached(self, broker: BrokerFacts) -> Iterator[None]:
        """Show an incarnation meanwhile, and keep its counts afterwards."""
        self.broker = broker
        try:
            yield
        finally:
            if self._exposition is not None:
                self._exposition.keep()
            self.broker = self.leader = None

    def lead(self, leader: LeaderFacts) -> None:
        """The incarnation that is attached is rank 0's, and this is what it knows."""
        self.leader = leader

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The metrics as the `Accept` header wants them: the body, and its content type."""
        if self._exposition is None:
            from fluxres.status.exposition import Exposition  # at the first scrape, see above

            self._exposition = Exposition(self)
        return self._exposition.text(accept)
