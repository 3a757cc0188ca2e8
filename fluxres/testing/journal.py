"""A shell's journal in memory: the real records.

Those that are acknowledged go at once, all but the last one, so that an acknowledgement that comes too early shows. A
node that loses its power loses what was not synced.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from fluxres.base.errors import ProtocolError
from fluxres.exec.host import Records
from fluxres_shell import records

BATCH_BYTES: Final = 128 * 1024
"""Bytes of records that are read at a time."""


class Journal:
    """The records of one shell, encoded. `limit` is the bytes from which on it is full."""

    def __init__(self, limit: int) -> None:
        self.first = 1
        """The first record that is still there; `last + 1` where there is none."""
        self._records: list[bytes] = []
        self._size = 0
        self._limit = limit
        self._synced = 0

    @property
    def last(self) -> int:
        """The number of the last record, 0 where there was none yet."""
        return self.first + len(self._records) - 1

    @property
    def full(self) -> bool:
        """Whether it takes nothing more for now."""
        return self._size >= self._limit

    def add(self, payload: bytes) -> None:
        """Append a record."""
        self._records.append(payload)
        self._size += len(payload)

    def read(self, from_seq: int, max_bytes: int) -> list[bytes]:
        """Records from `from_seq` on, of `max_bytes` at most, but one at least where there is one."""
        batch: list[bytes] = []
        size = 0
        for payload in self._records[max(0, from_seq - self.first) :]:
            size += len(payload)
            if batch and size > max_bytes:
                break
            batch.append(payload)
        return batch

    def pieces(self, from_seq: int) -> Generator[Records, None, None]:
        """All records from `from_seq` on, in pieces."""
        seq = max(from_seq, self.first)
        while batch := self.read(seq, BATCH_BYTES):
            yield Records(seq, batch)
            seq += len(batch)

    def ack(self, seq: int) -> None:
        """Records up to `seq` are durable elsewhere."""
        going = max(0, min(seq, self.last - 1) + 1 - self.first)
        self._size -= sum(map(len, self._records[:going]))
        del self._records[:going]
        self.first += going

    def sync(self) -> None:
        """What there is outlives the node's power."""
        self._synced = self.last

    def lose_power(self) -> None:
        """Lose what was not synced."""
        keep = max(0, self._synced + 1 - self.first)
        self._size -= sum(map(len, self._records[keep:]))
        del self._records[keep:]

    def has_exit_record(self) -> bool:
        """Whether the last record is an exit record."""
        try:
            return bool(self._records) and isinstance(records.decode(self._records[-1]), records.ExitRecord)
        except ProtocolError:
            return False
