"""The journal's writer: appends a shell's records, never loses a whole one, and knows when to say stop.

Format and reading are in `segments`; DESIGN §9 is the source. What may go wrong, and what is done:

- A shell is killed inside a write: the torn tail is truncated when the journal is opened again.
- A write fails or is short (disk full, quota, I/O error): what it left is truncated back, the records stay
  queued in memory and `stuck` says why. The caller stops producing, and calls `flush` again later.
- The disk is still full when the exit record is due: `flush_into_reserve` writes what is queued into room
  that was allocated before the first task started. Where even that fails, the records remain readable from
  memory.
- The journal grows to `limit`: `full` is true until acknowledgements let segments go. It is advice: the
  caller stops reading pipes, and what it already has is still taken.

Nothing is synced but by `sync`: records outlive the shell without, and the node only with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres_shell.segments import (
    SegmentReader,
    StopKind,
    Stored,
    frame_record,
    list_segments,
    segment_name,
)

RESERVE: Final = "reserve"
"""File that holds room for the exit record; it becomes a segment when it is needed."""
RESERVE_BYTES: Final = 64 * 1024
MIN_SEGMENTS: Final = 4
"""A segment is at most this part of the limit, so that acknowledgements always make room."""
_FILE_MODE: Final = 0o600


class JournalError(FluxresError):
    """A journal that cannot be written on: damaged, or not this shell's."""


