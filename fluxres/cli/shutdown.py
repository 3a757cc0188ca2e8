"""`fluxres shutdown`: end the instance, and return when it has ended (flux-shutdown(1)).

Rank 0 is asked; the connection closing says that the broker that we are connected to has ended. Where the
instance was made by `fluxres start`, that is told too, by SIGTERM: with --no-restart it does not know of a broker that
somebody else has restarted. Then its lock is waited for: once that is free, all its processes have ended, and what is
to be removed has been removed; by us, where a temporary instance has lost its `fluxres start`.

The lock's file holds the pid of its holder, which may be stale, and the pid another process's by now. So a signal goes
through a pidfd, and only after the process behind it has been seen to hold the lock.

A temporary instance cancels its jobs first, and waits for their end, but not for ever: what ranks that are away run, it
cannot end. So rank 0 is asked all the time who is away with parts of jobs; where the wait was in vain, it is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, ProtocolError, RpcError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.base.idset import IdSet
from fluxres.cli.common import Explain, argument, field, parser
from fluxres.cli.instancedir import CONFIG, LOCK, LOCK_BYTES, remove_left
from fluxres.cli.resource_set import parse_resources
from fluxres.client import CallTimeout, Client, Disconnected, socket_path, wait_ended

if TYPE_CHECKING:
    from typing import NoReturn

POLL_EVERY: Final = 0.02
"""Seconds between looks at the lock."""
ASK_EVERY: Final = 1.0
"""Seconds between questions who is away."""
IN_VAIN: Final = 15.0
"""Seconds: rank 0 ends at once when all jobs have ended, and after 20 s where not."""
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
        away = Away(temporary=lock != NO_LOCK and _is_temporary(client.uri))
        if not _end_broker(client, deadline, away):
            _give_up(args.timeout)
    if lock != NO_LOCK:
        _tell_supervisor(lock)
        while _is_locked(lock):
            if time.monotonic() >= deadline:
                _give_up(args.timeout)
            time.sleep(POLL_EVERY)
        remove_left(os.path.dirname(socket_path(client.uri)), lock)
    away.check()
    return 0


class Away:
    """Which ranks are away with parts of jobs, while a temporary instance cancels these."""

    def __init__(self, *, temporary: bool) -> None:
        self._temporary = temporary
        self._ranks = IdSet()
        self._begun = time.monotonic()

    def ask(self, client: Client, deadline: float) -> None:
        """Ask rank 0. Raises CallTimeout, Disconnected; where it does not tell, what it said before counts."""
        if not self._temporary:
            return
        with contextlib.suppress(RpcError, ProtocolError, ValueError):
            status = client.call("resource.status", {}, nodeid=0, timeout=_left(deadline))
            scheduled = client.call("resource.sched-status", {}, nodeid=0, timeout=_left(deadline))
            offline = IdSet.parse(field(status, "offline", str))
            self._ranks = offline & parse_resources(field(scheduled, "allocated", dict)).ranks

    def check(self) -> None:
        """The instance has ended. Raises FluxresError where some of its jobs had not."""
        if self._ranks and time.monotonic() - self._begun >= IN_VAIN:
            raise FluxresError(
                f"cannot cancel what runs on rank {self._ranks}: away when the instance was shut down, "
                "and what is left of its jobs there may run on"
            )


def _is_temporary(uri: str) -> bool:
    """Whether `fluxres start` has made the instance for as long as itself, by the configuration that it wrote."""
    import tomllib

    try:
        with open(f"{os.path.dirname(socket_path(uri))}/{CONFIG}", "rb") as file:
            broker = tomllib.load(file).get("broker")
    except (OSError, ValueError):
        return False  # it is another's, or being removed: nothing is known of it
    return isinstance(broker, dict) and broker.get("temporary") is True


def _end_broker(client: Client, deadline: float, away: Away) -> bool:
    """Have the instance shut down, and wait until the broker's process has ended; False at the deadline."""
    pidfd = client.broker_pidfd()
    try:
        with Explain("shut down"):
            client.call("broker.shutdown", {}, nodeid=0, timeout=_left(deadline))
        while time.monotonic() < deadline:
            away.ask(client, deadline)
            client.receive(_left(min(deadline, time.monotonic() + ASK_EVERY)))
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
