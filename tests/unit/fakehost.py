"""Shells in memory, behind the protocols of `exec.host`: a test says what there is, and sees what is done to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field

import trio

from fluxres.base.jobid import JobId
from fluxres.exec.host import Identity, Records, ShellDir, ShellHost
from fluxres.exec.reattach import Facts
from fluxres.wire.payload import WireMap
from fluxres_shell.find import Kind

BUFFER = 1000


class FakeLink:
    """A connection, whose other end the test holds."""

    def __init__(self) -> None:
        self.sent: list[WireMap] = []
        self.says, self._heard = trio.open_memory_channel[WireMap](BUFFER)
        self.stuck = trio.Event()
        self.stuck.set()
        self.closed = False

    async def send(self, *messages: WireMap) -> None:
        """Waits while the shell is `stuck`."""
        await self.stuck.wait()
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise trio.ClosedResourceError
        self.sent += messages

    async def __aiter__(self) -> AsyncGenerator[WireMap, None]:
        async for message in self._heard:
            yield message

    async def aclose(self) -> None:
        """The shell is detached."""
        self.closed = True
        await trio.lowlevel.checkpoint()


@dataclass(kw_only=True)
class FakeShell:
    """One (job, rank): what is true of it, and what was done."""

    kind: Kind = Kind.NOTHING
    nonce: str = "N"
    instance: str = "I"
    answers: bool = True
    stubborn: int = 0
    """Processes that outlive `kill_tasks`, once each time it is tried."""
    deathless: bool = False
    exited: bool = False
    records: list[bytes] = field(default_factory=list)
    spec: bytes | None = None
    launches: int = 0
    binds: int = 0
    killed: int = 0
    cleaned: int = 0
    links: list[FakeLink] = field(default_factory=list)
    launching: trio.Event | None = None
    """Where it is set, a launch waits for it."""
    changed: trio.Event = field(default_factory=trio.Event)

    def become(self, kind: Kind) -> None:
        """Something happens to it."""
        self.kind = kind
        self.changed.set()
        self.changed = trio.Event()


class FakeDir:
    """A look at a `FakeShell`."""

    def __init__(self, shell: FakeShell, nonce: str | None, opened: list[FakeDir]) -> None:
        self.shell = shell
        self._nonce = nonce
        self._opened = opened
        opened.append(self)

    def look(self) -> Facts:
        """What is true of it."""
        kind = self.shell.kind
        matches = kind is Kind.NOTHING or self._nonce in (None, self.shell.nonce)
        return Facts(kind=kind, nonce_matches=matches, locked=kind is Kind.ALIVE)

    def dial(self) -> FakeLink | None:
        """A new link, if it answers."""
        if not self.shell.answers:
            return None
        self.shell.links.append(FakeLink())
        return self.shell.links[-1]

    def ask_to_bind(self) -> None:
        """Counted."""
        self.shell.binds += 1

    def has_exit_record(self) -> bool:
        """As set."""
        return self.shell.exited

    def journal(self, from_seq: int) -> Generator[Records, None, None]:
        """One record at a time; an empty one is missing."""
        for seq, record in enumerate(self.shell.records, 1):
            if seq >= from_seq and record:
                yield Records(seq, [record])

    def void(self, reason: str) -> bool:
        """Unless there is a claim."""
        if self.shell.kind not in (Kind.NOTHING, Kind.UNCLAIMED):
            return False
        self.shell.become(Kind.VOID)
        return True

    async def launch(self) -> None:
        """It lives at once, unless it is void meanwhile."""
        await trio.lowlevel.checkpoint()
        self.shell.launches += 1
        if self.shell.launching is not None:
            await self.shell.launching.wait()
        if self.shell.kind is Kind.UNCLAIMED:
            self.shell.become(Kind.ALIVE)

    async def death(self) -> None:
        """Wait for it."""
        while self.shell.kind is Kind.ALIVE:
            await self.shell.changed.wait()

    async def how_it_died(self) -> str:
        """Always the same."""
        await trio.lowlevel.checkpoint()
        return "by SIGKILL"

    def kill(self) -> None:
        """It dies, unless it is deathless."""
        self.shell.killed += 1
        if self.shell.kind is Kind.ALIVE and not self.shell.deathless:
            self.shell.become(Kind.DEAD)

    async def kill_tasks(self) -> int:
        """One of the stubborn ones dies each time."""
        await trio.lowlevel.checkpoint()
        self.shell.cleaned += 1
        left, self.shell.stubborn = self.shell.stubborn, max(0, self.shell.stubborn - 1)
        return left

    def close(self) -> None:
        """Nothing is left open in the end."""
        if self in self._opened:
            self._opened.remove(self)


class FakeHost:
    """The shells of one rank."""

    def __init__(self, **shells: FakeShell) -> None:
        self.shells: dict[JobId, FakeShell] = {}
        self.discarded: list[JobId] = []
        self.unreadable: set[JobId] = set()
        self.opened: list[FakeDir] = []

    def inventory(self) -> list[JobId]:
        """All that were not discarded."""
        return list(self.shells)

    def identity(self, jobid: JobId) -> Identity | None:
        """As the fake has it."""
        if jobid in self.unreadable:
            raise OSError("cannot read it")
        shell = self.shells[jobid]
        return None if shell.kind is Kind.NOTHING else Identity(shell.nonce, shell.instance)

    def prepare(self, jobid: JobId, spec: bytes) -> bool:
        """A new one is unclaimed."""
        fresh = jobid not in self.shells
        if fresh:
            self.shells[jobid] = FakeShell(kind=Kind.UNCLAIMED)
        shell = self.shells[jobid]
        shell.spec = shell.spec or spec
        return fresh

    def shell(self, jobid: JobId, nonce: str | None = None) -> FakeDir:
        """Made where there is none, as nothing."""
        shell = self.shells.get(jobid) or FakeShell()
        return FakeDir(shell, nonce, self.opened)

    def discard(self, jobid: JobId) -> None:
        """Kept track of."""
        if self.shells.pop(jobid, None) is not None:
            self.discarded.append(jobid)

    async def empty_trash(self) -> None:
        """There is none."""
        await trio.lowlevel.checkpoint()


def is_a_host(host: FakeHost) -> ShellHost:
    """For the type checker."""
    return host


def is_a_dir(shell: FakeDir) -> ShellDir:
    """For the type checker."""
    return shell
