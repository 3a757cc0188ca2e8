"""A rank's presence in the instance: one streaming RPC to rank 0 that stays open for as long as the incarnation.

ASKING: `resource.hello` is sent; rank 0 makes durable what the rank has. PRESENT: the first response came, the rank is
online. There is no way back: when the stream ends, for whatever reason, the incarnation is over. That is how a rank
learns that rank 0, or a broker on the way to it, was lost, and RPC tracking tells rank 0 of it in the same way.

While ASKING, refusals that pass by themselves (`RETRYABLE`) are waited out here, and what rank 0 cannot take from us
(`FINAL`) is for a person to mend. A rank that is shut down says `resource.goodbye` before it goes, so that rank 0 does
not wait for it; a rank 0 that does not know the topic drops it.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Final, cast

import msgspec
import trio

from fluxres.base.errors import Refusal, RpcError
from fluxres.exec.ranks import MAX_WHY, LastLife, Presence
from fluxres.overlay.errors import SubtreePanic
from fluxres.rpc.handle import Handle
from fluxres.wire.payload import WireMap

__all__ = ["Ending", "Presence", "keep", "say_goodbye"]

log = logging.getLogger("fluxres.broker")

RETRYABLE: Final = frozenset({errno.ENOSPC, errno.EAGAIN})
"""Rank 0 has no room for the rank's record, or has too much to do: both pass."""
FINAL: Final = frozenset({errno.EINVAL, errno.EPERM, errno.EPROTO})
"""What we say of ourselves makes no sense to rank 0, and the next incarnation would say the same."""
RETRY_MIN: Final = 0.5
RETRY_MAX: Final = 10.0
"""Seconds between two attempts to join; doubling from the one to the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an incarnation that was online ended: when, by Trio's clock, and why."""

    at: float
    why: str

    def told(self) -> LastLife:
        """As rank 0 is told of it now."""
        return LastLife(ago=max(0.0, trio.current_time() - self.at), why=self.why[:MAX_WHY])


def say_goodbye(handle: Handle, rank: int, uuid: str) -> None:
    """Tell rank 0 that this incarnation is shut down, and has not panicked."""
    handle.send("resource.goodbye", {"rank": rank, "uuid": uuid}, nodeid=0)


async def keep(
    handle: Handle,
    presence: Presence,
    ending: Ending | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Join, and be present until cancelled; `started` when rank 0 has taken the rank. `ending` is told with it.

    Raises SubtreePanic, Refusal.
    """
    delay = RETRY_MIN
    while True:
        last = None if ending is None else ending.told()
        payload = cast("WireMap", msgspec.to_builtins(msgspec.structs.replace(presence, last=last)))
        try:
            await _attend(handle, payload, task_status)
        except _NotYet as refusal:
            log.warning("rank 0 does not take rank %d yet, trying again: %s", presence.rank, refusal)
        await trio.sleep(delay)
        delay = min(delay * 2, RETRY_MAX)


class _NotYet(Exception):
    """Refused, for a reason that passes."""


async def _attend(handle: Handle, payload: WireMap, task_status: trio.TaskStatus[None]) -> None:
    """One attempt. Raises _NotYet, Refusal, or SubtreePanic."""
    present = False
    try:
        async with handle.stream("resource.hello", payload, nodeid=0) as answers:
            async for _ in answers:
                if not present:
                    present = True
                    task_status.started()
    except RpcError as error:
        if not present and error.errnum in RETRYABLE:
            raise _NotYet(str(error)) from error
        if not present and error.errnum in FINAL:
            raise Refusal(f"cannot join the instance: {error}") from error
        what = "cannot stay in" if present else "cannot join"
        raise SubtreePanic(f"{what} the instance: {error}") from error
    raise SubtreePanic("cannot stay in the instance: rank 0 has ended this rank's presence")
