"""Which ranks are drained, since when and why, and which of them were declared lost. Pure.

A rank is *drained* or not. Modes are those of flux-core's resource.drain: plain (refused where a target is drained
with a reason already), update (leaves what is drained with a reason alone), overwrite (new reason, old timestamp),
force-overwrite (both new). A drained rank gets no new jobs; what runs there runs on.

A rank is *lost* from `declare` to `confirm`. Declaring drains it, unless it is drained already; confirming ends that
drain, unless somebody has drained the rank for a reason of their own meanwhile. Until then it cannot be undrained: what
ran there may still hold its resources.

All of it is one JSON value in the KVS (`DRAIN_KEY`). Source: flux-resource(1), flux-core's resource module.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, TypeVar

import msgspec

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.wire.payload import WireMap

_T = TypeVar("_T", bound=Hashable)

DRAIN_KEY: Final = "resource.drain"
"""Where the drains are kept, in the primary namespace."""


class Mode(Enum):
    """What to do with targets that are drained already (not drained, for undrain)."""

    PLAIN = ""
    UPDATE = "update"
    OVERWRITE = "overwrite"
    FORCE = "force-overwrite"

    @property
    def overwrite(self) -> int:
        """As drain events have it: 0, 1 for a new reason, 2 for a new timestamp too."""
        return {Mode.OVERWRITE: 1, Mode.FORCE: 2}.get(self, 0)


@dataclass(frozen=True, slots=True)
class Drain:
    """Since when a rank is drained (seconds since the epoch), and why; None where nobody said."""

    timestamp: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a rank was declared lost, and whether its drain is the declaration's own."""

    reason: str
    drained: bool


class _Group(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    timestamp: float
    reason: str | None = None


class _LostGroup(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    drained: bool


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    drain: dict[str, _Group] = {}
    lost: dict[str, _LostGroup] = {}


class Drains:
    """The drains of the instance. Methods that raise have changed nothing; the others say whether something has."""

    def __init__(self, drained: dict[int, Drain] | None = None, lost: dict[int, Lost] | None = None) -> None:
        self.drained = drained or {}
        self.lost = lost or {}

    def copy(self) -> Drains:
        """The same drains, to be changed independently."""
        return Drains(dict(self.drained), dict(self.lost))

    def ranks(self) -> IdSet:
        """The ranks that are drained."""
        return IdSet(self.drained)

    # --- changes

    def drain(self, ranks: IdSet, *, now: float, reason: str | None, mode: Mode = Mode.PLAIN) -> bool:
        """Drain `ranks`. Raises RpcError EEXIST in plain mode where some are drained with a reason.

        A declaration's own drain does not count as one: who drains the rank besides has a reason that outlives it.
        """
        taken = IdSet(rank for rank in ranks if self._has_reason(rank))
        if mode is Mode.PLAIN and taken:
            raise RpcError(errno.EEXIST, f"{_named(taken)} already drained")
        changed = False
        for rank in ranks - taken if mode is Mode.UPDATE else ranks:
            old = self.drained.get(rank)
            since = now if old is None or mode is Mode.FORCE else old.timestamp
            self.drained[rank] = Drain(since, reason)
            if rank in self.lost:
                self.lost[rank] = replace(self.lost[rank], drained=False)
            changed = changed or self.drained[rank] != old
        return changed

    def _has_reason(self, rank: int) -> bool:
        drain, lost = self.drained.get(rank), self.lost.get(rank)
        return drain is not None and drain.reason is not None and not (lost is not None and lost.drained)

    def undrain(self, ranks: IdSet, *, mode: Mode = Mode.PLAIN) -> bool:
        """End drains. Raises RpcError EEXIST in plain mode where some are not drained, EBUSY for lost ranks."""
        lost = IdSet(rank for rank in ranks if rank in self.lost)
        if lost:
            raise RpcError(
                errno.EBUSY,
                f"{_named(lost)} declared lost: undrained when back online with all that ran there dealt with",
            )
        not_drained = IdSet(rank for rank in ranks if rank not in self.drained)
        if mode is Mode.PLAIN and not_drained:
            raise RpcError(errno.EEXIST, f"{_named(not_drained)} not drained")
        for rank in ranks - not_drained:
            del self.drained[rank]
        return not_drained != ranks

    def declare(self, ranks: IdSet, *, now: float, reason: str) -> None:
        """Declare `ranks` lost. Raises RpcError EEXIST where some are already."""
        already = IdSet(rank for rank in ranks if rank in self.lost)
        if already:
            raise RpcError(errno.EEXIST, f"{_named(already)} already declared lost")
        for rank in ranks:
            self.lost[rank] = Lost(reason, drained=rank not in self.drained)
            self.drained.setdefault(rank, Drain(now, reason))

    def confirm(self, rank: int) -> bool:
        """The rank is no longer lost; returns whether that has undrained it. KeyError where it was not lost."""
        if not self.lost.pop(rank).drained:
            return False
        return self.drained.pop(rank, None) is not None

    # --- forms

    def groups(self) -> WireMap:
        """As resource.status has it: for each idset a timestamp (whole seconds) and a reason."""
        return {
            ids: {"timestamp": round(drain.timestamp), "reason": drain.reason or ""}
            for ids, drain in _grouped(self.drained.items())
        }

    def encode(self) -> bytes:
        """As stored."""
        drain = {ids: _Group(timestamp=d.timestamp, reason=d.reason) for ids, d in _grouped(self.drained.items())}
        lost = {ids: _LostGroup(reason=d.reason, drained=d.drained) for ids, d in _grouped(self.lost.items())}
        return msgspec.json.encode(_Stored(drain=drain, lost=lost))


def decode(data: bytes) -> Drains:
    """Read what `Drains.encode` wrote; raises ValueError."""
    stored = msgspec.json.decode(data, type=_Stored)  # its errors are ValueErrors
    drained = {r: Drain(d.timestamp, d.reason) for ids, d in stored.drain.items() for r in IdSet.parse(ids)}
    lost = {r: Lost(d.reason, d.drained) for ids, d in stored.lost.items() for r in IdSet.parse(ids)}
    return Drains(drained, lost)


def _grouped(items: Iterable[tuple[int, _T]]) -> list[tuple[str, _T]]:
    """Ranks with the same value together, as an idset, by their lowest rank."""
    groups: dict[_T, list[int]] = {}
    for rank, value in sorted(items, key=lambda item: item[0]):
        groups.setdefault(value, []).append(rank)
    return [(str(IdSet(ranks)), value) for value, ranks in groups.items()]


def _named(ranks: IdSet) -> str:
    return f"rank {ranks} is" if len(ranks) == 1 else f"ranks {ranks} are"
