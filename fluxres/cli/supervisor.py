"""What `fluxres start` decides about its brokers: when one is started, restarted and ended. Pure.

Phases of the instance:

    BRING_UP -> RUNNING            every rank has been online
    BRING_UP -> STOPPING_REST      a broker refused to start, or not all were online in time (`failure` says why)
    RUNNING -> STOPPING_ROOT       `stop` was called; rank 0 is asked first, while the others still obey it
    any -> STOPPING_REST           rank 0 has ended by itself (`fluxres shutdown`), or at last
    STOPPING_REST -> DONE          no broker is left

States of a rank: STARTING -> ONLINE -> DEAD -> STARTING … -> ENDED. A broker that dies is started again at
once, and after `RESTART_DELAY` where that has been done within the last `STABLE_FOR`; one that exits with 0
was shut down on purpose, and has ended. Times are in seconds, of any clock that only goes forward.

Where there are several ranks, one process forks their first brokers (`fluxres.broker.forker`): until it has, a
rank is WAITING. It is started and ended like a broker, as rank `FORKER`; ranks that still wait when it has ended
are started singly, or have ended where there is nothing to start any more.
"""

from __future__ import annotations

import signal
from enum import Enum
from typing import Final, NamedTuple

START_TIMEOUT: Final = 60.0
"""Seconds in which an instance must be online, and how many more …"""
START_TIMEOUT_PER_RANK: Final = 1.0
"""… for each rank."""
RESTART_DELAY: Final = 0.25
"""Seconds until a broker that keeps dying is started again."""
STABLE_FOR: Final = 5.0
"""Seconds after a restart in which another death counts as "keeps dying"."""
SHUTDOWN_TIMEOUT: Final = 30.0
"""Seconds for a clean shutdown; then the brokers, and only they, are killed."""
FORKER: Final = -1
"""Stands for a rank where the process is meant that forks the first brokers."""


class Phase(Enum):
    """The phases of the instance."""

    BRING_UP = "bring-up"
    RUNNING = "running"
    STOPPING_ROOT = "stopping rank 0"
    STOPPING_REST = "stopping"
    DONE = "done"


class RankState(Enum):
    """The states of one rank's broker."""

    WAITING = "waiting"
    STARTING = "starting"
    ONLINE = "online"
    DEAD = "dead"
    ENDED = "ended"


class Do(Enum):
    """What there is to do: to a rank's broker, or for the instance."""

    SPAWN = "spawn"
    TERMINATE = "terminate"
    KILL = "kill"
    ANNOUNCE = "announce"
    """All ranks are online for the first time."""
    ASK = "ask"
    """Shut down a broker that the caller of `--no-restart` may have started: it is not our child."""


class Effect(NamedTuple):
    """One thing to do, to the broker of `rank` or the `FORKER`; `rank` is 0 where it is for the whole instance."""

    do: Do
    rank: int = 0


class _Rank:
    """What is known of one rank."""

    __slots__ = ("restart_at", "restarted_at", "state")

    def __init__(self, state: RankState) -> None:
        self.state = state
        self.restart_at: float | None = None
        self.restarted_at: float | None = None

    @property
    def alive(self) -> bool:
        return self.state in (RankState.STARTING, RankState.ONLINE)


