"""The loop of incarnations of one rank: a panic ends an incarnation, and the loop begins the next in this process.

What was refused before the broker was ever online would be refused again, and ends the loop; so does a panic where the
site wants its supervisor to do the looping (`--on-panic=exit`). The loop remembers how the last incarnation ended that
was online, for the next one to tell rank 0 (`broker.presence`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import FluxresError, Refusal, RpcError
from fluxres.broker.config import Config
from fluxres.broker.incarnation import Incarnation
from fluxres.broker.logbuffer import LogBuffer
from fluxres.broker.platform import Platform
from fluxres.broker.presence import Ending
from fluxres.broker.statedir import Identities
from fluxres.broker.watched import Cause, Watched
from fluxres.overlay.errors import ParentLost, SubtreePanic
from fluxres.overlay.topology import Topology

log = logging.getLogger("fluxres.broker")

BACKOFF_MIN: Final = 0.05
BACKOFF_MAX: Final = 10.0
"""Seconds before the next incarnation, doubled at each panic in a row, with full jitter."""
BACKOFF_LOST: Final = 0.2
"""The same where the parent was lost, and nothing is wrong here."""
STEADY: Final = 30.0
"""Seconds after which an incarnation counts as a success, and the back-off begins anew."""


class BrokerLoop:
    """One rank in one process. `notify` is told `READY=1` and `STOPPING=1`, as sd_notify(3) has them."""

    def __init__(
        self,
        *,
        config: Config,
        rank: int,
        topology: Topology,
        statedir: Identities,
        platform: Platform,
        logbuffer: LogBuffer,
        notify: Callable[[str], None],
        exits: bool = False,
    ) -> None:
        self.shutdown = trio.Event()
        """Setting it shuts the broker down cleanly."""
        self.refusal = ""
        """Why no further incarnation was begun, for people; empty while there is no such reason."""
        self.incarnation: Incarnation | None = None
        self._config = config
        self._rank = rank
        self._topology = topology
        self._statedir = statedir
        self._platform = platform
        self._logbuffer = logbuffer
        self._notify = notify
        self._exits = exits
        self._watched = Watched(platform)
        self._was_online = False
        self._is_online = False
        """Whether the incarnation under way is, or was."""
        self._ending: Ending | None = None

    async def run(self) -> int:
        """Run until a clean shutdown (0), or what no further incarnation would mend (1)."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._platform.run)
            nursery.start_soon(self._watched.run, name="status")
            status = await self._loop()
            nursery.cancel_scope.cancel()
        if status == 0 and self.incarnation is not None:
            self.incarnation.clean_up()
        return status

    async def _loop(self) -> int:
        backoff = BACKOFF_MIN
        while True:
            begun = trio.current_time()
            try:
                self.incarnation = self._incarnation()
                await self.incarnation.run()
            except Exception as error:
                if self.shutdown.is_set() and _is_lost_parent(error):
                    return self._ended()  # it shuts down as we do, and was faster
                if not self._was_online and _is_refusal(error):
                    self.refusal = "; ".join(map(str, _leaves(error)))
                    return 1  # it will be so the next time too
                log_panic(error)
                self._watched.panicked(Cause.PARENT_LOST if _is_lost_parent(error) else Cause.ERROR)
                if self._is_online:  # what never joined has not ended for anybody
                    self._ending = Ending(at=trio.current_time(), why=reason_of(error))
                bound = BACKOFF_LOST if _is_lost_parent(error) else BACKOFF_MAX
            else:
                return self._ended()
            if self._exits or self.shutdown.is_set():
                return 1
            if trio.current_time() - begun > STEADY:
                backoff = BACKOFF_MIN
            with trio.move_on_after(self._platform.random.uniform(0, min(backoff, bound))):
                await self.shutdown.wait()
            backoff = min(2 * backoff, BACKOFF_MAX)

    def _ended(self) -> int:
        self._notify("STOPPING=1")
        return 0

    def _incarnation(self) -> Incarnation:
        self._is_online = False
        return Incarnation(
            config=self._config,
            rank=self._rank,
            topology=self._topology,
            statedir=self._statedir,
            platform=self._platform,
            logbuffer=self._logbuffer,
            shutdown=self.shutdown,
            online=self._online,
            watched=self._watched,
            ending=self._ending,
        )

    def _online(self) -> None:
        self._was_online = self._is_online = True
        self._notify("READY=1")


def log_panic(error: Exception) -> None:
    """Say why an incarnation ended: in a line where that is all there is to say, else with the traceback."""
    is_told = all(isinstance(cause, FluxresError) for cause in _causes(error))
    log.error("panic: %s", reason_of(error), exc_info=None if is_told else error)


def reason_of(error: Exception) -> str:
    """Why an incarnation ended, for people."""
    causes = _causes(error)
    told = str if all(isinstance(cause, FluxresError) for cause in causes) else repr
    return "; ".join(map(told, causes))


def _is_refusal(error: Exception) -> bool:
    """Whether a person has to mend what went wrong: a store that is refused, a socket that is taken."""
    return all(isinstance(cause, Refusal) for cause in _leaves(error))


def _is_lost_parent(error: Exception) -> bool:
    """Whether nothing is wrong here: connecting to the parent has a back-off of its own."""
    return all(isinstance(cause, SubtreePanic) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """What ended an incarnation. Where that was the loss of the parent, its consequences are left out: presence that
    ended, a request of ours that was under way."""
    leaves = _leaves(error)
    if not any(isinstance(leaf, ParentLost) for leaf in leaves):
        return leaves
    return [leaf for leaf in leaves if isinstance(leaf, ParentLost) or not _is_unreachable(leaf)]


def _is_unreachable(leaf: BaseException) -> bool:
    return isinstance(leaf, SubtreePanic) or (isinstance(leaf, RpcError) and leaf.errnum == errno.EHOSTUNREACH)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
