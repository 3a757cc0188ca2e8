"""The topic `overlay`: what is known of each rank's place in the tree, told by those above and beside it.

Rank 0 knows of its own children. For the rest every router, a rank with children, is asked to report whenever something
changes below it (`overlay.monitor`), for as long as it is online. `overlay.report` puts all of it together.

Of a rank whose status stays, `since` stays what it was: each who reports of it has learnt of it a moment apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.base.json import JsonObject
from fluxres.exec.ranks import Ranks
from fluxres.overlay.errors import HostUnreachable
from fluxres.overlay.overlay import Overlay
from fluxres.overlay.report import Failed, Report, Seen, failed, look, parse_report
from fluxres.rpc.handle import Handle
from fluxres.sched.pool import Pool
from fluxres.status.source import RETRY, Built, Wake

log = logging.getLogger("fluxres.status")

FIRST_REPORTS: Final = 1.0
"""Seconds that the first picture waits for the routers that are online."""
SAME: Final = 1.0
"""Seconds that two tellings of since when may differ by, and mean the same."""


class TreeSource:
    """The tree below rank 0, whose own `overlay` is given; other ranks are asked through `handle`."""

    topic = "overlay"

    def __init__(
        self, *, overlay: Overlay, handle: Handle, ranks: Ranks, pool: Pool, now: Callable[[], float], wake: Wake
    ) -> None:
        self._overlay = overlay
        self._topology = overlay.topology
        self._handle = handle
        self._ranks = ranks
        self._pool = pool
        self._now = now
        self._wake = wake
        self._answers: dict[int, Report | Failed] = {}
        self._at: dict[int, float] = {}
        """When each of the answers came, in seconds since 1970."""
        self._seen: dict[int, Seen] = {}
        self._since: dict[int, float] = {}
        self._torpid: frozenset[int] = frozenset()
        self._dirty: set[int] = set()
        """Ranks that told something, and of whose subtrees something else may be known now."""
        self._touched: set[int] = set()
        """Ranks of which something else has changed."""
        self._waiting: dict[int, trio.Event] = {}
        """Set when the rank is online, or no longer."""
        self._awaited: set[int] = set()
        self._all_told = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Have everybody report until cancelled."""
        topology = self._topology
        routers = [rank for rank in range(1, topology.size) if topology.children(rank)]
        self._awaited = {rank for rank in routers if self._ranks.online(rank)}
        self._tell(0, parse_report(self._overlay.report()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_own, name="overlay of rank 0")
            for rank in routers:
                nursery.start_soon(self._monitor, rank, name=f"overlay of rank {rank}")
            if self._awaited:
                with trio.move_on_after(FIRST_REPORTS):
                    await self._all_told.wait()
            task_status.started()

    def touch(self, rank: int) -> None:
        """A rank is online, or no longer."""
        if (waiting := self._waiting.pop(rank, None)) is not None:
            waiting.set()
        self._touched.add(rank)
        self._wake()

    async def _watch_own(self) -> None:
        while True:
            changed = self._overlay.changed
            self._tell(0, parse_report(self._overlay.report()))
            await changed.wait()

    async def _monitor(self, rank: int) -> None:
        while True:
            await self._ranks.wait_online(rank)
            presence = self._ranks.presence(rank)
            try:
                async with (
                    self._overlay.subtree(rank),
                    self._handle.stream("overlay.monitor", {}, nodeid=rank) as reports,
                ):
                    async for report in reports:
                        self._tell(rank, parse_report(report))
            except HostUnreachable:
                self._tell(rank, None)
            except RpcError as error:
                told = failed(error)
                self._tell(rank, None if told.unreachable else told)
            except ProtocolError as error:
                self._tell(rank, Failed(str(error)))
            else:
                self._tell(rank, None)
            if self._ranks.presence(rank) is presence:  # its link is lost, and its leaving is not noticed yet, say
                with trio.move_on_after(RETRY):
                    await self._waiting.setdefault(rank, trio.Event()).wait()

    def _tell(self, rank: int, answer: Report | Failed | None) -> None:
        """A rank has told this; None: it is away, and its parent knows more of it."""
        if answer is None:
            self._answers.pop(rank, None)
        else:
            self._answers[rank] = answer
            self._at[rank] = self._now()
        if rank in self._awaited:
            self._awaited.discard(rank)
            if not self._awaited:
                self._all_told.set()
        self._dirty.add(rank)
        self._wake()

    # --- documents

    def documents(self) -> Built:
        """The ranks below those that have told something, and those touched."""
        topology = self._topology
        dirty, self._dirty = self._dirty, set()
        touched, self._touched = self._touched, set()
        torpid = frozenset(self._pool.torpid_ranks())
        touched |= torpid ^ self._torpid
        self._torpid = torpid
        done: set[int] = set()
        for teller in sorted(dirty, key=topology.level):
            if teller in done:
                continue
            for rank in topology.subtree(teller):
                done.add(rank)
                self._look(rank)
                yield str(rank), self._document(rank)
        for rank in touched - done:
            if rank in self._seen:
                yield str(rank), self._document(rank)

    def _look(self, rank: int) -> None:
        """Find out what is known of a rank now, and since when it is so."""
        seen = look(rank, self._topology, self._answers, self._seen)
        before = self._seen.get(rank)
        self._seen[rank] = seen
        since = self._begun(rank, seen)
        old = self._since.get(rank)
        is_as_before = before is not None and before.status == seen.status
        if old is None or not is_as_before or (abs(since - old) > SAME and not seen.ghost):
            self._since[rank] = round(since, 3)  # one that was lost before the rank above it was stays so since then

    def _begun(self, rank: int, seen: Seen) -> float:
        """Since when a rank's status is what it is; that of a ghost, since when that is so above it."""
        parent = self._topology.parent(rank)
        if seen.duration is None:
            return self._now() if parent is None or parent not in self._since else self._since[parent]
        teller = rank if parent is None or isinstance(self._answers.get(rank), Report) else parent
        return self._at[teller] - seen.duration

    def _document(self, rank: int) -> JsonObject:
        seen = self._seen[rank]
        document: JsonObject = {
            "rank": rank,
            "parent": self._topology.parent(rank),
            "status": seen.status,
            "since": self._since[rank],
            "torpid": rank in self._torpid,
        }
        inventory = self._pool.find(rank)
        if inventory is not None:
            document["host"] = inventory.host
        if seen.ghost:
            document["ghost"] = True
        if seen.error:
            document["error"] = seen.error
        return document
