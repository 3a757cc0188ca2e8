"""One attendant, on a shell in memory: what it says to rank 0, and what it does about the shell."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fakehost import FakeDir, FakeHost, FakeLink, FakeShell

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec.attendant import COMMANDS, START_TRIES, Attendant, void_start
from fluxres.exec.reattach import CLAIM_GONE, SHELL_DIED
from fluxres.wire.payload import WireMap
from fluxres_shell.find import Kind

JOB = JobId(1234)
ATTACHED: WireMap = {"type": "attached", "first": 1, "last": 0, "pid": 7, "stdin": {"offset": 0, "eof": False}}
RELEASE = [{"type": "ack", "seq": 9}, {"type": "release"}]


class Attended:
    """An attendant, and what it has said."""

    def __init__(self, shell: FakeShell, *, cursor: int = 0, may_start: bool = True, fresh: bool = False) -> None:
        self.shell = shell
        self.host = FakeHost()
        self.host.shells[JOB] = shell
        self.attendant = Attendant(
            self.host.shell(JOB, "N"),
            jobid=JOB,
            rank=3,
            nonce="N",
            cursor=cursor,
            may_start=may_start,
            fresh=fresh,
        )
        self.said: list[WireMap] = []

    async def send(self, message: WireMap) -> None:
        await trio.lowlevel.checkpoint()
        self.said.append(message)

    async def run(self) -> None:
        await self.attendant.run(self.send)
        assert not self.host.opened

    def is_attached(self) -> bool:
        return self.attendant.attached

    @property
    def link(self) -> FakeLink:
        return self.shell.links[-1]


@asynccontextmanager
async def attending(made: Attended) -> AsyncIterator[Attended]:
    """Run it for the block; to its own end where that releases it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await settled()
        yield made
        if not made.attendant._released.is_set():
            nursery.cancel_scope.cancel()


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_a_fresh_start_is_launched_without_a_look(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Attended(FakeShell(kind=Kind.UNCLAIMED), fresh=True)) as made:
        assert made.shell.launches == 1
        assert made.link.sent == [{"type": "attach", "nonce": "N", "from": 1}]


async def test_records_are_relayed_and_taken_up_where_they_were() -> None:
    async with attending(Attended(FakeShell(kind=Kind.ALIVE), cursor=4)) as made:
        assert made.link.sent == [{"type": "attach", "nonce": "N", "from": 5}]
        made.link.says.send_nowait(ATTACHED)
        made.link.says.send_nowait({"type": "records", "records": [b"five", b"six"]})
        await settled()
        assert [message["type"] for message in made.said] == ["attached", "records"]
        made.link.says.close()
        await settled()
        assert made.link.sent == [{"type": "attach", "nonce": "N", "from": 7}]


async def test_a_barrier_is_relayed_in_both_directions() -> None:
    async with attending(Attended(FakeShell(kind=Kind.ALIVE))) as made:
        made.link.says.send_nowait({"type": "barrier", "name": "start", "seq": 0})
        await settled()
        assert made.said == [{"type": "barrier", "name": "start", "seq": 0}]
        made.attendant.barrier_done("start", 0)
        await settled()
        assert made.link.sent[1:] == [{"type": "barrier-done", "name": "start", "seq": 0}]


async def test_a_barrier_that_makes_no_sense_costs_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Attended(FakeShell(kind=Kind.ALIVE))) as made:
        first = made.link
        first.says.send_nowait({"type": "barrier", "name": 3, "seq": 0})
        await trio.sleep(1)
        assert first.closed
        assert made.link is not first
        assert made.said == []


async def test_a_shell_that_reads_nothing_is_attached_anew_for_its_barrier() -> None:
    """It then asks again; nothing else would."""
    async with attending(Attended(FakeShell(kind=Kind.ALIVE))) as made:
        first = made.link
        first.stuck = trio.Event()
        for _ in range(COMMANDS + 1):  # one is being sent
            made.attendant.command({"type": "kill", "signum": 15})
            await settled()
        made.attendant.barrier_done("start", 0)
        await settled()
        assert first.closed
        assert made.link is not first


async def test_a_cancelled_attendant_only_lets_go() -> None:
    """As when the broker's parent is lost: the shell goes on detached."""
    async with attending(Attended(FakeShell(kind=Kind.ALIVE))) as made:
        made.link.says.send_nowait(ATTACHED)
        await settled()
        assert made.is_attached()
    assert made.link.closed
    assert not made.is_attached()
    assert (made.shell.kind, made.shell.killed, made.shell.cleaned) == (Kind.ALIVE, 0, 0)
    assert made.link.sent == [{"type": "attach", "nonce": "N", "from": 1}]


