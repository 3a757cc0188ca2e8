"""The kvs and kvs-watch services: payloads as flux-core's commands send them, permissions, watches."""

from __future__ import annotations

import errno
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from kvskit import OWNER, running_kvs

from fluxres.base.errors import RpcError
from fluxres.kvs import lookup, watching
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Append, CreateNamespace, Link, Mkdir, Put, RemoveNamespace, Unlink
from fluxres.kvs.service import KvsService
from fluxres.rpc.handle import Handle, ResponseStream
from fluxres.rpc.router import Router
from fluxres.wire.messages import Message, Role
from fluxres.wire.payload import Wire, WireMap

GUEST = 2000
W = watching.WATCH
LIMIT = 30.0
"""Seconds that any wait of these tests may take."""


class GuestHandle(Handle):
    """A handle whose requests come from a user who is not the owner."""

    def _send(self, message: Message) -> None:
        self._router.request(message._replace(route=(self._id,), userid=GUEST, rolemask=int(Role.USER | Role.LOCAL)))


@dataclass
class Instance:
    """The services of one broker, and two who call them."""

    kvs: Kvs
    owner: Handle
    guest: Handle

    async def lookup(self, key: str, flags: int = 0, namespace: str = PRIMARY) -> Wire:
        reply = await self.owner.call("kvs.lookup", {"key": key, "namespace": namespace, "flags": flags})
        assert list(reply) == ["val"]
        return reply["val"]

    async def commit(self, *ops: WireMap, by: Handle | None = None, namespace: str = PRIMARY) -> WireMap:
        return await (by or self.owner).call("kvs.commit", {"namespace": namespace, "flags": 0, "ops": list(ops)})


@asynccontextmanager
async def instance(path: Path) -> AsyncIterator[Instance]:
    async with running_kvs(path / "kvs") as kvs, trio.open_nursery() as nursery:
        router = Router(rank=0, size=1)
        for service in KvsService(router=router, kvs=kvs).all:
            await nursery.start(service.run)
        yield Instance(kvs, Handle(router, "owner", OWNER), GuestHandle(router, "guest", GUEST))
        nursery.cancel_scope.cancel()


def val(data: bytes) -> WireMap:
    return {"ver": 1, "type": "val", "data": b64encode(data).decode()}


def op(key: str, dirent: WireMap | None, flags: int = 0) -> WireMap:
    return {"key": key, "flags": flags, "dirent": dirent}


def link(target: str, **more: str) -> WireMap:
    return {"ver": 1, "type": "symlink", "data": {"target": target, **more}}


def directory(**entries: WireMap) -> WireMap:
    return {"ver": 1, "type": "dir", "data": dict(entries)}


async def errnum_of(call: object, *arguments: object, **more: object) -> int:
    """The errnum with which a call fails."""
    assert callable(call)
    with pytest.raises(RpcError) as caught:
        await call(*arguments, **more)
    assert caught.value.text
    return caught.value.errnum


# --- commits and lookups


