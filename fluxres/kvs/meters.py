"""What the store measures of itself. Pure; `fluxres.status` shows it."""

from __future__ import annotations

from dataclasses import dataclass

from fluxres.base.meter import QUICK, Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """Bytes on the disk: of the file `used` and `free` (pages that will be used again), and of the log before it."""

    used: int
    free: int
    log: int


class StoreMeters:
    """The commits of one life of the store, in seconds of Trio's clock."""

    def __init__(self) -> None:
        self.commits = Histogram(QUICK)
        """From the submission of a commit until it is durable, its place in the queue included."""
        self.transactions = Histogram(QUICK)
        """From the beginning of a transaction until it is durable: what the disk takes, mostly."""
        self.failed = 0
        """Commits that were refused, or have failed."""
