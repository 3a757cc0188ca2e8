"""Watches: waiting for a key of the KVS to change, and reading a value as it grows.

A watch keeps a cursor and reads from the store; nothing is queued for it, so a slow one costs no memory. A
commit wakes only the watches of the keys it changed: each is registered under every key that its own led to
(links), and under the directories above, in which a link may appear or vanish. Everything here happens in
the Trio thread: what is committed after a watch has read is reported to it after it has registered.
"""

from __future__ import annotations

import errno
from collections import deque
from types import TracebackType
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres.kvs.keys import ROOT, shown, split
from fluxres.kvs.ops import Chunk, Kind
from fluxres.kvs.reader import READ_BYTES, Place, Reader
from fluxres.kvs.tree import Touch

MAX_WATCHES: Final = 65_536
"""Watches open at a time."""

Way = tuple[tuple[str, str], ...]


class Watcher:
    """One who waits for changes along a way of keys."""

    def __init__(self, index: WatchIndex) -> None:
        self._index = index
        self._event = trio.Event()
        self.way: Way = ()

    def arm(self) -> None:
        """Forget changes up to now; to be called before what is watched is read."""
        if self._event.is_set():
            self._event = trio.Event()

    def follow(self, way: Way) -> None:
        """Watch the keys of `way` from now on, in place of those before."""
        if way != self.way:
            self._index.place(self, way)

    def wake(self) -> None:
        """Something changed."""
        self._event.set()

    async def changed(self) -> None:
        """Wait for a change after the last `arm`."""
        await self._event.wait()

    def close(self) -> None:
        """Watch nothing any more."""
        self._index.place(self, ())


class WatchIndex:
    """Who watches what: by exact key, and by every directory above it."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], set[Watcher]] = {}
        self._below: dict[tuple[str, str], set[Watcher]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def place(self, watcher: Watcher, way: Way) -> None:
        """Register `watcher` for `way` alone, or, where that is empty, not at all. Raises RpcError EAGAIN."""
        if way and not watcher.way and self._count >= MAX_WATCHES:
            raise RpcError(errno.EAGAIN, f"cannot watch {shown(way[0][1])}: {MAX_WATCHES} watches are open")
        self._count += bool(way) - bool(watcher.way)
        for namespace, key in watcher.way:
            _discard(self._at, (namespace, key), watcher)
            for above in _and_above(key):
                _discard(self._below, (namespace, above), watcher)
        for namespace, key in way:
            self._at.setdefault((namespace, key), set()).add(watcher)
            for above in _and_above(key):
                self._below.setdefault((namespace, above), set()).add(watcher)
        watcher.way = way

    def touch(self, touched: Touch) -> None:
        """Wake whoever watches a place that has changed."""
        watchers = self._below if touched.below else self._at
        for watcher in watchers.get((touched.namespace, touched.key), ()):
            watcher.wake()


class Watch:
    """The chunks of a value, from a cursor on, as they come; made by `Kvs.watch`.

    Iterating gives each chunk once, in order, and then waits for more. A chunk with `first` begins a new
    value (a put): chunks of a value that was replaced before it was read are not seen. A key that does not
    exist, or stops to exist, is waited for. Ends with RpcError: ENOENT when the namespace does not exist or
    is removed, ESTALE when the key leads to another namespace than before, EISDIR.
    """

    def __init__(self, reader: Reader, index: WatchIndex, namespace: str, key: str, after: int) -> None:
        self._reader = reader
        self._watcher = Watcher(index)
        self._namespace = namespace
        self._key = key
        self._after = after
        self._asked_in: int | None = None
        self._found_in: int | None = None
        self._buffer: deque[Chunk] = deque()

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.close()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Chunk:
        if self._buffer:
            await trio.lowlevel.checkpoint()
        else:
            self._buffer.extend(await self.batch())
        return self._buffer.popleft()

    async def batch(self, limit_bytes: int = READ_BYTES) -> list[Chunk]:
        """Wait until there are chunks; returns them, `limit_bytes` of them but at least one."""
        await trio.lowlevel.checkpoint()
        while not (chunks := self.ready(limit_bytes)):
            await self.changed()
        return chunks

    async def changed(self) -> None:
        """Wait until something has changed since the last `ready`: there may be chunks, or there may not."""
        await self._watcher.changed()

    def ready(self, limit_bytes: int = READ_BYTES) -> list[Chunk]:
        """The next chunks, as `batch` would return them, or none where there are none yet."""
        self._watcher.arm()
        with self._reader.snapshot():
            place = self._reader.resolve(self._namespace, self._key)
            self._watcher.follow(place.way)
            self._check(place)
            chunks = self._reader.chunks_at(place, self._after, limit_bytes)
        if chunks:
            self._after = chunks[-1].seq
        return chunks

    def _check(self, place: Place) -> None:
        """See that the key still leads where it led, so that the cursor means the same."""
        asked, found = place.namespaces[0], place.namespaces[-1]
        if asked is None or (found is None and self._found_in is not None):
            gone = place.way[-1 if asked is not None else 0][0]
            raise RpcError(errno.ENOENT, f"cannot watch {shown(self._key)}: there is no namespace {gone}")
        if self._asked_in not in (None, asked):
            raise RpcError(errno.ESTALE, f"cannot watch {shown(self._key)}: its namespace was made anew")
        self._asked_in = asked
        if place.kind is Kind.DIR:
            raise RpcError(errno.EISDIR, f"cannot watch {shown(self._key)}: it is a directory")
        if place.kind is Kind.VALUE:
            if self._found_in not in (None, found):
                raise RpcError(errno.ESTALE, f"cannot watch {shown(self._key)}: it leads to another namespace now")
            self._found_in = found


def _and_above(key: str) -> list[str]:
    """`key` and the directories above it, the root included."""
    found = [key]
    while key != ROOT:
        key, _ = split(key)
        found.append(key)
    return found


def _discard(index: dict[tuple[str, str], set[Watcher]], place: tuple[str, str], watcher: Watcher) -> None:
    watchers = index.get(place)
    if watchers is not None:
        watchers.discard(watcher)
        if not watchers:
            del index[place]
