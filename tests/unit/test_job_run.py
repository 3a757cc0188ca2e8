"""The execution of one job over several ranks, on a real store and a virtual clock; the ranks' brokers are played."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from kvskit import OWNER, running_kvs
from trio.testing import MockClock

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, decode, encode
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.exec import progress
from fluxres.exec.attachments import Attachments
from fluxres.exec.barriers import Barrier
from fluxres.exec.job_run import RELEASE_AFTER, JobRun, Plan
from fluxres.exec.progress import Progress, RankState, guest_namespace, progress_key
from fluxres.exec.ranks import Presence, Ranks
from fluxres.exec.stdin import INPUT_KEY, WINDOW
from fluxres.exec.translate import EXEC_EVENTLOG_KEY, OUTPUT_KEY
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CommitResult, CreateNamespace, Link, Op, Put
from fluxres.overlay.errors import HostUnreachable
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Endpoint, Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.messages import Message, response_to
from fluxres.wire.payload import Wire, WireMap, pack, unpack_map
from fluxres_shell.records import DATA, EVENT, EXIT, STDOUT
from fluxres_shell.records import encode as record

JOB = JobId(0x1234)
GUEST = guest_namespace(JOB)
PATIENCE = 1000
POLL = 0.01
"""Seconds of the virtual clock."""
ATTENDING = ("exec.start", "exec.reattach")


class Far:
    """One incarnation of the broker of a rank: it keeps what it is asked, and says what the test wants."""

    def __init__(self, router: Router, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.uuid = f"{rank}-{incarnation}"
        self.id = f"peer-{self.uuid}"
        self.hop = self
        self.asked: list[tuple[str, WireMap]] = []
        self.refuses: dict[str, RpcError] = {}
        self.voids = False
        self._router = router
        self._stream: Message | None = None

    def deliver(self, message: Message) -> None:
        payload = unpack_map(message.payload)
        self.asked.append((message.topic, payload))
        if message.topic in self.refuses:
            refusal = self.refuses[message.topic]
            self._answer(response_to(message, payload=refusal.text.encode(), errnum=refusal.errnum))
        elif message.topic in ATTENDING:
            self._stream = message
        elif message.wants_response:
            self._answer(response_to(message, payload=pack({"void": self.voids})))

    def _answer(self, response: Message) -> None:
        self._router.receive(self, response)

    async def drained(self, asked: Message) -> None:
        await trio.lowlevel.checkpoint()

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        callback()

    def received_response(self, response: Message, onward: Endpoint | None) -> None:
        pass

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.asked if not topic.endswith((".cancel", ".ack"))]

    def payloads(self, topic: str) -> list[WireMap]:
        return [payload for each, payload in self.asked if each == topic]

    def say(self, kind: str, **message: Wire) -> None:
        """Say something on the stream of the newest attendance."""
        assert self._stream is not None
        self._answer(response_to(self._stream, payload=pack({"type": kind, **message})))

    def records(self, *payloads: bytes) -> None:
        self.say("records", records=list(payloads))

    def begin(self) -> None:
        self.records(record(1, 1.0, EVENT, "shell.init", {"rank": self.rank}))

    def end(self, seq: int = 2, status: int = 0, **info: Wire) -> None:
        self.records(record(seq, 2.0, EXIT, status, info))


class Root:
    """Rank 0, with the ranks that are there."""

    def __init__(self, kvs: Kvs) -> None:
        self.kvs = kvs
        self.router = Router(rank=0, size=10)
        self.router.use_overlay(None, self._next_hop)
        self.handle = Handle(self.router, "test", OWNER)
        self.ranks = Ranks()
        self.attachments = Attachments(trio.current_time)
        self.far: dict[int, Far] = {}
        self.said: list[WireMap] = []
        self.drained: list[tuple[object, bool]] = []
        self.full = False
        self._scopes: dict[int, set[trio.CancelScope]] = {}
        self._incarnations = itertools.count(1)
        self.resource = Service("resource", self.router)
        self.resource.method("drain", self._drain)

    def _next_hop(self, rank: int) -> Far | None:
        if rank not in self.far:
            raise HostUnreachable(f"rank {rank} is not online")
        return self.far[rank]

    def _drain(self, request: Request) -> None:
        if self.full:
            raise RpcError(errno.ENOSPC, "the disk is full")
        self.drained.append((request.payload["targets"], self.progress(1).ended))

    @asynccontextmanager
    async def subtree(self, rank: int) -> AsyncIterator[None]:
        if rank not in self.far:
            raise HostUnreachable("not there")
        with trio.CancelScope() as scope:
            scopes = self._scopes.setdefault(rank, set())
            scopes.add(scope)
            try:
                yield
            finally:
                scopes.discard(scope)
        if scope.cancelled_caught:
            raise HostUnreachable("lost")

    def join(self, *ranks: int) -> Far:
        """The ranks are online, as new incarnations; the last of them."""
        for rank in ranks:
            count = next(self._incarnations)
            far = self.far[rank] = Far(self.router, rank, count)
            self.router.add_endpoint(far)
            self.ranks.joined(
                Presence(
                    rank=rank,
                    uuid=far.uuid,
                    host="h",
                    statedir=f"S{rank}",
                    incarnation=count,
                    boot_id="b",
                    cores="0",
                )
            )
        return far

    def lose(self, rank: int) -> None:
        """The link to the rank is lost."""
        far = self.far.pop(rank)
        self.router.remove_endpoint(far, "lost")
        for scope in self._scopes.get(rank, ()):
            scope.cancel()
        self.ranks.left(rank, far.uuid)

    async def prepare(self, ranks: Iterable[int]) -> None:
        puts = [Put(PRIMARY, progress_key(JOB, rank), Progress(statedir=f"S{rank}").encode()) for rank in ranks]
        await self.kvs.commit(CreateNamespace(GUEST, OWNER), *puts)

    def run_of(self, *ranks: int, reattach: bool = False, killed: bool = False, released: str = "") -> JobRun:
        plan = Plan(
            jobid=JOB,
            nonce="N",
            ranks={rank: self.progress(rank) for rank in ranks},
            spec=lambda rank: b"spec %d" % rank,
            reattach=reattach,
            killed=killed,
            released=IdSet.parse(released),
            kill_timeout=5.0,
        )
        return JobRun(
            plan,
            kvs=self.kvs,
            handle=self.handle,
            ranks=self.ranks,
            attachments=self.attachments,
            subtree=self.subtree,
            respond=self.said.append,
            now=lambda: 9.0,
        )

    def progress(self, rank: int) -> Progress:
        data = self.kvs.get(PRIMARY, progress_key(JOB, rank))
        assert data is not None
        return progress.decode(data)

    def events(self) -> list[Event]:
        return decode(self.kvs.get(GUEST, EXEC_EVENTLOG_KEY) or b"")

    def types(self) -> list[object]:
        return [response["type"] for response in self.said]

    def notes(self) -> list[str]:
        data = [response["data"] for response in self.said if response["type"] == "exception"]
        return [str(each["note"]) for each in data if isinstance(each, dict)]


async def until(check: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not check():  # noqa: ASYNC110 - it costs nothing on a virtual clock
            await trio.sleep(POLL)


@asynccontextmanager
async def root(path: Path) -> AsyncIterator[Root]:
    """Rank 0 on a store in `path`."""
    async with running_kvs(path / "kvs.sqlite", threaded=False) as kvs, trio.open_nursery() as nursery:
        made = Root(kvs)
        await nursery.start(made.resource.run)
        yield made
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(here: Root, run: JobRun) -> AsyncIterator[None]:
    """The run goes on in the block; at its end it is cut off where it has not ended."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        yield
        nursery.cancel_scope.cancel()


