"""`fluxres shutdown`: end the instance, and return when it has ended (flux-shutdown(1)).

Rank 0 is asked; the connection closing says that the broker that we are connected to has ended. Where the
instance was made by `fluxres start`, that is told too, by SIGTERM: with --no-restart it does not know of a broker that
somebody else has restarted. Then its lock is waited for: once that is free, all its processes have ended, and what is
to be removed has been removed; by us, where a temporary instance has lost its `fluxres start`.

The lock's file holds the pid of its holder, which may be stale, and the pid another process's by now. So a signal goes
through a pidfd, and only after the process behind it has been seen to hold the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.common import Explain, argument, parser
from fluxres.cli.instancedir import LOCK, LOCK_BYTES, remove_left
from fluxres.client import CallTimeout, Client, Disconnected, socket_path, wait_ended

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
        if not _end_broker(client, deadline):
            _give_up(args.timeout)
    if lock == NO_LOCK:
        return 0
    _tell_supervisor(lock)
    while _is_locked(lock):
        if time.monotonic() >= deadline:
            _give_up(args.timeout)
        time.sleep(POLL_EVERY)
    remove_left(os.path.dirname(socket_path(client.uri)), lock)
    return 0


def _end_broker(client: Client, deadline: float) -> bool:
    """Have the instance shut down, and wait until the broker's process has ended; False at the deadline."""
    pidfd = client.broker_pidfd()
    try:
        with Explain("shut down"):
            client.call("broker.shutdown", {}, nodeid=0, timeout=_left(deadline))
        while client.receive(_left(deadline)) is not None:
            pass
    except CallTimeout:
        return False
    except Disconnected:
        return wait_ended(pidfd, _left(deadline))  # this is how it ends
    else:
        return False
    finally:
        if pidfd >= 0:
            os.close(pidfd)


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


def _tell_supervisor(lock: int) -> None:
    """Tell the holder of the lock, where there is one, that its instance has ended."""
    pid, *_rest = [*os.pread(lock, LOCK_BYTES, 0).split(), b""]
    if not pid.isdigit() or not int(pid):
        return  # nobody has signed it
    try:
        pidfd = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return  # it was killed, and its brokers lived on
    try:
        if _holds(int(pid), lock) and not wait_ended(pidfd, 0):  # alive even now: what we looked at was this one
            with contextlib.suppress(ProcessLookupError):  # then it has ended by itself
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    finally:
        os.close(pidfd)


def _holds(pid: int, lock: int) -> bool:
    """Whether a process holds the flock(2) of the file that `lock` is: the kernel lists it with the descriptor."""
    ours = os.fstat(lock)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile, or a socket
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), ours):
                    with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as info:
                        if any("FLOCK" in line.split() and "WRITE" in line.split() for line in info):
                            return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it has ended, or is another user's
    return False


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
