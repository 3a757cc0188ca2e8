"""The resource service on a real store: joining, leaving, drains, loss, and what a restart of rank 0 finds."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import pytest
import trio
import trio.testing
from kvskit import OWNER, running_kvs

from fluxres.base.errors import Refusal, RpcError
from fluxres.base.eventlog import Event, decode, encode
from fluxres.base.idset import IdSet
from fluxres.broker import changes as changes_module
from fluxres.broker import presence as presence_module
from fluxres.broker.drain import DRAIN_KEY
from fluxres.broker.inventory import rank_key
from fluxres.broker.resource import ResourceService
from fluxres.exec.ranks import MAX_WHY, LastLife, Notice, Presence, Ranks
from fluxres.exec.recall import Recalled
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, CommitResult, Put
from fluxres.overlay.errors import SubtreePanic
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.sched.policy import Decision, Granted
from fluxres.sched.pool import Allocation, Pool, Share
from fluxres.sched.request import Request
from fluxres.sched.service import Scheduler
from fluxres.wire.messages import Message, Role
from fluxres.wire.payload import WireMap

SIZE = 6
LIMIT = 30.0
"""Seconds that any wait of these tests may take."""


class GuestHandle(Handle):
    """A handle whose requests come from a user who is not the owner."""

    def _send(self, message: Message) -> None:
        self._router.request(message._replace(route=(self._id,), userid=2000, rolemask=int(Role.USER | Role.LOCAL)))


STATEDIR_GONE = "came back with another statedir: what ran there may still run"


def hello(rank: int, incarnation: int = 1, *, host: str = "", cores: str = "0-3", statedir: str = "") -> Presence:
    return Presence(
        rank=rank,
        uuid=f"{rank}.{incarnation}",
        host=host or f"n{rank}",
        statedir=statedir or f"s{rank}",
        incarnation=incarnation,
        boot_id="boot",
        cores=cores,
        properties=["big"] if rank else [],
    )


@dataclass
class Instance:
    """Rank 0's resources, and who calls them."""

    kvs: Kvs
    router: Router
    ranks: Ranks
    pool: Pool
    scheduler: Scheduler
    owner: Handle
    decided: list[Decision]
    nursery: trio.Nursery
    resource: ResourceService

    async def join(self, presence: Presence) -> trio.CancelScope:
        """Join as `presence`; cancelling what is returned is the loss of that rank."""
        scope = trio.CancelScope()

        async def stay(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            payload = cast("WireMap", msgspec.to_builtins(presence))
            with scope:
                async with self.owner.stream("resource.hello", payload) as answers:
                    assert await answers.__anext__() == {}
                    task_status.started()
                    await trio.sleep_forever()

        await self.nursery.start(stay)
        return scope

    async def lose(self, scope: trio.CancelScope, rank: int) -> None:
        scope.cancel()
        with trio.fail_after(LIMIT):
            while self.ranks.online(rank):
                await trio.testing.wait_all_tasks_blocked()

    async def call(self, method: str, **payload: str | int | bool) -> WireMap:
        return await self.owner.call(f"resource.{method}", {**payload})

    async def drained(self) -> object:
        status = await self.call("status")
        groups = cast("dict[str, dict[str, object]]", status["drain"])
        return {ranks: group["reason"] for ranks, group in groups.items()}

    def events(self) -> list[tuple[str, dict[str, object]]]:
        """The eventlog after the first event, which is restart; nodelists left out."""
        log = decode(self.kvs.get(PRIMARY, "resource.eventlog") or b"")
        return [(e.name, {k: v for k, v in e.context.items() if k != "nodelist"}) for e in log]


@asynccontextmanager
async def instance(path: Path, size: int = SIZE, *, threaded: bool = True) -> AsyncIterator[Instance]:
    async with running_kvs(path / "kvs", threaded=threaded) as kvs, trio.open_nursery() as nursery:
        router = Router(rank=0, size=size)
        decided: list[Decision] = []
        pool = Pool(size=size)
        scheduler = Scheduler(pool, decided.append)
        ranks = Ranks()
        resource = ResourceService(
            router=router, kvs=kvs, ranks=ranks, pool=pool, scheduler=scheduler, size=size, now=lambda: 1000.0
        )
        await resource.load()
        await nursery.start(scheduler.run)
        await nursery.start(resource.service.run)
        await nursery.start(resource.groups.run)
        yield Instance(kvs, router, ranks, pool, scheduler, Handle(router, "owner", OWNER), decided, nursery, resource)
        nursery.cancel_scope.cancel()


@contextmanager
def refused(errnum: int, text: str) -> Iterator[None]:
    with pytest.raises(RpcError, match=text) as error:
        yield
    assert error.value.errnum == errnum


def share(rank: int, cores: str) -> Allocation:
    return Allocation(shares=(Share(rank=rank, cores=IdSet.parse(cores)),), nslots=1)


async def test_a_rank_joins_works_and_leaves(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        it.scheduler.request(7, Request(nslots=4), priority=16)
        scope = await it.join(hello(2))
        with trio.fail_after(LIMIT):
            while not it.decided:
                await trio.testing.wait_all_tasks_blocked()
        assert isinstance(it.decided[0], Granted)
        record = json.loads(it.kvs.get(PRIMARY, rank_key(2)) or b"")
        assert record == {
            "host": "n2",
            "cores": "0-3",
            "gpus": "",
            "properties": ["big"],
            "statedir": "s2",
            "boot_id": "boot",
        }
        status = await it.call("status")
        assert (status["online"], status["offline"], status["torpid"]) == ("2", "0-1,3-5", "")
        assert (await it.owner.call("groups.get", {"name": "broker.online"})) == {"members": "2"}
        await it.lose(scope, 2)
        scheduled = await it.call("sched-status")
        assert scheduled["down"] == scheduled["all"]
        assert scheduled["allocated"] == {
            "version": 1,
            "execution": {
                "R_lite": [{"rank": "2", "children": {"core": "0-3"}}],
                "starttime": 0.0,
                "expiration": 0.0,
                "nodelist": ["n2"],
            },
        }
        assert cast("WireMap", cast("WireMap", scheduled["all"])["execution"])["properties"] == {"big": "2"}
        await it.kvs.commit()
        assert it.events() == [
            ("restart", {"ranks": "", "online": ""}),
            ("resource-define", {"method": "dynamic-discovery", "idset": "2"}),
            ("online", {"idset": "2"}),
            ("offline", {"idset": "2"}),
        ]


async def test_nothing_is_given_before_what_the_rank_has_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with instance(tmp_path) as it:
        held: list[tuple[object, ...]] = []
        submit = it.kvs.submit
        await it.kvs.commit()
        monkeypatch.setattr(it.kvs, "submit", lambda *args, **_: held.append(args))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.join, hello(1))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(held) == 1
            assert not it.ranks.online(1)
            assert it.pool.inventory() == ()
            monkeypatch.setattr(it.kvs, "submit", submit)
            submit(*held[0])  # type: ignore[arg-type]
        assert it.ranks.online(1)


@pytest.mark.parametrize(
    ("presence", "errnum", "why"),
    [
        (hello(SIZE), errno.EINVAL, "there is no rank 6"),
        (hello(-1), errno.EINVAL, "there is no rank -1"),
        (hello(1, cores="x"), errno.EINVAL, "cannot take rank 1: cannot parse idset 'x'"),
        (hello(1, cores="0-70000"), errno.EINVAL, "the largest id is 65535"),
        (hello(1, host="a,b"), errno.EINVAL, "cannot make a hostlist"),
    ],
)
async def test_who_cannot_join(tmp_path: Path, presence: Presence, errnum: int, why: str) -> None:
    async with instance(tmp_path) as it:
        with refused(errnum, why):
            async with it.owner.stream("resource.hello", cast("WireMap", msgspec.to_builtins(presence))) as answers:
                await answers.__anext__()
        with refused(errno.EPROTO, "streaming"):
            await it.owner.call("resource.hello", cast("WireMap", msgspec.to_builtins(hello(1))))


async def test_only_the_owner_may_change_anything(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        guest = GuestHandle(it.router, "guest", 2000)
        for method in ("drain", "undrain", "declare-lost", "confirm", "torpid"):
            with refused(errno.EPERM, "is for the instance owner"):
                await guest.call(f"resource.{method}", {"targets": "0", "ranks": "0", "rank": 0, "torpid": True})
        with refused(errno.EPERM, "is for the instance owner"):
            async with guest.stream("resource.hello", {}) as answers:
                await answers.__anext__()
        assert (await guest.call("resource.status"))["online"] == ""


async def test_a_later_incarnation_takes_over_and_an_earlier_one_is_refused(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        first = await it.join(hello(1, 5))
        await it.join(hello(1, 6))
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert it.ranks.online(1)
        for late in (4, 6):
            with refused(errno.ESTALE, f"its incarnation 6 is online, {late} is not later"):
                payload = cast("WireMap", msgspec.to_builtins(hello(1, late)))
                async with it.owner.stream("resource.hello", payload) as answers:
                    await answers.__anext__()
        await it.join(hello(1, 1, statedir="fresh"))
        assert it.ranks.statedir(1) == "fresh"
        assert it.ranks.presence(1) == hello(1, 1, statedir="fresh")


async def test_a_restart_knows_all_ranks_drains_and_losses(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        await it.join(hello(1))
        scope = await it.join(hello(2))
        await it.call("drain", targets="1", reason="fan")
        await it.lose(scope, 2)
        await it.call("declare-lost", ranks="2", reason="burnt")
    async with instance(tmp_path) as it:
        assert [i.rank for i in it.pool.inventory()] == [1, 2]
        assert str(it.pool.usable_ranks()) == ""
        assert (it.ranks.statedir(2), it.ranks.declared(2), it.ranks.online(1)) == ("s2", "burnt", False)
        it.pool.claim(share(2, "0-1"))
        assert await it.drained() == {"1": "fan", "2": "burnt"}
        status = await it.call("status")
        assert status["drain"] == {
            "1": {"timestamp": 1000, "reason": "fan"},
            "2": {"timestamp": 1000, "reason": "burnt"},
        }
        assert status["lost"] == "2"
        assert str(it.pool.drained_ranks()) == "1-2"
        await it.join(hello(1, 2))
        assert str(it.pool.usable_ranks()) == ""
        await it.call("undrain", targets="1")
        assert str(it.pool.usable_ranks()) == "1"


async def test_a_rank_that_comes_back_changed_under_jobs_is_drained(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        await it.join(hello(1))
        await it.join(hello(2))
    async with instance(tmp_path) as it:
        it.pool.claim(share(1, "3"))
        await it.join(hello(1, 2, cores="0-1", host="m1"))
        await it.join(hello(2, 2, cores="0-1"))
        assert await it.drained() == {
            "1": "came back changed while jobs hold some of it: host n1 became m1, cores 0-3 became 0-1"
        }
        assert str(it.pool.usable_ranks()) == "2"
        it.pool.release(share(1, "3"))
        assert [str(i.cores) for i in it.pool.inventory()] == ["0-1", "0-1"]
        await it.call("drain", targets="m1", mode="overwrite", reason="by host")
        with refused(errno.EINVAL, "no rank is known to be on host n1"):
            await it.call("drain", targets="n1")


async def test_targets(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        for rank in (0, 1, 2):
            await it.join(hello(rank, host="here"))
        await it.call("drain", targets="here", reason="all of them")
        assert await it.drained() == {"0-2": "all of them"}
        await it.call("drain", targets="[4-5]")
        assert await it.drained() == {"0-2": "all of them", "4-5": ""}
        await it.kvs.commit()
        log = decode(it.kvs.get(PRIMARY, "resource.eventlog") or b"")
        assert [(dict(e.context), e.name) for e in log][-2:] == [
            ({"idset": "0-2", "nodelist": "here,here,here", "overwrite": 0, "reason": "all of them"}, "drain"),
            ({"idset": "4-5", "nodelist": "(unknown),(unknown)", "overwrite": 0}, "drain"),
        ]
        for wrong, why in (
            ("6", "there is no rank 6: the instance has 6 ranks"),
            ("", "no targets are named"),
            ("n9", "no rank is known to be on host n9"),
            ("7-3", "cannot parse idset '7-3'"),
            ("3,1", "cannot parse idset '3,1': '1' is out of order"),
            ("a[", "'a\\[' is neither an idset of ranks nor a hostlist"),
        ):
            with refused(errno.EINVAL, why):
                await it.call("drain", targets=wrong)
        with refused(errno.EPROTO, "mode"):
            await it.call("drain", targets="3", mode="sideways")
        with refused(errno.EEXIST, "ranks 0-2 are already drained"):
            await it.call("drain", targets="0-3", reason="again")
        with refused(errno.EEXIST, "rank 3 is not drained"):
            await it.call("undrain", targets="3")


async def test_undrained_ranks_wake_the_scheduler(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        await it.call("drain", targets="1", reason="fan")
        await it.join(hello(1))
        it.scheduler.request(7, Request(), priority=16)
        await trio.testing.wait_all_tasks_blocked()
        assert it.decided == []
        await it.call("undrain", targets="1", reason="mended")
        await trio.testing.wait_all_tasks_blocked()
        assert len(it.decided) == 1


@pytest.mark.parametrize(
    ("statedir", "boot", "drained"),
    [("s1", "boot", {}), ("s1", "next", {}), ("fresh", "next", {}), ("fresh", "boot", {"1": STATEDIR_GONE})],
)
async def test_another_statedir_in_the_same_boot_drains_what_is_in_use(
    tmp_path: Path, statedir: str, boot: str, drained: dict[str, str]
) -> None:
    async with instance(tmp_path) as it:
        scope = await it.join(hello(1))
        it.pool.claim(share(1, "0-1"))
        await it.lose(scope, 1)
        await it.join(msgspec.structs.replace(hello(1, 2, statedir=statedir), boot_id=boot))
        assert await it.drained() == drained


async def test_torpid_ranks(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        scope = await it.join(hello(1))
        it.owner.send("resource.torpid", {"ranks": "1", "torpid": True})
        it.owner.send("resource.torpid", {"ranks": "1", "torpid": True})
        it.owner.send("resource.torpid", {"ranks": "2", "torpid": True})
        assert (await it.call("status"))["torpid"] == "1"
        assert (await it.owner.call("groups.get", {"name": "broker.torpid"})) == {"members": "1"}
        it.scheduler.request(7, Request(), priority=16)
        await trio.testing.wait_all_tasks_blocked()
        assert it.decided == []
        it.owner.send("resource.torpid", {"ranks": "1", "torpid": False})
        await trio.testing.wait_all_tasks_blocked()
        assert len(it.decided) == 1
        it.owner.send("resource.torpid", {"ranks": "1", "torpid": True})
        await it.lose(scope, 1)
        assert (await it.call("status"))["torpid"] == ""
        await it.kvs.commit()
        names = [name for name, _ in it.events()]
        assert names[-5:] == ["online", "torpid", "lively", "torpid", "offline"]
        with refused(errno.ENOENT, "there is no group 'x'"):
            await it.owner.call("groups.get", {"name": "x"})


async def test_declared_lost_until_back_and_confirmed(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        scope = await it.join(hello(1))
        with refused(errno.EBUSY, "online: rank 1; only offline ranks can be declared lost"):
            await it.call("declare-lost", ranks="1-2")
        await it.lose(scope, 1)
        told: list[str] = []

        async def wait() -> None:
            told.append(await it.ranks.wait_declared(1))

        it.nursery.start_soon(wait)
        await it.call("declare-lost", ranks="n1")
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["declared lost"]
        with refused(errno.EAGAIN, "rank 1 is not online"):
            await it.call("confirm", rank=1)
        await it.join(hello(1, 2))
        assert it.ranks.declared(1) == "declared lost"
        with refused(errno.EBUSY, "rank 1 is declared lost"):
            await it.call("undrain", targets="1")
        await it.call("confirm", rank=1)
        await it.call("confirm", rank=1)
        assert it.ranks.declared(1) is None
        assert str(it.pool.usable_ranks()) == "1"
        assert await it.drained() == {}
        await it.kvs.commit()
        assert [name for name, _ in it.events()][-4:] == ["offline", "drain", "online", "undrain"]
        with refused(errno.EINVAL, "there is no rank 9"):
            await it.call("confirm", rank=9)


class FullStore:
    """Makes the next `refusals` commits fail as on a full disk."""

    def __init__(self, it: Instance, monkeypatch: pytest.MonkeyPatch, refusals: int = 1 << 20) -> None:
        self.refusals = refusals
        submit = it.kvs.submit

        def full(ops: list[object], done: object, *, hold: bool = False) -> None:
            if self.refusals:
                self.refusals -= 1
                error = CommitResult({}, RpcError(errno.ENOSPC, "cannot commit: the disk is full"))
                trio.lowlevel.current_trio_token().run_sync_soon(done, error)  # type: ignore[arg-type]
            else:
                submit(ops, done, hold=hold)  # type: ignore[arg-type]

        monkeypatch.setattr(it.kvs, "submit", full)


async def test_on_a_full_disk_known_ranks_join_and_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(tmp_path) as it:
        await it.join(hello(1))
    async with instance(tmp_path) as it:
        await it.kvs.commit()
        store = FullStore(it, monkeypatch)
        await it.join(hello(1, 2))
        assert str(it.pool.usable_ranks()) == "1"
        with refused(errno.ENOSPC, "the disk is full"):
            async with it.owner.stream("resource.hello", cast("WireMap", msgspec.to_builtins(hello(2)))) as answers:
                await answers.__anext__()
        with refused(errno.ENOSPC, "the disk is full"):
            await it.call("drain", targets="1", reason="fan")
        assert str(it.pool.drained_ranks()) == ""
        assert it.pool.find(2) is None
        assert "cannot record changes of resources, or who is online" in caplog.text
        store.refusals = 0
        await it.call("drain", targets="1", reason="fan")
        assert str(it.pool.drained_ranks()) == "1"


async def test_presence_waits_out_a_full_disk_and_ends_with_the_rpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with instance(tmp_path, threaded=False) as it:
        await it.kvs.commit()
        store = FullStore(it, monkeypatch, refusals=3)
        handle = Handle(it.router, "rank1", OWNER)
        with pytest.raises(BaseExceptionGroup) as ended:
            async with trio.open_nursery() as nursery:
                await nursery.start(presence_module.keep, handle, hello(1))
                assert it.ranks.online(1)
                handle.close()
        assert ended.group_contains(SubtreePanic, match="cannot stay in the instance")
        assert store.refusals == 0


async def test_presence_of_a_rank_that_makes_no_sense_is_for_a_person_to_mend(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        with pytest.raises(Refusal, match="cannot join the instance: there is no rank 9"):
            await presence_module.keep(it.owner, hello(9))
        with pytest.raises(Refusal, match=r"cannot join the instance: cannot take rank 1: .*a b"):
            await presence_module.keep(it.owner, hello(1, host="a b"))


async def test_presence_of_a_rank_whose_later_incarnation_is_there_is_a_panic(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        await it.join(hello(1, 2))
        with pytest.raises(SubtreePanic, match="cannot join the instance: cannot take rank 1: its incarnation 2"):
            await presence_module.keep(it.owner, hello(1, 1))


async def test_damaged_records_drain_their_rank_and_damaged_drains_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(tmp_path) as it:
        await it.join(hello(1))
        await it.join(hello(2))
        await it.kvs.commit(Put(PRIMARY, rank_key(2), b'{"host":'))
    async with instance(tmp_path) as it:
        assert [i.rank for i in it.pool.inventory()] == [1]
        assert "cannot read resource.rank.2" in caplog.text
        await it.join(hello(2, 2))
        assert str(it.pool.usable_ranks()) == ""
        await it.call("undrain", targets="2")
        assert str(it.pool.usable_ranks()) == "2"
        await it.kvs.commit(Put(PRIMARY, DRAIN_KEY, b"[]"))
    with pytest.raises(BaseExceptionGroup) as ended:
        async with instance(tmp_path):
            raise AssertionError("it must not come this far")
    assert ended.group_contains(Refusal, match="cannot read resource.drain in the store")


async def test_a_long_eventlog_is_cut_back_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.broker.resource.MAX_LOG", 1000)
    monkeypatch.setattr(changes_module, "MAX_LOG", 1000)
    async with instance(tmp_path) as it:
        for _ in range(10):
            await it.call("drain", targets="1", reason="x" * 20)
            await it.call("undrain", targets="1")
    async with instance(tmp_path) as it:
        await it.kvs.commit()
        assert len(it.kvs.get(PRIMARY, "resource.eventlog") or b"") < 700
        assert [name for name, _ in it.events()][-2:] == ["undrain", "restart"]


async def test_many_ranks_join_in_few_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3000
    async with instance(tmp_path, size) as it:
        await it.kvs.commit()
        commits: list[int] = []
        submit = it.kvs.submit

        def counted(ops: list[object], done: object, *, hold: bool = False) -> None:
            commits.append(len(ops))
            submit(ops, done, hold=hold)  # type: ignore[arg-type]

        monkeypatch.setattr(it.kvs, "submit", counted)
        async with trio.open_nursery() as nursery:
            for rank in range(size):
                nursery.start_soon(it.join, hello(rank))
        assert len(it.ranks.online_ranks()) == size
        assert len(commits) < size / 10
        defined = [context["idset"] for name, context in it.events() if name == "resource-define"]
        assert IdSet(rank for text in defined for rank in IdSet.parse(str(text))) == IdSet(range(size))


# --- what a recovery needs


async def test_a_rank_that_says_goodbye_is_offline_with_a_reason(tmp_path: Path) -> None:
    notices: list[tuple[int, Notice]] = []
    async with instance(tmp_path) as it:
        it.ranks.on_notice(lambda rank, notice: notices.append((rank, notice)))
        first, second = await it.join(hello(1)), await it.join(hello(2))
        await it.call("goodbye", rank=1, uuid="1.1")
        await it.call("goodbye", rank=2, uuid="another incarnation")
        await it.call("goodbye", rank=5, uuid="nobody")
        assert notices == [(1, Notice.LEAVING)]
        await it.lose(first, 1)
        await it.lose(second, 2)
        assert it.ranks.is_leaving(1)
        await it.join(hello(1, 2))
        assert not it.ranks.is_leaving(1)
        await it.call("drain", targets="2")  # and all before it is durable
        offline = [context for name, context in it.events() if name == "offline"]
        assert offline == [{"idset": "1", "reason": "shut down"}, {"idset": "2"}]
        with refused(errno.EPERM, "owner"):
            await GuestHandle(it.router, "guest", 2000).call("resource.goodbye", {"rank": 1, "uuid": "1.2"})


async def test_the_next_life_expects_whom_the_last_one_had(tmp_path: Path) -> None:
    async with instance(tmp_path) as it:
        assert (it.resource.recalled, it.resource.known) == (Recalled(expected=IdSet(), alive=0.0), IdSet())
        scopes = [await it.join(hello(rank)) for rank in range(4)]
        await it.call("goodbye", rank=1, uuid="1.1")
        await it.lose(scopes[1], 1)
        await it.lose(scopes[2], 2)
        await it.resource.log("recovery", {"ranks": "5"})
        assert it.events()[-1] == ("recovery", {"ranks": "5"})
    async with instance(tmp_path, size=3) as it:  # and is smaller now
        assert it.resource.recalled == Recalled(expected=IdSet([0, 2]), alive=1000.0)
        assert it.resource.known == IdSet(range(3))


async def test_an_eventlog_that_cannot_be_read_lets_all_be_expected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(tmp_path) as it:
        for rank in range(3):
            await it.join(hello(rank))
        await it.kvs.commit(Put(PRIMARY, "resource.eventlog", b"{"))
    async with instance(tmp_path) as it:
        assert it.resource.recalled == Recalled(expected=IdSet(range(3)), alive=1000.0)
        assert "expect every rank back" in caplog.text


FILLER = Event(2.0, "filler", {"text": "-" * 50})


async def test_only_the_end_of_a_long_eventlog_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with instance(tmp_path) as it:
        for rank in (1, 2):
            await it.lose(await it.join(hello(rank)), rank)
        await it.call("drain", targets="2")  # all before it is durable
        events = (Event(1.0, "online", {"idset": "1"}), *[FILLER] * 20, Event(3.0, "online", {"idset": "2"}))
        await it.kvs.commit(Put(PRIMARY, "resource.eventlog", "".join(map(encode, events)).encode()))
    monkeypatch.setattr("fluxres.exec.recall.READ_BACK", 1000)
    async with instance(tmp_path) as it:
        assert it.resource.recalled == Recalled(expected=IdSet([2]), alive=3.0)


async def test_how_the_last_incarnation_ended_is_told_with_its_age(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Measured when it is told, however long it took to be heard."""
    async with instance(tmp_path, threaded=False) as it, trio.open_nursery() as nursery:
        ending = presence_module.Ending(at=trio.current_time(), why="x" * 1000)
        await trio.sleep(5)
        await nursery.start(presence_module.keep, it.owner, hello(1), ending)
        presence = it.ranks.presence(1)
        assert presence is not None
        assert presence.last == LastLife(ago=5.0, why="x" * MAX_WHY)
        await nursery.start(presence_module.keep, it.owner, hello(2))
        presence = it.ranks.presence(2)
        assert presence is not None
        assert presence.last is None
        nursery.cancel_scope.cancel()


async def test_a_rank_that_cannot_tell_how_it_ended_is_taken(tmp_path: Path) -> None:
    """Brokers of before know of no `last`, and leave it out; rank 0 of before takes no notice of it."""
    async with instance(tmp_path) as it:
        payload = cast("WireMap", msgspec.to_builtins(hello(1)))
        del payload["last"]
        async with it.owner.stream("resource.hello", payload) as answers:
            assert await answers.__anext__() == {}
            presence = it.ranks.presence(1)
            assert presence is not None
            assert presence.last is None