async def test_a_release_is_the_last_word() -> None:
    made = Attended(FakeShell(kind=Kind.ALIVE))
    with trio.fail_after(60):
        async with attending(made):
            made.attendant.release(9)
            await settled()
            assert made.link.sent[1:] == RELEASE
            made.shell.become(Kind.DEAD)
            made.link.says.close()


async def test_silence_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Attended(FakeShell(kind=Kind.ALIVE, answers=False))) as made:
        await trio.sleep(10)
        assert made.shell.binds > 5
        assert made.said == []
        made.shell.become(Kind.DEAD)
        await settled()
        assert made.said[-1]["type"] == "lost"


async def test_a_dead_shell_is_read_out_and_its_gaps_are_told() -> None:
    shell = FakeShell(kind=Kind.DEAD, exited=True, records=[b"1", b"2", b"3", b"", b"5"])
    async with attending(Attended(shell, cursor=1)) as made:
        assert made.said == [
            {"type": "attached", "first": 2, "last": 0},
            {"type": "records", "records": [b"2"]},
            {"type": "records", "records": [b"3"]},
            {"type": "attached", "first": 5, "last": 0},
            {"type": "records", "records": [b"5"]},
        ]
        made.attendant.release(5)


async def test_a_lost_shell_is_cleaned_up_and_told() -> None:
    async with attending(Attended(FakeShell(kind=Kind.DEAD, stubborn=2))) as made:
        note = f"{SHELL_DIED} (by SIGKILL); 2 of its processes would not die on rank 3"
        assert made.said == [{"type": "lost", "note": note, "status": 9, "leftover": 2}]


async def test_what_has_begun_and_is_gone_is_lost() -> None:
    async with attending(Attended(FakeShell(), cursor=3)) as made:
        assert str(made.said[0]["note"]).startswith(CLAIM_GONE)


@pytest.mark.parametrize(
    ("shell", "errnum"),
    [(FakeShell(), errno.ENOENT), (FakeShell(kind=Kind.ALIVE, nonce="M"), errno.ESTALE)],
)
async def test_what_is_not_there_or_not_of_this_job(shell: FakeShell, errnum: int) -> None:
    made = Attended(shell)
    with pytest.raises(RpcError) as caught:
        await made.run()
    assert caught.value.errnum == errnum
    assert not shell.links, "a shell of another job is not even dialled"


# --- voiding


@pytest.mark.parametrize("fresh", [True, False])
async def test_a_void_ends_a_start_that_is_under_way(fresh: bool) -> None:
    shell = FakeShell(kind=Kind.UNCLAIMED, launching=trio.Event())
    async with attending(Attended(shell, fresh=fresh)) as made:
        assert shell.launches == 1
        assert void_start(FakeDir(shell, "N", []), "cancelled")
        made.attendant.give_up_start()
        await settled()
        assert [message["type"] for message in made.said] == ["void"]


async def test_a_start_that_is_given_up_before_it_began_is_voided() -> None:
    made = Attended(FakeShell(kind=Kind.UNCLAIMED), fresh=True)
    made.attendant.give_up_start()
    async with attending(made):
        assert made.shell.launches == 0
        assert [message["type"] for message in made.said] == ["void"]


async def test_shells_that_never_claim_are_given_up(autojump_clock: trio.testing.MockClock) -> None:
    shell = FakeShell(kind=Kind.UNCLAIMED)

    class Hopeless(FakeDir):
        async def launch(self) -> None:
            await trio.lowlevel.checkpoint()
            shell.launches += 1

    made = Attended(shell)
    made.attendant._shell = Hopeless(shell, "N", [])
    async with attending(made):
        await trio.sleep(60)
        assert shell.launches == START_TRIES
        assert [message["type"] for message in made.said] == ["void"]


@pytest.mark.parametrize(
    ("kind", "voided"),
    [
        (Kind.NOTHING, True),
        (Kind.UNCLAIMED, True),
        (Kind.VOID, True),
        (Kind.ALIVE, False),
        (Kind.DEAD, False),
        (Kind.CORRUPT, False),
    ],
)
def test_voiding(kind: Kind, voided: bool) -> None:
    shell = FakeShell(kind=kind)
    assert void_start(FakeDir(shell, "N", []), "cancelled") is voided
    assert shell.kind is (Kind.VOID if voided else kind)


def test_another_jobs_directory_is_not_voided() -> None:
    shell = FakeShell(kind=Kind.UNCLAIMED, nonce="M")
    with pytest.raises(RpcError) as caught:
        void_start(FakeDir(shell, "N", []), "cancelled")
    assert caught.value.errnum == errno.ESTALE
    assert shell.kind is Kind.UNCLAIMED
