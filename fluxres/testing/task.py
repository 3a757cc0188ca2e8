"""A simulated task: a program in a Trio task, with pipes to its shell, signals, and an end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final, Protocol

import trio

from fluxres.rpc.gate import Gate
from fluxres.testing.programs import Program
from fluxres.testing.world import TaskId
from fluxres_shell.spec import TaskSpec

PIPE_BYTES: Final = 64 * 1024
"""Bytes of standard input that wait in a task's pipe, and bytes that a write puts into one at a time."""
SPARING: Final = frozenset({
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
})  # fmt: skip
"""Signals that end nothing here: the default is to ignore them, or to stop, which is not simulated."""


class Parent(Protocol):
    """The shell of a task."""

    @property
    def reading(self) -> Gate:
        """Open while the shell reads its tasks' pipes."""

    def wrote(self, task: SimulatedTask, stream: str, data: bytes) -> None:
        """The task has written to a stream."""

    def wants_input(self, task: SimulatedTask) -> None:
        """There is room in the pipe of the task's standard input."""

    def exited(self, task: SimulatedTask, wait_status: int) -> None:
        """The task has ended."""


class SimulatedTask:
    """One task of a shell. A `programs.Task` to its program."""

    def __init__(
        self, shell: Parent, task: TaskId, spec: TaskSpec, *, pid: int, command: tuple[str, ...], env: Mapping[str, str]
    ) -> None:
        self.id = task
        self.spec = spec
        self.pid = pid
        self.command = command
        self.environment = env
        self.ignored: set[int] = set()
        self.alive = True
        self._shell = shell
        self._scope = trio.CancelScope()
        self._signal = 0
        self._input = bytearray()
        self._input_ended = False
        self._more = trio.Event()

    async def run(self, program: Program) -> None:
        """Run the program to its end, or to that of the task."""
        code = 0
        with self._scope:
            code = await program(self)
        if self.alive:
            self.alive = False
            self._shell.exited(self, self._signal if self._scope.cancelled_caught else (code & 0xFF) << 8)

    # --- what the program does

    async def write(self, data: bytes, stream: str = "stdout") -> None:
        """Write to a stream, as far as the shell reads it."""
        for start in range(0, len(data), PIPE_BYTES):
            await self._shell.reading.wait()
            self._shell.wrote(self, stream, data[start : start + PIPE_BYTES])

    async def read(self) -> bytes:
        """The next input, b"" at its end."""
        await trio.lowlevel.checkpoint()
        while not self._input and not self._input_ended:
            self._more = trio.Event()
            await self._more.wait()
        data = bytes(self._input)
        self._input.clear()
        self._shell.wants_input(self)
        return data

    # --- what is done to it

    def feed(self, piece: bytes) -> int:
        """Put input into its pipe, b"" for the end; how many bytes it took."""
        taken = min(len(piece), PIPE_BYTES - len(self._input))
        self._input += piece[:taken]
        self._input_ended = self._input_ended or not piece
        self._more.set()
        return taken

    def signal(self, signum: int) -> None:
        """Send it a signal."""
        if signum == signal.SIGKILL or not (signum in SPARING or signum in self.ignored):
            self._signal = self._signal or signum
            self._scope.cancel()

    def vanish(self) -> None:
        """It is killed with its shell, and nobody takes its status."""
        self.alive = False
        self._scope.cancel()
