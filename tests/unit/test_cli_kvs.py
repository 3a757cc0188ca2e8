"""fluxres kvs: against a small store that speaks flux-core's kvs services."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from clikit import Run
from fakebroker import Answer, FakeBroker

from fluxres.base.errors import FluxresError
from fluxres.cli.kvs_eventlog import parse_context
from fluxres.cli.kvs_list import columns, fit, join
from fluxres.cli.kvs_object import APPEND, READDIR, READLINK, TREEOBJ, value, value_of
from fluxres.cli.main import main
from fluxres.wire.messages import Message
from fluxres.wire.payload import Wire, WireMap

Tree = dict[str, "bytes | tuple[str | None, str] | Tree"]
"""A directory: values, links (namespace, target) and directories by name."""


class Store:
    """The tree of one namespace, and its version."""

    def __init__(self, broker: FakeBroker) -> None:
        self.root: Tree = {}
        self.version = 0
        self.watched: list[Answer] = []
        broker.handlers["kvs.lookup"] = self.lookup
        broker.handlers["kvs.commit"] = self.commit
        broker.handlers["kvs.getroot"] = self.getroot
        broker.handlers["kvs-watch.lookup"] = lambda _message, _payload: self.watched

    def find(self, key: str) -> object:
        at: object = self.root
        for part in [part for part in key.split(".") if part]:
            at = at.get(part) if isinstance(at, dict) else None
        return at

    def lookup(self, _message: Message, payload: WireMap) -> Iterable[Answer]:
        key, flags = str(payload["key"]), payload["flags"]
        assert isinstance(flags, int)
        found = self.find(key)
        if found is None:
            return [(errno.ENOENT, "No such file or directory")]
        if isinstance(found, dict) and not flags & (READDIR | TREEOBJ):
            return [(errno.EISDIR, "Is a directory")]
        if not isinstance(found, dict) and flags & READDIR:
            return [(errno.ENOTDIR, "Not a directory")]
        if not isinstance(found, tuple) and flags & READLINK:
            return [(errno.EINVAL, "Invalid argument")]
        return [{"val": self.tree_object(found)}]

    def tree_object(self, found: object) -> WireMap:
        if isinstance(found, bytes):
            return value(found)
        if isinstance(found, tuple):
            namespace, target = found
            return {
                "type": "symlink",
                "ver": 1,
                "data": {"target": target, **({"namespace": namespace} if namespace else {})},
            }
        assert isinstance(found, dict)
        entries: dict[str, Wire] = {
            name: {"type": "dirref", "ver": 1, "data": ["x"]} if isinstance(each, dict) else self.tree_object(each)
            for name, each in found.items()
        }
        return {"type": "dir", "ver": 1, "data": entries}

    def commit(self, _message: Message, payload: WireMap) -> Iterable[Answer]:
        operations = payload["ops"]
        assert isinstance(operations, list)
        for each in operations:
            assert isinstance(each, dict)
            *path, name = str(each["key"]).split(".")
            at = self.root
            for part in path:
                inner = at.setdefault(part, {})
                assert isinstance(inner, dict)
                at = inner
            dirent = each["dirent"]
            if dirent is None:
                at.pop(name)
                continue
            assert isinstance(dirent, dict)
            data = dirent["data"]
            if dirent["type"] == "val":
                old = at.get(name, b"") if each["flags"] == APPEND else b""
                assert isinstance(old, bytes)
                at[name] = old + value_of(name, dirent)
            elif dirent["type"] == "dir":
                at[name] = {}
            else:
                assert isinstance(data, dict)
                at[name] = (str(data["namespace"]) if "namespace" in data else None, str(data["target"]))
        self.version += 1
        return [{"rootref": "root", "rootseq": self.version}]

    def getroot(self, _message: Message, _payload: WireMap) -> Iterable[Answer]:
        return [{"owner": 7, "rootref": "root", "rootseq": self.version, "flags": 0}]


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    monkeypatch.delenv("FLUX_KVS_NAMESPACE", raising=False)
    with FakeBroker(tmp_path / "local-0") as made:
        monkeypatch.setenv("FLUXRES_URI", made.uri)
        yield made


@pytest.fixture
def store(broker: FakeBroker) -> Store:
    return Store(broker)


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(["kvs", *argv])
        captured = capfdbinary.readouterr()
        return status, captured.out.decode(), captured.err.decode()

    return runner


def test_put_get_append(run: Run, store: Store) -> None:
    assert run("put", "a.b=1", "c=x=y") == (0, "", "")
    assert run("put", "-s", "empty=") == (0, "2\n", "")
    assert run("get", "a.b", "c", "empty") == (0, "1\nx=y\n", "")
    assert run("append", "c=z") == run("put", "-A", "c=!") == (0, "", "")
    assert run("get", "-l", "-r", "c") == (0, "c=x=yz!", "")
    assert json.loads(run("get", "-t", "c")[1]) == value(b"x=yz!")
    assert store.root == {"a": {"b": b"1"}, "c": b"x=yz!", "empty": b""}


def test_put_from_standard_input(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\0\xff\n")))
    assert run("put", "-r", "a=-")[0] == 0
    assert store.root == {"a": b"\0\xff\n"}


def test_errors(run: Run, store: Store) -> None:
    store.root = {"a": {"b": b"1"}}
    assert run("get", "x") == (1, "", "fluxres-kvs: cannot get x: No such file or directory\n")
    assert run("get", "a") == (1, "", "fluxres-kvs: cannot get a: Is a directory\n")
    assert run("dir", "a.b") == (1, "", "fluxres-kvs: cannot get a.b: Not a directory\n")
    status, _out, err = run("put", "novalue")
    assert status == 2
    assert "cannot put 'novalue': it must be KEY=VALUE (see fluxres-kvs put --help)\n" in err
    assert run("readlink", "a.b") == (1, "", "fluxres-kvs: cannot get a.b: Invalid argument\n")


def test_namespace_option(run: Run, broker: FakeBroker, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run("put", "a=1")
    run("put", "-N", "mine", "a=1")
    monkeypatch.setenv("FLUX_KVS_NAMESPACE", "env")
    run("get", "a")
    run("version")
    assert [payload["namespace"] for _topic, payload in broker.seen] == ["primary", "mine", "env", "env"]
    assert store.version == 2


def test_unlink(run: Run, store: Store) -> None:
    store.root = {"a": {"b": b"1"}, "c": b"2", "d": {}}
    assert run("unlink", "a") == (1, "", "fluxres-kvs: cannot unlink a: Directory not empty (-R removes it all)\n")
    assert run("unlink", "x") == (1, "", "fluxres-kvs: cannot unlink x: No such file or directory\n")
    assert run("unlink", "-f", "x") == (0, "", "")
    assert store.version == 0
    assert run("unlink", "-f", "x", "c", "d") == (0, "", "")
    assert run("unlink", "-R", "a") == (0, "", "")
    assert store.root == {}


def test_links_and_directories(run: Run, store: Store) -> None:
    assert run("mkdir", "d") == run("link", "a.b", "l") == run("link", "-T", "ns", "x", "m") == (0, "", "")
    assert store.root == {"d": {}, "l": (None, "a.b"), "m": ("ns", "x")}
    assert run("readlink", "l", "m") == (0, "a.b\nns::x\n", "")
    assert run("readlink", "-o", "m") == (0, "ns\n", "")
    assert run("readlink", "-k", "m") == (0, "x\n", "")


def test_ls_and_dir(run: Run, store: Store) -> None:
    store.root = {"a": {"b": b"1\n", "e": {}, "f": {"g": b"2"}}, "c": b"hello\nworld", "l": ("ns", "x")}
    assert run("ls", "-w", "80") == (0, "a    c    l\n", "")
    assert run("ls", "-1F") == (0, "a.\nc\nl@\n", "")
    assert run("ls", "-F", "-w", "80", "c", "a") == (0, "c\n\na:\nb     e.    f.\n", "")
    assert run("ls", "-dF", "a") == (0, "a.\n", "")
    assert run("ls", "-R1", "a") == (0, "a:\nb\ne\nf\n\na.e:\n\na.f:\ng\n", "")
    assert run("dir") == (0, "a.\nc = hello...\nl -> ns::x\n", "")
    assert run("dir", "-R") == (0, "a.b = 1\na.e.\na.f.g = 2\nc = hello...\nl -> ns::x\n", "")
    assert run("dir", "-d", "a") == (0, "a.b\na.e.\na.f.\n", "")
    assert run("dir", "-w", "0", "a") == (0, "a.b = 1\n\na.e.\na.f.\n", "")


def test_version_wait_getroot(run: Run, broker: FakeBroker, store: Store) -> None:
    store.version = 4
    broker.on("kvs.wait-version", {"rootref": "root", "rootseq": 4})
    assert run("version") == run("getroot", "-s") == (0, "4\n", "")
    assert run("getroot", "-o") == (0, "7\n", "")
    assert run("getroot") == (0, "root\n", "")
    assert run("wait", "4") == (0, "", "")
    assert broker.seen[-1] == ("kvs.wait-version", {"namespace": "primary", "rootseq": 4})


def test_watch(run: Run, broker: FakeBroker, store: Store) -> None:
    store.watched = [{"val": value(data)} for data in (b"1", b"2", b"3")]
    assert run("watch", "-c", "2", "a") == run("get", "-w", "-c", "2", "a") == (0, "1\n2\n", "")
    store.watched.append((errno.ENOTSUP, "namespace removed"))
    assert run("watch", "-uW", "a") == (1, "1\n2\n3\n", "fluxres-kvs: cannot watch a: namespace removed\n")
    assert [p["flags"] for topic, p in broker.seen if topic == "kvs-watch.lookup"] == [4, 4, 4 | 8 | 128]
    assert run("watch", "a", "b")[0] == 2


def test_namespaces(run: Run, broker: FakeBroker) -> None:
    broker.on("kvs.namespace-create", {})
    broker.on("kvs.namespace-remove", (errno.ENOENT, "no such namespace"))
    broker.on("kvs.namespace-list", {"namespaces": [{"namespace": "primary", "owner": 7, "rootseq": 1, "flags": 0}]})
    assert run("namespace", "create", "-o", "7", "a", "b") == (0, "", "")
    assert [payload for _, payload in broker.seen] == [{"namespace": n, "owner": 7, "flags": 0} for n in "ab"]
    assert run("namespace", "remove", "a")[2] == "fluxres-kvs: cannot remove namespace a: no such namespace\n"
    _status, out, _err = run("namespace", "list")
    assert [line.split() for line in out.splitlines()] == [
        ["NAMESPACE", "OWNER", "FLAGS"],
        ["primary", "7", "0x00000000"],
    ]


def test_eventlog(run: Run, store: Store) -> None:
    assert run("eventlog", "append", "-t", "1.5", "log", "start", "n=1", "s=text")[0] == 0
    assert run("eventlog", "append", "-t", "2", "log", "finish", '{"a": [1]}')[0] == 0
    lines = (
        b'{"timestamp":1.5,"name":"start","context":{"n":1,"s":"text"}}\n',
        b'{"timestamp":2.0,"name":"finish","context":{"a":[1]}}\n',
    )
    assert store.root == {"log": b"".join(lines)}
    assert run("eventlog", "get", "log") == (0, '1.500000 start n=1 s="text"\n2.000000 finish a=[1]\n', "")
    assert run("eventlog", "get", "-u", "-c1", "log") == (0, lines[0].decode(), "")
    store.watched = [{"val": value(lines[0])}, {"val": value(lines[1])}]
    assert run("eventlog", "get", "-w", "-c2", "log")[1].count("\n") == 2
    assert run("eventlog", "wait-event", "log", "finish") == (0, "2.000000 finish a=[1]\n", "")
    assert run("eventlog", "wait-event", "-v", "log", "finish")[1].count("\n") == 2
    assert run("eventlog", "wait-event", "-q", "log", "finish") == (0, "", "")
    assert run("eventlog", "wait-event", "-t", "0.01", "log", "never") == (
        1,
        "",
        "fluxres-kvs: cannot wait for never: it has not come within 0.01\n",
    )


def test_answers_that_make_no_sense(run: Run, broker: FakeBroker) -> None:
    values: list[Wire] = [1, {"type": "val", "data": "?"}, {"type": "val", "data": 1}]
    answers: list[WireMap] = [{}, *({"val": each} for each in values)]
    for answer in answers:
        broker.on("kvs.lookup", answer)
        status, _out, err = run("get", "a")
        assert status == 1
        assert err.startswith("fluxres-kvs: cannot use the broker's answer: ")


# --- pure helpers


@pytest.mark.parametrize(
    ("line", "width", "shown"),
    [
        ("a = 1", 80, "a = 1"),
        ("a = 1\n", 80, "a = 1"),
        ("a = 1\n2", 80, "a = 1..."),
        ("a = " + "x" * 10, 10, "a = xxx..."),
        ("a = \x1b[0m", 80, "a = ..."),
        ("a = 1\n2", 0, "a = 1\n2"),
    ],
)
def test_fit(line: str, width: int, shown: str) -> None:
    assert fit(line, width) == shown


def test_columns() -> None:
    assert columns([], 80) == []
    assert columns(["a", "bb", "c"], 12) == ["a     bb", "c"]
    assert columns(["a", "bb"], 1) == ["a", "bb"]
    assert columns(["a", "bb"], 0) == ["a     bb"]


def test_join() -> None:
    assert [join(".", "a"), join("a", "b"), join("a.b.", "c")] == ["a", "a.b", "a.b.c"]


@pytest.mark.parametrize(
    ("words", "context"),
    [
        ([], {}),
        (["a=1", "b=x", 'c="1"', "d="], {"a": 1, "b": "x", "c": "1", "d": ""}),
        (['{"a":', "1}"], {"a": 1}),
    ],
)
def test_context(words: list[str], context: object) -> None:
    assert parse_context(words) == context


@pytest.mark.parametrize("words", [["a"], ["=1"], ["{no"]])
def test_context_that_is_none(words: list[str]) -> None:
    with pytest.raises(FluxresError, match="cannot use context"):
        parse_context(words)
