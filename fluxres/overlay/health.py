"""The health of a subtree, as flux-core's `subtree_status` has it (flux-overlay(1)). Pure.

A parent knows of each child what the child itself says, and what no child can say of itself:

    word        of a rank means                                            who says it
    full        it is joined, and so is all that is below it               the rank, in a STATUS control
    partial     it is joined; some rank below has not come yet             the rank
    degraded    it is joined; some rank below has been lost                the rank
    lost        it was joined, and was lost: by silence, reset or refusal  its parent
    offline     it has not come yet, or has left in good order             its parent

From that follows what it says to its own parent:

    children                              own status
    all full, or none at all              full
    some degraded or lost                 degraded
    else: some offline or partial         partial
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum


class Health(IntEnum):
    """The status of a subtree. The number is the status of a STATUS control."""

    FULL = 1
    PARTIAL = 2
    DEGRADED = 3
    LOST = 4
    OFFLINE = 5

    @property
    def word(self) -> str:
        """The status as people and payloads have it."""
        return self.name.lower()


class Subtree:
    """What a broker knows of its children's subtrees, and what follows for its own. At first no child has come.

    `now` is the time in seconds of any one clock. Methods raise KeyError for a rank that is no child.
    """

    def __init__(self, children: Iterable[int], now: float) -> None:
        self._children = dict.fromkeys(children, (Health.OFFLINE, now))
        self._counts = dict.fromkeys(Health, 0)
        self._counts[Health.OFFLINE] = len(self._children)
        self._status = self._own()
        self._since = now

    @property
    def status(self) -> Health:
        """The status of this broker's own subtree: full, partial or degraded."""
        return self._status

    @property
    def since(self) -> float:
        """When the own status became what it is."""
        return self._since

    def child(self, rank: int) -> tuple[Health, float]:
        """The status of the subtree below child `rank`, and since when it is so."""
        return self._children[rank]

    def children(self) -> Iterator[tuple[int, Health, float]]:
        """Each child with its status and since when it is so, in the order given at first."""
        return ((rank, health, since) for rank, (health, since) in self._children.items())

    def set(self, child: int, health: Health, now: float) -> bool:
        """Take in what has become of `child`; returns whether the own status has changed by it."""
        before = self._children[child][0]
        if health is before:
            return False
        self._children[child] = health, now
        self._counts[before] -= 1
        self._counts[health] += 1
        own = self._own()
        if own is self._status:
            return False
        self._status, self._since = own, now
        return True

    def _own(self) -> Health:
        if self._counts[Health.FULL] == len(self._children):
            return Health.FULL
        if self._counts[Health.DEGRADED] or self._counts[Health.LOST]:
            return Health.DEGRADED
        return Health.PARTIAL
