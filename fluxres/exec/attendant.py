"""Attends one shell on behalf of rank 0: finds it, attaches, relays its records, until it is released.

Thin Trio around `exec.reattach`: gather the facts, decide, act, look again. It sends maps to rank 0, the responses of
one streaming request: `attached` {first, last, stdin}, `records` {records: encoded journal records}, `stdin-ack`
{offset}, and, each the last of its kind, `lost` {note, status} or `void` {note}. It holds no records of its own and
never acks by itself (I7).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from fluxres.base.errors import FluxresError, ProtocolError, RpcError
from fluxres.base.failpoint import hit
from fluxres.base.jobid import JobId, f58
from fluxres.exec import jobdir
from fluxres.exec.launcher import Launcher
from fluxres.exec.link import ShellLink
from fluxres.exec.reattach import Decision, Facts, decide
from fluxres.wire.payload import WireMap
from fluxres_shell import claim, pidfd
from fluxres_shell.find import Found, Kind, PeerMismatch, connect, find
from fluxres_shell.leftover import kill_marked
from fluxres_shell.segments import SegmentReader, exit_record, list_segments

log = logging.getLogger("fluxres.exec")

RETRY_MIN: Final = 0.02
RETRY_MAX: Final = 1.0
"""Seconds between two looks at a shell that lives and does not answer; doubled from the one to the other."""
START_TRIES: Final = 8
"""Times that a shell is started which ends before it has a claim, its launcher's death included; then the start is
given up. The pauses between them grow, so that many jobs do not wear out one launcher after the other."""
BATCH_BYTES: Final = 512 * 1024
"""Bytes of records that are read from a dead shell's journal at a time."""
COMMANDS: Final = 256
"""Messages to the shell that may wait to be sent; further ones are dropped, and asked for again by rank 0."""
RELEASE_GRACE: Final = 5.0
"""Seconds that a released shell has to end before it is left to itself."""

CLEANUP_ROUNDS: Final = 100
CLEANUP_PAUSE: Final = 0.02
"""How often, and how many seconds apart, the processes of a dead shell are looked for and killed."""
REAP_ROUNDS: Final = 25
REAP_PAUSE: Final = 0.02
"""How often, and how many seconds apart, the kernel is asked how a dead shell ended."""

RELEASE: Final[WireMap] = {"type": "release"}

Send = Callable[[WireMap], Awaitable[None]]


