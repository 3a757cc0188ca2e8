"""The view of the instance at a rank that is not rank 0: one `status.watch` of everything, for all readers here.

States, of the task in `run`:

    IDLE        nobody has the board open
    CONNECTING  the stream is asked for, from the position that we have; after a failure again, with growing pauses
    FOLLOWING   snapshot and deltas arrive, and are applied under the epoch and the numbers that they have at rank 0:
                a reader that comes from another rank goes on here where it was

The last reader's leaving leads back to IDLE, `LINGER` later; the picture is forgotten then. A stream that is lost
(EHOSTUNREACH; ENOSYS while rank 0 starts) leads from FOLLOWING to CONNECTING: readers keep the last picture, and what
they miss is merged into a delta, or, where rank 0 has begun another life meanwhile, is a snapshot with the word
`restarted`. There is no end of trying: the incarnation ends the task.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, cast

import trio

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.exec.backoff import Backoff
from fluxres.status.board import LINGER, Audience, Board
from fluxres.status.messages import DeltaPart, SnapshotPart, parse_body
from fluxres.status.view import TOPICS, View

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject
    from fluxres.rpc.handle import Handle
    from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.status")

WATCH: Final = "status.watch"
ROOT: Final = 0
"""The rank that has the feed."""


class Mirror:
    """`Boards` of a rank below rank 0. Runs as a task of the incarnation, whose handle it uses."""

    def __init__(self, handle: Handle, *, linger: float = LINGER) -> None:
        self._handle = handle
        self._linger = linger
        self._audience = Audience()
        self._board = Board(View())
        self._parts = Parts(self._board)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Board]:
        """Have the board kept up to date inside the block."""
        with self._audience.attending():
            yield self._board

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow rank 0 while somebody wants it, until cancelled."""
        task_status.started()
        while True:
            await self._audience.wanted()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow)
                await self._audience.gone(self._linger)
                nursery.cancel_scope.cancel()
            self._board.begin("")

    async def _follow(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._stream(backoff)
                why = "rank 0 has ended the stream"
            except (RpcError, ProtocolError) as error:
                why = str(error)
            if backoff.is_news(why):
                log.warning("the status of the instance does not arrive, trying again: %s", why)
            await trio.sleep(backoff.pause())

    async def _stream(self, backoff: Backoff) -> None:
        """Follow one stream to its end. Raises RpcError, and ProtocolError for what is no continuation."""
        self._parts.forget()
        payload: WireMap = {"topics": list(TOPICS)}
        position = self._board.view.position
        if self._board.view.begun:
            payload["position"] = [position.epoch, position.seq]
        async with self._handle.stream(WATCH, payload, nodeid=ROOT) as responses:
            async for response in responses:
                self._parts.take(parse_body(response))
                backoff.succeeded()


class Parts:
    """Puts the parts of snapshots and deltas together, and on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._put: dict[str, dict[str, JsonObject]] = {}
        self._delete: dict[str, list[str]] = {}
        self._count = 0

    def forget(self) -> None:
        """Another stream begins."""
        self._put, self._delete, self._count = {}, {}, 0

    def take(self, part: SnapshotPart | DeltaPart) -> None:
        """Take the next part. Raises ProtocolError where it does not go on from here; then there has to be a new
        snapshot."""
        if part.part != self._count:
            raise ProtocolError(f"cannot take part {part.part} of {WATCH}: part {self._count} is next")
        self._count += 1
        if isinstance(part, SnapshotPart):
            self._add(part.docs)
        else:
            self._check(part)
            self._add(part.set)
            for topic, keys in part.delete.items():
                self._delete.setdefault(topic, []).extend(keys)
        if not part.more:
            self._finish(part)

    def _check(self, part: DeltaPart) -> None:
        epoch, seq = part.position
        known = self._board.view.position
        if (epoch, part.prev) != known or seq < part.prev:
            self._board.begin("")
            raise ProtocolError(f"cannot apply a delta from {epoch}, {part.prev} to {seq}: this view is at {known}")

    def _finish(self, part: SnapshotPart | DeltaPart) -> None:
        put, delete = self._put, self._delete
        self.forget()
        epoch, seq = part.position
        if isinstance(part, SnapshotPart):
            self._board.begin(epoch, put, seq)
        elif seq > part.prev:  # else it is only the answer to a resume
            self._board.change(put, delete, seq=seq)

    def _add(self, documents: object) -> None:
        for topic, keys in cast("dict[str, dict[str, JsonObject]]", documents).items():
            self._put.setdefault(topic, {}).update(keys)
