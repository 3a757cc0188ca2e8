"""The store against a naive model, and single rules of RFC 11 keys, directories and links."""

from __future__ import annotations

import copy
import errno
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.errors import RpcError
from fluxres.kvs import store as store_module
from fluxres.kvs import tree
from fluxres.kvs.keys import MAX_DEPTH, MAX_KEY, normalise
from fluxres.kvs.ops import (
    PRIMARY,
    Append,
    CreateNamespace,
    Kind,
    Link,
    Mkdir,
    Op,
    Put,
    RemoveNamespace,
    Require,
    Unlink,
)
from fluxres.kvs.reader import Reader
from fluxres.kvs.schema import close_store, open_store
from fluxres.kvs.store import Applied, Store

# --- a store that is quick to make


@contextmanager
def fresh_store() -> Iterator[tuple[Store, Reader, sqlite3.Connection]]:
    with tempfile.TemporaryDirectory() as directory:
        writer, reader = open_store(Path(directory) / "kvs", 1000)
        writer.execute("PRAGMA synchronous = OFF")
        yield Store(writer), Reader(reader), writer
        close_store(writer, reader)


def commit(store: Store, *ops: Op) -> Applied:
    store.begin()
    try:
        return store.apply(ops)
    finally:
        store.commit()


def collect_all(store: Store) -> None:
    while store.garbage:
        store.begin()
        store.collect(3)
        store.commit()


# --- the model: dictionaries within dictionaries


@dataclass
class Value:
    chunks: list[tuple[int, bytes]]


@dataclass
class Symlink:
    namespace: str
    parts: list[str]


Dir = dict[str, "Value | Symlink | Dir"]


@dataclass
class Space:
    version: int = 0
    seq: int = 0
    root: Dir = field(default_factory=dict)


class Model:
    def __init__(self) -> None:
        self.spaces = {PRIMARY: Space()}

    def commit(self, ops: list[Op]) -> dict[str, int]:
        """Apply a commit; raises RpcError and changes nothing, as the store does."""
        before = copy.deepcopy(self.spaces)
        changed: set[str] = set()
        made: set[str] = set()
        try:
            for op in ops:
                self.apply(op, changed, made)
        except RpcError:
            self.spaces = before
            raise
        for name in changed - made:
            self.spaces[name].version += 1
        return {name: self.spaces[name].version for name in changed | made}

    def apply(self, op: Op, changed: set[str], made: set[str]) -> None:
        if isinstance(op, CreateNamespace):
            self.check(op.name not in self.spaces, errno.EEXIST)
            self.spaces[op.name] = Space()
            made.add(op.name)
            return
        if isinstance(op, RemoveNamespace):
            self.check(op.name != PRIMARY, errno.ENOTSUP)
            self.check(op.name in self.spaces, errno.ENOENT)
            del self.spaces[op.name]
            changed.discard(op.name)
            made.discard(op.name)
            return
        self.check(op.namespace in self.spaces, errno.ENOENT)
        space = self.spaces[op.namespace]
        parts = op.key.split(".")
        if isinstance(op, Require):
            where = self.descend(op.namespace, parts, make=False)
            exists = where is not None and where[1] in where[0]
            self.check(not (exists and op.absent), errno.EEXIST)
            self.check(exists or op.absent, errno.ENOENT)
            return
        changed.add(op.namespace)
        where = self.descend(op.namespace, parts, make=not isinstance(op, Unlink))
        if isinstance(op, Unlink):
            if where is not None:
                where[0].pop(where[1], None)
            return
        assert where is not None
        directory, name = where
        if isinstance(op, Put):
            space.seq += 1
            directory[name] = Value([(space.seq, op.data)])
        elif isinstance(op, Mkdir):
            directory[name] = {}
        elif isinstance(op, Link):
            directory[name] = Symlink(op.target_namespace, op.target_key.split("."))
        else:
            there = directory.get(name)
            self.check(not isinstance(there, dict), errno.EISDIR)
            self.check(not isinstance(there, Symlink), errno.EOPNOTSUPP)
            space.seq += 1
            there = directory.setdefault(name, Value([]))
            assert isinstance(there, Value)
            there.chunks.append((space.seq, op.data))

    def descend(self, namespace: str, parts: list[str], *, make: bool) -> tuple[Dir, str] | None:
        """The directory that a commit writes to, and the name in it."""
        for _ in range(tree.MAX_LINKS + 1):
            directory = self.spaces[namespace].root
            for index, part in enumerate(parts[:-1]):
                there = directory.get(part)
                if isinstance(there, Symlink):
                    self.check(there.namespace == namespace, errno.EINVAL)
                    parts = there.parts + parts[index + 1 :]
                    break
                if not isinstance(there, dict):
                    if not make:
                        return None
                    there = directory[part] = {}
                directory = there
            else:
                return directory, parts[-1]
        raise RpcError(errno.ELOOP)

    def find(self, namespace: str, parts: list[str]) -> Value | Dir | None:
        """What a reader finds: links are followed everywhere."""
        for _ in range(tree.MAX_LINKS + 1):
            if namespace not in self.spaces:
                return None
            there: Value | Symlink | Dir = self.spaces[namespace].root
            for index, part in enumerate(parts):
                if not isinstance(there, dict) or part not in there:
                    return None
                there = there[part]
                if isinstance(there, Symlink):
                    namespace, parts = there.namespace, there.parts + parts[index + 1 :]
                    break
            else:
                assert not isinstance(there, Symlink)
                return there
        raise RpcError(errno.ELOOP)

    @staticmethod
    def check(condition: bool, errnum: int) -> None:
        if not condition:
            raise RpcError(errnum)


