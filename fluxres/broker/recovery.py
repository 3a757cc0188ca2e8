"""Follows the recoveries of one life of rank 0 (`exec.recovery`), and has each that ends in `resource.eventlog`.

    ranks, attachments ──events──▶ Recovery ── Opened ──▶ how many jobs are pending; a tick at its deadline
                                            └─ Closed ──▶ `recovery` is logged, durably; tried again on a full disk

It only watches: where it cannot follow any more, which is a bug, it says so in the log and stops, and no job suffers.

Times are of a clock that does not step; what is told to others is in seconds since 1970, as this life had them when it
began. What ranks tell of their panics is an age (`LastLife`), and so free of what their clocks show; of the lives
before there is only the time of day in the eventlog, and where that is later than now it counts as now.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import deque
from collections.abc import Callable, Collection
from typing import Final, Protocol

import trio

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.base.meter import OUTAGES, Histogram
from fluxres.exec.attachments import Attachments, Fate
from fluxres.exec.episode import Document
from fluxres.exec.ranks import Notice, Ranks
from fluxres.exec.recall import Recalled
from fluxres.exec.recovery import (
    Begun,
    Closed,
    Counted,
    Declared,
    Event,
    Found,
    Joined,
    Leaving,
    Left,
    Opened,
    Over,
    Phase,
    Recovery,
    Shell,
    Tick,
)
from fluxres.overlay.topology import Topology

log = logging.getLogger("fluxres.resource")

EVENT: Final = "recovery"
"""The name of the event."""
MAX_UNSAVED: Final = 64
"""Events that may wait to be durable; of more the oldest is dropped, with a line in the log."""
RETRY: Final = 1.0
"""Seconds until an event is logged again for which there was no room."""
PASSES: Final = frozenset({errno.ENOSPC, errno.EAGAIN})
"""Errors of the store that pass."""


class Eventlog(Protocol):
    """`resource.eventlog`, and what it has of the lives before (`broker.resource`)."""

    @property
    def recalled(self) -> Recalled:
        """Who may be expected back."""

    @property
    def known(self) -> IdSet:
        """The ranks that were ever here."""

    async def log(self, name: str, context: JsonObject) -> None:
        """Log an event; returns when it is durable. Raises RpcError."""


class Recoveries:
    """What rank 0 knows of losses and returns. `pending` counts the jobs that wait for resources."""

    def __init__(
        self,
        *,
        ranks: Ranks,
        attachments: Attachments,
        topology: Topology,
        resource: Eventlog,
        pending: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self.count = 0
        """Recoveries that have ended in this life of rank 0, and were logged; the next three are of their jobs."""
        self.rediscovered = 0
        self.finished = 0
        self.lost = 0
        self.seconds = Histogram(OUTAGES)
        """How long they took."""
        self._ranks = ranks
        self._attachments = attachments
        self._resource = resource
        self._pending = pending
        self._machine: Recovery | None = Recovery(topology)
        self._wall = now() - trio.current_time()
        self._unsaved: deque[JsonObject] = deque()
        self._news = trio.Event()
        self._deadline = math.inf
        self._listeners: list[Callable[[], None]] = []

    def current(self) -> JsonObject | None:
        """The recovery under way, as the status feed shows it; None where there is none."""
        document = None if self._machine is None else self._machine.current()
        return None if document is None else document.context(self._wall)

    def listen(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever what `current` tells has changed, or may have."""
        self._listeners.append(callback)

    # --- what happens

    def begin(self, jobs: Collection[JobId], *, pending: int) -> None:
        """This life of rank 0 begins: it will take up `jobs`, which have shells to be found, and others are pending.

        Call it once, when the resources are loaded, and before anybody can join.
        """
        at = trio.current_time()
        recalled = self._resource.recalled
        begun = Begun(
            at=at,
            known=self._resource.known,
            expected=recalled.expected,
            alive=recalled.alive - self._wall,
            jobs=frozenset(map(int, jobs)),
            pending=pending,
        )
        self._apply(begun)
        for rank in self._ranks.declarations():
            self._apply(Declared(at=at, rank=rank))
        self._ranks.on_change(self._rank_changed)
        self._ranks.on_notice(self._noticed)
        self._attachments.follow(self)

    def _rank_changed(self, rank: int, online: bool) -> None:
        at = trio.current_time()
        if not online:
            self._attachments.left(rank)
            self._apply(Left(at=at, rank=rank))
            return
        presence = self._ranks.presence(rank)
        last = None if presence is None else presence.last
        if last is None:
            self._apply(Joined(at=at, rank=rank))
        else:
            self._apply(Joined(at=at, rank=rank, ago=last.ago, why=last.why))

    def _noticed(self, rank: int, notice: Notice) -> None:
        if notice is Notice.LEAVING:
            self._apply(Leaving(rank=rank))
        else:
            self._apply(Declared(at=trio.current_time(), rank=rank))

    def found(self, jobid: JobId, ranks: IdSet) -> None:
        """See `Follower`."""
        self._apply(Found(at=trio.current_time(), job=jobid, ranks=ranks))

    def shell(self, jobid: JobId, rank: int, fate: Fate) -> None:
        """See `Follower`."""
        self._apply(Shell(at=trio.current_time(), job=jobid, rank=rank, fate=fate))

    def over(self, jobid: JobId) -> None:
        """See `Follower`."""
        self._apply(Over(at=trio.current_time(), job=jobid))

    def _apply(self, event: Event) -> None:
        machine = self._machine
        if machine is None:
            return
        was = machine.phase
        try:
            effects = machine.apply(event)
            for effect in effects:
                match effect:
                    case Opened(deadline=deadline):
                        self._deadline = deadline
                        self._wake()
                    case Closed(document=Document() as document):
                        self._ended(document)
            if machine.phase is Phase.UNDER_WAY and was is Phase.IDLE:
                machine.apply(Counted(pending=self._pending()))
        except Exception:  # a bug, which those who tell us, in the midst of their own work, are not to suffer from
            log.exception("cannot follow recoveries any more")
            self._machine = None
        else:
            if machine.began is not None:
                self._attachments.before = machine.began
        if was is Phase.UNDER_WAY or machine.phase is Phase.UNDER_WAY:
            for listener in self._listeners:
                listener()

    def _ended(self, document: Document) -> None:
        seconds = document.seconds or 0.0
        self.count += 1
        self.rediscovered += document.rediscovered
        self.finished += document.finished
        self.lost += document.lost
        self.seconds.observe(seconds)
        log.log(
            logging.WARNING if document.lost or document.away or document.detached else logging.INFO,
            "recovery of rank(s) %s took %.3fs (%s): of %d running job(s) %d rediscovered, %d finished meanwhile, "
            "%d lost; %d pending",
            *(document.ranks, seconds, document.why, document.running),
            *(document.rediscovered, document.finished, document.lost, document.pending),
        )
        if len(self._unsaved) == MAX_UNSAVED:
            log.error("dropping a recovery event that could not be stored: %s", self._unsaved.popleft())
        self._unsaved.append(document.context(self._wall))
        self._wake()

    # --- in the background

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Log what has ended, and keep the time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_time, name="time limit of recoveries")
            task_status.started()
            while True:
                while not self._unsaved:
                    await self._news.wait()
                await self._save()

    async def _keep_time(self) -> None:
        while True:
            with trio.move_on_at(self._deadline):
                await self._news.wait()
            if trio.current_time() >= self._deadline:
                self._deadline = math.inf
                self._apply(Tick(at=trio.current_time()))

    async def _save(self) -> None:
        """Have the oldest event durable."""
        context = self._unsaved[0]
        try:
            await self._resource.log(EVENT, context)
        except RpcError as error:
            if error.errnum in PASSES:
                await trio.sleep(RETRY)
                return
            log.error("cannot log a recovery: %s", error.text)
        if self._unsaved and self._unsaved[0] is context:
            self._unsaved.popleft()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()
