"""The services `kvs` and `kvs-watch` of rank 0, with the topics and payload keys of flux-core.

- kvs.lookup {key, namespace, flags} -> {val}; kvs.commit {namespace, flags, ops: [{key, flags, dirent}]} ->
  {rootref, rootseq}, answered when it is durable
- kvs.getroot {namespace} -> {owner, rootref, rootseq, flags}; kvs.wait-version {namespace, rootseq} -> {rootref,
  rootseq}
- kvs.namespace-create {namespace, owner}, -remove {namespace}, -list {after, limit} -> {namespaces: [{namespace,
  owner, rootseq, flags}]}; `after` and `limit` are ours: a job has a namespace, so they may be many
- kvs-watch.lookup {key, namespace, flags} -> {val}, streaming: see `fluxres.kvs.watching`

Who may do what (RFC 12): the instance owner everything; a guest reads and writes in the namespaces that belong to it,
and a key whose links lead out of them is EPERM. Namespaces are made and removed by the owner.

`val` is a tree object (`fluxres.kvs.treeobj`).
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from typing import Annotated, Final

import msgspec

from fluxres.base.errors import RpcError
from fluxres.kvs import treeobj
from fluxres.kvs.keys import normalise, shown
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.lookup import Lookup, Lookups
from fluxres.kvs.ops import PRIMARY, CommitResult, CreateNamespace, RemoveNamespace
from fluxres.kvs.watching import Watching
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.messages import USERID_UNKNOWN
from fluxres.wire.payload import WireMap

NAMESPACES_LISTED: Final = 10_000
"""Namespaces in one response."""


class _Operation(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    flags: int = 0
    dirent: dict[str, object] | None


class _Commit(msgspec.Struct, frozen=True, kw_only=True):
    namespace: str = PRIMARY
    flags: int = 0
    """FLUX_KVS_NO_MERGE, _TXN_COMPACT and _SYNC ask for no more than every commit here gives."""
    ops: list[_Operation]


class _Namespace(msgspec.Struct, frozen=True, kw_only=True):
    namespace: str = PRIMARY
    owner: Annotated[int, msgspec.Meta(ge=-1, le=USERID_UNKNOWN)] = USERID_UNKNOWN


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    namespace: str = PRIMARY
    rootseq: int


class _List(msgspec.Struct, frozen=True, kw_only=True):
    after: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=NAMESPACES_LISTED)] = NAMESPACES_LISTED


class KvsService:
    """Serves `kvs.*` and `kvs-watch.*`. Nobody may write below the `reserved` keys of the primary namespace."""

    def __init__(self, *, router: Router, kvs: Kvs, reserved: Collection[str] = (), guests: str | None = None) -> None:
        """`guests` is what the names of namespaces begin with that only the instance makes."""
        self._reserved = frozenset(reserved)
        self._guests = guests
        self._kvs = kvs
        self._lookups = Lookups(kvs)
        self.service = Service("kvs", router)
        self.service.method("lookup", self._lookup)
        self.service.deferred("commit", self._commit)
        self.service.method("getroot", self._getroot)
        self.service.task("wait-version", self._wait_version)
        self.service.task("namespace-create", self._create)
        self.service.task("namespace-remove", self._remove)
        self.service.method("namespace-list", self._list)
        self.all = (self.service, Watching(router=router, kvs=kvs, lookups=self._lookups).service)
        """The services to run."""

    def _lookup(self, request: Request) -> WireMap:
        ask = request.parse(Lookup)
        with self._kvs.snapshot():
            return {"val": self._lookups.tree_object(self._lookups.find(request, ask), ask)}

    def _commit(self, request: Request) -> None:
        ask = request.parse(_Commit)
        info = self._lookups.authorize(request, ask.namespace)
        self._check_reserved(ask)
        ops = [
            op
            for each in ask.ops
            for op in treeobj.operations(ask.namespace, each.key, each.flags, each.dirent, guest=not request.is_owner)
        ]

        def done(result: CommitResult) -> None:
            if request.ended is not None:
                return  # its sender or this service has gone meanwhile
            if result.error is not None:
                request.fail(result.error.errnum, result.error.text)
            else:
                request.respond(_root(ask.namespace, result.versions.get(ask.namespace, info.version)))

        self._kvs.submit(ops, done)

    def _check_reserved(self, ask: _Commit) -> None:
        for each in ask.ops if ask.namespace == PRIMARY else []:
            key = normalise(each.key)
            if (not key and self._reserved) or key.partition(".")[0] in self._reserved:
                raise RpcError(errno.EPERM, f"cannot write {shown(key)}: it is where the instance keeps its jobs")

    def _getroot(self, request: Request) -> WireMap:
        info = self._lookups.authorize(request, request.parse(_Namespace).namespace)
        return {"owner": info.owner, "flags": 0, **_root(info.name, info.version)}

    async def _wait_version(self, request: Request) -> WireMap:
        ask = request.parse(_Version)
        self._lookups.authorize(request, ask.namespace)
        return _root(ask.namespace, await self._kvs.wait_version(ask.namespace, ask.rootseq))

    async def _create(self, request: Request) -> WireMap:
        request.require_owner()
        ask = request.parse(_Namespace)
        if self._guests is not None and ask.namespace.startswith(self._guests):
            raise RpcError(errno.EPERM, f"cannot create namespace {ask.namespace}: the name is for a job's")
        owner = request.userid if ask.owner in (-1, USERID_UNKNOWN) else ask.owner
        await self._kvs.commit(CreateNamespace(ask.namespace, owner))
        return {}

    async def _remove(self, request: Request) -> WireMap:
        request.require_owner()
        try:
            await self._kvs.commit(RemoveNamespace(request.parse(_Namespace).namespace))
        except RpcError as error:
            if error.errnum != errno.ENOENT:  # as in Flux, what is not there can be removed
                raise
        return {}

    def _list(self, request: Request) -> WireMap:
        ask = request.parse(_List)
        found = self._kvs.namespaces(ask.after, ask.limit)
        return {
            "namespaces": [
                {"namespace": info.name, "owner": info.owner, "rootseq": info.version, "flags": 0}
                for info in found
                if request.is_owner or info.owner == request.userid
            ]
        }


def _root(namespace: str, version: int) -> WireMap:
    return {"rootref": treeobj.blobref(namespace, version), "rootseq": version}
