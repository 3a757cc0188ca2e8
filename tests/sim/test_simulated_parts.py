"""The simulation itself: its nodes and shells behave like real ones, and its checks find what they are there for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from random import Random

import pytest
import trio

from fluxres.base.errors import FluxresError, IllegalTransition
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.exec.host import ShellDir, ShellHost, ShellLink
from fluxres.exec.reattach import Facts
from fluxres.exec.spec import LocalSettings, SpecBuilder, complete_spec
from fluxres.testing.checks import check_jobs, check_joined, check_new, check_same
from fluxres.testing.instance import Instance
from fluxres.testing.journal import Journal
from fluxres.testing.link import MemoryLink
from fluxres.testing.processes import LAUNCH_DELAY, MemoryShellDir, MemoryShellHost, Node
from fluxres.testing.programs import PROGRAMS, Task
from fluxres.testing.simulate import simulated
from fluxres.testing.timeline import Timeline
from fluxres.testing.world import World
from fluxres.wire.payload import WireMap
from fluxres_shell import records
from fluxres_shell.find import Kind

JOB = JobId(17)
NONCE = "N"


def spec(*command: str, ranks: tuple[int, ...] = (0,)) -> bytes:
    builder = SpecBuilder(
        jobid=JOB,
        nonce=NONCE,
        instance="I",
        userid=1000,
        jobspec={"tasks": [{"command": [*command]}], "attributes": {"system": {}}},
        resources={"execution": {"R_lite": [{"rank": "0-9", "children": {"core": "0"}}]}},
        layout={rank: [rank] for rank in ranks},
        taskmap=None,
        t_submit=0.0,
    )
    return complete_spec(builder.build(0), LocalSettings(uri="memory:///0", bind=False))


@asynccontextmanager
async def one_node() -> AsyncIterator[Node]:
    timeline = Timeline()
    async with trio.open_nursery() as nursery:
        await nursery.start(timeline.run)
        yield Node(World(timeline=timeline, nursery=nursery, random=Random(1)), 0, PROGRAMS)
        nursery.cancel_scope.cancel()


def interfaces(host: MemoryShellHost, shell: MemoryShellDir, link: MemoryLink) -> tuple[ShellHost, ShellDir, ShellLink]:
    """For the type checker."""
    return host, shell, link


async def heard(link: MemoryLink, count: int) -> list[WireMap]:
    """The next messages of a shell."""
    messages: list[WireMap] = []
    async with aclosing(aiter(link)) as said:
        async for message in said:
            messages.append(message)
            if len(messages) == count:
                break
    return messages


# --- the claim, and the shell


@simulated
async def test_many_launches_and_one_shell() -> None:
    async with one_node() as node:
        host = MemoryShellHost(node)
        assert host.prepare(JOB, spec("sleep", "5"))
        assert not host.prepare(JOB, spec("exit", "1"))
        assert host.inventory() == [JOB]
        identity = host.identity(JOB)
        assert identity is not None
        assert identity.nonce == NONCE
        shell = host.shell(JOB, NONCE)
        assert shell.look().kind is Kind.UNCLAIMED
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(host.shell(JOB).launch)
        assert shell.look() == Facts(kind=Kind.ALIVE, locked=True)
        assert not shell.void("too late")
        assert sum(node.world.deeds.starts.values()) == 1
        with pytest.raises(FluxresError, match="its shell lives"):
            host.discard(JOB)
        await shell.death()
        assert shell.look().kind is Kind.DEAD
        assert shell.has_exit_record()
        assert await shell.how_it_died() == ""
        host.discard(JOB)
        host.discard(JOB)
        assert shell.look().kind is Kind.NOTHING


@simulated
async def test_a_void_claim_is_a_claim() -> None:
    async with one_node() as node:
        host = MemoryShellHost(node)
        shell = host.shell(JOB, NONCE)
        host.prepare(JOB, spec("sleep", "5"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shell.launch)
            await trio.sleep(LAUNCH_DELAY / 2)
            assert shell.void("given up")
            assert not shell.void("again")
        assert shell.look() == Facts(kind=Kind.VOID, reason="given up")
        assert not host.shell(JOB, "another").look().nonce_matches
        assert not node.world.deeds.starts


@simulated
async def test_a_launch_that_is_cancelled_goes_on() -> None:
    async with one_node() as node:
        host = MemoryShellHost(node)
        host.prepare(JOB, spec("sleep", "5"))
        with trio.move_on_after(LAUNCH_DELAY / 2):
            await host.shell(JOB).launch()
        assert host.shell(JOB).look().kind is Kind.UNCLAIMED
        await trio.sleep(LAUNCH_DELAY)
        assert host.shell(JOB).look().kind is Kind.ALIVE


@simulated
async def test_the_host_of_a_killed_broker_is_powerless() -> None:
    async with one_node() as node:
        host, old = MemoryShellHost(node), MemoryShellHost(node)
        host.prepare(JOB, spec("sleep", "5"))
        await host.shell(JOB).launch()
        shell = old.shell(JOB)
        shell.look()
        link = shell.dial()
        assert link is not None
        interfaces(old, shell, link)
        old.sever()
        with pytest.raises(trio.ClosedResourceError):
            await link.send({"type": "attach", "nonce": NONCE, "from": 1})
        assert shell.dial() is None
        shell.kill()
        other = JobId(18)
        old.prepare(other, spec("exit", "1"))
        assert not old.shell(other).void("no")
        old.discard(JOB)
        await old.shell(other).launch()
        assert host.inventory() == [JOB]
        assert host.shell(JOB).look().kind is Kind.ALIVE


@simulated
async def test_power_and_boots() -> None:
    async with one_node() as node:
        host = MemoryShellHost(node)
        host.prepare(JOB, spec("sleep", "5", ranks=(0, 1)))
        shell = host.shell(JOB, NONCE)
        await shell.launch()
        assert shell.look().kind is Kind.ALIVE
        node.lose_power()
        node.boot()
        assert shell.look() == Facts(kind=Kind.DEAD, rebooted=True)
        assert await shell.how_it_died() == "by SIGKILL"
        assert [records.decode(p) for piece in shell.journal(1) for p in piece.payloads] != []  # synced for the barrier
        assert not shell.has_exit_record()
        assert await shell.kill_tasks() == 0


@simulated
async def test_what_a_shell_says_and_refuses() -> None:
    async with one_node() as node:
        host = MemoryShellHost(node)
        host.prepare(JOB, spec("echo", "hello"))
        shell = host.shell(JOB, NONCE)
        await shell.launch()
        shell.look()
        refused: list[tuple[WireMap, str]] = [
            ({"type": "ack", "seq": 1}, "before `attach`"),
            ({"type": "nonsense"}, "cannot understand"),
            ({"type": "attach", "nonce": "other", "from": 1}, "the nonce differs"),
            ({"type": "attach", "nonce": NONCE, "from": 100}, "the last one is"),
        ]
        for message, why in refused:
            link = shell.dial()
            assert link is not None
            await link.send(message)
            assert why in str((await heard(link, 2))[-1]["text"])
            with pytest.raises(trio.BrokenResourceError):
                await link.send(message)
        link = shell.dial()
        assert link is not None
        await link.send({"type": "attach", "nonce": NONCE, "from": 1})
        attached, said = await heard(link, 2)
        assert (attached["type"], attached["first"]) == ("attached", 1)
        payloads = said["records"]
        assert isinstance(payloads, list)
        found = [records.decode(payload) for payload in payloads if isinstance(payload, bytes)]
        assert isinstance(found[-1], records.ExitRecord)
        await link.send({"type": "ack", "seq": len(found)}, {"type": "release"})
        await shell.death()
        assert [message async for message in link] == []


def test_a_journal_keeps_what_is_not_acknowledged() -> None:
    journal = Journal(limit=100)
    assert (journal.first, journal.last, journal.full) == (1, 0, False)
    for number in range(1, 11):
        journal.add(b"%010d" % number)
    assert journal.full
    assert journal.read(9, 15) == [b"%010d" % 9]
    journal.ack(4)
    assert (journal.first, journal.last, journal.full) == (5, 10, False)
    assert [piece.first for piece in journal.pieces(1)] == [5]
    journal.ack(99)
    assert (journal.first, journal.last) == (10, 10)
    journal.sync()
    journal.add(b"lost")
    journal.lose_power()
    assert journal.read(1, 1000) == [b"%010d" % 10]
    assert not journal.has_exit_record()


# --- tasks


@simulated
async def test_detached_output_waits_in_the_pipe() -> None:
    """At the journal's bound the pipes are not read: the task waits, and nothing is lost."""
    size = 1_000_000

    async def loud(task: Task) -> int:
        for start in range(0, size, 1000):
            await task.write(b"%07d" % start * 142 + b"......")
        return 0

    limits: JsonObject = {"exec": {"journal-limit": 256 * 1024, "segment-size": 256 * 1024}}
    async with Instance(3, fanout=2, settings=limits) as instance:
        instance.programs["loud"] = loud
        await instance.start()
        jobid = await instance.jobs.submit("sleep", "1", nodes=3)
        jobid = await instance.jobs.submit("loud", nodes=3)
        await instance.jobs.wait(jobid, "alloc")
        await trio.sleep(LAUNCH_DELAY)
        instance.kill(*range(3))
        await trio.sleep(10)
        written = [len(data) for data in instance.world.deeds.output.values()]
        assert all(length <= 400 * 1024 for length in written)
        await instance.restart(*range(3))
        await instance.jobs.wait(jobid)
        check_jobs(instance)
        assert [len(data) for data in instance.jobs.output(jobid).values()] == [size] * 3


