"""The `exec` service of a rank, on shells in memory: what it prepares, voids, reports, forgets and puts down."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fakehost import FakeHost, FakeShell

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec import forget
from fluxres.exec.shells import Shells
from fluxres.exec.spec import LocalSettings
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap
from fluxres_shell.find import Kind

JOB = JobId(1234)
OTHER = JobId(5678)
THIRD = JobId(9999)
ATTEND: WireMap = {"id": int(JOB), "nonce": "N", "statedir": "S", "cursor": 0, "start": True}
VOID: WireMap = {"id": int(JOB), "nonce": "N", "statedir": "S", "note": "cancelled"}


class Rank:
    """Rank 0 with its shells, and the services that it reports to."""

    def __init__(self) -> None:
        router = Router(rank=0, size=1)
        self.handle = Handle(router, "test", 1000)
        self.incarnation = trio.CancelScope()
        self.host = FakeHost()
        self.answer: WireMap = {"unknown": [], "lost": []}
        self.reported: list[WireMap] = []
        self.confirmed: list[WireMap] = []
        self.job_exec = Service("job-exec", router)
        self.job_exec.method("inventory", self._inventory)
        self.resource = Service("resource", router)
        self.resource.method("confirm", self._confirm)
        self.refusals = 0
        """How often the store of rank 0 will be full."""
        self.shells = Shells(
            router=router,
            handle=self.handle,
            host=self.host,
            local=LocalSettings(uri="local:///here"),
            statedir_id="S",
            instance="I",
        )

    async def live(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `incarnation` is cancelled."""
        with self.incarnation:
            async with trio.open_nursery() as nursery:
                for run in (self.job_exec.run, self.resource.run, self.shells.run):
                    await nursery.start(run)
                task_status.started()

    def _confirm(self, request: Request) -> None:
        if self.refusals:
            self.refusals -= 1
            raise RpcError(errno.ENOSPC, "the disk is full")
        self.confirmed.append(request.payload)

    def _inventory(self, request: Request) -> WireMap:
        self.reported.append(request.payload)
        return self.answer


@asynccontextmanager
async def rank() -> AsyncIterator[Rank]:
    made = Rank()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.live)
        yield made
        nursery.cancel_scope.cancel()
    assert not made.host.opened, "all is let go of"


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def refused(here: Rank, topic: str, payload: WireMap) -> RpcError:
    """The error that ends a streaming request."""
    with pytest.raises(RpcError) as caught:
        async with here.handle.stream(topic, payload) as replies:
            async for _ in replies:
                pass
    return caught.value


# --- attending


async def test_a_start_completes_the_spec_and_relays_what_the_shell_says() -> None:
    async with rank() as here, here.handle.stream("exec.start", {**ATTEND, "spec": b'{"id":1234}'}) as replies:
        await settled()
        shell = here.host.shells[JOB]
        assert shell.spec is not None
        assert json.loads(shell.spec).items() >= {"id": 1234, "uri": "local:///here"}.items()
        assert shell.launches == 1
        link = shell.links[-1]
        link.says.send_nowait({"type": "barrier", "name": "start", "seq": 0})
        assert await anext(aiter(replies)) == {"type": "barrier", "name": "start", "seq": 0}
        here.handle.send("exec.barrier", {"id": int(JOB), "name": "start", "seq": 0})
        here.handle.send("exec.release", {"id": int(JOB), "seq": 5})
        await settled()
        assert link.sent[1:] == [
            {"type": "barrier-done", "name": "start", "seq": 0},
            {"type": "ack", "seq": 5},
            {"type": "release"},
        ]


async def test_commands_for_a_job_that_nobody_attends_are_dropped() -> None:
    async with rank() as here:
        here.handle.send("exec.barrier", {"id": int(JOB), "name": "start", "seq": 0})
        here.handle.send("exec.ack", {"id": int(JOB), "seq": 1})
        await settled()
        with pytest.raises(RpcError) as caught:
            await here.handle.call("exec.kill", {"id": int(JOB), "signum": 15})
        assert caught.value.errnum == errno.ESRCH


async def test_a_spec_that_is_none_starts_nothing() -> None:
    async with rank() as here:
        error = await refused(here, "exec.start", {**ATTEND, "spec": b"[]"})
        assert error.errnum == errno.EPROTO
        assert not here.host.shells


@pytest.mark.parametrize("topic", ["exec.start", "exec.reattach"])
async def test_another_statedir_is_never_started_on(topic: str) -> None:
    async with rank() as here:
        error = await refused(here, topic, {**ATTEND, "statedir": "T", "spec": b"{}"})
        assert error.errnum == errno.ESTALE
        assert not here.host.shells


async def test_the_end_of_the_incarnation_leaves_shells_alone() -> None:
    """The broker's parent is lost, say: they go on, detached."""
    async with rank() as here:
        async with here.handle.stream("exec.start", {**ATTEND, "spec": b"{}"}):
            await settled()
            shell = here.host.shells[JOB]
            here.incarnation.cancel()
            await settled()
        assert shell.links[-1].closed
        assert (shell.kind, shell.killed, shell.cleaned) == (Kind.ALIVE, 0, 0)
        assert shell.links[-1].sent == [{"type": "attach", "nonce": "N", "from": 1}]


async def test_a_request_that_is_withdrawn_leaves_its_shell_alone() -> None:
    async with rank() as here:
        async with here.handle.stream("exec.start", {**ATTEND, "spec": b"{}"}):
            await settled()
        await settled()
        shell = here.host.shells[JOB]
        assert shell.links[-1].closed
        assert (shell.kind, shell.killed, shell.cleaned) == (Kind.ALIVE, 0, 0)


