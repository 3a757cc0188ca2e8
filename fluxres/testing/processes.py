"""The nodes of a simulated instance: their disks, and the processes on them that are no brokers.

    Node ── one a rank, for ever; loses its power, and is up again with another boot id
      ├─ the disk: the statedir's identity, and a Directory for each job, all of which outlive the power
      └─ shells: outlive every broker, die with the node

`MemoryShellHost` is what one incarnation of a broker has of it (`fluxres.exec.host`). When the broker's process is
killed, `sever` makes it powerless: its connections to shells end, and nothing that it still tries has any effect.

The claim is what it is on a real node: whoever writes it first wins, a void one included, and only the winner runs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId
from fluxres.broker.statedir import Identity as StatedirIdentity
from fluxres.exec.host import Identity, Records
from fluxres.exec.reattach import Facts
from fluxres.testing.journal import Journal
from fluxres.testing.link import MemoryLink
from fluxres.testing.programs import Program
from fluxres.testing.shell import SimulatedShell
from fluxres.testing.world import World
from fluxres_shell.find import Kind
from fluxres_shell.spec import ShellSpec, SpecError, parse_spec

LAUNCH_DELAY: Final = 0.003
"""Seconds from a launch to the claim: what forking a warm launcher takes."""
SIGKILLED: Final = "by SIGKILL"
"""How a killed shell died, for people."""


@dataclass(slots=True)
class Claim:
    """Who runs, or that nobody does: a void claim's `reason` says why."""

    nonce: str
    boot_id: str
    void: bool = False
    reason: str = ""


class Directory:
    """What the disk has of one (job, rank), and the shell that holds its claim."""

    def __init__(self) -> None:
        self.spec: ShellSpec | None = None
        self.claim: Claim | None = None
        self.journal = Journal(0)
        self.shell: SimulatedShell | None = None

    @property
    def alive(self) -> SimulatedShell | None:
        """The shell, if it lives: whether the claim's lock is held."""
        return self.shell if self.shell is not None and self.shell.alive else None


class Node:
    """The machine of one rank."""

    def __init__(self, world: World, rank: int, programs: Mapping[str, Program]) -> None:
        self.rank = rank
        self.world = world
        self.host = f"node{rank}"
        self.boot_id = world.uuid()
        self.directories: dict[JobId, Directory] = {}
        self.identity: StatedirIdentity | None = None
        """What the statedir says of itself; None before its first broker."""
        self._programs = programs

    def shells(self) -> dict[JobId, SimulatedShell]:
        """The shells that live here."""
        return {jobid: each.alive for jobid, each in self.directories.items() if each.alive is not None}

    def kill_shell(self, jobid: JobId) -> None:
        """SIGKILL to the shell of a job. Raises KeyError where there is none."""
        self.shells()[jobid].kill()

    def lose_power(self) -> None:
        """Everything that runs here dies, and what was not synced is lost."""
        for directory in self.directories.values():
            if directory.alive is not None:
                directory.alive.kill()
            directory.journal.lose_power()

    def boot(self) -> None:
        """The node is up again."""
        self.boot_id = self.world.uuid()

    def launch(self, jobid: JobId) -> trio.Event:
        """Fork a shell for the directory of a job; the event is set when it has come as far as its claim."""
        ready = trio.Event()
        boot_id = self.boot_id

        def begin() -> None:
            directory = self.directories.get(jobid)
            if boot_id == self.boot_id and directory is not None and directory.spec is not None:
                self._claim(directory, directory.spec)
            ready.set()

        self.world.timeline.after(LAUNCH_DELAY, begin)
        return ready

    def _claim(self, directory: Directory, spec: ShellSpec) -> None:
        """Be a shell: whoever finds a claim ends, and has run nothing."""
        if directory.claim is None:
            directory.claim = Claim(nonce=spec.nonce, boot_id=self.boot_id)
            directory.journal = Journal(spec.journal_limit)
            directory.shell = SimulatedShell(
                self.world, spec, directory.journal, pid=self.world.pid(), programs=self._programs
            )
            directory.shell.begin()