async def test_a_job_of_two_ranks_from_its_start_to_its_release(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1, 2)
        run = here.run_of(1, 2)
        async with running(here, run):
            await until(lambda: all(far.topics == ["exec.start"] for far in here.far.values()))
            assert here.far[2].asked[0][1] == {
                "id": JOB,
                "nonce": "N",
                "statedir": "S2",
                "cursor": 0,
                "start": True,
                "spec": b"spec 2",
            }
            for far in here.far.values():
                far.begin()
            await until(lambda: here.types() == ["start"])
            for far in here.far.values():
                far.end(status=256 * far.rank)  # both ends are under way at once
            await until(lambda: here.types() == ["start", "finish", "release"])
            assert here.said[1]["data"] == {"status": 512}
            assert here.said[2]["data"] == {"ranks": "1-2", "final": True}
            init, leader, complete, done = here.events()
            assert (init.name, init.context) == ("shell.init", {"rank": 1})
            assert (leader.name, leader.context["wait_status"]) == ("shell-exit", 256)
            assert leader.context.get("active_ranks", "2") == "2"
            assert (complete.name, complete.context, done.name) == ("complete", {"status": 512}, "done")
            run.released(None, final=True)
            await until(lambda: all(far.topics[-1] == "exec.release" for far in here.far.values()))
            assert here.far[1].payloads("exec.release") == [{"id": JOB, "seq": 2}]


