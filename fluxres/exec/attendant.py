"""Attends one shell on behalf of rank 0: finds it, attaches, relays its records, until it is released.

Thin Trio around `exec.reattach`: gather the facts, decide, act, look again. Files and processes are behind `exec.host`.
It sends maps to rank 0, the responses of one streaming request: `attached` {first, last, stdin}, `records` {records:
encoded journal records}, `stdin-ack` {offset}, `barrier` {name, seq}, and, each the last of its kind, `lost` {note,
status, leftover} or `void` {note}. It holds no records of its own and never acks by itself (I7).

It can be cut off at any instant (rank 0's request is withdrawn, or the broker's parent is lost): it closes its
connection, which leaves the shell detached, and touches nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import trio

from fluxres.base.errors import FluxresError, ProtocolError, RpcError
from fluxres.base.failpoint import hit
from fluxres.base.jobid import JobId, f58
from fluxres.exec.host import ShellDir, ShellLink
from fluxres.exec.reattach import Decision, Facts, decide
from fluxres.wire.payload import WireMap
from fluxres_shell.find import Kind

log = logging.getLogger("fluxres.exec")

RETRY_MIN: Final = 0.02
RETRY_MAX: Final = 1.0
"""Seconds between two looks at a shell that lives and does not answer; doubled from the one to the other."""
START_TRIES: Final = 8
"""Times that a shell is started which ends before it has a claim, its launcher's death included; then the start is
given up. The pauses between them grow, so that many jobs do not wear out one launcher after the other."""
COMMANDS: Final = 256
"""Messages to the shell that may wait to be sent; further ones are dropped, and asked for again by rank 0."""
RELEASE_GRACE: Final = 5.0
"""Seconds that a released shell has to end before it is left to itself."""

RELEASE: Final[WireMap] = {"type": "release"}

Send = Callable[[WireMap], Awaitable[None]]


def void_start(shell: ShellDir, note: str) -> bool:
    """Make sure that nothing starts, unless it has. True: nothing ran and nothing will.

    Raises RpcError ESTALE where the directory is another job's, OSError where the claim cannot be written.
    """
    if not shell.look().nonce_matches:
        raise RpcError(errno.ESTALE, "the directory is of another job: its nonce differs")
    return shell.void(note) or shell.look().kind is Kind.VOID


class Attendant:
    """Attends the shell of one job on this rank, whose directory is `shell`; closes that at the end."""

    def __init__(
        self,
        shell: ShellDir,
        *,
        jobid: JobId,
        rank: int,
        nonce: str,
        cursor: int,
        may_start: bool,
        fresh: bool = False,
    ) -> None:
        """`fresh` says that the directory was made just now: there is nothing to look at before the start."""
        self._shell = shell
        self._jobid = jobid
        self._rank = rank
        self._nonce = nonce
        self._sent = cursor
        self._may_start = may_start
        self._fresh = fresh
        self._starts = 0
        self._retry = RETRY_MIN
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

    def barrier_done(self, name: str, seq: int) -> None:
        """Every rank of the job has entered the barrier. A shell that is attached anew asks again, if it has to."""
        if not self.command({"type": "barrier-done", "name": name, "seq": seq}):
            self._linked.cancel()

    def release(self, seq: int) -> None:
        """Rank 0 has everything durable, up to the exit record `seq`: the shell may go."""
        self._released.set()
        if not self.command({"type": "ack", "seq": seq}, RELEASE):
            self._linked.cancel()  # a shell that loses its broker at the end syncs its journal, and goes too

    def give_up_start(self) -> None:
        """The start is voided, or was claimed before: start nothing any more, and see what there is."""
        self._may_start = False
        self._launching.cancel()

    def force(self) -> None:
        """Kill the shell itself; the kernel then kills its tasks."""
        self._shell.kill()

    # --- the life of an attendant

    async def run(self, send: Send) -> None:
        """Attend until released. Raises RpcError ENOENT where there is nothing, ESTALE for another job's directory."""
        try:
            while not await self._step(send):
                await trio.lowlevel.checkpoint()
        finally:
            self._shell.close()

    async def _step(self, send: Send) -> bool:
        """Look, decide, act; True when there is nothing left to do."""
        facts, link = self._gather()
        decision, why = decide(facts)
        match decision:
            case Decision.ATTACH:
                assert link is not None
                await self._attached(link, send)
            case Decision.WAIT:
                await self._wait()
            case Decision.START:
                await self._start()
            case Decision.VOID_IT:
                self._shell.void("the start was given up")
            case Decision.READ_OUT:
                await self._read_out(send)
                await self._released.wait()
            case Decision.LOST:
                await self._lost(why, send)
            case Decision.VOID:
                await send({"type": "void", "note": why})
                await self._released.wait()
            case Decision.NOTHING:
                raise RpcError(errno.ENOENT, f"nothing was started for job {f58(self._jobid)}")
            case Decision.FOREIGN:
                raise RpcError(errno.ESTALE, why)
        return self._released.is_set()

    def _gather(self) -> tuple[Facts, ShellLink | None]:
        """The facts, and a connection to a shell that answers."""
        if self._fresh:
            self._fresh = False
            return Facts(kind=Kind.UNCLAIMED, may_start=self._may_start), None
        facts = self._shell.look()
        link = None
        if facts.kind is Kind.ALIVE and facts.nonce_matches:
            link = self._shell.dial()
            if link is None:
                self._shell.ask_to_bind()
        return replace(
            facts,
            answers=link is not None,
            exit_record=facts.dead and self._shell.has_exit_record(),
            may_start=self._may_start,
            begun=self._sent > 0,
        ), link

    # --- acting

    async def _start(self) -> None:
        if self._starts == START_TRIES:
            self._shell.void(f"the shell ended {START_TRIES} times before it had begun")
            return
        self._starts += 1
        hit("launch.before")
        with trio.CancelScope() as self._launching:  # a void claim ends the wait
            if self._starts > 1:
                await self._pause()
            try:
                await self._shell.launch()
            except FluxresError as error:
                log.error("job %s: %s", f58(self._jobid), error)
        hit("launch.after")

    async def _pause(self) -> None:
        await trio.sleep(self._retry)
        self._retry = min(2 * self._retry, RETRY_MAX)

    async def _wait(self) -> None:
        """Wait until the shell dies, or for a while: then it is asked again."""
        with trio.move_on_after(self._retry):
            await self._shell.death()
        self._retry = min(2 * self._retry, RETRY_MAX)

    async def _attached(self, link: ShellLink, send: Send) -> None:
        try:
            self._drop_input()
            await link.send({"type": "attach", "nonce": self._nonce, "from": self._sent + 1})
            async with trio.open_nursery() as nursery:
                self._linked = nursery.cancel_scope
                nursery.start_soon(self._write, link)
                async with contextlib.aclosing(aiter(link)) as messages:
                    async for message in messages:
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
        match message:
            case {"type": "records"}:
                await self._send_records(message, send)
            case {"type": "attached" | "stdin-ack"}:
                self.attached = True
                self._retry = RETRY_MIN
                match message.get("stdin"):
                    case {"offset": int(offset)}:
                        self._stdin_next = offset
                await send(message)
            case {"type": "barrier", "name": str(name), "seq": int(seq)}:
                await send({"type": "barrier", "name": name, "seq": seq})
            case {"type": "error"}:
                raise ProtocolError(f"the shell refuses: {message.get('text')}")
            case _:
                raise ProtocolError(f"cannot read a {message.get('type')!r} message from a shell")

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

    async def _read_out(self, send: Send) -> None:
        """Send what a dead shell's journal still holds above the cursor, and say where records are missing."""
        expected = 0  # so that the first piece is announced in any case
        with contextlib.closing(self._shell.journal(self._sent + 1)) as journal:
            for first, payloads in journal:
                if first != expected:
                    await send({"type": "attached", "first": first, "last": 0})
                await send({"type": "records", "records": payloads})
                self._sent = first + len(payloads) - 1
                expected = self._sent + 1

    async def _lost(self, why: str, send: Send) -> None:
        """The shell died without an exit record: pass on what it still said, end its tasks, say why."""
        await self._read_out(send)
        left = await self._shell.kill_tasks()
        if how := await self._shell.how_it_died():
            why += f" ({how})"
        if left:
            why += f"; {left} of its processes would not die"
        status = signal.SIGKILL.value
        await send({"type": "lost", "note": f"{why} on rank {self._rank}", "status": status, "leftover": left})
        await self._released.wait()
