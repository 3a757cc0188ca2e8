"""The topic `resources`: what each rank that was ever seen has, what of it is in use, and why it gets no jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import trio

from fluxres.base.json import JsonObject
from fluxres.exec.ranks import Ranks
from fluxres.kvs.kvs import Kvs
from fluxres.sched.pool import Inventory, Pool, Usage
from fluxres.status.source import Built, Wake, follow

DRAIN_KEY: Final = "resource.drain"
"""Where the drains lie: what is committed there has been applied by the time that a watch tells of it."""
TOTALS: Final = (
    *("nodes", "online", "torpid", "drained", "lost"),
    *("cores", "cores_used", "cores_down", "gpus", "gpus_used"),
)
"""What is added up over all ranks."""

Drains = Callable[[], Mapping[int, str]]
"""The reason, be it "", of each rank that is drained."""


class NodesSource:
    """The ranks in the pool. `drains` is asked whenever the record of the drains has changed."""

    topic = "resources"

    def __init__(self, *, pool: Pool, ranks: Ranks, kvs: Kvs, drains: Drains, wake: Wake) -> None:
        self._pool = pool
        self._ranks = ranks
        self._kvs = kvs
        self._drains = drains
        self._wake = wake
        self._drained: dict[int, str] = {}
        self._lost: dict[int, str] = {}
        self._dirty: set[int] = {inventory.rank for inventory in pool.inventory()}
        self._counted: dict[int, tuple[int, ...]] = {}
        """What each rank adds to each of `TOTALS`."""
        self._totals = [0] * len(TOTALS)

    def totals(self) -> JsonObject:
        """`TOTALS`, as of the documents built so far."""
        return dict(zip(TOTALS, self._totals, strict=True))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen to the pool, and watch the drains, until cancelled."""
        self._pool.listen(self.touch)
        try:
            self._look_at_drains()
            task_status.started()
            await follow(self._kvs, DRAIN_KEY, self._look_at_drains)
        finally:
            self._pool.unlisten(self.touch)

    def touch(self, rank: int) -> None:
        """Something of a rank has changed."""
        self._dirty.add(rank)
        self._wake()

    def _look_at_drains(self) -> None:
        drained, lost = dict(self._drains()), dict(self._ranks.declarations())
        for rank, _ in (drained.items() ^ self._drained.items()) | (lost.items() ^ self._lost.items()):
            self.touch(rank)
        self._drained, self._lost = drained, lost

    # --- documents

    def documents(self) -> Built:
        """The ranks that have changed."""
        dirty, self._dirty = self._dirty, set()
        for rank in dirty:
            inventory, usage = self._pool.find(rank), self._pool.usage(rank)
            if inventory is not None and usage is not None:  # else it was drained before it was ever seen
                self._count(rank, usage)
                yield str(rank), self._document(inventory, usage)

    def _document(self, inventory: Inventory, usage: Usage) -> JsonObject:
        rank = inventory.rank
        document: JsonObject = {
            "rank": rank,
            "host": inventory.host,
            "cores": usage.cores,
            "cores_used": usage.cores_used,
            "gpus": usage.gpus,
            "gpus_used": usage.gpus_used,
            "online": self._ranks.online(rank),
            "torpid": usage.torpid,
            "properties": [*sorted(inventory.properties)],
        }
        if rank in self._drained:
            document["drained"] = self._drained[rank]
        if rank in self._lost:
            document["lost"] = self._lost[rank]
        return document

    def _count(self, rank: int, usage: Usage) -> None:
        """Bring the totals up to date."""
        facts = (True, self._ranks.online(rank), usage.torpid, rank in self._drained, rank in self._lost)
        down = 0 if usage.usable else usage.cores_idle
        counts = (*map(int, facts), usage.cores, usage.cores_used, down, usage.gpus, usage.gpus_used)
        before = self._counted.get(rank)
        if counts != before:
            self._counted[rank] = counts
            for at, count in enumerate(counts):
                self._totals[at] += count - (before[at] if before else 0)