NAMESPACES = st.sampled_from([PRIMARY, "n1", "n2"])
KEYS = st.lists(st.sampled_from(["a", "b", "c-", "c"]), min_size=1, max_size=4).map(".".join)
DATA = st.binary(max_size=3)
OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(Put, NAMESPACES, KEYS, DATA),
    st.builds(Append, NAMESPACES, KEYS, DATA),
    st.builds(Append, st.just(PRIMARY), KEYS, DATA),
    st.builds(Unlink, NAMESPACES, KEYS),
    st.builds(Mkdir, NAMESPACES, KEYS),
    st.builds(Link, NAMESPACES, KEYS, NAMESPACES, KEYS),
    st.builds(CreateNamespace, st.sampled_from(["n1", "n2"]), st.just(5)),
    st.builds(RemoveNamespace, NAMESPACES),
    st.builds(Require, NAMESPACES, KEYS, st.booleans()),
)


def errnum_of(call: object, *arguments: object) -> object:
    """What a call returns, or the errnum that it raises."""
    assert callable(call)
    try:
        answer: object = call(*arguments)
    except RpcError as error:
        return error.errnum
    return answer


def compare(model: Model, reader: Reader, keys: list[tuple[str, str]]) -> None:
    with reader.snapshot():
        rows = reader._db.execute("SELECT count(*) FROM entry JOIN namespace ON entry.ns = namespace.id").fetchone()
        assert rows[0] == sum(size_of(space.root) for space in model.spaces.values()), "rows that nothing leads to"
        spaces = {info.name: info.version for info in reader.namespaces()}
        assert spaces == {name: space.version for name, space in model.spaces.items()}
        for name, space in model.spaces.items():
            compare_directory(reader, name, "", space.root)
        for namespace, key in keys:
            expected = errnum_of(model.find, namespace, key.split("."))
            found = errnum_of(reader.get, namespace, key)
            if isinstance(expected, Value):
                assert found == b"".join(data for _, data in expected.chunks)
                after = expected.chunks[0][0]
                assert [(chunk.seq, chunk.data) for chunk in reader.chunks(namespace, key, after)] == [
                    (seq, data) for seq, data in expected.chunks if seq > after
                ]
            elif isinstance(expected, dict):
                assert found == errno.EISDIR
                names = reader.list_range(namespace, key, limit=99)
                assert names == sorted(expected, reverse=True)
            elif expected is None:
                assert found == (None if namespace in model.spaces else errno.ENOENT)
            else:
                assert found == expected


