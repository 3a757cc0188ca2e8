"""Changes to what is durable about ranks: inventories, drains and `resource.eventlog`, committed in batches.

Everything that changes them is a function of a `Draft`, and goes through one line (`Changes.put`). While a commit is
under way, changes and events gather for the next one: 10,000 ranks that join together cost a handful of commits. Each
change is done on top of all before it, and is answered when it is durable:

    waiting ── draft ──┬── refused (RpcError)
                       ├── nothing to commit: answered with its batch, whatever becomes of the commit
                       └── under way ── durable: applied, answered │ failed: answered with the error, nothing changed

Who is online is a fact and no change: its events (online, offline, torpid, lively) are only logged, and where there is
no room for them the broker's log says so. An event that has to get into the eventlog is a change (`Draft.log`).

The eventlog is flux-core's: resource-define, drain, undrain, and what its journal adds to them. It is cut back when a
life of rank 0 finds it longer than `MAX_LOG`.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, encode
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.broker.drain import DRAIN_KEY, Drains, Mode
from fluxres.broker.inventory import Record, Records, rank_key
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CommitResult, Op, Put

log = logging.getLogger("fluxres.resource")

EVENTLOG_KEY: Final = "resource.eventlog"
MAX_LOG: Final = 4 << 20
"""Bytes of the eventlog above which a life of rank 0 cuts it back, to half of that, when it begins."""
MAX_BATCH: Final = 4096
"""Changes of one commit."""
MAX_WAITING: Final = 1 << 17
"""Changes that may wait for their turn; the next one is refused with EAGAIN."""
DEFINED_BY: Final = "dynamic-discovery"
"""The method that resource-define events name: ranks say themselves what they have."""

Change = Callable[["Draft"], None]
"""Changes a draft, or raises RpcError and has changed nothing."""
Done = Callable[[RpcError | None], None]
"""Told how a change has ended."""


class Draft:
    """What a batch of changes makes of what is durable."""

    def __init__(self, records: Records, drains: Drains, now: float) -> None:
        self.now = now
        self.drains = drains.copy()
        self.records: dict[int, Record] = {}
        self.events: list[Event] = []
        self.steps = 0
        """How many changes so far have something to commit."""
        self.redrained = False
        """Whether the drains change."""
        self._known = records

    def record(self, rank: int) -> Record | None:
        """The record of `rank` as it will be."""
        return self.records.get(rank) or self._known.get(rank)

    def define(self, rank: int, record: Record) -> None:
        """Set the record of `rank`."""
        self.records[rank] = record
        self.steps += 1

    def drain(self, ranks: IdSet, reason: str | None, mode: Mode) -> None:
        """Drain, see `Drains.drain`."""
        if self.drains.drain(ranks, now=self.now, reason=reason, mode=mode):
            self._drain_event("drain", ranks, reason, mode)

    def undrain(self, ranks: IdSet, reason: str | None, mode: Mode) -> None:
        """Undrain, see `Drains.undrain`."""
        if self.drains.undrain(ranks, mode=mode):
            self._drain_event("undrain", ranks, reason, mode)

    def declare(self, ranks: IdSet, reason: str) -> None:
        """Declare lost, see `Drains.declare`."""
        self.drains.declare(ranks, now=self.now, reason=reason)
        self._drain_event("drain", ranks, reason, Mode.UPDATE)

    def confirm(self, rank: int) -> None:
        """End a declaration, see `Drains.confirm`; nothing where there is none."""
        if rank not in self.drains.lost:
            return
        undrained = self.drains.confirm(rank)
        self.redrained = True
        self.steps += 1
        if undrained:
            self._drain_event("undrain", IdSet([rank]), "back online, and what ran there is dealt with", Mode.UPDATE)

    def log(self, name: str, context: JsonObject) -> None:
        """Log an event, which has to become durable."""
        self.events.append(Event(self.now, name, context))
        self.steps += 1

    def ops(self) -> list[Op]:
        """What to commit."""
        ops: list[Op] = [Put(PRIMARY, rank_key(rank), msgspec.json.encode(r)) for rank, r in self.records.items()]
        if self.redrained:
            ops.append(Put(PRIMARY, DRAIN_KEY, self.drains.encode()))
        events = self.events
        if self.records:
            defined = {"method": DEFINED_BY, "idset": str(IdSet(self.records))}
            events = [Event(self.now, "resource-define", defined), *events]
        if events:
            ops.append(Append(PRIMARY, EVENTLOG_KEY, "".join(map(encode, events)).encode()))
        return ops

    def _drain_event(self, name: str, ranks: IdSet, reason: str | None, mode: Mode) -> None:
        hosts = self._known.hosts(ranks)
        context: dict[str, str | int] = {"idset": str(ranks), "nodelist": str(hosts), "overwrite": mode.overwrite}
        if reason is not None:
            context["reason"] = reason
        self.events.append(Event(self.now, name, context))
        self.redrained = True
        self.steps += 1


class Changes:
    """The line of changes. `apply` is called with each draft that has become durable, before its changes' `done`."""

    def __init__(self, *, kvs: Kvs, now: Callable[[], float], apply: Callable[[Draft], None]) -> None:
        self.records = Records()
        self.drains = Drains()
        self._kvs = kvs
        self._now = now
        self._apply = apply
        self._waiting: deque[tuple[Change, Done]] = deque()
        self._facts: list[tuple[str, str, set[int]]] = []
        """Name, reason, ranks."""
        self._under_way = False

    def put(self, change: Change, done: Done) -> None:
        """Make a change when its turn comes; `done` is told, once, unless the store ends before."""
        if len(self._waiting) >= MAX_WAITING:
            done(RpcError(errno.EAGAIN, f"{MAX_WAITING} changes to resources are waiting; try again later"))
            return
        self._waiting.append((change, done))
        self._go_on()

    def note(self, name: str, rank: int, reason: str = "") -> None:
        """Log that `rank` is online, offline, torpid or lively; neighbours of one kind become one event."""
        if not self._facts or self._facts[-1][:2] != (name, reason):
            self._facts.append((name, reason, set()))
        self._facts[-1][2].add(rank)
        self._go_on()

    def _go_on(self) -> None:
        while not self._under_way and (self._waiting or self._facts):
            self._commit()

    def _commit(self) -> None:
        """Make one batch of what waits, and commit it."""
        self._under_way = True
        draft = Draft(self.records, self.drains, self._now())
        draft.events += [_fact(draft.now, *fact) for fact in self._facts]
        self._facts.clear()
        taken: list[tuple[Done, bool]] = []
        while self._waiting and len(taken) < MAX_BATCH:
            change, done = self._waiting.popleft()
            before = draft.steps
            try:
                change(draft)
            except RpcError as error:
                done(error)
            else:
                taken.append((done, draft.steps != before))
        ops = draft.ops()
        if ops:
            self._kvs.submit(ops, lambda result: self._ended(draft, taken, result))
        else:
            self._finish(draft, taken, None)

    def _ended(self, draft: Draft, taken: Sequence[tuple[Done, bool]], result: CommitResult) -> None:
        if result.error is not None and result.error.errnum != errno.ECANCELED:
            log.warning("cannot record changes of resources, or who is online: %s", result.error.text)
        self._finish(draft, taken, result.error)
        self._go_on()

    def _finish(self, draft: Draft, taken: Sequence[tuple[Done, bool]], error: RpcError | None) -> None:
        if error is None:
            self.drains = draft.drains
            for rank, record in draft.records.items():
                self.records.put(rank, record)
            self._apply(draft)
        self._under_way = False
        for done, needed in taken:
            done(error if needed else None)


def _fact(now: float, name: str, reason: str, ranks: set[int]) -> Event:
    why: JsonObject = {"reason": reason} if reason else {}
    return Event(now, name, {"idset": str(IdSet(ranks)), **why})


def cut_back(eventlog: bytes) -> bytes:
    """The newest events of a log that is too long: whole lines, half of `MAX_LOG` at most."""
    start = eventlog.find(b"\n", len(eventlog) - MAX_LOG // 2) + 1
    return eventlog[start:]