class JournalWriter:
    """The only writer of the journal in the directory `dirfd` (which stays the caller's).

    `segment_size` and `limit` are bytes. `add` queues, `flush` writes all that is queued with one write.
    """

    def __init__(self, dirfd: int, *, segment_size: int, limit: int) -> None:
        """Open the journal, truncating a torn tail; the first `flush` creates it where there is none.

        Raises JournalError, OSError.
        """
        self._dirfd = dirfd
        self._segment_size = max(1, min(segment_size, limit // MIN_SEGMENTS))
        self._limit = limit
        self._queue: deque[Stored] = deque()
        self._closed_sizes: dict[int, int] = {}
        self._hole = False
        self.stuck: OSError | None = None
        firsts = list_segments(dirfd)
        self.written = 0
        self._first = 1
        self._fd = -1
        self._size = 0
        if firsts:
            self._reopen(firsts)

    def _reopen(self, firsts: list[int]) -> None:
        reader = SegmentReader(self._dirfd, firsts[0])
        try:
            for _ in reader:
                pass
            stop, last = reader.stop, reader.next_seq - 1
        finally:
            reader.close()
        if stop is None or stop.kind is StopKind.GAP or stop.segment != segment_name(firsts[-1]):
            raise JournalError(f"cannot append to a damaged journal: {stop}")
        for first in firsts[:-1]:
            self._closed_sizes[first] = os.stat(segment_name(first), dir_fd=self._dirfd).st_size
        self._first, self.written, self._size = firsts[-1], last, stop.offset
        self._fd = os.open(stop.segment, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        os.ftruncate(self._fd, self._size)

    def _create_segment(self, first: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._begin_segment(os.open(segment_name(first), flags, _FILE_MODE, dir_fd=self._dirfd), first)

    def _begin_segment(self, fd: int, first: int) -> None:
        if self._fd >= 0:
            if self._first != first:  # else an empty segment of the same name has just been replaced
                self._closed_sizes[self._first] = self._size
            os.close(self._fd)
        self._fd, self._first, self._size, self._hole = fd, first, 0, False

    @property
    def first(self) -> int:
        """The first record that can still be read; `last + 1` where there is none."""
        return min(self._closed_sizes, default=self._first)

    @property
    def last(self) -> int:
        """The last record added, written or still queued; 0 before any."""
        return self._queue[-1].seq if self._queue else self.written

    @property
    def size(self) -> int:
        """Bytes of the journal on disk."""
        return self._size + sum(self._closed_sizes.values())

    @property
    def full(self) -> bool:
        """Whether the journal has reached its limit."""
        return self.size >= self._limit

    def reserve(self) -> None:
        """Allocate the room for the exit record. Raises OSError, after which there is none."""
        fd = os.open(RESERVE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE, dir_fd=self._dirfd)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            os.unlink(RESERVE, dir_fd=self._dirfd)
            raise
        finally:
            os.close(fd)

    def drop_reserve(self) -> None:
        """Give the reserved room back, when the exit record is written without it."""
        with contextlib.suppress(FileNotFoundError):  # it has become a segment, or never was
            os.unlink(RESERVE, dir_fd=self._dirfd)

    def add(self, payload: bytes) -> None:
        """Queue the record `last + 1`, whose encoded bytes are `payload`."""
        self._queue.append(Stored(self.last + 1, payload))

    def flush(self) -> bool:
        """Write what is queued; False, and `stuck` says why, where nothing of it could be written."""
        if not self._queue:
            self.stuck = None
            return True
        try:
            if self._fd < 0 or self._hole or self._size >= self._segment_size:
                self._create_segment(self.written + 1)
            self._write(b"".join([frame_record(stored.payload) for stored in self._queue]))
        except OSError as error:
            self.stuck = error
            return False
        self._drop_queue()
        return True

    def flush_into_reserve(self) -> bool:
        """Write what is queued into the reserved room; False where it does not fit or the room is not there.

        The reserve's blocks are allocated already, so neither writing in it nor renaming it needs new ones.
        """
        data = b"".join([frame_record(stored.payload) for stored in self._queue])
        if len(data) > RESERVE_BYTES:
            return False
        first = self.written + 1
        try:
            fd = os.open(RESERVE, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except OSError as error:
            self.stuck = error
            return False
        try:
            os.rename(RESERVE, segment_name(first), src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
        except OSError as error:
            os.close(fd)
            self.stuck = error
            return False
        self._begin_segment(fd, first)
        try:
            self._write(data)
        except OSError as error:
            self.stuck = error
            return False
        os.ftruncate(fd, self._size)
        self._drop_queue()
        return True

    def _drop_queue(self) -> None:
        self.written = self._queue[-1].seq
        self._queue.clear()
        self.stuck = None

    def _write(self, data: bytes) -> None:
        """Append `data` whole, or leave the segment as it was and raise OSError."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], self._size + done)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += done

    def queued(self, from_seq: int, max_bytes: int) -> list[Stored]:
        """The queued records from `from_seq`, of `max_bytes` in all, but at least one where there is one."""
        found: list[Stored] = []
        size = 0
        for stored in self._queue:
            if stored.seq >= from_seq and (not found or size + len(stored.payload) <= max_bytes):
                found.append(stored)
                size += len(stored.payload)
            elif found:
                break
        return found

    def ack(self, seq: int) -> None:
        """Records up to `seq` are durable elsewhere: delete the segments that hold no other."""
        while self._queue and self._queue[0].seq <= seq:
            # The broker was served from memory (a full disk): these are never written. A segment's
            # records are numbered by their place in it, so what comes after the hole goes to a new one.
            self.written, self._hole = self._queue.popleft().seq, True
        if seq >= self.written and self._size >= self._segment_size:
            with contextlib.suppress(OSError):  # then the next ack, or the next flush, begins the new segment
                self._create_segment(self.written + 1)
        bounds = [*sorted(self._closed_sizes), self._first]
        for first, following in itertools.pairwise(bounds):
            if following - 1 > seq:
                break
            with contextlib.suppress(OSError):  # gone already, or not to be deleted: no record is lost by it
                os.unlink(segment_name(first), dir_fd=self._dirfd)
            del self._closed_sizes[first]

    def sync(self) -> None:
        """Make everything written durable: the segments and the directory. Raises OSError."""
        for first in self._closed_sizes:
            fd = os.open(segment_name(first), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        if self._fd >= 0:
            os.fsync(self._fd)
        os.fsync(self._dirfd)

    def close(self) -> None:
        """Give the segment's descriptor back; what is still queued is lost."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
