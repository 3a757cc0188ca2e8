"""RFC 11 tree objects, as the payloads of the kvs services have them. Pure.

A tree object is a map `{ver: 1, type, data}`. Values (`val`), directories (`dir`) and links (`symlink`) are what they
are in Flux. There is no content store here, so the references inside a directory (`valref`, `dirref`) are only names
for a state of what they stand for: they have the form of blobrefs (RFC 10), differ when it differs, and cannot be
committed.
"""

from __future__ import annotations

import binascii
import errno
import hashlib
from collections.abc import Mapping
from typing import Final

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import join, normalise, shown
from fluxres.kvs.ops import Append, Link, Mkdir, Op, Put, Unlink
from fluxres.wire.payload import WireMap

VERSION: Final = 1
APPEND: Final = 32
"""FLUX_KVS_APPEND: the flag of an operation that adds to a value."""


def val(data: bytes) -> WireMap:
    """The tree object of a value."""
    return _object("val", binascii.b2a_base64(data, newline=False).decode())


def directory(entries: WireMap) -> WireMap:
    """The tree object of a directory with these tree objects in it, by name."""
    return _object("dir", entries)


def symlink(namespace: str, target: str) -> WireMap:
    """The tree object of a link."""
    return _object("symlink", {"namespace": namespace, "target": target or "."})


def valref(*identity: str | int) -> WireMap:
    """The tree object that stands for a value; `identity` says which one, in which state."""
    return _object("valref", [blobref(*identity)])


def dirref(*identity: str | int) -> WireMap:
    """The tree object that stands for a directory."""
    return _object("dirref", [blobref(*identity)])


def blobref(*identity: str | int) -> str:
    """A reference of the form of RFC 10 to a state that `identity` names."""
    return "sha1-" + hashlib.sha1(repr(identity).encode(), usedforsecurity=False).hexdigest()


def operations(namespace: str, key: str, flags: int, dirent: object, *, guest: bool) -> list[Op]:
    """The operations that one entry of `kvs.commit` asks for: set `key` to the tree object `dirent`, None to unlink.

    A guest may not make links, nor commit directories with something in them, as in Flux.
    Raises RpcError EINVAL (no such flag, no tree object, a reference), EPERM.
    """
    if flags & ~APPEND:
        raise RpcError(errno.EINVAL, f"cannot commit {shown(key)}: its flags {flags} are not known")
    if flags and _type(key, dirent) != "val":
        raise RpcError(errno.EINVAL, f"cannot append to {shown(key)}: what is appended must be a val object")
    return _operations(namespace, key, dirent, guest=guest, append=bool(flags))


def _operations(namespace: str, key: str, dirent: object, *, guest: bool, append: bool = False) -> list[Op]:
    kind = _type(key, dirent)
    data = dirent.get("data") if isinstance(dirent, Mapping) else None
    if kind is None:
        return [Unlink(namespace, key)]
    if kind == "val" and isinstance(data, str):
        return [(Append if append else Put)(namespace, key, _bytes(key, data))]
    if kind == "dir" and isinstance(data, Mapping):
        if data and guest:
            raise RpcError(errno.EPERM, f"cannot commit {shown(key)}: guests may not commit a directory with entries")
        below = [_operations(namespace, _entry(key, name), inner, guest=guest) for name, inner in data.items()]
        return [Mkdir(namespace, key), *(op for ops in below for op in ops)]
    if kind == "symlink" and isinstance(data, Mapping):
        if guest:
            raise RpcError(errno.EPERM, f"cannot commit {shown(key)}: guests may not make links")
        target, target_namespace = data.get("target"), data.get("namespace", namespace)
        if isinstance(target, str) and isinstance(target_namespace, str):
            return [Link(namespace, key, target_namespace, target)]
    if kind in ("valref", "dirref", "hdir"):
        raise RpcError(errno.EINVAL, f"cannot commit {shown(key)}: a {kind} object has no content of its own")
    raise _no_tree_object(key)


def _type(key: str, dirent: object) -> str | None:
    """The type of a tree object, None for None. Raises RpcError EINVAL where it is neither."""
    if dirent is None:
        return None
    kind = dirent.get("type") if isinstance(dirent, Mapping) and dirent.get("ver") == VERSION else None
    if not isinstance(kind, str):
        raise _no_tree_object(key)
    return kind


def _entry(key: str, name: object) -> str:
    if not isinstance(name, str) or "." in name or not name:
        raise _no_tree_object(key)
    return join(normalise(key), name)


def _bytes(key: str, data: str) -> bytes:
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise RpcError(errno.EINVAL, f"cannot commit {shown(key)}: its data is not base64") from error


def _no_tree_object(key: str) -> RpcError:
    return RpcError(errno.EINVAL, f"cannot commit {shown(key)}: its dirent is no tree object of RFC 11")


def _object(kind: str, data: str | list[str] | WireMap) -> WireMap:
    return {"ver": VERSION, "type": kind, "data": list(data) if isinstance(data, list) else data}
