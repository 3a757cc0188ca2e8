"""The service `kvs-watch`: `kvs-watch.lookup` {key, namespace, flags} -> {val}, streaming (flux_kvs_lookup(3)).

What it sends depends on the flags:

- FLUX_KVS_WATCH: the value, and the value again each time that the key is committed. With _UNIQ or _FULL only when
  it is another value than before; of a directory (_READDIR), when what is in it changes.
- _WATCH with _WATCH_APPEND: the value in parts, then what is appended. EINVAL when it is overwritten. With
  _WATCH_INITIAL_SENTINEL an empty response follows what was there at first.
- _STREAM: the value in parts, then ENODATA.
- neither: the value, once; that is for _WAITCREATE, which waits for a key that does not exist. Without it, and for a
  key that is removed later, the answer is ENOENT.

A watch ends when its namespace is removed (ENOENT), by an error, or when it is cancelled.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

from fluxres.base.errors import RpcError
from fluxres.kvs import treeobj
from fluxres.kvs.keys import shown
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.lookup import MAX_LOOKUP, READDIR, Lookup, Lookups
from fluxres.kvs.ops import Chunk
from fluxres.kvs.reader import Place
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap, pack

WATCH: Final = 4
WAITCREATE: Final = 8
WATCH_FULL: Final = 64
WATCH_UNIQ: Final = 128
WATCH_APPEND: Final = 256
STREAM: Final = 512
WATCH_INITIAL_SENTINEL: Final = 1024
"""Flags of a watch (flux_kvs_lookup(3))."""
NEED_WATCH: Final = WATCH_FULL | WATCH_UNIQ | WATCH_APPEND | WATCH_INITIAL_SENTINEL


class Watching:
    """Serves `kvs-watch.*`."""

    def __init__(self, *, router: Router, kvs: Kvs, lookups: Lookups) -> None:
        self._kvs = kvs
        self._lookups = lookups
        self.service = Service("kvs-watch", router)
        self.service.task("lookup", self._lookup)

    async def _lookup(self, request: Request) -> WireMap | None:
        ask = request.parse(Lookup)
        _check(request, ask)
        await self._wait_create(request, ask)
        if ask.flags & WATCH_APPEND:
            await self._watch_appends(request, ask)
        elif ask.flags & WATCH:
            await self._watch_values(request, ask)
        elif ask.flags & STREAM:
            await self._stream(request, ask)
        else:
            _, value = self._read(request, ask)
            if not request.message.is_streaming:
                return {"val": value}
            await request.stream({"val": value})
        return None

    def _read(self, request: Request, ask: Lookup) -> tuple[Place, WireMap]:
        with self._kvs.snapshot():
            place = self._lookups.find(request, ask)
            return place, self._lookups.tree_object(place, ask)

    async def _wait_create(self, request: Request, ask: Lookup) -> None:
        """Wait until the key exists, with _WAITCREATE; raises RpcError ENOENT without."""
        watcher = self._kvs.watcher()
        try:
            while True:
                watcher.arm()
                place = self._lookups.find(request, ask)
                watcher.follow(place.way)
                if place.kind is not None:
                    return
                if not ask.flags & WAITCREATE:
                    raise _missing(ask)
                await watcher.changed()
        finally:
            watcher.close()

    async def _watch_values(self, request: Request, ask: Lookup) -> None:
        """Send the value each time that it is committed, or, where that was asked for, that it differs."""
        compare = bool(ask.flags & (WATCH_UNIQ | WATCH_FULL | READDIR))
        sent: Place | bytes | None = None
        watcher = self._kvs.watcher()
        try:
            while True:
                watcher.arm()
                with self._kvs.snapshot():
                    place, value = self._read(request, ask)
                    namespace = self._kvs.namespace(place.way[-1][0])
                watcher.follow(place.way)
                state = hashlib.sha256(pack(value)).digest() if compare else place
                if state != sent:
                    sent = state
                    await request.stream({"val": value})
                elif ask.flags & READDIR:
                    await self._kvs.wait_version(namespace.name, namespace.version + 1)
                else:
                    await watcher.changed()
        finally:
            watcher.close()

    async def _watch_appends(self, request: Request, ask: Lookup) -> None:
        """Send the value in parts and then what is appended to it."""
        started = False
        sentinel = bool(ask.flags & WATCH_INITIAL_SENTINEL)
        async with self._kvs.watch(ask.namespace, ask.key) as watch:
            while True:
                with self._kvs.snapshot():
                    place = self._lookups.find(request, ask)
                    chunks = watch.ready()
                if place.kind is None:
                    raise _missing(ask)
                if any(chunk.first for chunk in chunks[0 if started else 1 :]):
                    raise RpcError(errno.EINVAL, f"{shown(ask.key)} was overwritten")
                for part in _parts(chunks):
                    started = True
                    await request.stream({"val": treeobj.val(part)})
                if not chunks:
                    if sentinel:
                        sentinel = False
                        await request.stream({})
                    await watch.changed()

    async def _stream(self, request: Request, ask: Lookup) -> None:
        """Send the value as it is now, in parts."""
        until = self._lookups.find(request, ask).last
        after = 0
        while after < until:
            with self._kvs.snapshot():
                self._lookups.find(request, ask)
                chunks = [chunk for chunk in self._kvs.chunks(ask.namespace, ask.key, after) if chunk.seq <= until]
            if not chunks or (after and chunks[0].first):
                raise RpcError(errno.ESTALE, f"{shown(ask.key)} was overwritten while it was read")
            after = chunks[-1].seq
            for part in _parts(chunks):
                await request.stream({"val": treeobj.val(part)})


def _check(request: Request, ask: Lookup) -> None:
    """Raise RpcError for flags that do not go together, as Flux does."""
    if ask.flags & (WATCH | STREAM) and not request.message.is_streaming:
        raise RpcError(errno.EPROTO, "a watch or stream of a key must be a streaming request")
    if ask.flags & WATCH and ask.flags & STREAM:
        raise RpcError(errno.EINVAL, "cannot watch and stream a key at once")
    if ask.flags & NEED_WATCH and not ask.flags & WATCH:
        raise RpcError(errno.EINVAL, "the flags of a watch need FLUX_KVS_WATCH itself")
    if ask.flags & WATCH_INITIAL_SENTINEL and not ask.flags & WATCH_APPEND:
        raise RpcError(errno.EINVAL, "an initial sentinel needs FLUX_KVS_WATCH_APPEND")


def _missing(ask: Lookup) -> RpcError:
    return RpcError(errno.ENOENT, f"there is no key {shown(ask.key)} in namespace {ask.namespace}")


def _parts(chunks: Sequence[Chunk]) -> Iterator[bytes]:
    """What is in the chunks, in pieces that fit a response."""
    data = b"".join([chunk.data for chunk in chunks])
    for start in range(0, max(len(data), 1 if chunks else 0), MAX_LOOKUP):
        yield data[start : start + MAX_LOOKUP]