# --- the instance's own checks


@simulated
async def test_faults_are_found() -> None:
    async with Instance(7, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("print", "3", nodes=2, tasks=2)
        with pytest.raises(AssertionError, match="I1: job"):
            check_jobs(instance)
        await instance.jobs.wait(jobid)
        check_jobs(instance)
        deeds = instance.world.deeds
        task = deeds.of(jobid)[0]
        deeds.started(task, 1)
        with pytest.raises(AssertionError, match="I2: tasks ran twice"):
            check_jobs(instance)
        deeds.starts[task] = 1
        deeds.wrote(task, "stdout", b"more")
        with pytest.raises(AssertionError, match=r"I3: .* was written"):
            check_jobs(instance)
        whole = deeds.output.pop((task, "stdout"))
        with pytest.raises(AssertionError, match=r"I3: .* nobody wrote"):
            check_jobs(instance)
        deeds.output[task, "stdout"] = whole[:-4]
        deeds.statuses[task] = 9
        with pytest.raises(AssertionError, match="I4: job"):
            check_jobs(instance)
        before = instance.uuids()
        check_same(instance, before, [5])
        with pytest.raises(AssertionError, match="I6: ranks \\[5\\]"):
            check_new(instance, before, [5])
        instance.kill(5)
        with pytest.raises(AssertionError, match="rank 5 is not online"):
            check_joined(instance)
        await instance.restart(5)
        await instance.online()
        with pytest.raises(AssertionError, match="ranks \\[5\\] were restarted"):
            check_same(instance, before, [4, 5])


@simulated
async def test_a_simulation_ends_in_time() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with Instance(1, time_limit=10) as instance:
            await instance.start()
            await trio.sleep_forever()
    assert caught.group_contains(trio.TooSlowError, match="not ended within 10s")


@simulated
async def test_tracebacks_are_found() -> None:
    with pytest.raises(AssertionError, match=r"tracebacks:\n.*it broke"):
        async with Instance(1):
            try:
                raise IllegalTransition("it", "broke", "badly", [])
            except IllegalTransition:
                logging.getLogger("fluxres.broker").exception("it broke")


@simulated
async def test_what_goes_wrong_in_the_test_is_told_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Instance(2) as instance:
            await instance.start()
            raise KeyError("mine")


@simulated
async def test_brokers_are_started_once() -> None:
    async with Instance(2) as instance:
        await instance.start()
        with pytest.raises(ValueError, match="cannot start rank 1: it runs"):
            instance.launch([1])
