"""One command on many ranks, as flux-exec(1) has it: who runs, what came of it, how much input may be sent. Pure.

States of a rank: ASKED (its request is out) -> RUNNING (`started`) -> EXITED (`finished`) -> ENDED (all output read);
from each of them ENDED by an error. Its exit code comes from `finished`, or from the error.

Input goes to all ranks alike, so it waits for the slowest: not before all are RUNNING or past it, and no more than the
least credit of those that still read.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import TYPE_CHECKING, Final

from fluxres.base.idset import IdSet
from fluxres.cli.common import field
from fluxres.cli.exitcode import SIGNAL_BASE, exit_code

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxres.base.errors import RpcError
    from fluxres.wire.payload import WireMap

EX_NOHOST: Final = 68
"""sysexits(3): the exit code for a rank that cannot be reached."""
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
_CODES: Final = {
    errno.EPERM: NOT_EXECUTABLE,
    errno.EACCES: NOT_EXECUTABLE,
    errno.ENOENT: NOT_FOUND,
    errno.EHOSTUNREACH: EX_NOHOST,
}
STDIN: Final = "stdin"


class State(Enum):
    """The states of a rank."""

    ASKED = "asked"
    RUNNING = "running"
    EXITED = "exited"
    ENDED = "ended"


class _Rank:
    __slots__ = ("credit", "pid", "state")

    def __init__(self) -> None:
        self.state = State.ASKED
        self.pid = 0
        self.credit = 0


class RemoteRun:
    """The command on these ranks."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ranks = {rank: _Rank() for rank in ranks}
        self._said: dict[str, list[int]] = {}
        self.exit_code = 0
        """The largest so far."""

    @property
    def done(self) -> bool:
        """Whether all has come that will come."""
        return all(each.state is State.ENDED for each in self._ranks.values())

    @property
    def running(self) -> dict[int, int]:
        """The pid of the process on each rank where it runs."""
        return {rank: each.pid for rank, each in self._ranks.items() if each.state is State.RUNNING}

    @property
    def unfinished(self) -> IdSet:
        """The ranks of which nobody knows yet how the command ended there."""
        return IdSet(rank for rank, each in self._ranks.items() if each.state in (State.ASKED, State.RUNNING))

    @property
    def room(self) -> int:
        """How many bytes of input may be sent to all ranks that run; 0 while some have not started."""
        if any(each.state is State.ASKED for each in self._ranks.values()):
            return 0
        return max(0, min((each.credit for each in self._ranks.values() if each.state is State.RUNNING), default=0))

    def sent(self, size: int) -> None:
        """This much input has been sent to each rank that runs."""
        for each in self._ranks.values():
            each.credit -= size

    def take(self, rank: int, payload: WireMap) -> WireMap | None:
        """Take the next response of a rank; returns the I/O object of output (RFC 24). Raises ProtocolError."""
        each = self._ranks[rank]
        kind = payload.get("type")
        if kind == "started":
            each.state, each.pid = State.RUNNING, field(payload, "pid", int)
        elif kind == "add-credit":
            credit = field(payload, "channels", dict).get(STDIN, 0)
            each.credit += credit if isinstance(credit, int) else 0
        elif kind == "output":
            return field(payload, "io", dict)
        elif kind == "finished":
            each.state = State.EXITED
            self._exited(rank, field(payload, "status", int))
        return None

    def ended(self, rank: int, error: RpcError) -> str | None:
        """The stream of a rank has ended; returns why, in words, where that is no good end."""
        each = self._ranks[rank]
        before, each.state = each.state, State.ENDED
        if error.errnum == errno.ENODATA and before is State.EXITED:
            return None
        self.exit_code = max(self.exit_code, _CODES.get(error.errnum, 1))
        return error.text

    def summary(self) -> list[str]:
        """Which ranks have not exited with 0, a line for each way: `[0-3]: Exit 2`."""
        return [f"{_brackets(IdSet(ranks))}: {text}" for text, ranks in self._said.items()]

    def _exited(self, rank: int, status: int) -> None:
        code = exit_code(status)
        self.exit_code = max(self.exit_code, code)
        if code:
            self._said.setdefault(_words(status, code), []).append(rank)


def _words(status: int, code: int) -> str:
    if status & 0x7F:
        import signal

        return signal.strsignal(code - SIGNAL_BASE) or f"signal {code - SIGNAL_BASE}"
    return f"Exit {code}"


def _brackets(ranks: IdSet) -> str:
    return str(ranks) if len(ranks) == 1 else f"[{ranks}]"
