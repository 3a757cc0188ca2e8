"""One process that the `rexec` service runs for somebody: its pipes, its input, and its end.

    started -> dead (a zombie: its pid, and its group's number, cannot be another's) -> reaped

It leads a session of its own, so that a signal to its group reaches what it started. It dies with the broker's process
(PR_SET_PDEATHSIG, through `fluxres_shell.pidfd`). It is reaped last of all, when nobody will signal it any more.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres_shell import pidfd as pidfds

log = logging.getLogger("fluxres.rexec")

CHUNK: Final = 64 * 1024
"""Bytes of output that one response carries at most."""
INPUT_BOUND: Final = 64 * 1024
"""Bytes of standard input that may wait for a process: the credit that its requester has (RFC 42)."""
GRACE: Final = 1.0
"""Seconds that a process has to end after SIGTERM, before SIGKILL."""
KILL_WAIT: Final = 1.0
"""Seconds in which SIGKILL has ended a process; one that is still there then sleeps in the kernel, and is left."""
STDOUT: Final = "stdout"
STDERR: Final = "stderr"
_CORE: Final = 0x80
"""The bit of a wait status that says that there is a core dump (wait(2))."""


class RemoteProcess:
    """A running process. `outputs` are the names of the streams that its requester wants; others go nowhere."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None, outputs: Sequence[str]) -> None:
        """Start it. Raises RpcError: ENOENT or EACCES for the program itself, EINVAL for its directory."""
        self._outputs: dict[str, int] = {}
        self._stdin = -1
        self._input = bytearray()
        self._input_ended = False
        self._more = trio.Event()
        theirs: list[int] = []
        try:
            stdin, self._stdin = os.pipe2(os.O_CLOEXEC)
            theirs.append(stdin)
            os.set_blocking(self._stdin, False)
            for name in (STDOUT, STDERR):
                theirs.append(self._open_output(name, wanted=name in outputs))
            child = pidfds.spawn(
                argv, env=env, cwd=cwd, stdin=theirs[0], stdout=theirs[1], stderr=theirs[2], new_session=True
            )
        except (OSError, ValueError) as error:
            self._close_pipes()
            raise _refusal(error) from error
        finally:
            for fd in theirs:
                os.close(fd)
        self.pid = child.pid
        self._pidfd = child.pidfd

    # --- its input

    def write(self, data: bytes, *, eof: bool) -> None:
        """Take standard input for it. Raises RpcError ENOBUFS above what its credit allows.

        What comes after the end of the input is dropped, as is what nobody reads.
        """
        if self._input_ended:
            return
        if len(self._input) + len(data) > INPUT_BOUND:
            raise RpcError(errno.ENOBUFS, f"process {self.pid} got more standard input than its {INPUT_BOUND} bytes")
        self._input += data
        self._input_ended = eof
        self._more.set()

    async def feed(self, credit: Callable[[int], Awaitable[None]]) -> None:
        """Write its input to it until the input's end; `credit` is told how many bytes have room again.

        However this ends, so does the process's input.
        """
        reads = True
        try:
            while self._input or not self._input_ended:
                if not self._input:
                    self._more = trio.Event()
                    await self._more.wait()
                    continue
                if reads:
                    await trio.lowlevel.wait_writable(self._stdin)
                reads, taken = self._write_some() if reads else (False, len(self._input))
                del self._input[:taken]
                if taken:
                    await credit(taken)
        finally:
            self._close_stdin()

    def _write_some(self) -> tuple[bool, int]:
        """Whether it still reads, and how many bytes it took; without a reader all of them are dropped."""
        try:
            return True, os.write(self._stdin, self._input)
        except BlockingIOError:
            return True, 0
        except BrokenPipeError:
            return False, len(self._input)

    # --- its output and its end

    async def read(self, stream: str) -> bytes:
        """The next output of a stream, b"" at its end."""
        fd = self._outputs[stream]
        while True:
            await trio.lowlevel.wait_readable(fd)
            try:
                return os.read(fd, CHUNK)
            except BlockingIOError:
                continue

    async def ended(self) -> int:
        """Wait until it is dead; returns its wait status."""
        await trio.lowlevel.wait_readable(self._pidfd)
        return self._status()

    def _status(self) -> int:
        """The wait status of the dead process, which stays a zombie."""
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is None:
            raise ChildProcessError(errno.ECHILD, f"cannot tell how process {self.pid} ended: it is not dead")
        if result.si_code == os.CLD_EXITED:
            return result.si_status << 8
        return result.si_status | (_CORE if result.si_code == os.CLD_DUMPED else 0)

    def signal(self, signum: int) -> None:
        """Signal its process group. Raises RpcError: ESRCH where all of it is gone, EPERM."""
        try:
            os.killpg(self.pid, signum)
        except OSError as error:
            raise RpcError(error.errno or errno.EIO, f"cannot signal process {self.pid}: {error.strerror}") from error

    async def kill(self) -> None:
        """End it and its group, whatever the caller's scope says: SIGTERM, after `GRACE` SIGKILL."""
        with trio.CancelScope(shield=True):
            if not pidfds.wait_dead(self._pidfd, 0):
                self._try_to_signal(signal.SIGTERM)
                with trio.move_on_after(GRACE):
                    await trio.lowlevel.wait_readable(self._pidfd)
            self._try_to_signal(signal.SIGKILL)  # what it has started may be there still
            with trio.move_on_after(KILL_WAIT):
                await trio.lowlevel.wait_readable(self._pidfd)

    def close(self) -> None:
        """Reap it, and close what there is of it here."""
        self._close_pipes()
        if os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG) is None:
            log.warning("leaving process %d alone: SIGKILL has not ended it within %gs", self.pid, KILL_WAIT)
        os.close(self._pidfd)

    def _try_to_signal(self, signum: int) -> None:
        try:
            self.signal(signum)
        except RpcError as error:
            if error.errnum != errno.ESRCH:
                log.warning("%s", error)

    # --- its pipes

    def _open_output(self, name: str, *, wanted: bool) -> int:
        """Its end of an output: of a pipe, or /dev/null."""
        if not wanted:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._outputs[name], theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._outputs[name], False)
        return theirs

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            trio.lowlevel.notify_closing(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def _close_pipes(self) -> None:
        self._close_stdin()
        for fd in self._outputs.values():
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        self._outputs.clear()


def _refusal(error: OSError | ValueError) -> RpcError:
    """Why a process was not started. ENOENT and EACCES are of the program alone: commands make 127 and 126 of them."""
    if not isinstance(error, OSError):
        return RpcError(errno.EINVAL, str(error))
    if isinstance(error, pidfds.SpawnError):
        known = error.stage in (pidfds.Stage.EXEC, pidfds.Stage.CLONE)
        return RpcError((error.errno or errno.EIO) if known else errno.EINVAL, str(error))
    return RpcError(error.errno or errno.EIO, f"cannot start a process: {error.strerror}")
