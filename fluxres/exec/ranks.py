"""Which ranks are there, as rank 0 knows it: who is online as which incarnation, and who was declared lost.

A rank is ONLINE from `joined` to `left`; before, after, and at the beginning of every life of rank 0 it is offline. A
rank that joins while it counts as online supersedes its earlier incarnation, whose `left` then says nothing any more.
Independently of that a rank may be *declared lost* by an administrator: whatever ran there is given up, and the
declaration stands, over restarts and while the rank is back online, until its shells are known to be dealt with.

Only the `resource` service (`broker.resource`) calls what changes anything here; job-exec and the manager ask and wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Final

import msgspec
import trio

from fluxres.base.idset import IdSet

OnChange = Callable[[int, bool], None]
"""Told of (rank, whether it is online now)."""
MAX_WHY: Final = 400
"""Characters of the reason that a rank gives for the end of its last incarnation; more are cut off."""


class Notice(Enum):
    """What may be said of a rank, whether it is online or not."""

    LEAVING = "leaving"
    """It is shut down, and will be gone in a moment."""
    DECLARED = "declared"
    """It was declared lost."""


class LastLife(msgspec.Struct, frozen=True, kw_only=True):
    """How the incarnation ended that the same process had before this one, the last of them that was online.

    `ago` is how many seconds before this message that was, measured by the process itself on a clock that does not
    step. It is no time of day, for the clocks of two nodes may differ by anything: rank 0 takes it off its own time.
    """

    ago: float
    why: str


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of itself when it joins: the payload of `resource.hello`.

    `statedir` is the statedir's own id and `incarnation` its count, by which lives of one rank are ordered. `cores` and
    `gpus` are idsets of logical ids, as text; `properties` as RFC 20 has them. `last` is missing where a process is
    online for the first time, and from brokers that do not know of it.
    """

    rank: int
    uuid: str
    host: str
    statedir: str
    incarnation: int
    boot_id: str
    cores: str
    gpus: str = ""
    properties: Sequence[str] = ()
    last: LastLife | None = None


class Ranks:
    """The ranks of the instance, as one life of rank 0 sees them."""

    def __init__(self) -> None:
        self._online: dict[int, Presence] = {}
        self._ids: IdSet | None = IdSet()
        self._statedirs: dict[int, str] = {}
        self._declared: dict[int, str] = {}
        self._joins: dict[int, trio.Event] = {}
        self._declarations: dict[int, trio.Event] = {}
        self._leaving: set[int] = set()
        self._listeners: list[OnChange] = []
        self._noticing: list[Callable[[int, Notice], None]] = []

    # --- questions

    def online(self, rank: int) -> bool:
        """Whether `rank` is online."""
        return rank in self._online

    def online_ranks(self) -> IdSet:
        """All ranks that are online."""
        if self._ids is None:
            self._ids = IdSet(self._online)
        return self._ids

    def presence(self, rank: int) -> Presence | None:
        """What `rank` said when it joined; None while it is offline."""
        return self._online.get(rank)

    def is_leaving(self, rank: int) -> bool:
        """Whether `rank` said goodbye before it left, or is about to leave; until it joins again."""
        return rank in self._leaving

    def statedir(self, rank: int) -> str:
        """The id of the statedir that `rank` has, or had when it was last here. KeyError if it never was."""
        return self._statedirs[rank]

    def declared(self, rank: int) -> str | None:
        """Why `rank` was declared lost; None where it was not."""
        return self._declared.get(rank)

    def declarations(self) -> Mapping[int, str]:
        """All ranks that are declared lost, each with the reason."""
        return self._declared

    # --- waiting

    async def wait_online(self, rank: int) -> None:
        """Return as soon as `rank` is online, at once where it is."""
        await trio.lowlevel.checkpoint()
        while rank not in self._online:
            await self._joins.setdefault(rank, trio.Event()).wait()

    async def wait_declared(self, rank: int) -> str:
        """Return the reason as soon as `rank` is declared lost, at once where it is."""
        await trio.lowlevel.checkpoint()
        while (reason := self._declared.get(rank)) is None:
            await self._declarations.setdefault(rank, trio.Event()).wait()
        return reason

    def on_change(self, callback: OnChange) -> None:
        """Call `callback` whenever a rank has joined or left, in the order of subscription."""
        self._listeners.append(callback)

    def on_notice(self, callback: Callable[[int, Notice], None]) -> None:
        """Call `callback` whenever something is said of a rank, in the order of subscription."""
        self._noticing.append(callback)

    # --- changes

    def remember(self, rank: int, statedir: str) -> None:
        """The durable records say that `rank` has this statedir."""
        self._statedirs[rank] = statedir

    def joined(self, presence: Presence) -> None:
        """A rank is here; where it counts as online already, its earlier incarnation has left."""
        rank = presence.rank
        earlier = self._online.get(rank)
        if earlier is not None:
            self.left(rank, earlier.uuid)
        self._online[rank] = presence
        self._ids = None
        self._leaving.discard(rank)
        self._statedirs[rank] = presence.statedir
        _wake(self._joins, rank)
        self._tell(rank, online=True)

    def left(self, rank: int, uuid: str) -> None:
        """The incarnation `uuid` of `rank` is gone; says nothing where another one has taken its place."""
        presence = self._online.get(rank)
        if presence is None or presence.uuid != uuid:
            return
        del self._online[rank]
        self._ids = None
        self._tell(rank, online=False)

    def say_goodbye(self, rank: int, uuid: str) -> None:
        """The incarnation `uuid` of `rank` is shut down on purpose; says nothing where it is not the one online."""
        presence = self._online.get(rank)
        if presence is not None and presence.uuid == uuid:
            self._leaving.add(rank)
            self._notice(rank, Notice.LEAVING)

    def declare(self, rank: int, reason: str) -> None:
        """An administrator has declared `rank` lost, durably."""
        self._declared[rank] = reason
        _wake(self._declarations, rank)
        self._notice(rank, Notice.DECLARED)

    def confirm(self, rank: int) -> None:
        """The declaration no longer stands: the rank is back, and its shells are dealt with."""
        self._declared.pop(rank, None)

    def _tell(self, rank: int, *, online: bool) -> None:
        for listener in self._listeners:
            listener(rank, online)

    def _notice(self, rank: int, notice: Notice) -> None:
        for callback in self._noticing:
            callback(rank, notice)


def _wake(events: dict[int, trio.Event], rank: int) -> None:
    event = events.pop(rank, None)
    if event is not None:
        event.set()
