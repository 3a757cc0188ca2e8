"""Lookups as the kvs services answer them (flux_kvs_lookup(3)): permission, flags, and the tree object.

A response must fit a frame, so a value has up to `MAX_LOOKUP` bytes and a directory up to `MAX_DIRECTORY` entries,
else EFBIG; longer values are streamed (`fluxres.kvs.watching`).
"""

from __future__ import annotations

import errno
from typing import Final

import msgspec

from fluxres.base.errors import RpcError
from fluxres.kvs import treeobj
from fluxres.kvs.keys import ROOT, join, shown
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, DirEntry, Kind, NamespaceInfo
from fluxres.kvs.reader import Place
from fluxres.rpc.server import Request
from fluxres.wire.payload import WireMap

READDIR: Final = 1
READLINK: Final = 2
TREEOBJ: Final = 16
"""Flags of a lookup (flux_kvs_lookup(3))."""
MAX_LOOKUP: Final = 4 << 20
"""Bytes of a value in one response."""
MAX_DIRECTORY: Final = 20_000
"""Entries of a directory in one response."""


class Lookup(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a key, of `kvs.lookup` and `kvs-watch.lookup`."""

    key: str
    namespace: str = PRIMARY
    flags: int = 0


class Lookups:
    """Reads a key for a request: finds it, sees that the sender may read it, and makes its tree object."""

    def __init__(self, kvs: Kvs) -> None:
        self._kvs = kvs

    def find(self, request: Request, ask: Lookup) -> Place:
        """Where the key leads. Raises RpcError ENOENT where there is no such namespace, EPERM, EINVAL, ELOOP."""
        with self._kvs.snapshot():
            place = self._kvs.resolve(ask.namespace, ask.key, follow=not ask.flags & (READLINK | TREEOBJ))
            if place.namespaces[0] is None:
                raise RpcError(errno.ENOENT, f"there is no namespace {ask.namespace}")
            for namespace, _ in () if request.is_owner else place.way:
                self.authorize(request, namespace)
            return place

    def authorize(self, request: Request, namespace: str) -> NamespaceInfo:
        """The namespace. Raises RpcError ENOENT, and EPERM where the sender may not use it."""
        info = self._kvs.namespace(namespace)
        if not request.is_owner and info.owner != request.userid:
            raise RpcError(errno.EPERM, f"namespace {namespace} belongs to user {info.owner}")
        return info

    def tree_object(self, place: Place, ask: Lookup) -> WireMap:
        """The tree object of what was found, in the same snapshot. Raises RpcError ENOENT, EISDIR, and others."""
        if place.kind is None:
            raise RpcError(errno.ENOENT, f"there is no key {shown(ask.key)} in namespace {ask.namespace}")
        if ask.flags & READLINK and place.kind is not Kind.LINK:
            raise RpcError(errno.EINVAL, f"{shown(ask.key)} is not a link")
        if place.target is not None:
            return treeobj.symlink(*place.target)
        if ask.flags & READDIR:
            return self._directory(place, ask)
        if place.kind is Kind.DIR:
            if ask.flags & TREEOBJ:
                return treeobj.dirref(*place.way[-1])
            raise RpcError(errno.EISDIR, f"{shown(ask.key)} is a directory")
        if place.size > MAX_LOOKUP:
            raise RpcError(
                errno.EFBIG, f"{shown(ask.key)} has {place.size} bytes, {MAX_LOOKUP} fit a response: stream it"
            )
        return treeobj.val(self._kvs.get(*place.way[-1]) or b"")

    def _directory(self, place: Place, ask: Lookup) -> WireMap:
        if place.kind is not Kind.DIR:
            raise RpcError(errno.ENOTDIR, f"{shown(ask.key)} is not a directory")
        namespace, key = place.way[-1]
        entries = self._kvs.list(namespace, key or ".")
        if len(entries) > MAX_DIRECTORY:
            raise RpcError(errno.EFBIG, f"{shown(ask.key)} has {len(entries)} entries, {MAX_DIRECTORY} fit a response")
        return treeobj.directory({entry.name: self._entry(namespace, key, entry) for entry in entries})

    def _entry(self, namespace: str, directory: str, entry: DirEntry) -> WireMap:
        key = join(directory, entry.name)
        if entry.kind is Kind.DIR:
            return treeobj.dirref(namespace, key)
        if entry.kind is Kind.VALUE:
            return treeobj.valref(namespace, key, entry.last)
        target = self._kvs.resolve(namespace, key, follow=False).target
        return treeobj.symlink(*(target or (namespace, ROOT)))