class MemoryShellHost:
    """The shells of one node, for one incarnation of its broker (`host.ShellHost`)."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.alive = True
        self._links: dict[MemoryLink, None] = {}

    def sever(self) -> None:
        """The broker's process is gone."""
        self.alive = False
        for link in self._links:
            link.sever()

    def inventory(self) -> list[JobId]:
        """The jobs that have a directory here."""
        return sorted(self.node.directories)

    def identity(self, jobid: JobId) -> Identity | None:
        """Whose a directory is."""
        spec = self.node.directories[jobid].spec
        return None if spec is None else Identity(spec.nonce, spec.instance)

    def prepare(self, jobid: JobId, spec: bytes) -> bool:
        """Make a directory with its spec, unless it has one. Raises ValueError for a spec that makes no sense."""
        fresh = jobid not in self.node.directories
        if self.alive:
            directory = self.node.directories.setdefault(jobid, Directory())
            if directory.spec is None:
                try:
                    directory.spec = parse_spec(spec)
                except SpecError as error:
                    raise ValueError(str(error)) from error
        return fresh

    def shell(self, jobid: JobId, nonce: str | None = None) -> MemoryShellDir:
        """The directory of a job, there or not."""
        return MemoryShellDir(self, jobid, nonce)

    def discard(self, jobid: JobId) -> None:
        """Remove a directory. Raises FluxresError where its shell lives: a bug, since nobody could find it any more."""
        directory = self.node.directories.get(jobid)
        if directory is not None and self.alive:
            if directory.alive is not None:
                raise FluxresError(f"cannot discard the directory of job {jobid}: its shell lives")
            del self.node.directories[jobid]

    async def empty_trash(self) -> None:
        """There is none: what is discarded is gone."""
        await trio.lowlevel.checkpoint()

    # --- for its directories

    def connect(self, shell: SimulatedShell) -> MemoryLink | None:
        """Dial a shell; None where nobody answers."""
        link = shell.accept() if self.alive else None
        if link is not None:
            self._links[link] = None
        return link

    def disconnected(self, link: MemoryLink) -> None:
        """A connection is closed."""
        self._links.pop(link, None)


class MemoryShellDir:
    """One shell's directory (`host.ShellDir`)."""

    def __init__(self, host: MemoryShellHost, jobid: JobId, nonce: str | None) -> None:
        self._host = host
        self._jobid = jobid
        self._nonce = nonce
        self._directory: Directory | None = None
        self._shell: SimulatedShell | None = None
        self._link: MemoryLink | None = None

    def look(self) -> Facts:
        """The facts, liveness first."""
        directory = self._directory = self._host.node.directories.get(self._jobid)
        if directory is None:
            return Facts(kind=Kind.NOTHING)
        claim, spec_nonce = directory.claim, None if directory.spec is None else directory.spec.nonce
        if claim is None:
            kind, nonce = (Kind.UNCLAIMED if directory.spec else Kind.NOTHING), spec_nonce
        else:
            alive = directory.alive
            kind = Kind.VOID if claim.void else Kind.DEAD if alive is None else Kind.ALIVE
            nonce = claim.nonce
            self._shell = alive or self._shell
        if self._nonce is None:
            self._nonce = spec_nonce if nonce is None else nonce
        return Facts(
            kind=kind,
            nonce_matches=nonce in (None, self._nonce),
            locked=kind is Kind.ALIVE,
            rebooted=claim is not None and claim.boot_id != self._host.node.boot_id,
            reason="" if claim is None else claim.reason,
        )

    def dial(self) -> MemoryLink | None:
        """Connect to the shell that was seen."""
        self._hang_up()
        if self._shell is not None:
            self._link = self._host.connect(self._shell)
        return self._link

    def ask_to_bind(self) -> None:
        """There is no socket that could be lost."""

    def has_exit_record(self) -> bool:
        """Look at the end of the journal."""
        return self._directory is not None and self._directory.journal.has_exit_record()

    def journal(self, from_seq: int) -> Generator[Records, None, None]:
        """Read it out."""
        if self._directory is not None:
            yield from self._directory.journal.pieces(from_seq)

    def void(self, reason: str) -> bool:
        """Claim it for nobody."""
        if not self._host.alive:
            return False
        directory = self._host.node.directories.setdefault(self._jobid, Directory())
        if directory.claim is not None:
            return False
        directory.claim = Claim(nonce=self._nonce or "", boot_id=self._host.node.boot_id, void=True, reason=reason)
        return True

    async def launch(self) -> None:
        """Have a shell forked."""
        await trio.lowlevel.checkpoint()
        if self._host.alive:
            await self._host.node.launch(self._jobid).wait()

    async def death(self) -> None:
        """Wait for the end of the shell that was seen."""
        if self._shell is None:
            await trio.sleep_forever()
        else:
            await self._shell.ended.wait()

    async def how_it_died(self) -> str:
        """How the shell that was seen alive died."""
        await trio.lowlevel.checkpoint()
        return SIGKILLED if self._shell is not None and self._shell.killed else ""

    def kill(self) -> None:
        """Kill the shell that was seen."""
        if self._shell is not None and self._host.alive:
            self._shell.kill()

    async def kill_tasks(self) -> int:
        """Tasks die with their shell here."""
        await trio.lowlevel.checkpoint()
        return 0

    def close(self) -> None:
        """Let go of it."""
        self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.sever()
            self._host.disconnected(self._link)
            self._link = None