async def test_a_rank_that_is_away_makes_the_job_wait(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1)
        async with running(here, here.run_of(1, 2)):
            await until(lambda: here.far[1].topics)
            here.far[1].begin()
            await trio.sleep(100)
            assert here.said == []
            here.join(2)
            await until(lambda: here.far[2].topics == ["exec.start"])
            here.far[2].begin()
            await until(lambda: here.types() == ["start"])


async def test_a_rank_that_comes_back_goes_on_where_it_was(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        here.join(1)
        async with running(here, here.run_of(1)):
            for life in range(3):
                await until(lambda: here.far[1].topics)
                topic, payload = here.far[1].asked[0]
                assert (topic, payload["cursor"]) == ("exec.reattach" if life else "exec.start", life)
                here.far[1].records(*(record(seq, 1.0, DATA, STDOUT, 0, b"%d" % seq) for seq in range(1, life + 2)))
                await until(lambda life=life: here.progress(1).cursor == life + 1)  # type: ignore[misc]
                here.lose(1)
                await trio.sleep(100)
                here.join(1)
        output = decode(here.kvs.get(GUEST, OUTPUT_KEY) or b"")
        assert [event.context["data"] for event in output] == ["1", "2", "3"]
        assert not caplog.records


async def test_shells_are_attached_detached_and_found_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2, 3))
        here.join(1, 2, 3)
        shells = here.attachments
        run = here.run_of(1, 2, 3)
        async with running(here, run):
            await until(lambda: all(far.topics for far in here.far.values()))
            assert (shells.attached_count, shells.detached_count) == (0, 0)
            for far in here.far.values():
                far.say("attached", first=1, last=0, stdin={"offset": 0})
            await until(lambda: shells.attached_count == 3)
            for rank in (1, 2, 3):
                here.lose(rank)
            await until(lambda: str(shells.detached(JOB)) == "1-3")
            here.join(1, 2, 3)
            await until(lambda: all(far.topics == ["exec.reattach"] for far in here.far.values()))
            here.far[1].say("attached", first=1, last=0, stdin={"offset": 0})
            here.far[2].say("attached", first=1, last=0)  # a journal that is read out
            here.far[2].begin()
            here.far[2].end()
            here.far[3].say("lost", note="it is gone", status=9, leftover=0)
            await until(lambda: not shells.detached_count)
            assert (shells.rediscovered, shells.finished, shells.lost) == (1, 1, 1)
            here.far[1].begin()
            here.far[1].end()
            await until(lambda: here.types()[-1] == "release")
            run.released(None, final=True)
        assert (shells.attached_count, shells.detached_count) == (0, 0)


async def test_the_shells_of_a_life_before_are_detached_until_it_is_known(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1)
        shells = here.attachments
        async with running(here, here.run_of(1, 2, reattach=True)):
            await until(lambda: here.far[1].topics == ["exec.reattach"])
            assert str(shells.detached(JOB)) == "1-2"
            far = here.join(2)
            far.refuses["exec.reattach"] = RpcError(errno.ENOENT, "nothing is there")
            await until(lambda: far.topics[-1:] == ["exec.start"])
            assert str(shells.detached(JOB)) == "1"  # of the other it is known that there was none
            far.say("attached", first=1, last=0, stdin={"offset": 0})
            await until(lambda: shells.attached_count == 1)
            assert shells.rediscovered == 0
        assert str(shells.detached(JOB)) == "1-2"  # this life of rank 0 is over, the job is not


