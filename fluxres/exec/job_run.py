"""One job on rank 0 while it runs: takes what its shells say, commits it, acknowledges it, and tells the manager.

Log durably, then act, then acknowledge: each batch of records is committed together with the rank's cursor before its
ack goes out, and before anything that follows from it is said (invariants I3, I4, I7). Everything here can be cut off
at any instant and begun again from the durable progress records.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.base.eventlog import Event, encode
from fluxres.base.failpoint import hit
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject
from fluxres.exec.execution import Execution, Response
from fluxres.exec.progress import Problem, Progress, RankState, guest_namespace, progress_key
from fluxres.exec.stdin import StdinPump
from fluxres.exec.translate import EXEC_EVENTLOG_KEY, OUTPUT_KEY, problems_of, translate
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, Op, Put
from fluxres.rpc.handle import Handle
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.exec")

RETRY: Final = 0.2
"""Seconds before a rank that answered with an error is asked again."""
LOST_STATUS: Final = signal.SIGKILL.value
"""The wait status of a rank whose shell is gone without having said one."""

Respond = Callable[[WireMap], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job's execution needs to know: all of it durable before any of it is used.

    `spec` builds the spec of a rank; `ranks` are the durable progress records; `killed` says that a fatal exception is
    logged already.
    """

    jobid: JobId
    nonce: str
    ranks: Mapping[int, Progress]
    spec: Callable[[int], bytes]
    reattach: bool
    killed: bool
    kill_timeout: float