def size_of(there: Value | Symlink | Dir) -> int:
    """The number of entries below a node of the model."""
    return sum(1 + size_of(inner) for inner in there.values()) if isinstance(there, dict) else 0


def compare_directory(reader: Reader, namespace: str, key: str, directory: Dir) -> None:
    place = reader.resolve(namespace, key or ".", follow=False)
    assert place.kind is Kind.DIR
    assert [entry.name for entry in reader.entries(namespace, key or ".")] == sorted(directory)
    for name, there in directory.items():
        inner = f"{key}.{name}" if key else name
        found = reader.resolve(namespace, inner, follow=False)
        if isinstance(there, dict):
            compare_directory(reader, namespace, inner, there)
        elif isinstance(there, Symlink):
            assert found.kind is Kind.LINK
            assert found.target == (there.namespace, ".".join(there.parts))
        else:
            assert found.kind is Kind.VALUE
            chunks = reader.chunks(namespace, inner)
            assert [(chunk.seq, chunk.data) for chunk in chunks] == there.chunks
            assert [chunk.first for chunk in chunks] == [True, *[False] * (len(chunks) - 1)]
            assert found.size == sum(len(data) for _, data in there.chunks)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.lists(OPS, max_size=4), max_size=14), st.lists(st.tuples(NAMESPACES, KEYS), max_size=6))
def test_every_commit_does_what_the_model_does(commits: list[list[Op]], keys: list[tuple[str, str]]) -> None:
    model = Model()
    with fresh_store() as (store, reader, _):
        for ops in commits:
            store.begin()
            found = errnum_of(lambda ops=ops: store.apply(ops).versions)
            store.commit()
            assert found == errnum_of(model.commit, ops)
            compare(model, reader, keys)
        collect_all(store)
        compare(model, reader, keys)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(OPS, max_size=4), min_size=1, max_size=10), st.data())
def test_nothing_of_a_rolled_back_transaction_stays(commits: list[list[Op]], data: st.DataObject) -> None:
    model = Model()
    with fresh_store() as (store, reader, _):
        while commits:
            group = commits[: data.draw(st.integers(1, 3))]
            del commits[: len(group)]
            undo = data.draw(st.booleans())
            before = copy.deepcopy(model.spaces)
            store.begin()
            for ops in group:
                found = errnum_of(lambda ops=ops: store.apply(ops).versions)
                assert found == errnum_of(model.commit, ops)
            if undo:
                store.rollback()
                model.spaces = before
            else:
                store.commit()
            compare(model, reader, [])


# --- single rules


def test_chunks_of_removed_values_are_deleted_in_bounded_steps() -> None:
    with fresh_store() as (store, _, db):
        commit(store, CreateNamespace("n1", 5))
        for index in range(30):
            commit(store, Append(PRIMARY, "long", b"x"), Append("n1", f"a.b{index}", b"y"))
        commit(store, Unlink(PRIMARY, "long"), RemoveNamespace("n1"))
        commit(store, CreateNamespace("n1", 6), Put("n1", "a.new", b"z"))
        assert db.execute("SELECT count(*) FROM chunk").fetchone()[0] == 61
        steps = 0
        while store.garbage:
            before = db.total_changes
            store.begin()
            store.collect(10)
            store.commit()
            assert db.total_changes - before <= 25
            steps += 1
        assert steps > 5
        assert db.execute("SELECT count(*) FROM chunk").fetchone()[0] == 1
        assert db.execute("SELECT count(*) FROM entry").fetchone()[0] == 2


