"""Failpoints: places where a test can have a process killed, stopped, or fail, to the instruction.

`FLUXRES_FAILPOINT=NAME` or `NAME@N` in the environment makes the first, or the N-th, `hit(NAME)` of a process
send it SIGKILL. With `=stop` behind it, it is SIGSTOP: the process goes on from there at a SIGCONT. With `=panic`
the hit raises `Panicked`, a bug as it were, which in a broker ends the incarnation. The variable is read once, at
import; without it a hit costs one comparison. An unknown name raises at import, so that no test passes because its
failpoint was never there. A process forked later, as shells are from the launcher, inherits what is armed and the
number of hits so far.

Each name exists as NAME.before and NAME.after: just before and just after the thing that it names.

| name            | process  | what happens there                                                            |
|-----------------|----------|-------------------------------------------------------------------------------|
| `submit-commit` | broker   | rank 0 commits a submission (jobid, key, jobspec, first event)                |
| `submit-answer` | broker   | rank 0 answers the submit request                                             |
| `alloc`         | broker   | rank 0 commits a job's `alloc` event                                          |
| `start-request` | broker   | rank 0 sends a rank the request to start its shell                            |
| `launch`        | broker   | a rank's broker, the `spec` being written, asks its launcher for a shell      |
| `fork`          | launcher | the launcher forks a shell                                                    |
| `claim`         | shell    | the shell links its claim (or a broker one that is void)                      |
| `first-record`  | shell    | the shell appends the first record of its journal                             |
| `start-durable` | broker   | rank 0 commits a job's `start` event                                          |
| `ack`           | broker   | rank 0 acknowledges records that it has committed                             |
| `exit-record`   | shell    | the shell appends its exit record                                             |
| `exit-commit`   | broker   | rank 0 commits a shell's exit record                                          |
| `finish`        | broker   | rank 0 commits a job's `finish` event                                         |
| `release`       | broker   | rank 0 commits a job's `release` event for a rank                             |
| `clean`         | broker   | rank 0 commits a job's `clean` event                                          |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

VARIABLE: Final = "FLUXRES_FAILPOINT"
"""The environment variable that arms a failpoint."""

_PLACES: Final = (
    "submit-commit",
    "submit-answer",
    "alloc",
    "start-request",
    "launch",
    "fork",
    "claim",
    "first-record",
    "start-durable",
    "ack",
    "exit-record",
    "exit-commit",
    "finish",
    "release",
    "clean",
)

FAILPOINTS: Final[tuple[str, ...]] = tuple(f"{place}.{side}" for place in _PLACES for side in ("before", "after"))
"""Every name that can be armed and hit."""

_MAX_COUNT_DIGITS: Final = 9

# Not signal.SIGKILL: every process imports this module, and few need the signal module otherwise.
_SIGKILL: Final = 9
_SIGSTOP: Final = 19
_PANIC: Final = 0
_ACTIONS: Final = {"": _SIGKILL, "stop": _SIGSTOP, "panic": _PANIC}


class Panicked(Exception):
    """What a failpoint armed with `=panic` raises; nobody expects it."""


class _Armed:
    """The armed failpoint, how many hits of it are still to come, and the signal of the last one (0: it raises)."""

    __slots__ = ("hits_left", "name", "signum")

    def __init__(self, name: str, hits_left: int, signum: int) -> None:
        self.name = name
        self.hits_left = hits_left
        self.signum = signum


def _arm(environ: Mapping[str, str]) -> _Armed | None:
    """What `environ` arms, None for nothing; raises ValueError for an unknown name or a bad count."""
    setting = environ.get(VARIABLE)
    if not setting:
        return None
    place, _equals, action = setting.partition("=")
    name, at, count = place.partition("@")
    if name not in FAILPOINTS:
        raise ValueError(f"cannot arm failpoint {name!r}: unknown, one of {', '.join(FAILPOINTS)}")
    if at and not (count.isascii() and count.isdecimal() and len(count) <= _MAX_COUNT_DIGITS and int(count) > 0):
        raise ValueError(f"cannot arm failpoint {setting!r}: what follows @ must be a number of hits, 1 or more")
    if action not in _ACTIONS:
        raise ValueError(f"cannot arm failpoint {setting!r}: what follows = must be stop or panic")
    return _Armed(name, int(count) if at else 1, _ACTIONS[action])


_armed = _arm(os.environ)


def hit(name: str) -> None:
    """Pass the failpoint `name`: kills, or stops, this process when it is armed and this is the hit that counts.

    Raises Panicked where that is what it is armed with, and ValueError when any failpoint is armed and `name` is not
    one of `FAILPOINTS`.
    """
    if _armed is None:
        return
    if name not in FAILPOINTS:
        raise ValueError(f"cannot hit failpoint {name!r}: unknown, one of {', '.join(FAILPOINTS)}")
    if name != _armed.name:
        return
    _armed.hits_left -= 1
    if _armed.hits_left == 0:
        if _armed.signum == _PANIC:
            raise Panicked(f"failpoint {name}")
        os.kill(os.getpid(), _armed.signum)
        if _armed.signum == _SIGKILL:
            # Only PID 1 of a pid namespace gets here: the kernel ignores a SIGKILL that it sends to itself.
            os._exit(128 + _SIGKILL)