class JobRun:
    """The execution of one job, from its `start` request to its release."""

    def __init__(self, plan: Plan, *, kvs: Kvs, handle: Handle, respond: Respond, now: Callable[[], float]) -> None:
        self._plan = plan
        self._kvs = kvs
        self._handle = handle
        self._respond = respond
        self._now = now
        self._execution = Execution(plan.ranks, reattach=plan.reattach)
        self._guest = guest_namespace(plan.jobid)
        self._killed = plan.killed
        self._released = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._feeds: dict[int, trio.CancelScope] = {}
        self._voiding = trio.Lock()
        self._stdin = StdinPump(kvs, handle, plan.jobid, self._guest)

    # --- what the manager asks for

    def kill(self) -> None:
        """A fatal exception is logged: end the tasks, or see to it that none start."""
        if not self._killed:
            self._killed = True
            self._start_killing()

    def released(self) -> None:
        """The job's final `release` is durable: the shells may go."""
        self._released.set()

    def has_input(self) -> None:
        """There is standard input in the guest namespace."""
        if not self._stdin.begun:
            self._stdin.begun = True
            for rank in self._feeds:
                self._start_feeding(rank)

    async def signal(self, signum: int) -> None:
        """Send a signal to all tasks. Raises RpcError where a rank cannot take it."""
        for rank in self._execution.missing():
            await self._handle.call("exec.kill", {"id": int(self._plan.jobid), "signum": signum}, nodeid=rank)

    # --- the life of a run

    async def run(self) -> None:
        """Attend every rank until the job is released; responds as RFC 32 says."""
        self._say(self._execution.begin())
        async with trio.open_nursery() as self._nursery:
            for rank in self._execution.missing():
                self._nursery.start_soon(self._attend, rank, name=f"{f58(self._plan.jobid)} on rank {rank}")
            if self._killed:
                self._start_killing()
            await self._released.wait()
            hit("ack.before")
            for rank, progress in self._execution.ranks.items():
                release: WireMap = {"id": int(self._plan.jobid), "seq": progress.cursor}
                self._handle.send("exec.release", release, nodeid=rank)
            hit("ack.after")
            self._nursery.cancel_scope.cancel()

    async def _attend(self, rank: int) -> None:
        start = not self._plan.reattach
        while not self._execution.ranks[rank].ended:
            error = await self._attempt(rank, start=start)
            start = error is not None and await self._refused(rank, error)

    async def _attempt(self, rank: int, *, start: bool) -> RpcError | ProtocolError | None:
        """One streaming request to `rank`, to its end; returns the error that ended it."""
        progress = self._execution.ranks[rank]
        payload: WireMap = {
            "id": int(self._plan.jobid),
            "nonce": self._plan.nonce,
            "statedir": progress.statedir,
            "cursor": progress.cursor,
            "start": not self._killed,
        }
        if start:
            payload["spec"] = self._plan.spec(rank)
            hit("start-request.before")
        topic = "exec.start" if start else "exec.reattach"
        async with self._handle.stream(topic, payload, nodeid=rank) as replies:
            if start:
                hit("start-request.after")
            self._feeds[rank] = trio.CancelScope()
            if self._stdin.begun:
                self._start_feeding(rank)
            try:
                async for message in replies:
                    await self._take(rank, message)
            except (RpcError, ProtocolError) as error:
                return error
            finally:
                self._feeds.pop(rank).cancel()
                self._stdin.lost(rank)
        return None

    def _start_feeding(self, rank: int) -> None:
        """Feed standard input to a rank, for as long as its stream stands."""
        if self._nursery is not None:
            self._nursery.start_soon(self._feed, rank, self._feeds[rank])

    async def _feed(self, rank: int, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await self._stdin.run(rank)
            except (RpcError, ValueError) as error:  # whoever owns the job may write to its namespace
                log.error("job %s: cannot read its standard input: %s", f58(self._plan.jobid), error)

    async def _refused(self, rank: int, error: RpcError | ProtocolError) -> bool:
        """The rank answered with an error; returns whether it is to be sent a start."""
        match error:
            case ProtocolError():
                kill: WireMap = {"id": int(self._plan.jobid), "signum": signal.SIGKILL.value, "force": True}
                self._handle.send("exec.kill", kill, nodeid=rank)
                await self._lose(rank, f"the journal of rank {rank} cannot be read: {error}")
            case RpcError(errnum=errno.ENOENT):
                # Nothing was started: start it, unless the job is to end, when `_kill_rank` voids it.
                if not self._killed:
                    return True
                await trio.sleep(RETRY)
            case RpcError(errnum=errno.ESTALE):
                await self._lose(rank, f"rank {rank} lost its state: {error.text}")
            case _:
                log.warning("job %s: rank %d: %s", f58(self._plan.jobid), rank, error)
                await trio.sleep(RETRY)
        return False

    async def _take(self, rank: int, message: WireMap) -> None:
        match message:
            case {"type": "records", "records": [*payloads]}:
                await self._take_records(rank, [bytes(p) for p in payloads if isinstance(p, bytes)])
            case {"type": "attached", "first": int(first)}:
                await self._attached(rank, first, message)
            case {"type": "stdin-ack", "offset": int(offset)}:
                self._stdin.acked(rank, offset)
            case {"type": "lost", "note": str(note)}:
                await self._lose(rank, note)
            case {"type": "void", "note": str(note)}:
                await self._voided(rank, note)
            case _:
                raise ProtocolError(f"unknown message {message.get('type')!r}")

    async def _attached(self, rank: int, first: int, message: WireMap) -> None:
        progress = self._execution.ranks[rank]
        if first > progress.cursor + 1:
            note = f"records {progress.cursor + 1} to {first - 1} of rank {rank} are gone: output may be missing"
            problem = Problem(type="exec", severity=1, note=note)
            state = RankState.RUNNING
            await self._advance(rank, progress.moved(state, cursor=first - 1, problems=(problem,)), [])
        match message.get("stdin"):
            case {"offset": int(offset)}:
                self._stdin.attached(rank, offset)

    async def _take_records(self, rank: int, payloads: list[bytes]) -> None:
        progress = self._execution.ranks[rank]
        batch = translate(payloads, cursor=progress.cursor)
        if batch.last == progress.cursor:
            return
        ops: list[Op] = []
        if batch.events:
            ops.append(Append(self._guest, EXEC_EVENTLOG_KEY, "".join(batch.events).encode()))
        if batch.output:
            ops.append(Append(self._guest, OUTPUT_KEY, "".join(batch.output).encode()))
        if batch.exit is None:
            state, status = (RankState.RUNNING if batch.started else progress.state), 0
        else:
            state, status = RankState.EXITED, batch.exit.status
        moved = progress.moved(state, cursor=batch.last, status=status, problems=problems_of(batch, progress))
        if batch.exit is not None:
            hit("exit-commit.before")
        await self._advance(rank, moved, ops)
        if batch.exit is not None:
            hit("exit-commit.after")

    async def _lose(self, rank: int, note: str) -> None:
        progress = self._execution.ranks[rank]
        if not progress.ended:
            problem = Problem(type="exec", severity=0, note=note)
            moved = progress.moved(RankState.LOST, cursor=progress.cursor, status=LOST_STATUS, problems=(problem,))
            await self._advance(rank, moved, [])

    async def _void(self, rank: int) -> None:
        answer = await self._handle.call(
            "exec.void",
            {
                "id": int(self._plan.jobid),
                "nonce": self._plan.nonce,
                "note": "the job was ended before it started",
            },
            nodeid=rank,
        )
        if answer.get("void") is True:
            await self._voided(rank, "")

    async def _voided(self, rank: int, note: str) -> None:
        """Nothing ran on `rank` and nothing will. Unless that is what was wanted, the job has to say why.

        Told by the answer to `exec.void` and by the attendant, at the same time, of which one counts. Where a shell
        had begun, its attendant finds it lost.
        """
        async with self._voiding:
            progress = self._execution.ranks[rank]
            if progress.state is not RankState.WAITING:
                return
            note = f"cannot start the job shell on rank {rank}: {note}"
            given_up = () if self._killed else (Problem(type="exec", severity=0, note=note),)
            await self._advance(rank, progress.moved(RankState.VOID, cursor=0, problems=given_up), [])

    async def _advance(self, rank: int, progress: Progress, ops: list[Op]) -> None:
        """Commit `progress` with `ops`; then, and only then, acknowledge and say what follows.

        `ops` are of the guest namespace, which the job's owner may spoil: then the job ends, with that as its reason.
        """
        key = progress_key(self._plan.jobid, rank)
        if progress.ended and self._execution.missing() == [rank]:
            ops.append(Append(self._guest, EXEC_EVENTLOG_KEY, self._last_words(rank, progress)))
        try:
            await self._kvs.commit(Put(PRIMARY, key, progress.encode()), *ops, hold=True)
        except RpcError as error:
            if not ops or error.errnum == errno.ECANCELED:  # the store is closed
                raise
            note = f"cannot store what rank {rank} says: {error.text}"
            progress = progress.with_problem(Problem(type="exec", severity=0, note=note))
            await self._kvs.commit(Put(PRIMARY, key, progress.encode()), hold=True)
        due = self._execution.advanced(rank, progress)
        if not progress.ended:  # the exit record is acknowledged with the release
            hit("ack.before")
            self._handle.send("exec.ack", {"id": int(self._plan.jobid), "seq": progress.cursor}, nodeid=rank)
            hit("ack.after")
        self._say(due)

    def _last_words(self, rank: int, progress: Progress) -> bytes:
        """RFC 50 `complete` and `done`, in the transaction that ends the last rank."""
        now = self._now()
        status = max(self._execution.status(), progress.status)
        context: JsonObject = {"status": status}
        return (encode(Event(now, "complete", context)) + encode(Event(now, "done"))).encode()

    def _say(self, responses: list[Response]) -> None:
        """Respond, all at once: the manager then logs it all in one commit. They are few for any job."""
        for response in responses:
            self._respond({"id": int(self._plan.jobid), "type": response.type, "data": response.data})

    # --- killing

    def _start_killing(self) -> None:
        if self._nursery is not None:
            for rank in self._execution.missing():
                self._nursery.start_soon(self._kill_rank, rank)

    async def _kill_rank(self, rank: int) -> None:
        """Void the start, or end the tasks: SIGTERM, then SIGKILL, then the shell itself."""
        steps: list[WireMap] = [{"signum": signal.SIGTERM.value}, {"signum": signal.SIGKILL.value}]
        force: WireMap = {"signum": signal.SIGKILL.value, "force": True}
        while not self._execution.ranks[rank].ended:
            step = steps.pop(0) if steps else force
            try:
                await self._void(rank)
                if self._execution.ranks[rank].ended:
                    return
                await self._handle.call("exec.kill", {"id": int(self._plan.jobid), **step}, nodeid=rank)
            except RpcError as error:
                log.info("job %s: cannot kill on rank %d yet: %s", f58(self._plan.jobid), rank, error.text)
                steps.insert(0, step)
                await trio.sleep(RETRY)
            else:
                await trio.sleep(self._plan.kill_timeout)
