"""`fluxres shutdown`: end the instance, and return when it has ended (flux-shutdown(1)).

Rank 0 is asked; the connection closing says that the broker that we are connected to has ended. Where the
instance was made by `fluxres start`, its lock is waited for too: then all its processes have ended, and what
is to be removed has been removed.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.common import Explain, argument, parser
from fluxres.cli.instancedir import LOCK
from fluxres.client import CallTimeout, Client, Disconnected, socket_path

if TYPE_CHECKING:
    from typing import NoReturn

POLL_EVERY: Final = 0.02
"""Seconds between looks at the lock."""
NO_LOCK: Final = -1


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("shutdown", "End the instance")
    made.add_argument(
        "--timeout",
        type=argument(parse_fsd),
        default=float("inf"),
        metavar="FSD",
        help="wait at most this long",
    )
    args = made.parse_args(argv)
    deadline = time.monotonic() + args.timeout
    with Client.connect(args.uri) as client:
        lock = _open_lock(client.uri)
        try:
            with Explain("shut down"):
                client.call("broker.shutdown", {}, nodeid=0, timeout=_left(deadline))
        except CallTimeout:
            _give_up(args.timeout)
        try:
            while client.receive(_left(deadline)) is not None:
                pass
        except Disconnected:
            pass  # this is how it ends
        else:
            _give_up(args.timeout)
    while lock != NO_LOCK and _is_locked(lock):
        if time.monotonic() >= deadline:
            _give_up(args.timeout)
        time.sleep(POLL_EVERY)
    return 0


def _left(deadline: float) -> float | None:
    left = max(0.0, deadline - time.monotonic())
    return None if left == float("inf") else left


def _give_up(timeout: float) -> NoReturn:
    raise FluxresError(f"cannot finish the shutdown within {format_fsd(timeout)}: it goes on")


def _open_lock(uri: str) -> int:
    """The lock of the `fluxres start` that made the instance, opened before its directory goes."""
    try:
        return os.open(f"{os.path.dirname(socket_path(uri))}/{LOCK}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return NO_LOCK  # something else made it


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