def test_garbage_is_found_again_when_the_store_is_opened_anew(tmp_path: Path) -> None:
    connections = open_store(tmp_path / "kvs", 1)
    store = Store(connections[0])
    commit(store, Put(PRIMARY, "a", b"1"), CreateNamespace("n1", 1), Put("n1", "k", b"1"))
    commit(store, Unlink(PRIMARY, "a"), RemoveNamespace("n1"))
    close_store(*connections)
    connections = open_store(tmp_path / "kvs", 1)
    store = Store(connections[0])
    commit(store, CreateNamespace("n1", 1), Put("n1", "k", b"2"), Put(PRIMARY, "a", b"2"))
    collect_all(store)
    reader = Reader(connections[1])
    assert (reader.get("n1", "k"), reader.get(PRIMARY, "a")) == (b"2", b"2")
    close_store(*connections)


def test_a_put_over_a_long_value_replaces_it() -> None:
    with fresh_store() as (store, reader, _):
        for _ in range(tree.INLINE_DELETE + 2):
            commit(store, Append(PRIMARY, "a", b"x"))
        last = reader.resolve(PRIMARY, "a").last
        commit(store, Put(PRIMARY, "a", b"new"))
        (chunk,) = reader.chunks(PRIMARY, "a")
        assert (chunk.data, chunk.first) == (b"new", True)
        assert chunk.seq > last
        collect_all(store)
        assert reader.get(PRIMARY, "a") == b"new"


def test_sequence_numbers_are_not_used_again_after_an_unlink() -> None:
    with fresh_store() as (store, reader, _):
        commit(store, Append(PRIMARY, "a", b"1"), Append(PRIMARY, "a", b"2"))
        last = reader.chunks(PRIMARY, "a")[-1].seq
        commit(store, Unlink(PRIMARY, "a"))
        commit(store, Append(PRIMARY, "a", b"3"))
        assert [chunk.data for chunk in reader.chunks(PRIMARY, "a", last)] == [b"3"]


def test_a_commit_in_more_namespaces_than_are_cached_keeps_their_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "MAX_CACHED_NAMESPACES", 2)
    with fresh_store() as (store, reader, _):
        names = [f"n{index}" for index in range(6)]
        commit(store, *(CreateNamespace(name, 5) for name in names))
        ops = [op for name in names for op in (Put(name, "k", b"1"), Require(PRIMARY, "x"))]
        for version in range(1, 4):
            applied = commit(store, Put(PRIMARY, "y", b""), *ops)
            assert applied.versions == {PRIMARY: version} | dict.fromkeys(names, version)
        assert {info.version for info in reader.namespaces()} == {3}
        assert reader.resolve("n0", "k").last == 3


def test_chunks_are_read_in_parts() -> None:
    with fresh_store() as (store, reader, _):
        for index in range(10):
            commit(store, Append(PRIMARY, "a", bytes([index]) * 10))
        got: list[int] = []
        after = 0
        while chunks := reader.chunks(PRIMARY, "a", after, limit_bytes=25):
            assert len(chunks) <= 3
            after = chunks[-1].seq
            got += [chunk.data[0] for chunk in chunks]
        assert got == list(range(10))
        assert len(reader.chunks(PRIMARY, "a", 0, limit_bytes=1)) == 1


def test_job_ids_are_listed_newest_first_in_parts() -> None:
    with fresh_store() as (store, reader, _):
        ids = [f"{high:04x}.{mid:04x}.0000.{low:04x}" for high in range(2) for mid in range(3) for low in range(4)]
        commit(store, *(Put(PRIMARY, f"job.{jobid}.eventlog", b"x") for jobid in ids), Put(PRIMARY, "job.x", b""))
        got: list[str] = []
        before: str | None = None
        while part := reader.list_range(PRIMARY, "job", before=before, limit=5, depth=4):
            got += part
            before = part[-1]
        assert got == sorted(ids, reverse=True)
        assert reader.list_range(PRIMARY, "nosuch", limit=5) == []


@pytest.mark.parametrize(
    ("key", "normal"),
    [(".", ""), ("..", ""), ("a", "a"), (".a..b.", "a.b"), ("a b.ƒ", "a b.ƒ"), ("a/b.-", "a/b.-")],
)
def test_keys_in_normal_form(key: str, normal: str) -> None:
    assert normalise(key) == normal


