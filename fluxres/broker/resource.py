"""The `resource` service and groups on rank 0: which ranks there are, what they have, who is online, who is drained.

A rank joins with `resource.hello`, a streaming request that stays open for as long as its incarnation:

    asked ── refused: malformed, or a later incarnation is here (ESTALE)
      │ what the rank has is durable: into the pool; drained if that has changed while jobs hold some of it
    joined: online, answered {}, the scheduler wakes
      │ the request is cancelled: by RPC tracking when a broker on the way is lost, or superseded by the next one
    left: offline, gets no new jobs, keeps what it carries

A rank that is shut down sends `resource.goodbye` before it leaves: then it is offline, and not lost.

`resource.declare-lost` gives up an offline rank: drained, and all who wait in `Ranks.wait_declared` are told. It stands
until the rank is back and has sent `resource.confirm`: what had run there is dealt with.

Topics and payloads are flux-core's, but for hello, goodbye, torpid, declare-lost and confirm.
Source: RFC 20 (R), RFC 29, 22.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, cast

import msgspec
import trio

from fluxres.base.errors import Refusal, RpcError
from fluxres.base.eventlog import Event
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.broker.changes import EVENTLOG_KEY, MAX_LOG, Change, Changes, Draft, cut_back
from fluxres.broker.drain import DRAIN_KEY, Mode, decode
from fluxres.broker.inventory import Record, changes, load_records, record_of
from fluxres.exec.ranks import Presence, Ranks
from fluxres.exec.recall import Recalled, recall
from fluxres.job.resources import ResourceSet, Target, from_shares
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Put
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.sched.pool import Pool
from fluxres.sched.service import Scheduler
from fluxres.wire.payload import WireMap

LOST: Final = "declared lost"
"""The reason where a declaration gives none."""
SHUT_DOWN: Final = "shut down"
"""The reason of an `offline` event of a rank that said goodbye; others have none."""

log = logging.getLogger("fluxres.resource")


class _Group(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class _Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    uuid: str


class _Torpid(msgspec.Struct, frozen=True, kw_only=True):
    ranks: str
    torpid: bool


class _Drain(msgspec.Struct, frozen=True, kw_only=True):
    targets: str
    reason: str | None = None
    mode: Mode = Mode.PLAIN


class _Declare(msgspec.Struct, frozen=True, kw_only=True):
    ranks: str
    reason: str = LOST


class _Confirm(msgspec.Struct, frozen=True, kw_only=True):
    rank: int


class ResourceService:
    """Serves `resource.*` and `groups.get` on rank 0. `size` is that of the instance, `now` in seconds since 1970.

    It alone changes `ranks`, and fills `pool`. `load` it before jobs are taken up; jobs must be taken up before the
    services run: until then nobody can join.
    """

    def __init__(
        self,
        *,
        router: Router,
        kvs: Kvs,
        ranks: Ranks,
        pool: Pool,
        scheduler: Scheduler,
        size: int,
        now: Callable[[], float],
    ) -> None:
        self._kvs = kvs
        self._ranks = ranks
        self._pool = pool
        self._scheduler = scheduler
        self._size = size
        self._now = now
        self._changes = Changes(kvs=kvs, now=now, apply=self._apply)
        self.recalled = Recalled(expected=IdSet(), alive=0.0)
        """What the eventlog says of the lives before; from `load` on."""
        ranks.on_change(self._online_changed)
        self.service = Service("resource", router)
        self.service.task("hello", self._hello)
        self.service.method("goodbye", self._goodbye)
        self.service.method("torpid", self._torpid)
        self.service.method("status", self._status)
        self.service.method("sched-status", self._sched_status)
        self.service.deferred("drain", self._drain)
        self.service.deferred("undrain", self._undrain)
        self.service.deferred("declare-lost", self._declare_lost)
        self.service.deferred("confirm", self._confirm)
        self.groups = Service("groups", router)
        self.groups.method("get", self._group)

    async def load(self) -> None:
        """Read what is durable: ranks into the pool, down, and drains. Raises Refusal."""
        records, unreadable = await load_records(self._kvs)
        self._changes.records = records
        for rank in records.ranks():
            record = records.get(rank)
            if record is not None and rank < self._size:
                self._pool.add(record.inventory(rank))
                self._ranks.remember(rank, record.statedir)
        drains = self._kvs.get(PRIMARY, DRAIN_KEY)
        if drains is not None:
            try:
                self._changes.drains = decode(drains)
            except ValueError as error:
                raise Refusal(
                    f"cannot read {DRAIN_KEY} in the store: {error}; nobody could tell which ranks are drained: "
                    "put back a copy of the store"
                ) from error
        self._apply_drains()
        eventlog = self._kvs.get(PRIMARY, EVENTLOG_KEY) or b""
        self.recalled = self._recall(eventlog)
        if len(eventlog) > MAX_LOG:
            self._kvs.submit([Put(PRIMARY, EVENTLOG_KEY, cut_back(eventlog))], lambda _: None)
        self._begin(unreadable)

    def _recall(self, eventlog: bytes) -> Recalled:
        """Who may be expected back. Where the log cannot be read that is every rank with a record."""
        try:
            recalled = recall(eventlog)
        except ValueError as error:
            log.error("cannot read %s, and expect every rank back that was ever here: %s", EVENTLOG_KEY, error)
            return Recalled(expected=self.known, alive=self._now())
        return Recalled(expected=recalled.expected & self.known, alive=recalled.alive)

    @property
    def known(self) -> IdSet:
        """The ranks that were ever here, as far as the instance has them."""
        return IdSet(rank for rank in self._changes.records.ranks() if rank < self._size)

    @property
    def drained(self) -> dict[int, str]:
        """Why each rank is drained that is; "" where nobody said."""
        return {rank: drain.reason or "" for rank, drain in self._changes.drains.drained.items()}

    async def log(self, name: str, context: JsonObject) -> None:
        """Log an event to `resource.eventlog`; returns when it is durable. Raises RpcError."""
        await self._changed(lambda draft: draft.log(name, context))

    def _begin(self, unreadable: dict[int, str]) -> None:
        """Log that a life of rank 0 has begun; drain ranks of which it is not known what their jobs hold."""
        known = IdSet(self._changes.records.ranks())
        nodelist = str(self._changes.records.hosts(known))

        def change(draft: Draft) -> None:
            draft.events.append(Event(draft.now, "restart", {"ranks": str(known), "online": "", "nodelist": nodelist}))
            for rank, why in unreadable.items():
                draft.drain(IdSet([rank]), f"the record of what it has is damaged: {why}", Mode.UPDATE)

        self._pool.drain(IdSet(unreadable))
        self._changes.put(change, lambda _: None)

    # --- presence

    async def _hello(self, request: Request) -> None:
        request.require_owner()
        if not request.message.is_streaming:
            raise RpcError(errno.EPROTO, "resource.hello wants a streaming request")
        presence = request.parse(Presence)
        self._known(presence.rank)
        try:
            record = record_of(presence)
        except ValueError as error:
            raise RpcError(errno.EINVAL, f"cannot take rank {presence.rank}: {error}") from error
        self._check_order(presence)
        known = self._changes.records.get(presence.rank)
        if known is not None and msgspec.structs.replace(known, boot_id=record.boot_id) == record:
            # No more than its boot is new: that must not keep it away while the disk is full.
            self._changes.put(lambda draft: self._define(draft, presence.rank, record), lambda _: None)
        else:
            await self._changed(lambda draft: self._define(draft, presence.rank, record))
        self._check_order(presence)
        self._ranks.joined(presence)
        try:
            await request.stream({})
            await trio.sleep_forever()
        finally:
            self._ranks.left(presence.rank, presence.uuid)

    def _goodbye(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Goodbye)
        self._ranks.say_goodbye(ask.rank, ask.uuid)

    def _check_order(self, presence: Presence) -> None:
        """Of two incarnations on one statedir the later one stays; another statedir takes the place."""
        present = self._ranks.presence(presence.rank)
        if (
            present is not None
            and present.statedir == presence.statedir
            and present.incarnation >= presence.incarnation
        ):
            raise RpcError(
                errno.ESTALE,
                f"cannot take rank {presence.rank}: its incarnation {present.incarnation} is online, "
                f"{presence.incarnation} is not later",
            )

    def _define(self, draft: Draft, rank: int, record: Record) -> None:
        old = draft.record(rank)
        if old == record:
            return
        draft.define(rank, record)
        if old is None or not self._pool.in_use(rank):
            return
        what = changes(old, record)
        if what:
            draft.drain(IdSet([rank]), f"came back changed while jobs hold some of it: {what}", Mode.UPDATE)
        if old.statedir != record.statedir and old.boot_id == record.boot_id:  # and was not rebooted
            draft.drain(IdSet([rank]), "came back with another statedir: what ran there may still run", Mode.UPDATE)

    def _online_changed(self, rank: int, online: bool) -> None:
        here = IdSet([rank])
        self._pool.set_lively(here)
        if online:
            self._pool.set_up(here)
            self._scheduler.wake()
            self._changes.note("online", rank)
        else:
            self._pool.set_down(here)
            self._changes.note("offline", rank, SHUT_DOWN if self._ranks.is_leaving(rank) else "")

    def _torpid(self, request: Request) -> WireMap:
        request.require_owner()
        ask = request.parse(_Torpid)
        try:
            named = IdSet.parse(ask.ranks)
        except ValueError as error:
            raise RpcError(errno.EINVAL, str(error)) from error
        torpid = self._pool.torpid_ranks()
        changed = named & self._ranks.online_ranks()
        changed = changed - torpid if ask.torpid else changed & torpid
        if ask.torpid:
            self._pool.set_torpid(changed)
        else:
            self._pool.set_lively(changed)
            self._scheduler.wake()
        for rank in changed:
            self._changes.note("torpid" if ask.torpid else "lively", rank)
        return {}

    # --- drains

    def _drain(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Drain)
        targets = self._resolve(ask.targets)
        self._answer(request, lambda draft: draft.drain(targets, ask.reason, ask.mode))

    def _undrain(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Drain)
        targets = self._resolve(ask.targets)
        self._answer(request, lambda draft: draft.undrain(targets, ask.reason, ask.mode))

    def _declare_lost(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Declare)
        targets = self._resolve(ask.ranks)

        def change(draft: Draft) -> None:
            online = targets & self._ranks.online_ranks()
            if online:
                raise RpcError(errno.EBUSY, f"online: rank {online}; only offline ranks can be declared lost")
            draft.declare(targets, ask.reason or LOST)

        self._answer(request, change)

    def _confirm(self, request: Request) -> None:
        request.require_owner()
        rank = request.parse(_Confirm).rank
        self._known(rank)

        def change(draft: Draft) -> None:
            if not self._ranks.online(rank):
                raise RpcError(errno.EAGAIN, f"rank {rank} is not online: it has to join first")
            draft.confirm(rank)

        self._answer(request, change)

    def _answer(self, request: Request, change: Change) -> None:
        """Make a change, and answer when it is durable."""

        def done(error: RpcError | None) -> None:
            if error is None:
                request.respond()
            else:
                request.fail(error.errnum, error.text)

        self._changes.put(change, done)

    async def _changed(self, change: Change) -> None:
        """Make a change, and return when it is durable. Raises RpcError."""
        ended = trio.Event()
        errors: list[RpcError] = []

        def done(error: RpcError | None) -> None:
            if error is not None:
                errors.append(RpcError(error.errnum, error.text))
            ended.set()

        self._changes.put(change, done)
        await ended.wait()
        if errors:
            raise errors[0]

    def _apply(self, draft: Draft) -> None:
        """A draft is durable."""
        for rank, record in draft.records.items():
            inventory = record.inventory(rank)
            if self._pool.find(rank) is None:
                self._pool.add(inventory)
            else:
                self._pool.replace(inventory)
            self._ranks.remember(rank, record.statedir)
        if draft.redrained:
            self._apply_drains()

    def _apply_drains(self) -> None:
        drains = self._changes.drains
        drained, before = drains.ranks(), self._pool.drained_ranks()
        self._pool.drain(drained - before)
        if undrained := before - drained:
            self._pool.undrain(undrained)
            self._scheduler.wake()
        for rank, lost in drains.lost.items():
            if self._ranks.declared(rank) is None:
                self._ranks.declare(rank, lost.reason)
        for rank in self._ranks.declarations().keys() - drains.lost.keys():
            self._ranks.confirm(rank)

    def _resolve(self, targets: str) -> IdSet:
        return self._changes.records.resolve(targets, self._size)

    def _known(self, rank: int) -> None:
        if not 0 <= rank < self._size:
            raise RpcError(errno.EINVAL, f"there is no rank {rank}: the instance has {self._size} ranks, from 0 on")

    # --- questions

    def _status(self, request: Request) -> WireMap:
        online = self._ranks.online_ranks()
        return {
            "R": _encoded(self._all()),
            "drain": self._changes.drains.groups(),
            "online": str(online),
            "offline": str(IdSet(range(self._size)) - online),
            "exclude": "",
            "torpid": str(self._pool.torpid_ranks()),
            "lost": str(IdSet(self._changes.drains.lost)),
        }

    def _sched_status(self, request: Request) -> WireMap:
        hosts = {inventory.rank: inventory.host for inventory in self._pool.inventory()}
        everything = self._all()
        return {
            "all": _encoded(everything),
            "down": _encoded(everything.only(self._pool.unusable_ranks())),
            "allocated": _encoded(from_shares(self._pool.allocated(), hosts)),
        }

    def _group(self, request: Request) -> WireMap:
        name = request.parse(_Group).name
        if name == "broker.online":
            return {"members": str(self._ranks.online_ranks())}
        if name == "broker.torpid":
            return {"members": str(self._pool.torpid_ranks())}
        raise RpcError(errno.ENOENT, f"there is no group {name!r}")

    def _all(self) -> ResourceSet:
        inventory = self._pool.inventory()
        having: dict[str, list[int]] = {}
        for each in inventory:
            for name in each.properties:
                having.setdefault(name, []).append(each.rank)
        return ResourceSet(
            targets=tuple(Target(rank=i.rank, host=i.host, cores=i.cores, gpus=i.gpus) for i in inventory),
            properties={name: IdSet(having[name]) for name in sorted(having)} or None,
        )


def _encoded(resources: ResourceSet) -> WireMap:
    return cast("WireMap", resources.encode())
