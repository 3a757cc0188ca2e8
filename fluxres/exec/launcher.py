"""The broker's side of the launcher: starts it on first use, and asks it for shells.

The launcher is a convenience, never a record: it may die at any instant. A request carries the shell's directory and
the write end of a pipe, `ready`; the end closes when the shell listens, has lost its claim, or is dead, and also when
the launcher died with the request unread. Whatever the reason, the end of `ready` means only "look at the directory".
Where it cannot fork it says so in a packet of its own, for the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from typing import Final

import trio

from fluxres.base.errors import FluxresError, ProtocolError
from fluxres.base.jobid import JobId
from fluxres.wire.payload import pack, unpack_map

log = logging.getLogger("fluxres.launcher")

MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are read."""
STOP_GRACE: Final = 2.0
"""Seconds that the launcher has to end once its socket is closed, before it is killed."""


class Launcher:
    """The launcher of one broker, for all its incarnations; its shells live below the directory of `cgroup`, if any."""

    def __init__(self) -> None:
        self.cgroup: str | None = None
        self._process: trio.Process | None = None
        self._socket: socket.socket | None = None
        self._lock = trio.Lock()

    async def launch(self, directory: str, jobid: JobId, rank: int) -> None:
        """Ask for a shell in `directory`, and return when there is something to see there.

        Cancelling does not undo the request. Raises FluxresError where the launcher cannot be started.
        """
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                await self._ask(pack({"dir": directory, "id": int(jobid), "rank": rank}), [dirfd, ready_write])
            finally:
                os.close(dirfd)
                os.close(ready_write)
            await trio.lowlevel.wait_readable(ready_read)
            self._take_refusals()
        finally:
            trio.lowlevel.notify_closing(ready_read)
            os.close(ready_read)

    async def _ask(self, request: bytes, fds: list[int]) -> None:
        async with self._lock:
            self._take_refusals()
            for attempt in (1, 2):
                sock = self._socket or await self._start()
                try:
                    while True:
                        try:
                            socket.send_fds(sock, [request], fds)
                        except BlockingIOError:
                            await trio.lowlevel.wait_writable(sock)
                        else:
                            return
                except OSError as error:
                    log.warning("the launcher is gone (%s), starting another", error.strerror)
                    await self._stop()
                    if attempt == 2:
                        raise FluxresError(f"cannot reach the launcher: {error.strerror}") from error

    def _take_refusals(self) -> None:
        """Log what the launcher could not do. Unread, its answers would keep it from taking requests in the end."""
        with contextlib.suppress(OSError):  # there are no more, or it is gone, which the next request finds
            while self._socket is not None and (answer := self._socket.recv(MAX_ANSWER)):
                try:
                    log.warning("the launcher: %s", unpack_map(answer).get("text"))
                except ProtocolError as error:
                    log.warning("the launcher says something else: %s", error)

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = [] if self.cgroup is None else [self.cgroup]
        program = [sys.executable, "-P", "-m", "fluxres_shell.main"]  # -P: nothing from where the broker was started
        try:
            self._process = await trio.lowlevel.open_process(
                [*program, "--launcher", str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            ours.close()
            raise FluxresError(f"cannot start the launcher: {error.strerror}") from error
        finally:
            theirs.close()
        self._socket = ours
        return ours

    async def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with trio.move_on_after(STOP_GRACE):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                with trio.move_on_after(STOP_GRACE):  # one that hangs in the kernel is left to itself
                    await self._process.wait()
            self._process = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the launcher until cancelled; its shells go on."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * STOP_GRACE):
                await self._stop()
