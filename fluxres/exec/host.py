"""Where the shells of one rank live: all of what touches files, locks, sockets and processes, as protocols.

`Shells`, `Attendant` and `Forgetting` are written against these, and know nothing of the kernel. `exec.shelldir` is a
node of Linux; `fluxres.testing` has a table of processes in memory. Methods that are not async never block for long and
give up control at no point, so that what an attendant sees and does without waiting is one step to everybody else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import NamedTuple, Protocol

from fluxres.base.jobid import JobId
from fluxres.exec.reattach import Facts
from fluxres.wire.payload import WireMap


class Records(NamedTuple):
    """Encoded journal records, each following the one before; `first` is the sequence number of the first."""

    first: int
    payloads: list[bytes]


class Identity(NamedTuple):
    """Whose a shell's directory is, as its spec says: the job's nonce, and the instance's id."""

    nonce: str
    instance: str


class ShellLink(Protocol):
    """A connection to a living shell: maps in both directions (`fluxres_shell.protocol`)."""

    async def send(self, *messages: WireMap) -> None:
        """Send messages, all at once. Raises trio.BrokenResourceError where the shell is gone."""

    def __aiter__(self) -> AsyncGenerator[WireMap, None]:
        """What the shell sends, until it closes. Raises ProtocolError, trio.BrokenResourceError."""

    async def aclose(self) -> None:
        """Close the connection."""


class ShellDir(Protocol):
    """The directory of one (job, rank), and through it the shell. Close it after use.

    `look` comes first: `dial`, `ask_to_bind`, `has_exit_record`, `journal`, `kill` and what waits for the shell's end
    are about the directory and the process that it saw last.
    """

    def look(self) -> Facts:
        """The facts that a look at the directory gives, liveness first; NOTHING also where there is no directory.

        What only its caller knows (`answers`, `exit_record`, `may_start`, `begun`) is left out. Raises OSError.
        """

    def dial(self) -> ShellLink | None:
        """Connect to the shell that is alive; None where nobody answers, or somebody else does."""

    def ask_to_bind(self) -> None:
        """Ask the shell that is alive to make its socket anew, where it can be asked."""

    def has_exit_record(self) -> bool:
        """Whether the journal ends with an exit record: only to be asked when the shell is dead. Raises OSError."""

    def journal(self, from_seq: int) -> Generator[Records, None, None]:
        """Read out a dead shell's journal from the record `from_seq`, in order and in pieces.

        Behind records that cannot be read it goes on with the next that can. Raises OSError.
        """

    def void(self, reason: str) -> bool:
        """Claim the directory, made if need be, for nobody, durably; False where there is a claim. Raises OSError."""

    async def launch(self) -> None:
        """Ask for a shell, and return when there may be something to see of it. Cancelling does not undo the request.

        Does nothing if it is cancelled already. Raises FluxresError where shells cannot be started.
        """

    async def death(self) -> None:
        """Return when the shell that was seen alive is dead; where nobody would tell, never."""

    async def how_it_died(self) -> str:
        """How the shell ended, for people ("by SIGKILL"); empty where the kernel does not tell."""

    def kill(self) -> None:
        """Kill the shell that was seen alive, and with it its tasks; nothing happens to any other process."""

    async def kill_tasks(self) -> int:
        """Kill what a dead shell left behind; how many processes would not die."""

    def close(self) -> None:
        """Let go of it; the shell is as it was. May be called again."""


class ShellHost(Protocol):
    """The shells of one rank."""

    def inventory(self) -> list[JobId]:
        """The jobs that have a directory here, ended ones included. Raises OSError."""

    def identity(self, jobid: JobId) -> Identity | None:
        """Whose the job's directory is; None where it has no spec, or none that can be understood. Raises OSError."""

    def prepare(self, jobid: JobId, spec: bytes) -> bool:
        """Make the directory with its spec, unless it has one; whether there was no directory. Raises OSError."""

    def shell(self, jobid: JobId, nonce: str | None = None) -> ShellDir:
        """The directory of a job, there or not. `nonce` is the job's own; None takes whatever job it is of."""

    def discard(self, jobid: JobId) -> None:
        """Put the job's directory out of the way, for `empty_trash`; nothing happens where there is none.

        Raises FluxresError.
        """

    async def empty_trash(self) -> None:
        """Remove what was discarded, now or before a crash; what cannot be removed is left for the next time."""