@pytest.mark.parametrize("key", ["", "a\0b", "\udc80", "x" * (MAX_KEY + 1), ".".join("a" * (MAX_DEPTH + 1))])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(RpcError, match="cannot use the key") as caught:
        normalise(key)
    assert caught.value.errnum == errno.EINVAL


@pytest.mark.parametrize(
    ("op", "errnum"),
    [
        (Put(PRIMARY, ".", b""), errno.EINVAL),
        (Append(PRIMARY, "", b""), errno.EINVAL),
        (Append(PRIMARY, ".", b""), errno.EINVAL),
        (Unlink(PRIMARY, "."), errno.EINVAL),
        (Mkdir(PRIMARY, "."), errno.EINVAL),
        (Put("", "a", b""), errno.EINVAL),
        (Put("nosuch", "a", b""), errno.ENOENT),
        (Link(PRIMARY, "a", "", "a"), errno.EINVAL),
        (CreateNamespace("x\0", 1), errno.EINVAL),
        (Put(PRIMARY, "a", bytes(tree.MAX_CHUNK + 1)), errno.EFBIG),
        (Append(PRIMARY, "dir", b""), errno.EISDIR),
        (Put(PRIMARY, "loop.x", b""), errno.ELOOP),
        (Put(PRIMARY, "self.x.y", b""), errno.ELOOP),
        (Put(PRIMARY, "away.x", b""), errno.EINVAL),
    ],
)
def test_refused_operations(op: Op, errnum: int) -> None:
    with fresh_store() as (store, reader, _):
        commit(
            store,
            Mkdir(PRIMARY, "dir"),
            Link(PRIMARY, "loop", PRIMARY, "pool"),
            Link(PRIMARY, "pool", PRIMARY, "loop"),
            Link(PRIMARY, "self", PRIMARY, "self"),
            Link(PRIMARY, "away", "n1", "a"),
        )
        with pytest.raises(RpcError, match="cannot") as caught:
            commit(store, Put(PRIMARY, "before", b""), op)
        assert caught.value.errnum == errnum
        assert reader.get(PRIMARY, "before") is None


def test_the_root_of_a_namespace_can_be_linked_to() -> None:
    with fresh_store() as (store, reader, _):
        commit(store, Link(PRIMARY, "job.1.guest", "job-1", "."))
        assert reader.get(PRIMARY, "job.1.guest.exec.eventlog") is None
        commit(store, CreateNamespace("job-1", 5), Append("job-1", "exec.eventlog", b"init"))
        assert reader.get(PRIMARY, "job.1.guest.exec.eventlog") == b"init"
        assert [entry.name for entry in reader.entries(PRIMARY, "job.1.guest")] == ["exec"]
        commit(store, RemoveNamespace("job-1"))
        assert reader.get(PRIMARY, "job.1.guest.exec.eventlog") is None


def test_reading_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxres.kvs.reader.MAX_VALUE", 3)
    monkeypatch.setattr("fluxres.kvs.reader.MAX_LISTED", 1)
    with fresh_store() as (store, reader, db):
        commit(store, Put(PRIMARY, "d.long", b"1234"), Put(PRIMARY, "d.b", b"123"))
        for call, errnum in [
            (lambda: reader.get(PRIMARY, "d.long"), errno.EFBIG),
            (lambda: reader.get("nosuch", "d"), errno.ENOENT),
            (lambda: reader.entries(PRIMARY, "d"), errno.EFBIG),
            (lambda: reader.entries(PRIMARY, "d.b"), errno.ENOTDIR),
            (lambda: reader.entries(PRIMARY, "e"), errno.ENOENT),
            (lambda: reader.chunks(PRIMARY, "d"), errno.EISDIR),
        ]:
            assert errnum_of(call) == errnum
        assert reader.get(PRIMARY, "d.b") == b"123"
        db.execute("DROP TABLE chunk")
        assert errnum_of(reader.get, PRIMARY, "d.b") == errno.EIO
