"""The `overlay` service of every rank: what the tree looks like from here, and cutting a child off.

| topic               | payload | answers                                                               |
|---------------------|---------|-----------------------------------------------------------------------|
| overlay.health      |         | rank, status, duration, children [{rank, status, duration}]           |
| overlay.topology    | rank    | rank, size, children, nested: the tree below `rank` (default: this)   |
| overlay.monitor     |         | streaming: as health, at once and after each change                   |
| overlay.disconnect-subtree | rank | declare that child dead: its subtree restarts (flux-core issue 3805)  |
| overlay.stats-get   |         | messages and bytes of each link, and what is under way over them      |
"""

from __future__ import annotations

import errno
import os
from typing import Annotated

import msgspec

from fluxres.base.errors import RpcError
from fluxres.overlay.overlay import Overlay
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap


class _Rank(msgspec.Struct, frozen=True, kw_only=True):
    rank: Annotated[int, msgspec.Meta(ge=0)] | None = None


class OverlayService:
    """Serves `overlay.*` for one incarnation."""

    def __init__(self, overlay: Overlay, router: Router) -> None:
        self._overlay = overlay
        self._router = router
        self.service = Service("overlay", router)
        self.service.method("health", lambda _: overlay.report())
        self.service.method("topology", self._topology)
        self.service.method("disconnect-subtree", self._disconnect)
        self.service.method("stats-get", self._stats)
        self.service.task("monitor", self._monitor)

    def _topology(self, request: Request) -> WireMap:
        rank = request.parse(_Rank).rank
        if rank is not None and rank >= self._overlay.topology.size:
            raise RpcError(errno.ENOENT, f"there is no rank {rank}: the instance has {self._overlay.topology.size}")
        return self._below(self._overlay.rank if rank is None else rank)

    def _below(self, root: int) -> WireMap:
        topology = self._overlay.topology
        trees: dict[int, WireMap] = {}
        sizes: dict[int, int] = {}
        for rank in reversed([*topology.subtree(root)]):  # children before their parents
            below = topology.children(rank)
            sizes[rank] = 1 + sum(sizes[child] for child in below)
            trees[rank] = {"rank": rank, "size": sizes[rank], "children": [trees.pop(child) for child in below]}
        return trees[root]

    def _disconnect(self, request: Request) -> None:
        request.require_owner()
        rank = request.parse(_Rank).rank
        if rank is None or rank not in self._overlay.topology.children(self._overlay.rank):
            raise RpcError(errno.EINVAL, f"cannot disconnect rank {rank}: it is no child of rank {self._overlay.rank}")
        why = f"an administrator (uid {request.userid}) has disconnected rank {rank}"
        if not self._overlay.down.disconnect(rank, why):
            raise RpcError(errno.ENOTCONN, f"cannot disconnect rank {rank}: {os.strerror(errno.ENOTCONN)}")

    def _stats(self, request: Request) -> WireMap:
        links: dict[str, WireMap] = {}
        up = None if self._overlay.up is None else self._overlay.up.link
        for link in (*(child.link for child in self._overlay.down.online.values()), *([up] if up else [])):
            links[str(link.rank)] = {
                "sent": link.sent,
                "received": link.received,
                "bytes-sent": link.bytes_sent,
                "bytes-received": link.bytes_received,
                "backlog": link.connection.backlog,
            }
        return {"tracked": len(self._router.tracker), "links": {**links}}

    async def _monitor(self, request: Request) -> None:
        while True:
            changed = self._overlay.changed
            await request.stream(self._overlay.report())
            await changed.wait()