# --- voiding


async def test_a_void_is_for_this_statedir() -> None:
    async with rank() as here:
        with pytest.raises(RpcError) as caught:
            await here.handle.call("exec.void", {**VOID, "statedir": "T"})
        assert caught.value.errnum == errno.ESTALE


async def test_a_void_and_a_start_that_is_under_way() -> None:
    """One of the two wins, and the attendant says which."""
    async with rank() as here:
        here.host.shells[JOB] = shell = FakeShell(kind=Kind.UNCLAIMED, launching=trio.Event())
        async with here.handle.stream("exec.reattach", ATTEND) as replies:
            await settled()
            assert await here.handle.call("exec.void", VOID) == {"void": True}
            assert (await anext(aiter(replies)))["type"] == "void"
        assert shell.launches == 1
        shell.become(Kind.ALIVE)
        assert await here.handle.call("exec.void", VOID) == {"void": False}


async def test_a_void_that_comes_before_its_start_stands() -> None:
    """Requests are dispatched in order, and a start then begins in a task of its own."""
    async with rank() as here:
        here.host.shells[JOB] = shell = FakeShell(kind=Kind.UNCLAIMED)
        assert await here.handle.call("exec.void", VOID) == {"void": True}
        async with here.handle.stream("exec.start", {**ATTEND, "spec": b"{}"}) as replies:
            assert (await anext(aiter(replies)))["type"] == "void"
        assert shell.launches == 0


@pytest.mark.parametrize(("nonce", "note"), [("9" * 5000, ""), ("", ""), ("N", "☃" * 5000)])
async def test_what_no_claim_can_hold_is_refused(nonce: str, note: str) -> None:
    async with rank() as here:
        with pytest.raises(RpcError) as caught:
            await here.handle.call("exec.void", {**VOID, "nonce": nonce, "note": note})
        assert caught.value.errnum == errno.EPROTO


# --- reporting


async def test_a_rank_reports_what_is_its_instances() -> None:
    async with rank() as here:
        here.host.shells = {JOB: FakeShell(kind=Kind.DEAD), OTHER: FakeShell(kind=Kind.ALIVE, instance="another")}
        await here.shells.report()
        await settled()
        assert here.reported == [{"rank": 0, "ids": [int(JOB)]}]
        assert here.confirmed == [{"rank": 0}]
        assert here.host.shells[OTHER].killed == 0


async def test_what_cannot_be_read_is_left_alone_and_nothing_is_confirmed(caplog: pytest.LogCaptureFixture) -> None:
    async with rank() as here:
        here.host.shells = {JOB: FakeShell(kind=Kind.ALIVE), OTHER: FakeShell(kind=Kind.ALIVE)}
        here.host.unreadable = {JOB}
        await here.shells.report()
        await settled()
        assert here.reported == [{"rank": 0, "ids": [int(OTHER)]}]
        assert here.confirmed == []
        assert "cannot read" in caplog.text


async def test_unknown_jobs_are_forgotten_and_their_shells_killed_after_a_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rank() as here:
        living, waiting = FakeShell(kind=Kind.ALIVE), FakeShell(kind=Kind.UNCLAIMED)
        here.host.shells = {JOB: FakeShell(kind=Kind.DEAD), OTHER: living, THIRD: waiting}
        here.answer = {"unknown": [int(JOB), int(OTHER), int(THIRD)], "lost": []}
        await here.shells.report()
        await trio.sleep(2 * forget.ROUND)
        assert here.host.discarded == [JOB, THIRD]
        assert waiting.kind is Kind.VOID, "a shell that is on its way must not start in the trash"
        assert living.killed == 0
        await trio.sleep(forget.GRACE + 2 * forget.ROUND)
        assert living.killed == 1
        assert here.host.discarded == [JOB, THIRD, OTHER]


@pytest.mark.parametrize("kind", list(Kind))
async def test_lost_jobs_are_put_down_at_once(kind: Kind, autojump_clock: trio.testing.MockClock) -> None:
    async with rank() as here:
        here.host.shells = {JOB: (shell := FakeShell(kind=kind))}
        here.answer = {"unknown": [], "lost": [int(JOB)]}
        await here.shells.report()
        await settled()
        assert here.host.discarded == [JOB]
        assert here.confirmed == [{"rank": 0}]
        assert shell.killed == (kind is Kind.ALIVE)
        assert shell.cleaned == (kind in (Kind.ALIVE, Kind.DEAD, Kind.CORRUPT))
        assert shell.kind is not Kind.UNCLAIMED


async def test_what_rank_0_has_no_room_for_is_confirmed_again(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with rank() as here:
        here.refusals = 3
        await here.shells.report()
        await trio.sleep(60)
        assert here.confirmed == [{"rank": 0}]
        assert caplog.text.count("the disk is full") == 1


async def test_nothing_is_confirmed_before_all_that_was_given_up_is_dead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rank() as here:
        hard, full = FakeShell(kind=Kind.ALIVE, deathless=True), FakeShell(kind=Kind.ALIVE, stubborn=3)
        here.host.shells = {JOB: hard, OTHER: full, THIRD: FakeShell(kind=Kind.DEAD)}
        here.answer = {"unknown": [], "lost": [int(JOB), int(OTHER), int(THIRD)]}
        await here.shells.report()
        await trio.sleep(60)
        assert here.host.discarded == [THIRD, OTHER]
        assert full.cleaned == 4
        assert here.confirmed == []
        hard.deathless = False
        await trio.sleep(60)
        assert here.host.discarded == [THIRD, OTHER, JOB]
        assert here.confirmed == [{"rank": 0}]
