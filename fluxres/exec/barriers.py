"""Barriers between the shells of one job: who has entered which, and what follows. Pure.

A barrier is named by (name, seq), and is complete when every rank of the job has entered it. Entering is idempotent: a
shell that waits says so again whenever it is attached anew. Completion is committed before anybody is told of it, and
is what a restart goes by; who has entered is only known in memory, because those who wait will say it again.

    (nothing) --enter--> OPEN --last rank enters--> COMMITTING --completed--> (nothing here; a key in the store)

| what comes                                        | answer                                                   |
|---------------------------------------------------|----------------------------------------------------------|
| a rank enters, others are missing                 | WAITS                                                    |
| the last rank enters                              | COMPLETES: commit it, then `completed` says whom to tell |
| a rank enters a barrier that the store has        | PASSES: it is told at once                               |
| a rank enters, another has ended and never can    | BROKEN, once: the job cannot go on                       |
| a rank ends while others wait (`left`)            | the barriers that are broken by that, each once          |
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from typing import Final, NamedTuple

from fluxres.base.errors import ProtocolError

MAX_OPEN: Final = 16
"""Barriers of one job that may be open at a time; its shells wait in one each."""
MAX_NAME: Final = 64
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
MAX_SEQ: Final = 2**62


class Barrier(NamedTuple):
    """The name of one barrier."""

    name: str
    seq: int

    def __str__(self) -> str:
        return f"{self.name}/{self.seq}"

    @property
    def key(self) -> str:
        """Where its completion is kept in the guest namespace."""
        return f"exec.barrier.{self.name}.{self.seq}"


class Entered(Enum):
    """What comes of entering a barrier."""

    WAITS = "waits"
    COMPLETES = "completes"
    PASSES = "passes"
    BROKEN = "broken"


class _Open:
    """A barrier that is not complete: who has entered, whether its completion is being committed, or never can be."""

    __slots__ = ("broken", "committing", "entered")

    def __init__(self) -> None:
        self.entered: set[int] = set()
        self.committing = False
        self.broken = False


def barrier_of(name: str, seq: int) -> Barrier:
    """The barrier that a shell names. Raises ProtocolError for a name that is none."""
    if not 0 < len(name) <= MAX_NAME or not _NAME_CHARACTERS.issuperset(name) or not 0 <= seq <= MAX_SEQ:
        raise ProtocolError(f"cannot enter barrier {name[:MAX_NAME]!r}/{seq}: no such name or number is allowed")
    return Barrier(name, seq)


class Barriers:
    """The open barriers of one job. `is_complete` asks the store; `ended` are the ranks that have ended already."""

    def __init__(
        self, ranks: Collection[int], *, ended: Collection[int], is_complete: Callable[[Barrier], bool]
    ) -> None:
        self._count = len(ranks)
        self._ended = set(ended)
        self._is_complete = is_complete
        self._open: dict[Barrier, _Open] = {}

    @property
    def gone(self) -> Collection[int]:
        """The ranks that have ended: none of them enters anything any more."""
        return self._ended

    def enter(self, rank: int, barrier: Barrier) -> Entered:
        """`rank` has entered `barrier`. Raises ProtocolError where too many are open."""
        state = self._open.get(barrier)
        if state is None:
            if self._is_complete(barrier):
                return Entered.PASSES
            if len(self._open) >= MAX_OPEN:
                raise ProtocolError(f"cannot enter barrier {barrier}: {MAX_OPEN} are open already")
            state = self._open[barrier] = _Open()
        state.entered.add(rank)
        if state.committing or state.broken:
            return Entered.WAITS
        if self._ended:
            state.broken = True
            return Entered.BROKEN
        if len(state.entered) < self._count:
            return Entered.WAITS
        state.committing = True
        return Entered.COMPLETES

    def completed(self, barrier: Barrier) -> list[int]:
        """The completion of `barrier` is durable: the ranks to be told, in order."""
        return sorted(self._open.pop(barrier).entered)

    def left(self, rank: int) -> list[Barrier]:
        """`rank` has ended: the open barriers in which others wait, and which will never be complete."""
        self._ended.add(rank)
        broken = []
        for barrier, state in self._open.items():
            if not state.committing and not state.broken and not state.entered <= self._ended:
                state.broken = True
                broken.append(barrier)
        return broken
