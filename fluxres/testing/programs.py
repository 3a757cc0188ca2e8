"""What simulated tasks run: small programs in place of real ones, found by the first word of a job's command line.

| command            | does                                                                         |
|--------------------|------------------------------------------------------------------------------|
| sleep SECONDS      | sleeps                                                                       |
| echo WORD …        | writes the words and a newline                                               |
| print N [every S]  | writes N lines, `line 1` to `line N`, with S seconds between two             |
| cat                | copies its standard input to its standard output                             |
| exit N             | exits with status N                                                          |

A test adds its own: an async function of a `Task` that returns the exit status. Signals do what they do by default,
SIGKILL always, the others unless the program has put them into `ignored`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

import trio

from fluxres.testing.world import TaskId


class Task(Protocol):
    """What a program knows of the process that it runs in."""

    @property
    def id(self) -> TaskId:
        """Which task of which job it is."""

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Its environment, as the job's."""

    @property
    def ignored(self) -> set[int]:
        """The signals that it ignores; to be added to."""

    async def write(self, data: bytes, stream: str = "stdout") -> None:
        """Write to a standard stream; waits while the pipe is full."""

    async def read(self) -> bytes:
        """Read what there is of standard input, b"" at its end."""


Program = Callable[[Task], Awaitable[int]]
"""Runs as a task, and returns its exit status."""


async def _sleep(task: Task) -> int:
    await trio.sleep(float(task.command[1]))
    return 0


async def _echo(task: Task) -> int:
    await task.write(" ".join(task.command[1:]).encode() + b"\n")
    return 0


async def _print(task: Task) -> int:
    count, pause = int(task.command[1]), 0.0
    if len(task.command) > 2:
        pause = float(task.command[-1])
    for number in range(1, count + 1):
        await task.write(f"line {number}\n".encode())
        if number < count:
            await trio.sleep(pause)
    return 0


async def _cat(task: Task) -> int:
    while data := await task.read():
        await task.write(data)
    return 0


async def _exit(task: Task) -> int:
    await trio.lowlevel.checkpoint()
    return int(task.command[1])


PROGRAMS: Final[Mapping[str, Program]] = {
    "sleep": _sleep,
    "echo": _echo,
    "print": _print,
    "cat": _cat,
    "exit": _exit,
}
"""The programs that every instance has."""
