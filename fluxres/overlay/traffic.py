"""What went over links, those that are gone included: counters never go back while an incarnation lives. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Counted(Protocol):
    """A link, as far as it counts."""

    sent: int
    bytes_sent: int
    received: int
    bytes_received: int


@dataclass(slots=True)
class Traffic:
    """Messages, and their bytes without the framing."""

    sent: int = 0
    bytes_sent: int = 0
    received: int = 0
    bytes_received: int = 0

    def add(self, link: Counted) -> None:
        """Count what went over `link`, or over several."""
        self.sent += link.sent
        self.bytes_sent += link.bytes_sent
        self.received += link.received
        self.bytes_received += link.bytes_received

    def plus(self, links: Iterable[Counted]) -> Traffic:
        """This, and what has gone over `links` so far."""
        total = Traffic(self.sent, self.bytes_sent, self.received, self.bytes_received)
        for link in links:
            total.add(link)
        return total