async def test_commits_and_lookups(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        first = await broker.commit(op("a.b", val(b"1")), op("a.b", val(b"2"), 32), op("d", directory()))
        assert first.keys() == {"rootref", "rootseq"}
        assert first["rootseq"] == 1
        await broker.commit(op("l", link("a")), op("other", link("x", namespace="n1")))
        nested = directory(x=val(b"x"), y=directory(z=val(b"")), l=link("e.x"))
        second = await broker.commit(op("e", nested))
        assert second["rootseq"] == 3
        assert second["rootref"] != first["rootref"]
        assert await broker.lookup("a.b") == await broker.lookup("l.b") == val(b"12")
        assert await broker.lookup("e.l") == val(b"x")
        assert await broker.lookup("e.y.z") == val(b"")
        assert await broker.lookup("l", lookup.READLINK) == link("a", namespace=PRIMARY)
        assert await broker.lookup("other", lookup.TREEOBJ) == link("x", namespace="n1")
        assert await broker.lookup("a.b", lookup.TREEOBJ) == val(b"12")
        root = await broker.lookup(".", lookup.READDIR)
        assert isinstance(root, dict)
        assert isinstance(root["data"], dict)
        types = {name: entry["type"] for name, entry in root["data"].items() if isinstance(entry, dict)}
        assert types == {"a": "dirref", "d": "dirref", "e": "dirref", "l": "symlink", "other": "symlink"}
        entries = await broker.lookup("l", lookup.READDIR)
        await broker.commit(op("a.b", val(b"3")))
        changed = await broker.lookup("l", lookup.READDIR)
        assert entries != changed
        json.dumps([root, entries])
        assert (await broker.commit())["rootseq"] == 4
        await broker.commit(op("a", None), op("nosuch", None))
        assert await errnum_of(broker.lookup, "a.b") == errno.ENOENT


@pytest.mark.parametrize(
    ("key", "flags", "errnum"),
    [
        ("nosuch", 0, errno.ENOENT),
        ("dir", 0, errno.EISDIR),
        ("a", lookup.READDIR, errno.ENOTDIR),
        ("a", lookup.READLINK, errno.EINVAL),
        ("loop", 0, errno.ELOOP),
        ("", 0, errno.EINVAL),
        ("away", 0, errno.ENOENT),
    ],
)
async def test_lookups_that_fail(tmp_path: Path, key: str, flags: int, errnum: int) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(
            Put(PRIMARY, "a", b"1"),
            Mkdir(PRIMARY, "dir"),
            Link(PRIMARY, "loop", PRIMARY, "loop"),
            Link(PRIMARY, "away", "nosuch", "a"),
        )
        assert await errnum_of(broker.lookup, key, flags) == errnum
        assert await errnum_of(broker.lookup, "a", namespace="nosuch") == errno.ENOENT


@pytest.mark.parametrize(
    ("bad", "errnum"),
    [
        (op("", val(b"")), errno.EINVAL),
        (op("a", val(b""), 64), errno.EINVAL),
        (op("a", None, 32), errno.EINVAL),
        (op("a", {"ver": 1, "type": "val", "data": "%%"}), errno.EINVAL),
        (op("a", {"ver": 1, "type": "val", "data": {}}), errno.EINVAL),
        (op("a", {"ver": 2, "type": "val", "data": ""}), errno.EINVAL),
        (op("a", {"ver": 1, "type": "valref", "data": ["sha1-00"]}), errno.EINVAL),
        (op("a", {"ver": 1, "type": "symlink", "data": {}}), errno.EINVAL),
        (op("a", directory(**{"x.y": val(b"")})), errno.EINVAL),
        (op("a", {}), errno.EINVAL),
        ({"key": "a", "flags": 0}, errno.EPROTO),
        ({"key": 7, "flags": 0, "dirent": None}, errno.EPROTO),
        (op("keep", val(b"x"), 0) | {"key": "x\0"}, errno.EINVAL),
    ],
)
async def test_commits_that_fail_change_nothing(tmp_path: Path, bad: WireMap, errnum: int) -> None:
    async with instance(tmp_path) as broker:
        assert await errnum_of(broker.commit, op("first", val(b"1")), bad) == errnum
        assert await errnum_of(broker.commit, op("a", val(b"1")), namespace="nosuch") == errno.ENOENT
        assert broker.kvs.list(PRIMARY, ".") == []


async def test_what_does_not_fit_a_response_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MAX_LOOKUP", 10)
    monkeypatch.setattr(watching, "MAX_LOOKUP", 10)
    monkeypatch.setattr(lookup, "MAX_DIRECTORY", 1)
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(*(Append(PRIMARY, "a", bytes([48 + n]) * 7) for n in range(6)), Put(PRIMARY, "b", b""))
        assert await errnum_of(broker.lookup, "a") == errno.EFBIG
        assert await errnum_of(broker.lookup, ".", lookup.READDIR) == errno.EFBIG
        parts = [reply async for reply in stream(broker.owner, "a", watching.STREAM)]
        assert b"".join(data_of(part) for part in parts) == broker.kvs.get(PRIMARY, "a")
        assert max(len(data_of(part)) for part in parts) == 10
        assert [data_of(part) async for part in stream(broker.owner, "b", watching.STREAM)] == [b""]


# --- namespaces


async def test_namespaces_and_versions(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        call = broker.owner.call
        await call("kvs.namespace-create", {"namespace": "n1", "owner": GUEST, "flags": 0})
        await call("kvs.namespace-create", {"namespace": "n2", "owner": 0xFFFFFFFF, "flags": 0})
        assert await errnum_of(call, "kvs.namespace-create", {"namespace": "n1", "owner": 1}) == errno.EEXIST
        root = await call("kvs.getroot", {"namespace": "n1", "flags": 0})
        assert {**root, "rootref": ""} == {"owner": GUEST, "rootref": "", "rootseq": 0, "flags": 0}
        versions: list[Wire] = []

        async def wait() -> None:
            versions.append((await call("kvs.wait-version", {"namespace": "n1", "rootseq": 2}))["rootseq"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await broker.commit(op("a", val(b"1")), namespace="n1")
            await trio.testing.wait_all_tasks_blocked()
            assert versions == []
            await broker.commit(op("a", val(b"1")), namespace="n1")
        assert versions == [2]
        listed = await call("kvs.namespace-list", {})
        assert listed["namespaces"] == [
            {"namespace": "n1", "owner": GUEST, "rootseq": 2, "flags": 0},
            {"namespace": "n2", "owner": OWNER, "rootseq": 0, "flags": 0},
            {"namespace": PRIMARY, "owner": OWNER, "rootseq": 0, "flags": 0},
        ]
        part = await call("kvs.namespace-list", {"after": "n1", "limit": 1})
        assert isinstance(part["namespaces"], list)
        assert [each["namespace"] for each in part["namespaces"] if isinstance(each, dict)] == ["n2"]
        for _ in range(2):  # what is not there is removed too, as in Flux
            await call("kvs.namespace-remove", {"namespace": "n1"})
        assert await errnum_of(call, "kvs.getroot", {"namespace": "n1"}) == errno.ENOENT
        assert await errnum_of(call, "kvs.namespace-remove", {"namespace": PRIMARY}) == errno.ENOTSUP


async def test_a_guest_has_its_own_namespaces_and_no_others(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(
            CreateNamespace("mine", GUEST),
            CreateNamespace("theirs", OWNER),
            Put("theirs", "a", b"secret"),
            Link("mine", "l", "theirs", "."),
            Link("theirs", "l", "mine", "."),
        )
        guest = broker.guest
        await broker.commit(op("a", val(b"1")), op("d", directory()), op("x", None), by=guest, namespace="mine")
        assert (await guest.call("kvs.lookup", {"key": "a", "namespace": "mine", "flags": 0}))["val"] == val(b"1")
        await guest.call("kvs.getroot", {"namespace": "mine"})
        listed = await guest.call("kvs.namespace-list", {})
        assert isinstance(listed["namespaces"], list)
        assert len(listed["namespaces"]) == 1
        for topic, payload in [
            ("kvs.lookup", {"key": "a", "namespace": "theirs", "flags": 0}),
            ("kvs.lookup", {"key": "a", "namespace": PRIMARY, "flags": 0}),
            ("kvs.lookup", {"key": "l.a", "namespace": "mine", "flags": 0}),
            ("kvs.lookup", {"key": "l.a", "namespace": "theirs", "flags": 0}),
            ("kvs.lookup", {"key": "l", "namespace": "mine", "flags": lookup.READDIR}),
            ("kvs.commit", {"namespace": PRIMARY, "flags": 0, "ops": [op("a", val(b""))]}),
            ("kvs.commit", {"namespace": "mine", "flags": 0, "ops": [op("k", link("a"))]}),
            ("kvs.commit", {"namespace": "mine", "flags": 0, "ops": [op("k", directory(a=val(b"")))]}),
            ("kvs.getroot", {"namespace": PRIMARY}),
            ("kvs.wait-version", {"namespace": PRIMARY, "rootseq": 0}),
            ("kvs.namespace-create", {"namespace": "new", "owner": GUEST}),
            ("kvs.namespace-remove", {"namespace": "mine"}),
        ]:
            assert await errnum_of(guest.call, topic, payload) == errno.EPERM, (topic, payload)
        for key, namespace in [("l.a", "mine"), ("a", PRIMARY)]:
            for flags in (W, W | watching.WATCH_APPEND, watching.STREAM, watching.WAITCREATE):
                with pytest.raises(RpcError) as caught:
                    _ = [reply async for reply in stream(guest, key, flags, namespace)]
                assert caught.value.errnum == errno.EPERM
        assert broker.kvs.get("mine", "k") is None


# --- watches


async def stream(handle: Handle, key: str, flags: int, namespace: str = PRIMARY) -> AsyncIterator[WireMap]:
    async with watch(handle, key, flags, namespace) as replies:
        async for reply in replies:
            yield reply


@asynccontextmanager
async def watch(handle: Handle, key: str, flags: int, namespace: str = PRIMARY) -> AsyncIterator[ResponseStream]:
    payload: WireMap = {"key": key, "namespace": namespace, "flags": flags}
    with trio.fail_after(LIMIT):
        async with handle.stream("kvs-watch.lookup", payload) as replies:
            yield replies


def data_of(reply: WireMap) -> bytes:
    found = reply["val"]
    assert isinstance(found, dict)
    assert found["type"] == "val"
    return b64decode(str(found["data"]))


async def next_data(replies: ResponseStream) -> bytes:
    return data_of(await replies.__anext__())


async def ends_with(replies: ResponseStream) -> int:
    """The errnum with which a stream ends, nothing coming before it."""
    with pytest.raises(RpcError) as caught:
        await replies.__anext__()
    return caught.value.errnum


async def test_a_watch_sends_the_value_each_time_it_is_committed(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(Put(PRIMARY, "a", b"1"))
        async with watch(broker.owner, "a", W) as every, watch(broker.owner, "a", W | watching.WATCH_UNIQ) as uniq:
            assert await next_data(every) == await next_data(uniq) == b"1"
            await broker.kvs.commit(Put(PRIMARY, "a", b"1"))
            assert await next_data(every) == b"1"
            await broker.kvs.commit(Put(PRIMARY, "b", b"1"))
            await broker.kvs.commit(Append(PRIMARY, "a", b"2"))
            assert await next_data(every) == await next_data(uniq) == b"12"
            await broker.kvs.commit(Unlink(PRIMARY, "a"))
            assert await ends_with(every) == await ends_with(uniq) == errno.ENOENT


async def test_a_watch_of_appends(tmp_path: Path) -> None:
    flags = W | watching.WATCH_APPEND | watching.WATCH_INITIAL_SENTINEL
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(Append(PRIMARY, "a", b"1"), Append(PRIMARY, "a", b"2"))
        async with watch(broker.owner, "a", flags) as replies:
            assert await next_data(replies) == b"12"
            assert await replies.__anext__() == {}
            await broker.kvs.commit(Append(PRIMARY, "a", b"3"))
            assert await next_data(replies) == b"3"
            await broker.kvs.commit(Put(PRIMARY, "a", b"4"))
            assert await ends_with(replies) == errno.EINVAL
        async with watch(broker.owner, "a", W | watching.WATCH_APPEND) as replies:
            assert await next_data(replies) == b"4"
            await broker.kvs.commit(Unlink(PRIMARY, "a"))
            assert await ends_with(replies) == errno.ENOENT


@pytest.mark.parametrize("flags", [W, W | watching.WATCH_APPEND, 0, watching.STREAM])
async def test_waiting_for_a_key_to_be_made(tmp_path: Path, flags: int) -> None:
    async with instance(tmp_path) as broker:
        async with watch(broker.owner, "g.a", flags) as replies:
            assert await ends_with(replies) == errno.ENOENT
        await broker.kvs.commit(Link(PRIMARY, "g", "n1", "."))
        async with watch(broker.owner, "g.a", flags | watching.WAITCREATE) as replies:
            await trio.testing.wait_all_tasks_blocked()
            await broker.kvs.commit(CreateNamespace("n1", OWNER), Put(PRIMARY, "x", b""))
            await broker.kvs.commit(Put("n1", "a", b"1"))
            assert await next_data(replies) == b"1"
            if not flags & W:
                with pytest.raises(StopAsyncIteration):
                    await replies.__anext__()


async def test_a_watch_of_a_directory(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(Mkdir(PRIMARY, "d"))
        async with watch(broker.owner, "d", W | lookup.READDIR) as replies:
            assert (await replies.__anext__())["val"] == directory()
            await broker.kvs.commit(Put(PRIMARY, "e", b""))
            await broker.kvs.commit(Put(PRIMARY, "d.x", b""))
            found = (await replies.__anext__())["val"]
            assert isinstance(found, dict)
            assert isinstance(found["data"], dict)
            assert list(found["data"]) == ["x"]


async def test_a_watch_ends_with_its_namespace(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(CreateNamespace("n1", OWNER), Put("n1", "a", b"1"))
        for flags in (W, W | watching.WATCH_APPEND):
            async with watch(broker.owner, "a", flags, "n1") as replies:
                assert await next_data(replies) == b"1"
                await broker.kvs.commit(RemoveNamespace("n1"))
                assert await ends_with(replies) == errno.ENOENT
            await broker.kvs.commit(CreateNamespace("n1", OWNER), Put("n1", "a", b"1"))


async def test_a_watch_that_is_left_leaves_nothing_behind(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(Put(PRIMARY, "a", b"1"))
        async with watch(broker.owner, "a", W) as replies:
            await replies.__anext__()
            await trio.testing.wait_all_tasks_blocked()
            assert len(broker.kvs._index) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert len(broker.kvs._index) == 0


@pytest.mark.parametrize(
    ("flags", "errnum"),
    [
        (W | watching.STREAM, errno.EINVAL),
        (watching.WATCH_UNIQ, errno.EINVAL),
        (W | watching.WATCH_INITIAL_SENTINEL, errno.EINVAL),
    ],
)
async def test_flags_that_do_not_go_together(tmp_path: Path, flags: int, errnum: int) -> None:
    async with instance(tmp_path) as broker:
        async with watch(broker.owner, "a", flags) as replies:
            assert await ends_with(replies) == errnum
        payload: WireMap = {"key": "a", "namespace": PRIMARY, "flags": W}
        assert await errnum_of(broker.owner.call, "kvs-watch.lookup", payload) == errno.EPROTO


async def test_a_lookup_may_wait_without_a_stream(tmp_path: Path) -> None:
    async with instance(tmp_path) as broker:
        await broker.kvs.commit(Put(PRIMARY, "a", b"1"))
        payload: WireMap = {"key": "a", "namespace": PRIMARY, "flags": watching.WAITCREATE}
        assert await broker.owner.call("kvs-watch.lookup", payload) == {"val": val(b"1")}