class Supervisor:
    """Decides; whoever owns it does (see `fluxres.cli.supervise`)."""

    def __init__(self, size: int, *, restart: bool, temporary: bool, now: float) -> None:
        """Supervise `size` ranks; rank 0 of a `temporary` instance must be up at its end, to cancel jobs."""
        self.phase = Phase.BRING_UP
        self.failure: str | None = None
        self._restart = restart
        self._needs_root = restart and temporary
        self._forking = size > 1
        first = RankState.WAITING if self._forking else RankState.STARTING
        self._ranks = [_Rank(first) for _ in range(size)]
        self._deadline: float | None = now + START_TIMEOUT + START_TIMEOUT_PER_RANK * size

    def begin(self) -> list[Effect]:
        """Start everything."""
        return [Effect(Do.SPAWN, FORKER if self._forking else 0)]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self._ranks)

    def state(self, rank: int) -> RankState:
        """The state of a rank's broker."""
        return self._ranks[rank].state

    def forked(self, rank: int) -> list[Effect]:
        """The forker has forked the broker of `rank`."""
        self._ranks[rank].state = RankState.STARTING
        if self.phase is not Phase.STOPPING_REST:
            return []
        return [Effect(Do.KILL if self._deadline is None else Do.TERMINATE, rank)]

    def forker_ended(self) -> list[Effect]:
        """No further broker will be forked."""
        self._forking = False
        waiting = [rank for rank, each in enumerate(self._ranks) if each.state is RankState.WAITING]
        if self.phase is Phase.BRING_UP:
            for rank in waiting:
                self._ranks[rank].state = RankState.STARTING
            return [Effect(Do.SPAWN, rank) for rank in waiting]
        for rank in waiting:
            self._ranks[rank].state = RankState.ENDED
        if self.phase is Phase.STOPPING_REST:
            self._check_done()
        return []

    def ready(self, rank: int) -> list[Effect]:
        """The broker of `rank` says that it is online."""
        if self._ranks[rank].state is not RankState.STARTING:
            return []
        self._ranks[rank].state = RankState.ONLINE
        if self.phase is Phase.BRING_UP and all(each.state is RankState.ONLINE for each in self._ranks):
            self.phase = Phase.RUNNING
            self._deadline = None
            return [Effect(Do.ANNOUNCE)]
        if self.phase is Phase.STOPPING_ROOT and rank == 0:
            return [Effect(Do.TERMINATE)]
        return []

    def exited(self, rank: int, code: int, now: float) -> list[Effect]:
        """The broker of `rank` has exited with `code`, or by a signal where it is negative."""
        each = self._ranks[rank]
        was_online = each.state is RankState.ONLINE
        each.state = RankState.DEAD
        if self.phase is Phase.STOPPING_REST:
            return self._ended(rank)
        if self.phase is Phase.BRING_UP and not was_online and (code >= 0 or not self._restart):
            return self.fail(f"broker {rank} {describe(code)} before it was online", now)
        asked = self.phase is Phase.STOPPING_ROOT and rank == 0
        if code == 0 or (asked and (code == -signal.SIGTERM or not self._needs_root)):
            each.state = RankState.ENDED
            return self._stop_rest(now) if rank == 0 else []
        if not self._restart:
            return []
        if each.restarted_at is None or now - each.restarted_at >= STABLE_FOR:
            return self._spawn(rank, now)
        each.restart_at = now + RESTART_DELAY
        return []

    def stop(self, now: float) -> list[Effect]:
        """Shut the instance down, rank 0 first."""
        if self.phase is Phase.BRING_UP:
            return self._stop_rest(now)
        if self.phase is not Phase.RUNNING:
            return []
        self.phase = Phase.STOPPING_ROOT
        self._deadline = now + SHUTDOWN_TIMEOUT
        root = self._ranks[0]
        if root.state is RankState.ONLINE:
            return [Effect(Do.TERMINATE)]
        if self._needs_root:
            return []  # it is on its way, and asked once it is there
        return self._stop_rest(now)

    def fail(self, why: str, now: float) -> list[Effect]:
        """The instance cannot come up: end what there is of it."""
        self.failure = why
        return self._stop_rest(now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due (see `due`)."""
        if self._deadline is not None and now >= self._deadline:
            return self._overdue(now)
        return [
            effect
            for rank, each in enumerate(self._ranks)
            if each.restart_at is not None and now >= each.restart_at
            for effect in self._spawn(rank, now)
        ]

    def due(self) -> float | None:
        """When `tick` has something to do; None while nothing is due."""
        times = [each.restart_at for each in self._ranks]
        return min((at for at in (*times, self._deadline) if at is not None), default=None)

    def _spawn(self, rank: int, now: float) -> list[Effect]:
        each = self._ranks[rank]
        each.state = RankState.STARTING
        each.restart_at = None
        each.restarted_at = now
        return [Effect(Do.SPAWN, rank)]

    def _overdue(self, now: float) -> list[Effect]:
        if self.phase is Phase.BRING_UP:
            late = [str(n) for n, each in enumerate(self._ranks) if each.state is not RankState.ONLINE]
            return self.fail(f"not online in time: rank {','.join(late)}", now)
        self._deadline = None
        self.phase = Phase.STOPPING_REST
        return self._end_all(Do.KILL)

    def _stop_rest(self, now: float) -> list[Effect]:
        self.phase = Phase.STOPPING_REST
        self._deadline = now + SHUTDOWN_TIMEOUT
        return self._end_all(Do.TERMINATE)

    def _end_all(self, do: Do) -> list[Effect]:
        """End every broker that is alive; the others have ended, as far as we know."""
        effects = [Effect(do, FORKER)] if self._forking else []
        for rank, each in enumerate(self._ranks):
            each.restart_at = None
            if each.alive:
                effects.append(Effect(do, rank))
            elif do is Do.TERMINATE and not self._restart and each.state is not RankState.WAITING:
                effects.append(Effect(Do.ASK, rank))
        self._check_done()
        return effects

    def _ended(self, rank: int) -> list[Effect]:
        self._ranks[rank].state = RankState.ENDED
        self._check_done()
        return []

    def _check_done(self) -> None:
        if not self._forking and not any(each.alive for each in self._ranks):
            self.phase = Phase.DONE
            self._deadline = None


class Reports:
    """Reads what the brokers of a forker report: lines of `RANK PID`."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, int]]:
        """The (rank, pid) of all lines that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in lines:
            rank, pid = line.split()
            found.append((int(rank), int(pid)))
        return found


def describe(code: int) -> str:
    """Words for an exit code, negative for a signal."""
    if code >= 0:
        return f"exited with status {code}"
    return f"was killed by signal {-code} ({signal.strsignal(-code)})"