async def test_what_is_under_way_to_the_disk_is_not_committed_twice(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subtree is lost between the commit and its end, and is back before that."""
    async with root(tmp_path) as here:
        await here.prepare((1,))
        here.join(1)
        held: list[Callable[[], None]] = []
        submit = here.kvs.submit

        def hold(ops: list[Op], done: Callable[[CommitResult], None], *, hold: bool = False) -> None:
            held.append(lambda: submit(ops, done, hold=hold))

        async with running(here, here.run_of(1)):
            await until(lambda: here.far[1].topics)
            monkeypatch.setattr(here.kvs, "submit", hold)
            here.far[1].records(record(1, 1.0, DATA, STDOUT, 0, b"once"))
            await until(lambda: held)
            here.lose(1)
            here.join(1)
            await trio.sleep(1)
            assert here.far[1].topics == [], "nobody knows yet from where"
            monkeypatch.undo()
            held[0]()
            await until(lambda: here.far[1].topics)
            assert here.far[1].payloads("exec.reattach")[0]["cursor"] == 1
        assert (here.kvs.get(GUEST, OUTPUT_KEY) or b"").count(b"once") == 1


async def test_nothing_there_is_started_and_nothing_is_started_for_ever(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        far.refuses = {topic: RpcError(errno.ENOENT, "nothing") for topic in ATTENDING}
        async with running(here, here.run_of(1, reattach=True)):
            await trio.sleep(100)
        assert far.topics[:4] == ["exec.reattach", "exec.start", "exec.reattach", "exec.start"]
        assert len(far.topics) < 50


async def test_an_error_is_told_once_and_asked_about_ever_more_rarely(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        far.refuses["exec.start"] = far.refuses["exec.reattach"] = RpcError(errno.ENOSPC, "no room")
        async with running(here, here.run_of(1)):
            await trio.sleep(100)
            assert len(far.topics) < 20
            assert [r.getMessage().partition(": ")[2] for r in caplog.records] == ["rank 1: no room"]
            far.refuses["exec.reattach"] = RpcError(errno.EIO, "broken")
            await until(lambda: len(caplog.records) == 2)
            far.refuses = {}
            asked = len(far.topics)
            await until(lambda: len(far.topics) > asked)
            far.begin()
            await until(lambda: here.types() == ["start"])


async def test_a_link_that_is_lost_before_anybody_knows_is_no_busy_loop(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        far.refuses = {topic: HostUnreachable("a hop below is lost") for topic in ATTENDING}
        async with running(here, here.run_of(1)):
            await trio.sleep(100)
        assert 2 < len(far.topics) < 20
        assert not caplog.records


async def test_a_job_is_cancelled_while_one_of_its_ranks_is_away(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1, 2)
        run = here.run_of(1, 2)
        async with running(here, run):
            await until(lambda: all(far.topics for far in here.far.values()))
            for far in here.far.values():
                far.begin()
            await until(lambda: here.types() == ["start"])
            here.lose(2)
            run.kill()
            await until(lambda: here.far[1].topics[-2:] == ["exec.void", "exec.kill"])
            here.far[1].end(status=15)
            await trio.sleep(100)
            assert here.types() == ["start", "release"]
            here.join(2)
            await until(lambda: "exec.kill" in here.far[2].topics)
            assert here.far[2].payloads("exec.kill") == [{"id": JOB, "signum": 15}]
            assert here.far[2].payloads("exec.void")[0]["statedir"] == "S2"
            await until(lambda: len(here.far[2].payloads("exec.kill")) == 3)
            assert here.far[2].payloads("exec.kill")[1:] == [
                {"id": JOB, "signum": 9},
                {"id": JOB, "signum": 9, "force": True},
            ]
            here.far[2].end(status=9)
            await until(lambda: here.types() == ["start", "release", "finish", "release"])


async def test_a_start_that_is_void_is_told_once_by_whoever_tells_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        far.voids = True
        run = here.run_of(1)
        async with running(here, run):
            await until(lambda: far.topics)
            run.kill()
            far.say("void", note="the job was ended")
            far.say("void", note="the job was ended")
            await until(lambda: here.types() == ["release"])
            await trio.sleep(10)
            assert here.types() == ["release"]
            assert here.progress(1).state is RankState.VOID


@pytest.mark.parametrize("topic", ["exec.void", "exec.start"])
async def test_a_rank_with_another_statedir_has_lost_its_part(
    tmp_path: Path, autojump_clock: MockClock, topic: str
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        far.refuses[topic] = RpcError(errno.ESTALE, "another statedir")
        run = here.run_of(1)
        async with running(here, run):
            await until(lambda: far.topics)
            run.kill()
            await until(lambda: here.types() == ["exception", "start", "finish", "release"])
            assert here.notes() == ["rank 1 lost its state: another statedir"]


async def test_a_rank_that_is_declared_lost_ends_its_part(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1)
        run = here.run_of(1, 2)
        async with running(here, run):
            await until(lambda: here.far[1].topics)
            here.far[1].begin()
            here.ranks.declare(2, "it burnt down")
            await until(lambda: here.types() == ["exception", "start", "release"])
            assert here.notes() == ["rank 2 was declared lost: it burnt down"]
            assert here.progress(2).state is RankState.LOST
            late = here.join(2)
            here.far[1].end()
            await until(lambda: here.types()[-2:] == ["finish", "release"])
            assert "exec.start" not in late.topics


async def test_shells_meet_in_a_barrier_also_after_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    done: WireMap = {"id": JOB, "name": "start", "seq": 0}
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1, 2)
        async with running(here, here.run_of(1, 2)):
            await until(lambda: all(far.topics for far in here.far.values()))
            here.far[1].say("barrier", name="start", seq=0)
            here.far[1].say("barrier", name="start", seq=0)
            await trio.sleep(10)
            assert here.far[1].payloads("exec.barrier") == []
            here.far[2].say("barrier", name="start", seq=0)
            await until(lambda: all(far.payloads("exec.barrier") for far in here.far.values()))
            assert [far.payloads("exec.barrier") for far in here.far.values()] == [[done], [done]]
            assert here.kvs.exists(GUEST, Barrier("start", 0).key)
        async with running(here, here.run_of(1, 2, reattach=True)):
            await until(lambda: "exec.reattach" in here.far[2].topics)
            here.far[2].say("barrier", name="start", seq=0)
            await until(lambda: here.far[2].payloads("exec.barrier") == [done, done])
        assert here.notes() == []


@pytest.mark.parametrize("first", ["enters", "ends"])
async def test_who_waits_for_a_rank_that_has_ended_does_not_wait_for_ever(
    tmp_path: Path, autojump_clock: MockClock, first: str
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1, 2)
        async with running(here, here.run_of(1, 2)):
            await until(lambda: all(far.topics for far in here.far.values()))
            if first == "enters":
                here.far[1].say("barrier", name="start", seq=0)
                await trio.sleep(1)
            here.far[2].end(1)
            await until(lambda: here.progress(2).ended)
            here.far[1].say("barrier", name="start", seq=0)
            await until(here.notes)
            here.far[1].say("barrier", name="start", seq=0)
            await trio.sleep(10)
            assert len(here.notes()) == 1
            assert "barrier start/0" in here.notes()[0]


async def test_ranks_that_have_ended_are_released_before_the_rest(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2, 3))
        here.join(1, 2, 3)
        run = here.run_of(1, 2, 3)
        async with running(here, run):
            await until(lambda: all(far.topics for far in here.far.values()))
            for far in here.far.values():
                far.begin()
            await until(lambda: here.types() == ["start"])
            here.far[1].end()
            here.far[3].end()
            await trio.sleep(RELEASE_AFTER / 2)
            assert here.types() == ["start"]
            await until(lambda: here.types() == ["start", "release"])
            assert here.said[-1]["data"] == {"ranks": "1,3", "final": False}
            assert all("exec.release" not in far.topics for far in here.far.values()), "it is not durable yet"
            run.released(IdSet([1, 3]), final=False)
            assert [rank for rank, far in here.far.items() if "exec.release" in far.topics] == [1, 3]
        async with running(here, again := here.run_of(1, 2, 3, reattach=True, released="1,3")):
            await until(lambda: "exec.reattach" in here.far[2].topics)
            here.far[2].end()
            await until(lambda: here.types()[-3:] == ["reattached", "finish", "release"])
            assert here.said[-1]["data"] == {"ranks": "2", "final": True}
            again.released(IdSet([2]), final=True)
            assert [len(far.payloads("exec.release")) for far in here.far.values()] == [1, 1, 1]


async def test_a_signal_goes_to_all_whatever_becomes_of_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2, 3))
        here.join(1, 3)
        run = here.run_of(1, 2, 3)
        async with running(here, run):
            await until(lambda: all(far.topics for far in here.far.values()))
            here.far[1].refuses["exec.kill"] = RpcError(errno.EAGAIN, "not reading")
            with pytest.raises(RpcError, match="cannot signal the job on rank 1-2: not reading") as caught:
                await run.signal(10)
            assert caught.value.errnum == errno.EAGAIN
            assert here.far[3].payloads("exec.kill") == [{"id": JOB, "signum": 10}]


@pytest.mark.parametrize("how", ["exit", "lost"])
async def test_a_rank_on_which_something_lives_on_is_drained_before_it_ends(
    tmp_path: Path, autojump_clock: MockClock, how: str
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        async with running(here, here.run_of(1)):
            await until(lambda: far.topics)
            if how == "exit":
                far.end(1, leftover=2)
            else:
                far.say("lost", note="the shell was killed", status=9, leftover=2)
            await until(lambda: here.progress(1).ended)
            assert here.drained == [("1", False)]


async def test_a_rank_that_cannot_be_drained_for_want_of_room_does_not_end_before_it_is(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        here.full = True
        async with running(here, here.run_of(1)):
            await until(lambda: far.topics)
            far.end(1, leftover=2)
            await trio.sleep(60)
            assert not here.progress(1).ended
            here.full = False
            await until(lambda: here.progress(1).ended)
            assert here.drained == [("1", False)]


async def test_a_shell_that_was_seen_to_die_is_a_shell_exit(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        async with running(here, here.run_of(1)):
            await until(lambda: far.topics)
            far.say("lost", note="the shell was killed", status=9, leftover=0)
            await until(lambda: here.types() == ["exception", "start", "finish", "release"])
            assert [event.name for event in here.events()] == ["shell-exit", "complete", "done"]
            assert here.events()[0].context == {"rank": 1, "wait_status": 9}
            assert here.drained == []


async def test_what_makes_no_sense_ends_the_shell_and_its_part(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        async with running(here, here.run_of(1)):
            await until(lambda: far.topics)
            far.records(b"\xff")
            await until(lambda: here.progress(1).ended)
            assert far.payloads("exec.kill") == [{"id": JOB, "signum": 9, "force": True}]
            assert here.notes()[0].startswith("the journal of rank 1 cannot be read")
            far.begin()  # too late
            far.say("lost", note="killed")
            await trio.sleep(10)
            assert len(here.notes()) == 1


async def test_records_that_are_gone_are_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1,))
        far = here.join(1)
        async with running(here, here.run_of(1)):
            await until(lambda: far.topics)
            far.say("attached", first=5, last=9)
            far.end(5)
            await until(lambda: here.types()[-1:] == ["release"])
            assert here.notes() == ["records 1 to 4 of rank 1 are gone: output may be missing"]


async def test_a_spoilt_namespace_ends_the_job_with_that_as_its_reason(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        await here.kvs.commit(
            Link(GUEST, "exec.barrier", GUEST, "exec.barrier"), Put(GUEST, f"{OUTPUT_KEY}.mine", b"mine")
        )
        here.join(1, 2)
        async with running(here, here.run_of(1, 2)):
            await until(lambda: all(far.topics for far in here.far.values()))
            for far in here.far.values():
                far.say("barrier", name="start", seq=0)
            await until(here.notes)
            assert "cannot store that barrier start/0 is complete" in here.notes()[0]
            here.far[1].records(record(1, 1.0, DATA, STDOUT, 0, b"x"))
            await until(lambda: len(here.notes()) == 2)
            assert here.notes()[1].startswith("cannot store what rank 1 says")


async def test_each_shell_gets_all_of_the_input_at_its_own_pace(tmp_path: Path, autojump_clock: MockClock) -> None:
    whole = bytes(range(48, 123)) * 2000
    async with root(tmp_path) as here:
        await here.prepare((1, 2))
        here.join(1, 2)
        run = here.run_of(1, 2)
        async with running(here, run):
            await until(lambda: all(far.topics for far in here.far.values()))
            here.far[1].say("attached", first=1, last=0, stdin={"offset": 0})
            line = encode(Event(1.0, "data", {"stream": "stdin", "rank": "all", "data": whole.decode(), "eof": True}))
            await here.kvs.commit(Append(GUEST, INPUT_KEY, line.encode()))
            run.has_input()
            await until(lambda: sent(here.far[1]))
            await trio.sleep(1)
            assert len(sent(here.far[1])) <= WINDOW
            here.far[2].say("attached", first=1, last=0, stdin={"offset": 70})
            for offset in range(0, len(whole) + WINDOW, WINDOW // 2):
                here.far[2].say("stdin-ack", offset=min(offset, len(whole)))
                await trio.sleep(0.1)
            assert sent(here.far[2]) == whole[70:]
            assert here.far[2].payloads("exec.stdin")[-1]["eof"] is True
            assert len(sent(here.far[1])) <= WINDOW, "it has acknowledged nothing"
            here.lose(1)
            here.join(1)
            await until(lambda: here.far[1].topics)
            here.far[1].say("attached", first=1, last=0, stdin={"offset": len(whole) - 3})
            await until(lambda: sent(here.far[1]) == whole[-3:])


def sent(far: Far) -> bytes:
    pieces = [payload["data"] for payload in far.payloads("exec.stdin")]
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))
