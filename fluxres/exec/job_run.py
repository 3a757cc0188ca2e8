"""One job on rank 0 while it runs: attends each of its ranks, and tells the manager what comes of it (RFC 32).

    for each rank:  wait until it is online ─▶ exec.start or exec.reattach, a stream in `subtree(rank)` ─▶ records …
                    ▲                                                  │
                    '──── EHOSTUNREACH; other errors after a pause ────'

Log durably, then act, then acknowledge: `exec.recorder` commits what a rank says, and only when that is durable it is
acknowledged, and what follows from it said. Everything here can be cut off at any instant, by the loss of a subtree or
of rank 0 itself, and begun again from the durable progress records. A rank that is away makes the job wait, its kill
included; it does not fail it. Only an administrator who declares the rank lost ends its part without it.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

import trio

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.base.failpoint import hit
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, f58
from fluxres.exec.attachments import Attachments
from fluxres.exec.backoff import Backoff
from fluxres.exec.execution import Execution, Response
from fluxres.exec.progress import Problem, Progress, RankState, guest_namespace
from fluxres.exec.ranks import Ranks
from fluxres.exec.recorder import Recorder
from fluxres.exec.rendezvous import Rendezvous
from fluxres.exec.stdin import StdinPump
from fluxres.exec.translate import translate
from fluxres.kvs.kvs import Kvs
from fluxres.rpc.handle import Handle
from fluxres.wire.payload import WireMap
from fluxres_shell.records import MAX_STATUS

log = logging.getLogger("fluxres.exec")

RELEASE_AFTER: Final = 1.0
"""Seconds after which ranks that have ended are released, while others have not (partial release)."""
PASSES: Final = frozenset({errno.ENOSPC, errno.EAGAIN})
"""Why a rank cannot be drained now, and can be later: the store is full, or too much waits for it."""
ROOT: Final = 0
"""The rank that all this runs on."""

Respond = Callable[[WireMap], None]
Subtree = Callable[[int], AbstractAsyncContextManager[None]]
"""Runs its body in the scope of the child that leads to a rank; raises HostUnreachable when that is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job's execution needs to know: all of it durable before any of it is used.

    `spec` builds the spec of a rank; `ranks` are the durable progress records; `killed` says that a fatal exception is
    logged already, `released` which ranks are released. `kill_timeout` is the seconds between SIGTERM and SIGKILL.
    """

    jobid: JobId
    nonce: str
    ranks: Mapping[int, Progress]
    spec: Callable[[int], bytes]
    reattach: bool
    killed: bool
    released: IdSet
    kill_timeout: float


class JobRun:
    """The execution of one job, from its `start` request to its release."""

    def __init__(
        self,
        plan: Plan,
        *,
        kvs: Kvs,
        handle: Handle,
        ranks: Ranks,
        attachments: Attachments,
        subtree: Subtree,
        respond: Respond,
        now: Callable[[], float],
    ) -> None:
        self._plan = plan
        self._id = int(plan.jobid)
        self._attachments = attachments
        self._handle = handle
        self._ranks = ranks
        self._subtree = subtree
        self._respond = respond
        self._execution = Execution(plan.ranks, reattach=plan.reattach, released=plan.released)
        self._recorder = Recorder(plan.jobid, self._execution, kvs=kvs, now=now, durable=self._advanced)
        self._leader = min(plan.ranks)
        self._killed = plan.killed
        self._let_go = set(plan.released)
        """Ranks whose shells may go, and know it or are gone."""
        self._over = trio.Event()
        self._can_release = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._stdin = StdinPump(kvs, handle, plan.jobid, guest_namespace(plan.jobid))
        ended = plan.ranks.keys() - self._execution.missing()
        self._rendezvous = Rendezvous(plan.jobid, plan.ranks, ended=ended, kvs=kvs, handle=handle, fail=self._fail)

    # --- what the manager asks for

    def kill(self) -> None:
        """A fatal exception is logged: end the tasks, or see to it that none start."""
        if not self._killed:
            self._killed = True
            self._start_killing()

    def released(self, ranks: IdSet | None, *, final: bool) -> None:
        """The release of `ranks` (None: all) is durable: their shells may go. With `final` the run is over."""
        hit("ack.before")
        for rank in self._execution.ranks if final or ranks is None else ranks:
            progress = self._execution.ranks.get(rank)
            if progress is not None and rank not in self._let_go:
                self._let_go.add(rank)
                self._handle.send("exec.release", {"id": self._id, "seq": progress.cursor}, nodeid=rank)
        hit("ack.after")
        if final:
            self._over.set()

    def has_input(self) -> None:
        """There is standard input in the guest namespace."""
        self._stdin.begin()

    async def signal(self, signum: int) -> None:
        """Send a signal to all tasks, wherever they can be reached now. Raises RpcError that names the other ranks."""
        failed: dict[int, RpcError] = {}

        async def send(rank: int) -> None:
            try:
                await self._handle.call("exec.kill", {"id": self._id, "signum": signum}, nodeid=rank)
            except RpcError as error:
                failed[rank] = error

        async with trio.open_nursery() as nursery:
            for rank in self._execution.missing():
                nursery.start_soon(send, rank)
        if failed:
            first = failed[min(failed)]
            text = f"cannot signal the job on rank {IdSet(failed)}: {first.text}"
            raise RpcError(first.errnum, text)

    # --- the life of a run

    async def run(self) -> None:
        """Attend every rank until the job is released; responds as RFC 32 says."""
        self._attachments.begin(self._plan.jobid, self._execution.missing(), found=self._plan.reattach)
        self._say(self._execution.begin())
        try:
            async with trio.open_nursery() as self._nursery:
                self._stdin.run_in(self._nursery)
                for rank in self._execution.missing():
                    self._nursery.start_soon(self._attend, rank, name=f"{f58(self._plan.jobid)} on rank {rank}")
                    if rank != ROOT:
                        self._nursery.start_soon(self._until_declared, rank)
                if len(self._execution.ranks) > 1:
                    self._nursery.start_soon(self._release_early)
                if self._killed:
                    self._start_killing()
                await self._over.wait()
                self._nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
        self._attachments.over(self._plan.jobid)

    def _ended(self, rank: int) -> bool:
        return self._execution.ranks[rank].ended

    async def _attend(self, rank: int) -> None:
        """Attend `rank` until its part has ended, whatever becomes of its brokers meanwhile."""
        start = not self._plan.reattach
        backoff = Backoff()
        while not self._ended(rank):
            if not self._ranks.online(rank):
                await self._ranks.wait_online(rank)
            error = await self._attempt(rank, backoff, start=start)
            start = error is not None and await self._refused(rank, error, backoff, start=start)

    async def _attempt(self, rank: int, backoff: Backoff, *, start: bool) -> RpcError | None:
        """One streaming request to `rank`, to its end; returns the error that ended it."""
        progress = await self._recorder.settled(rank)  # a commit of the last attempt may be under way
        if progress.ended:
            return None
        payload: WireMap = {
            "id": self._id,
            "nonce": self._plan.nonce,
            "statedir": progress.statedir,
            "cursor": progress.cursor,
            "start": not self._killed,
        }
        if start:
            payload["spec"] = self._plan.spec(rank)
            hit("start-request.before")
        topic = "exec.start" if start else "exec.reattach"
        try:
            async with self._subtree(rank), self._handle.stream(topic, payload, nodeid=rank) as replies:
                if start:
                    self._attachments.start(self._plan.jobid, rank)
                    hit("start-request.after")
                self._stdin.opened(rank)
                try:
                    async for message in replies:
                        backoff.succeeded()
                        await self._heed(rank, message)
                finally:
                    self._stdin.closed(rank)
        except RpcError as error:
            return error
        finally:
            self._attachments.detach(self._plan.jobid, rank)
        return None

    async def _refused(self, rank: int, error: RpcError, backoff: Backoff, *, start: bool) -> bool:
        """The rank answered with an error; returns whether it is to be sent a start."""
        match error.errnum:
            case errno.ENOENT if not start and not self._killed:
                self._attachments.absent(self._plan.jobid, rank)
                return True  # nothing was started; where the job is to end, `_kill_rank` voids it
            case errno.ESTALE:
                await self._recorder.lose(rank, f"rank {rank} lost its state: {error.text}")
            case _:
                await self._pause(rank, error, backoff)
        return False

    async def _pause(self, rank: int, error: RpcError, backoff: Backoff) -> None:
        """Wait before `rank` is asked again; where it is not reachable, until it is back, which is no news."""
        if error.errnum == errno.EHOSTUNREACH:
            await trio.lowlevel.checkpoint()  # the same loss is on its way to `ranks`
            if not self._ranks.online(rank):
                return
        elif not (error.errnum == errno.ENOENT and self._killed) and backoff.is_news(error.text):
            log.warning("job %s: rank %d: %s", f58(self._plan.jobid), rank, error.text)
        await trio.sleep(backoff.pause())

    async def _until_declared(self, rank: int) -> None:
        reason = await self._ranks.wait_declared(rank)
        await self._recorder.lose(rank, f"rank {rank} was declared lost: {reason}")

    async def _release_early(self) -> None:
        """Release what has ended while the rest has not, in rounds, so that a large job does not log each rank."""
        while True:
            while not self._execution.can_release:
                self._can_release = trio.Event()
                await self._can_release.wait()
            await trio.sleep(RELEASE_AFTER)
            self._say(self._execution.release_early())

    # --- what a rank says

    async def _heed(self, rank: int, message: WireMap) -> None:
        """Take a message; where it makes no sense the rank's part is lost, and its shell killed."""
        try:
            await self._take(rank, message)
        except ProtocolError as error:
            kill: WireMap = {"id": self._id, "signum": signal.SIGKILL.value, "force": True}
            self._handle.send("exec.kill", kill, nodeid=rank)
            await self._recorder.lose(rank, f"the journal of rank {rank} cannot be read: {error}")

    async def _take(self, rank: int, message: WireMap) -> None:
        match message:
            case {"type": "records", "records": [*payloads]}:
                await self._take_records(rank, [bytes(p) for p in payloads if isinstance(p, bytes)])
            case {"type": "attached", "first": int(first)}:
                await self._recorder.missed(rank, first)
                match message.get("stdin"):
                    case {"offset": int(offset)}:  # a journal that is read out has none
                        self._attachments.attach(self._plan.jobid, rank)
                        self._stdin.attached(rank, offset)
            case {"type": "stdin-ack", "offset": int(offset)}:
                self._stdin.acked(rank, offset)
            case {"type": "barrier", "name": str(name), "seq": int(seq)}:
                if not self._ended(rank):
                    self._rendezvous.enter(rank, name, seq)
            case {"type": "lost", "note": str(note)}:
                await self._drain(rank, message.get("leftover"))
                status = message.get("status")
                seen = status if isinstance(status, int) and 0 <= status <= MAX_STATUS else None
                await self._recorder.lose(rank, note, wait_status=seen)
            case {"type": "void", "note": str(note)}:
                await self._voided(rank, note)
            case _:
                raise ProtocolError(f"unknown message {message.get('type')!r}")

    async def _take_records(self, rank: int, payloads: list[bytes]) -> None:
        progress = await self._recorder.settled(rank)
        if progress.ended:
            return
        batch = translate(payloads, cursor=progress.cursor, leader=rank == self._leader)
        if batch.exit is not None and "leftover" in batch.exit.info:
            await self._drain(rank, batch.exit.info["leftover"])
            progress = await self._recorder.settled(rank)
        if not progress.ended and batch.last > progress.cursor:
            self._recorder.take(rank, progress, batch)
            await self._recorder.settled(rank)

    async def _drain(self, rank: int, leftover: object) -> None:
        """Processes of the job would not die on `rank`: it is not to be given to others, from before its release on."""
        if not isinstance(leftover, int) or leftover <= 0 or self._ended(rank):
            return
        reason = f"{leftover} process(es) of job {f58(self._plan.jobid)} would not die"
        drain: WireMap = {"targets": str(rank), "reason": reason, "mode": "update"}
        backoff = Backoff()
        while True:
            try:
                await self._handle.call("resource.drain", drain)
                break
            except RpcError as error:
                if backoff.is_news(error.text):
                    log.error("cannot drain rank %d (%s): %s", rank, reason, error.text)
                if error.errnum not in PASSES:
                    break
            await trio.sleep(backoff.pause())

    async def _voided(self, rank: int, note: str) -> None:
        """Nothing ran on `rank`. Unless that is what was wanted, the job has to say why.

        Told by the answer to `exec.void` and by the attendant, at the same time, of which one counts.
        """

        def why() -> Problem | None:
            text = f"cannot start the job shell on rank {rank}: {note}"
            return None if self._killed else Problem(type="exec", severity=0, note=text)

        await self._recorder.void(rank, why)

    def _fail(self, rank: int, problem: Problem) -> None:
        """Give the job a fatal exception for `rank`, unless it has one, or one is on its way."""
        if self._nursery is not None and not self._killed and not self._execution.failed:
            self._nursery.start_soon(self._recorder.fail, rank, problem)

    # --- what is durable

    def _advanced(self, rank: int, progress: Progress) -> None:
        """`progress` is durable: now, and only now, acknowledge and say what follows."""
        if self._nursery is None:
            return
        ends = progress.ended and not self._ended(rank)
        due = self._execution.advanced(rank, progress)
        if not progress.ended:  # the exit record is acknowledged with the release
            hit("ack.before")
            self._handle.send("exec.ack", {"id": self._id, "seq": progress.cursor}, nodeid=rank)
            hit("ack.after")
        self._say(due)
        if ends:
            self._attachments.end(self._plan.jobid, rank, progress.state)
            self._rendezvous.left(rank)
            if self._execution.can_release:
                self._can_release.set()
            if progress.state is RankState.EXITED:
                hit("exit-commit.after")

    def _say(self, responses: list[Response]) -> None:
        """Respond, all at once: the manager then logs it all in one commit. They are few for any job."""
        for response in responses:
            self._respond({"id": self._id, "type": response.type, "data": response.data})

    # --- killing

    def _start_killing(self) -> None:
        if self._nursery is not None:
            for rank in self._execution.missing():
                self._nursery.start_soon(self._kill_rank, rank)

    async def _kill_rank(self, rank: int) -> None:
        """Void the start, or end the tasks: SIGTERM, then SIGKILL, then the shell itself. A rank away is waited for."""
        steps: list[WireMap] = [{"signum": signal.SIGTERM.value}, {"signum": signal.SIGKILL.value}]
        force: WireMap = {"signum": signal.SIGKILL.value, "force": True}
        backoff = Backoff()
        while not self._ended(rank):
            if not self._ranks.online(rank):
                await self._ranks.wait_online(rank)
            try:
                async with self._subtree(rank):
                    if await self._void(rank):
                        return
                    await self._handle.call(
                        "exec.kill", {"id": self._id, **(steps[0] if steps else force)}, nodeid=rank
                    )
            except RpcError as error:
                if error.errnum == errno.ESTALE:
                    await self._recorder.lose(rank, f"rank {rank} lost its state: {error.text}")
                else:
                    await self._pause(rank, error, backoff)
            else:
                backoff.succeeded()
                del steps[:1]
                await trio.sleep(self._plan.kill_timeout)

    async def _void(self, rank: int) -> bool:
        """See to it that nothing starts on `rank`, unless it has; whether its part has ended."""
        progress = await self._recorder.settled(rank)
        ask: WireMap = {
            "id": self._id,
            "nonce": self._plan.nonce,
            "statedir": progress.statedir,
            "note": "the job was ended before it started",
        }
        answer = await self._handle.call("exec.void", ask, nodeid=rank)
        if answer.get("void") is True:
            await self._voided(rank, "")
            await self._recorder.settled(rank)
        return self._ended(rank)
