"""The KVS as it is on the wire (RFC 11 tree objects, flux-core's kvs services), for `fluxres kvs`.

A tree object is a map `{ver: 1, type, data}`: a `val` holds base64, a `dir` the objects of its entries by
name, a `symlink` its target and perhaps a namespace. The reference types (`valref`, `dirref`) stand for what
is kept elsewhere; they are asked for by their key.
"""

from __future__ import annotations

import binascii
import errno
import os
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, ProtocolError
from fluxres.cli.common import Explain, field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fluxres.client import Client
    from fluxres.wire.payload import WireMap

READDIR, READLINK, WATCH, WAITCREATE, TREEOBJ, APPEND = 1, 2, 4, 8, 16, 32
WATCH_FULL, WATCH_UNIQ, WATCH_APPEND = 64, 128, 256
"""Flags of kvs.lookup, kvs-watch.lookup and (APPEND) of an operation of kvs.commit."""
PRIMARY: Final = "primary"


class Kvs:
    """One namespace, as a client sees it. All methods raise FluxresError: `cannot X: why`."""

    def __init__(self, client: Client, namespace: str | None) -> None:
        """Use `namespace`, else FLUX_KVS_NAMESPACE, else the primary one."""
        self.client = client
        self.namespace = namespace or os.environ.get("FLUX_KVS_NAMESPACE") or PRIMARY

    def lookup(self, key: str, flags: int = 0) -> WireMap:
        """The tree object of `key`."""
        with Explain(f"get {key}"):
            return tree_object(self.client.call("kvs.lookup", self._request(key, flags)))

    def get(self, key: str) -> bytes:
        """The value of `key`."""
        return value_of(key, self.lookup(key))

    def directory(self, key: str) -> dict[str, WireMap]:
        """The entries of a directory by name; their values are not in them."""
        found = self.lookup(key, READDIR)
        if found.get("type") != "dir":
            raise FluxresError(f"cannot list {key}: {os.strerror(errno.ENOTDIR)}")
        entries = field(found, "data", dict)
        return {str(name): _checked(entries[name]) for name in sorted(entries)}

    def watch(self, key: str, flags: int) -> Iterator[WireMap]:
        """The tree object of `key` now, and each time that it changes."""
        with Explain(f"watch {key}"):
            for reply in self.client.stream("kvs-watch.lookup", self._request(key, flags | WATCH)):
                yield tree_object(reply)

    def commit(self, what: str, operations: list[WireMap]) -> int:
        """Make changes, all or none; returns the namespace's new version. `what` names them in errors."""
        payload: WireMap = {"namespace": self.namespace, "flags": 0, "ops": list(operations)}
        with Explain(what):
            return field(self.client.call("kvs.commit", payload), "rootseq", int)

    def root(self) -> WireMap:
        """The answer to kvs.getroot: owner, rootref, rootseq, flags."""
        with Explain(f"find namespace {self.namespace}"):
            return self.client.call("kvs.getroot", {"namespace": self.namespace})

    def _request(self, key: str, flags: int) -> WireMap:
        return {"key": key, "namespace": self.namespace, "flags": flags}


def operation(key: str, dirent: WireMap | None, flags: int = 0) -> WireMap:
    """One operation of a commit: put the tree object `dirent` at `key`, or unlink `key` where it is None."""
    return {"key": key, "flags": flags, "dirent": dirent}


def value(data: bytes) -> WireMap:
    """The tree object of a value."""
    return {"ver": 1, "type": "val", "data": binascii.b2a_base64(data, newline=False).decode()}


def empty_directory() -> WireMap:
    """The tree object of an empty directory."""
    return {"ver": 1, "type": "dir", "data": {}}


def symlink(target: str, namespace: str | None) -> WireMap:
    """The tree object of a symbolic link."""
    data: WireMap = {"target": target}
    if namespace is not None:
        data["namespace"] = namespace
    return {"ver": 1, "type": "symlink", "data": data}


def tree_object(reply: WireMap) -> WireMap:
    """The tree object in a lookup's answer. Raises ProtocolError."""
    return _checked(reply.get("val"))


def value_of(key: str, found: WireMap) -> bytes:
    """The bytes of a value. Raises FluxresError where the tree object is something else."""
    kind = field(found, "type", str)
    if kind != "val":
        why = os.strerror(errno.EISDIR) if kind in ("dir", "dirref") else f"it is a {kind}"
        raise FluxresError(f"cannot get {key}: {why}")
    try:
        return binascii.a2b_base64(field(found, "data", str), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"cannot use the broker's answer: the value of {key} is no base64") from error


def link_of(found: WireMap) -> tuple[str | None, str]:
    """Namespace (None: the link's own) and target of a symbolic link. Raises FluxresError if it is none."""
    if found.get("type") != "symlink":
        raise FluxresError(f"cannot read the link: it is a {field(found, 'type', str)}")
    data = field(found, "data", dict)
    namespace = data.get("namespace")
    return namespace if isinstance(namespace, str) else None, field(data, "target", str)


def show_link(found: WireMap) -> str:
    """A symbolic link's target, as `NAMESPACE::KEY` where it has a namespace."""
    namespace, target = link_of(found)
    return target if namespace is None else f"{namespace}::{target}"


def _checked(found: object) -> WireMap:
    if not isinstance(found, dict) or not isinstance(found.get("type"), str):
        raise ProtocolError("cannot use the broker's answer: it holds no tree object")
    return found