class Attendant:
    """Attends the shell of one job on this rank."""

    def __init__(
        self,
        *,
        path: str,
        jobid: JobId,
        rank: int,
        nonce: str,
        cursor: int,
        may_start: bool,
        launcher: Launcher,
        fresh: bool = False,
    ) -> None:
        """`fresh` says that the directory was made just now: there is nothing to look at before the start."""
        self._path = path
        self._jobid = jobid
        self._rank = rank
        self._nonce = nonce
        self._sent = cursor
        self._may_start = may_start
        self._launcher = launcher
        self._fresh = fresh
        self._starts = 0
        self._retry = RETRY_MIN
        self._pidfd: int | None = None
        self.attached = False
        """Whether the shell has answered, and its connection stands."""
        self._released = trio.Event()
        self._commands, self._command_queue = trio.open_memory_channel[tuple[WireMap, ...]](COMMANDS)
        self._linked = trio.CancelScope()
        self._stdin_next: int | None = None
        """The first byte of standard input that may be passed on next; None until the shell has told it."""
        self._launching = trio.CancelScope()

    # --- what rank 0 asks for

    def command(self, *messages: WireMap) -> bool:
        """Pass messages (ack, kill) to the shell; False where they cannot be taken now."""
        try:
            self._commands.send_nowait(messages)
        except trio.WouldBlock:
            return False
        return True

    def feed(self, offset: int, data: bytes, *, eof: bool, task: int) -> None:
        """Pass standard input on to the shell.

        Where there is no room for it, the connection is given up: rank 0 begins anew from where the shell says it is
        when it is attached again, and until then nothing is taken.
        """
        if self._stdin_next is None or offset > self._stdin_next:
            return
        self._stdin_next = max(self._stdin_next, offset + len(data))
        if not self.command({"type": "stdin", "task": task, "offset": offset, "data": data, "eof": eof}):
            self._stdin_next = None
            self._linked.cancel()

    def release(self, seq: int) -> None:
        """Rank 0 has everything durable, up to the exit record `seq`: the shell may go."""
        self._released.set()
        if not self.command({"type": "ack", "seq": seq}, RELEASE):
            self._linked.cancel()  # a shell that loses its broker at the end syncs its journal, and goes too

    def void(self, reason: str) -> bool:
        """Make sure that nothing starts, unless it has. True: nothing ran and nothing will."""
        os.makedirs(self._path, mode=jobdir.PRIVATE, exist_ok=True)
        with jobdir.opened(self._path) as dirfd:
            won = claim.void(dirfd, self._nonce, reason)
            with find(dirfd) as found:
                won = won or found.kind is Kind.VOID
        self._may_start = False
        self._launching.cancel()
        return won

    def force(self) -> None:
        """Kill the shell itself; the kernel then kills its tasks (PDEATHSIG)."""
        if self._pidfd is not None:
            pidfd.send_signal(self._pidfd, signal.SIGKILL)

    # --- the life of an attendant

    async def run(self, send: Send) -> None:
        """Attend until released. Raises RpcError ENOENT where there is nothing, ESTALE for another job's directory."""
        try:
            while not await self._step(send):
                await trio.lowlevel.checkpoint()
        finally:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None

    async def _step(self, send: Send) -> bool:
        """Look, decide, act; True when there is nothing left to do."""
        if not jobdir.exists(self._path):
            if not self._sent:
                raise RpcError(errno.ENOENT, f"no directory for job {f58(self._jobid)}")
            os.makedirs(self._path, mode=jobdir.PRIVATE)  # somebody removed it: what ran is lost, and never runs again
        with jobdir.opened(self._path) as dirfd:
            facts, sock = self._gather(dirfd)
            self._fresh = False
            decision, why = decide(facts)
            match decision:
                case Decision.ATTACH:
                    assert sock is not None
                    await self._attached(ShellLink(sock), send)
                case Decision.WAIT:
                    await self._wait()
                case Decision.START:
                    await self._start(dirfd)
                case Decision.VOID_IT:
                    claim.void(dirfd, self._nonce, "the start was given up")
                case Decision.READ_OUT:
                    await self._read_out(dirfd, send)
                    await self._released.wait()
                case Decision.LOST:
                    await self._lost(dirfd, why, send)
                case Decision.VOID:
                    await send({"type": "void", "note": why})
                    await self._released.wait()
                case Decision.NOTHING:
                    raise RpcError(errno.ENOENT, f"nothing was started for job {f58(self._jobid)}")
                case Decision.FOREIGN:
                    raise RpcError(errno.ESTALE, why)
        return self._released.is_set()

    def _gather(self, dirfd: int) -> tuple[Facts, socket.socket | None]:
        if self._fresh:
            return Facts(kind=Kind.UNCLAIMED, may_start=self._may_start), None
        with find(dirfd) as found:
            sock = None
            if found.kind is Kind.ALIVE:
                self._keep_pidfd(found)
                sock = self._dial(dirfd, found)
            kind, nonce = found.kind, None if found.claim is None else found.claim.nonce
            if kind is Kind.UNCLAIMED:
                identity = jobdir.spec_identity(self._path)
                kind, nonce = (Kind.NOTHING, None) if identity is None else (kind, identity[0])
            dead = found.kind in (Kind.DEAD, Kind.CORRUPT) and not found.locked
            facts = Facts(
                kind=kind,
                nonce_matches=nonce in (None, self._nonce),
                answers=sock is not None,
                locked=found.locked,
                exit_record=dead and exit_record(dirfd) is not None,
                rebooted=found.rebooted,
                reason=found.reason,
                may_start=self._may_start,
                begun=self._sent > 0,
            )
            return facts, sock

    def _keep_pidfd(self, found: Found) -> None:
        """Hold on to the shell's pidfd: after its death it still tells how it died."""
        if found.pidfd is not None and self._pidfd is None:
            self._pidfd = os.dup(found.pidfd)

    def _dial(self, dirfd: int, found: Found) -> socket.socket | None:
        try:
            sock = connect(dirfd, found)
        except (PeerMismatch, OSError) as error:
            log.warning("job %s: %s", f58(self._jobid), error)
            sock = None
        if sock is None and found.pidfd is not None:
            pidfd.send_signal(found.pidfd, signal.SIGUSR1)
        return sock

    # --- acting

    async def _start(self, dirfd: int) -> None:
        if self._starts == START_TRIES:
            claim.void(dirfd, self._nonce, f"the shell ended {START_TRIES} times before it had begun")
            return
        self._starts += 1
        hit("launch.before")
        with trio.CancelScope() as self._launching:  # a void claim ends the wait
            if self._starts > 1:
                await self._pause()
            try:
                await self._launcher.launch(self._path, self._jobid, self._rank)
            except FluxresError as error:
                log.error("job %s: %s", f58(self._jobid), error)
        hit("launch.after")

    async def _pause(self) -> None:
        await trio.sleep(self._retry)
        self._retry = min(2 * self._retry, RETRY_MAX)

    async def _wait(self) -> None:
        """Wait until the shell dies, or for a while: then it is asked again."""
        with trio.move_on_after(self._retry):
            if self._pidfd is None:
                await trio.sleep_forever()
            else:
                await trio.lowlevel.wait_readable(self._pidfd)
        self._retry = min(2 * self._retry, RETRY_MAX)

    async def _attached(self, link: ShellLink, send: Send) -> None:
        try:
            self._drop_input()
            await link.send({"type": "attach", "nonce": self._nonce, "from": self._sent + 1})
            async with trio.open_nursery() as nursery:
                self._linked = nursery.cancel_scope
                nursery.start_soon(self._write, link)
                async for message in link:
                    await self._relay(message, send)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionError):
            log.debug("job %s: the connection to the shell is lost", f58(self._jobid))
        except* ProtocolError as errors:
            log.error("job %s: %s", f58(self._jobid), errors.exceptions[0])
            await self._pause()
        finally:
            self.attached = False
            with trio.CancelScope(shield=True, deadline=trio.current_time() + RELEASE_GRACE):
                await link.aclose()

    def _drop_input(self) -> None:
        """Forget standard input meant for an earlier connection: the shell may have lost what was before it."""
        self._stdin_next = None
        kept: list[tuple[WireMap, ...]] = []
        with contextlib.suppress(trio.WouldBlock):
            while True:
                kept.append(self._command_queue.receive_nowait())
        for messages in kept:
            if messages[0]["type"] != "stdin":
                self._commands.send_nowait(messages)

    async def _relay(self, message: WireMap, send: Send) -> None:
        match message.get("type"):
            case "records":
                await self._send_records(message, send)
            case "attached" | "stdin-ack":
                self.attached = True
                self._retry = RETRY_MIN
                match message.get("stdin"):
                    case {"offset": int(offset)}:
                        self._stdin_next = offset
                await send(message)
            case "error":
                raise ProtocolError(f"the shell refuses: {message.get('text')}")
            case kind:
                raise ProtocolError(f"cannot read a {kind!r} message from a shell")

    async def _send_records(self, message: WireMap, send: Send) -> None:
        payloads = message.get("records")
        if not isinstance(payloads, list) or not payloads:
            raise ProtocolError("cannot read records from a shell: no list")
        await send(message)
        self._sent += len(payloads)

    async def _write(self, link: ShellLink) -> None:
        """Pass commands on. The release is still sent when rank 0 has withdrawn its request: it does so at once."""
        async for messages in self._command_queue:
            last = messages[-1] is RELEASE
            with trio.CancelScope(shield=last, deadline=trio.current_time() + RELEASE_GRACE if last else math.inf):
                await link.send(*messages)

    async def _read_out(self, dirfd: int, send: Send) -> None:
        """Send what a dead shell's journal still holds above the cursor, and say where records are missing.

        Behind a record that cannot be read it goes on with the next segment, if there is one.
        """
        resume: int | None = self._sent + 1
        while resume is not None:
            reader = SegmentReader(dirfd, resume)
            try:
                batch = reader.read(BATCH_BYTES)
                if batch:
                    await send({"type": "attached", "first": batch[0].seq, "last": 0})
                while batch:
                    await send({"type": "records", "records": [stored.payload for stored in batch]})
                    self._sent = batch[-1].seq
                    batch = reader.read(BATCH_BYTES)
                resume = min((first for first in list_segments(dirfd) if first > reader.next_seq), default=None)
                if resume is not None:
                    log.error("job %s: the journal is damaged: %s", f58(self._jobid), reader.stop)
            finally:
                reader.close()

    async def _kill_tasks(self) -> int:
        """Kill what a dead shell left behind; returns how many processes would not die."""
        left: list[int] = []
        for _ in range(CLEANUP_ROUNDS):
            dying = jobdir.kill_cgroup(self._path, f"job-{f58(self._jobid, ascii=True)}-{self._rank}")
            left = await trio.to_thread.run_sync(kill_marked, f58(self._jobid, ascii=True), self._nonce)
            if not left and not dying:
                return 0
            await trio.sleep(CLEANUP_PAUSE)
        return max(1, len(left))

    async def _lost(self, dirfd: int, why: str, send: Send) -> None:
        """The shell died without an exit record: pass on what it still said, end its tasks, say why."""
        await self._read_out(dirfd, send)
        status = signal.SIGKILL.value
        left = await self._kill_tasks()
        why += await self._how_it_died()
        if left:
            why += f"; {left} of its processes would not die"
        await send({"type": "lost", "note": f"{why} on rank {self._rank}", "status": status, "leftover": left})
        await self._released.wait()

    async def _how_it_died(self) -> str:
        """What the kernel tells of the shell's end, which it does once somebody has reaped it: soon, or never."""
        if self._pidfd is None:
            return ""
        for _ in range(REAP_ROUNDS):
            info = pidfd.exit_info(self._pidfd)
            if info is not None and info.status is not None:
                return f" ({_how(info.status)})"
            await trio.sleep(REAP_PAUSE)
        return ""


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"by signal {os.WTERMSIG(status)}"
    return f"it exited with code {os.waitstatus_to_exitcode(status)}"
