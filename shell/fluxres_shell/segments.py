"""Segments: how a journal's records lie in files, and how they are read back.

A journal is the files `journal.<first>` of a shell's directory, `first` being the sequence number of the
segment's first record in 16 digits; they follow each other without a gap. A segment is a row of

    u32 length, u32 crc32 of the payload (both big-endian), payload

and ends where the file ends, or at a header of zeros (room that was allocated ahead). Anything else that is
not a whole, valid record is *torn* (the file ends inside it) or *corrupt* (its checksum or length is wrong):
reading stops there, and `Stop` says where and why. Nothing here ever writes.

Two readers use it: the shell, sending from its own journal, and a broker that reads a dead shell's.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fluxres.base.errors import ProtocolError
from fluxres_shell import records

HEADER: Final = struct.Struct(">II")
PREFIX: Final = "journal."
DIGITS: Final = 16
READ_CHUNK: Final = 64 * 1024
"""Bytes asked of a segment at a time (more only where one record is longer)."""


class StopKind(Enum):
    """Why reading stopped."""

    END = "end"
    TORN = "torn"
    CORRUPT = "corrupt"
    GAP = "gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Where reading stopped: `segment` and the `offset` in it of the first byte that is not a whole record.

    After a GAP, `resume` is the first record behind it: a new reader from there goes on.
    """

    kind: StopKind
    segment: str
    offset: int
    why: str = ""
    resume: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """One record as it is stored: its sequence number and its encoded bytes."""

    seq: int
    payload: bytes


def segment_name(first: int) -> str:
    """The file name of the segment whose first record is `first`."""
    return f"{PREFIX}{first:0{DIGITS}d}"


def list_segments(dirfd: int) -> list[int]:
    """The first sequence numbers of the segments in the directory `dirfd`, ascending."""
    return sorted(
        int(name[len(PREFIX) :])
        for name in os.listdir(dirfd)
        if name.startswith(PREFIX) and len(name) == len(PREFIX) + DIGITS and name[len(PREFIX) :].isdecimal()
    )


def frame_record(payload: bytes) -> bytes:
    """The bytes that store `payload`."""
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


class SegmentReader:
    """A cursor over the journal in the directory `dirfd` (which stays the caller's).

    `next_seq` is the record that `read` returns next; at the end of the journal it is one that a later `read`
    finds when it has been written. Segments deleted meanwhile do no harm while the cursor is inside them.
    """

    def __init__(self, dirfd: int, from_seq: int = 1) -> None:
        """Start at `from_seq`, or where that is not in the journal, at its nearer end."""
        self._dirfd = dirfd
        self._fd = -1
        self._name = ""
        self._offset = 0
        self._buffer = b""
        self._buffer_at = 0
        self.next_seq = from_seq
        self.stop: Stop | None = None
        self._seek(from_seq)

    def close(self) -> None:
        """Give the segment's descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, max_bytes: int) -> list[Stored]:
        """Return the next records, in order, of `max_bytes` payload in all, but at least one where there is
        one.

        An empty list means that there is none now; `stop` then says why. Raises OSError.
        """
        found: list[Stored] = []
        size = 0
        while size < max_bytes:
            payload = self._next_payload(max_bytes - size if found else None)
            if payload is None:
                break
            found.append(Stored(self.next_seq, payload))
            size += len(payload)
            self.next_seq += 1
        return found

    def __iter__(self) -> Iterator[Stored]:
        """Iterate over all records up to where reading stops (see `stop`)."""
        while batch := self.read(READ_CHUNK):
            yield from batch

    def _seek(self, from_seq: int) -> None:
        firsts = list_segments(self._dirfd)
        if not firsts:
            self.stop = Stop(kind=StopKind.END, segment="", offset=0)
            return
        start = max((first for first in firsts if first <= from_seq), default=firsts[0])
        self._open(start)
        self.next_seq = start
        while self.next_seq < from_seq and self._next_payload(None) is not None:
            self.next_seq += 1

    def _open(self, first: int) -> bool:
        try:
            fd = os.open(segment_name(first), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except FileNotFoundError:
            return False
        self.close()
        self._fd, self._name = fd, segment_name(first)
        self._offset = self._buffer_at = 0
        self._buffer = b""
        return True

    def _next_payload(self, max_bytes: int | None) -> bytes | None:
        """The payload at the cursor, which moves past it; None at a stop, or where it exceeds `max_bytes`."""
        while True:
            if self._fd < 0:
                if not self._open(self.next_seq):
                    self._seek(self.next_seq)
                if self._fd < 0:
                    return None
            header = self._bytes(HEADER.size)
            length, checksum = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0)
            if length == 0:
                if self._next_segment(len(header), checksum):
                    continue
                return None
            if length > records.MAX_RECORD:
                self._stopped(StopKind.CORRUPT, f"a length of {length}, beyond {records.MAX_RECORD}")
                return None
            if max_bytes is not None and length > max_bytes:
                return None
            stored = self._bytes(HEADER.size + length)
            if len(stored) < HEADER.size + length:
                self._stopped(StopKind.TORN, f"{len(stored)} of a record's {HEADER.size + length} bytes")
                return None
            payload = stored[HEADER.size :]
            if zlib.crc32(payload) != checksum:
                self._stopped(StopKind.CORRUPT, "a wrong checksum")
                return None
            self._offset += len(stored)
            self.stop = None
            return payload

    def _next_segment(self, header_bytes: int, checksum: int) -> bool:
        """At the end of a segment: go on to the next one, or say why not."""
        if checksum:
            self._stopped(StopKind.CORRUPT, "an empty record")
            return False
        if self._name != segment_name(self.next_seq) and self._open(self.next_seq):
            return True
        if 0 < header_bytes < HEADER.size:
            self._stopped(StopKind.TORN, f"{header_bytes} of a header's {HEADER.size} bytes")
            return False
        later = [first for first in list_segments(self._dirfd) if first > self.next_seq]
        if later:
            why = f"record {self.next_seq} is missing, the next segment begins at {later[0]}"
            self._stopped(StopKind.GAP, why, resume=later[0])
        else:
            self._stopped(StopKind.END, "")
        return False

    def _stopped(self, kind: StopKind, why: str, resume: int = 0) -> None:
        """Note the stop, and drop what is buffered: the file may have grown when reading is tried again."""
        self.stop = Stop(kind=kind, segment=self._name, offset=self._offset, why=why, resume=resume)
        self._buffer = b""

    def _bytes(self, count: int) -> bytes:
        """`count` bytes at the cursor, fewer at the end of the file."""
        start = self._offset - self._buffer_at
        if start + count > len(self._buffer):
            self._buffer = os.pread(self._fd, max(count, READ_CHUNK), self._offset)
            self._buffer_at, start = self._offset, 0
        return self._buffer[start : start + count]


def exit_record(dirfd: int) -> records.ExitRecord | None:
    """The exit record of the journal in `dirfd`, None where it has none that can be read. Raises OSError.

    It is the last record of the journal, so only the last segment that holds any is read.
    """
    for first in reversed(list_segments(dirfd)):
        reader = SegmentReader(dirfd, first)
        try:
            last = deque(reader, maxlen=1)
        finally:
            reader.close()
        if last:
            with contextlib.suppress(ProtocolError):  # whoever takes the records says what is wrong with it
                record = records.decode(last[0].payload)
                return record if isinstance(record, records.ExitRecord) else None
            return None
    return None
