"""The journal: what was appended is read back whole, whatever is torn, full, acknowledged or missing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.wire.payload import pack
from fluxres_shell import records
from fluxres_shell.journal import RESERVE, RESERVE_BYTES, JournalError, JournalWriter
from fluxres_shell.segments import (
    HEADER,
    SegmentReader,
    StopKind,
    exit_record,
    frame_record,
    list_segments,
    segment_name,
)

BIG = 1024 * 1024
FUNCTION_SCOPED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=50,
)


@pytest.fixture
def dirfd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def fresh(tmp_path: Path, name: str) -> int:
    """A descriptor of a new directory."""
    (tmp_path / name).mkdir()
    return os.open(tmp_path / name, os.O_RDONLY | os.O_DIRECTORY)


def write(dirfd: int, payloads: list[bytes], *, segment_size: int = BIG, batch: int = 1) -> None:
    """Write a journal."""
    writer = JournalWriter(dirfd, segment_size=segment_size, limit=64 * BIG)
    for index, payload in enumerate(payloads):
        writer.add(payload)
        if (index + 1) % batch == 0:
            assert writer.flush()
    assert writer.flush()
    writer.close()


def read(dirfd: int, from_seq: int = 1) -> tuple[list[tuple[int, bytes]], StopKind]:
    """The records from `from_seq`, and why they end."""
    reader = SegmentReader(dirfd, from_seq)
    try:
        found = [(stored.seq, stored.payload) for stored in reader]
    finally:
        reader.close()
    assert reader.stop is not None
    return found, reader.stop.kind


def numbered(payloads: list[bytes], first: int = 1) -> list[tuple[int, bytes]]:
    return list(enumerate(payloads, first))


def exit_payload(seq: int) -> bytes:
    return records.encode(seq, 1.5, records.EXIT, 256, {"timeout": True})


class TestRecords:
    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            (records.EVENT, ("shell.init", {"size": 1})),
            (records.DATA, ("stdout", 3, b"\xff\x00")),
            (records.EOF, ("stderr", 0)),
            (records.EXIT, (256, {"timeout": True})),
        ],
    )
    def test_each_kind_comes_back(self, kind: str, fields: tuple[str, ...]) -> None:
        record = records.decode(records.encode(7, 1.25, kind, *fields))
        assert (record.seq, record.time) == (7, 1.25)
        assert type(record).__name__.lower().startswith(kind)

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\xff",
            b"\x80",
            pack([0, 1.0, "eof", "stdout", 0]),
            pack([1, 1.0, "what"]),
            pack([1, 1.0, "eof", "stdfun", 0]),
            pack([1, 1.0, "exit", -1, {}]),
            pack([1, 1.0, "exit", 2**31, {}]),
            pack([1, 1.0, "exit", True, {}]),
            pack({"seq": 1}),
        ],
    )
    def test_anything_else_is_refused(self, payload: bytes) -> None:
        with pytest.raises(ProtocolError, match="cannot decode"):
            records.decode(payload)

    def test_a_record_has_a_bound(self) -> None:
        with pytest.raises(ProtocolError, match="cannot write a data record"):
            records.encode(1, 1.0, records.DATA, "stdout", 0, b"x" * (records.MAX_RECORD + 1))


class TestWriteAndRead:
    @FUNCTION_SCOPED
    @given(
        payloads=st.lists(st.binary(min_size=1, max_size=300), max_size=40),
        segment_size=st.integers(1, 1000),
        batch=st.integers(1, 9),
        from_seq=st.integers(1, 45),
    )
    def test_what_is_written_is_read(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        payloads: list[bytes],
        segment_size: int,
        batch: int,
        from_seq: int,
    ) -> None:
        dirfd = fresh(tmp_path_factory.mktemp("journal"), "d")
        try:
            write(dirfd, payloads, segment_size=segment_size, batch=batch)
            found, stop = read(dirfd, from_seq)
            assert found == numbered(payloads)[from_seq - 1 :]
            assert stop is StopKind.END
        finally:
            os.close(dirfd)

    def test_a_reader_goes_on_where_the_writer_does(self, dirfd: int) -> None:
        writer = JournalWriter(dirfd, segment_size=50, limit=BIG)
        reader = SegmentReader(dirfd)
        for number in range(1, 60):
            assert reader.read(BIG) == []
            payload = b"r" * (number % 23 + 1)
            writer.add(payload)
            assert reader.read(BIG) == []
            assert writer.flush()
            (stored,) = reader.read(BIG)
            assert (stored.seq, stored.payload) == (number, payload)
        reader.close()
        writer.close()

    def test_a_batch_has_the_size_asked_for_but_at_least_one_record(self, dirfd: int) -> None:
        write(dirfd, [b"a" * 10] * 6)
        reader = SegmentReader(dirfd)
        assert [len(reader.read(size)) for size in (1, 25, 30, 100, 100)] == [1, 2, 3, 0, 0]
        reader.close()

    def test_an_empty_directory_is_an_empty_journal(self, dirfd: int) -> None:
        assert read(dirfd) == ([], StopKind.END)
        assert exit_record(dirfd) is None

    def test_it_is_reopened_where_it_ended(self, dirfd: int) -> None:
        write(dirfd, [b"one", b"two"])
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        assert (writer.first, writer.last) == (1, 2)
        writer.add(b"three")
        assert writer.flush()
        writer.close()
        assert read(dirfd)[0] == numbered([b"one", b"two", b"three"])


class TestDamage:
    PAYLOADS = (b"first", b"second record", b"third")

    def test_torn_at_every_byte(self, tmp_path: Path) -> None:
        """A prefix of the file gives the records that are whole in it, and can be written on."""
        stored = [frame_record(payload) for payload in self.PAYLOADS]
        whole = b"".join(stored)
        ends = [sum(map(len, stored[: count + 1])) for count in range(len(stored))]
        for cut in range(len(whole) + 1):
            dirfd = fresh(tmp_path, str(cut))
            (tmp_path / str(cut) / segment_name(1)).write_bytes(whole[:cut])
            kept = [payload for payload, end in zip(self.PAYLOADS, ends, strict=True) if end <= cut]
            found, stop = read(dirfd)
            assert found == numbered(kept)
            assert (stop is StopKind.END) == (cut in (0, *ends))
            writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
            writer.add(b"after")
            assert writer.flush()
            writer.close()
            assert read(dirfd)[0] == numbered([*kept, b"after"])
            os.close(dirfd)

    def test_every_flipped_byte_is_seen(self, tmp_path: Path, dirfd: int) -> None:
        write(dirfd, list(self.PAYLOADS))
        path = tmp_path / segment_name(1)
        good = path.read_bytes()
        for index in range(len(good)):
            path.write_bytes(good[:index] + bytes([good[index] ^ 0x41]) + good[index + 1 :])
            found, stop = read(dirfd)
            assert found == numbered(list(self.PAYLOADS))[: len(found)]
            assert len(found) < len(self.PAYLOADS)
            assert stop in (StopKind.CORRUPT, StopKind.TORN)

    def test_the_stop_says_where(self, tmp_path: Path, dirfd: int) -> None:
        write(dirfd, [b"one", b"two"])
        (tmp_path / segment_name(1)).write_bytes(frame_record(b"one") + HEADER.pack(100, 1) + b"tail")
        reader = SegmentReader(dirfd)
        assert [stored.payload for stored in reader] == [b"one"]
        assert reader.stop is not None
        assert (reader.stop.kind, reader.stop.segment) == (StopKind.TORN, segment_name(1))
        assert reader.stop.offset == HEADER.size + 3
        assert "12 of a record's 108 bytes" in reader.stop.why
        reader.close()

    def test_room_allocated_ahead_is_the_end(self, tmp_path: Path, dirfd: int) -> None:
        (tmp_path / segment_name(1)).write_bytes(frame_record(b"one") + bytes(4096))
        assert read(dirfd) == ([(1, b"one")], StopKind.END)

    def test_a_gap_is_told_with_where_to_go_on(self, tmp_path: Path, dirfd: int) -> None:
        (tmp_path / segment_name(1)).write_bytes(frame_record(b"one"))
        (tmp_path / segment_name(5)).write_bytes(frame_record(b"five"))
        reader = SegmentReader(dirfd)
        assert [stored.seq for stored in reader] == [1]
        assert reader.stop is not None
        assert (reader.stop.kind, reader.stop.resume) == (StopKind.GAP, 5)
        reader.close()
        assert read(dirfd, 5) == ([(5, b"five")], StopKind.END)
        with pytest.raises(JournalError, match="damaged"):
            JournalWriter(dirfd, segment_size=BIG, limit=BIG)

    def test_records_that_are_gone_are_skipped(self, tmp_path: Path, dirfd: int) -> None:
        (tmp_path / segment_name(5)).write_bytes(frame_record(b"five"))
        reader = SegmentReader(dirfd, 2)
        assert reader.next_seq == 5
        reader.close()


class TestExitRecord:
    def test_it_is_found_in_the_last_segment_with_records(self, tmp_path: Path, dirfd: int) -> None:
        write(dirfd, [b"x" * 40, b"y" * 40, exit_payload(3)], segment_size=1)
        (tmp_path / segment_name(4)).touch()
        found = exit_record(dirfd)
        assert found is not None
        assert (found.seq, found.status, found.info) == (3, 256, {"timeout": True})

    def test_a_torn_one_is_none(self, tmp_path: Path, dirfd: int) -> None:
        eof = records.encode(1, 1.0, records.EOF, "stdout", 0)
        data = frame_record(eof) + frame_record(exit_payload(2))
        (tmp_path / segment_name(1)).write_bytes(data[:-1])
        assert exit_record(dirfd) is None

    def test_one_that_makes_no_sense_is_none(self, tmp_path: Path, dirfd: int) -> None:
        """Its checksum is right: it was forged, or is of another version."""
        (tmp_path / segment_name(1)).write_bytes(frame_record(pack([1, 1.0, "exit", "well", {}])))
        assert exit_record(dirfd) is None


class TestAcknowledge:
    def test_segments_go_when_all_of_them_is_acknowledged(self, dirfd: int) -> None:
        writer = JournalWriter(dirfd, segment_size=30, limit=BIG)
        for _ in range(6):
            writer.add(b"0123456789")
            assert writer.flush()
        assert list_segments(dirfd) == [1, 3, 5]
        for seq, left in ((1, [1, 3, 5]), (2, [3, 5]), (3, [3, 5]), (6, [7])):
            writer.ack(seq)
            assert list_segments(dirfd) == left
        assert (writer.first, writer.last) == (7, 6)
        writer.add(b"seven")
        assert writer.flush()
        assert read(dirfd, 7) == ([(7, b"seven")], StopKind.END)
        writer.close()

    def test_full_at_the_limit_until_acknowledged(self, dirfd: int) -> None:
        writer = JournalWriter(dirfd, segment_size=BIG, limit=400)
        while writer.size < 400:
            writer.add(b"x" * 50)
            assert writer.flush()
        assert writer.full
        writer.ack(writer.last)
        assert writer.size < 100
        writer.close()


class FullDisk:
    """Stands in for os.pwrite: takes `room` bytes for each file number, then ENOSPC; -1 takes all."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._pwrite = os.pwrite

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        if self.room < 0:
            return self._pwrite(fd, data, offset)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._pwrite(fd, data[: self.room], offset)
        self.room -= count
        return count


class TestFullDisk:
    @pytest.mark.parametrize("room", [0, 1, 7, 8, 9, 20, 40])
    def test_what_does_not_fit_stays_queued_and_is_written_later(
        self, dirfd: int, monkeypatch: pytest.MonkeyPatch, room: int
    ) -> None:
        write(dirfd, [b"before"])
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        disk = FullDisk(room)
        monkeypatch.setattr(os, "pwrite", disk)
        payloads = [b"two" * 9, b"three" * 9]
        for payload in payloads:
            writer.add(payload)
        assert not writer.flush()
        assert isinstance(writer.stuck, OSError)
        assert read(dirfd) == ([(1, b"before")], StopKind.END)
        assert [stored.seq for stored in writer.queued(2, BIG)] == [2, 3]
        assert [stored.seq for stored in writer.queued(2, 1)] == [2]
        assert [stored.seq for stored in writer.queued(3, BIG)] == [3]
        disk.room = -1
        assert writer.flush()
        assert read(dirfd)[0] == numbered([b"before", *payloads])
        writer.close()

    def test_the_exit_record_goes_into_the_reserve(self, dirfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        writer.reserve()
        assert os.stat(RESERVE, dir_fd=dirfd).st_size == RESERVE_BYTES
        writer.add(b"one")
        assert writer.flush()
        disk = FullDisk(0)
        monkeypatch.setattr(os, "pwrite", disk)
        writer.add(b"two")
        writer.add(exit_payload(3))
        assert not writer.flush()
        disk.room = -1  # the reserve's blocks are there: writing them needs no room
        assert writer.flush_into_reserve()
        writer.drop_reserve()
        writer.close()
        assert read(dirfd)[0] == numbered([b"one", b"two", exit_payload(3)])
        assert exit_record(dirfd) is not None

    def test_the_reserve_takes_the_place_of_an_empty_journal(self, dirfd: int) -> None:
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        writer.reserve()
        writer.add(exit_payload(1))
        assert writer.flush_into_reserve()
        writer.sync()
        writer.close()
        assert read(dirfd)[0] == [(1, exit_payload(1))]
        assert not os.path.exists(f"/proc/self/fd/{dirfd}/{RESERVE}")

    def test_a_reserve_too_small_is_left_alone(self, dirfd: int) -> None:
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        writer.reserve()
        writer.add(b"x" * RESERVE_BYTES)
        assert not writer.flush_into_reserve()
        assert writer.flush()
        writer.close()

    def test_no_room_for_the_reserve_is_an_error(self, dirfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_room(fd: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", no_room)
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        with pytest.raises(OSError, match="No space left"):
            writer.reserve()
        assert not writer.flush_into_reserve() or not writer.queued(1, BIG)
        writer.close()

    def test_what_was_served_from_memory_and_acknowledged_is_not_written(
        self, dirfd: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = JournalWriter(dirfd, segment_size=BIG, limit=BIG)
        writer.add(b"one")
        assert writer.flush()
        disk = FullDisk(0)
        monkeypatch.setattr(os, "pwrite", disk)
        for payload in (b"two", b"three", b"four"):
            writer.add(payload)
        assert not writer.flush()
        writer.ack(3)
        disk.room = -1
        assert writer.flush()
        assert writer.last == 4
        writer.add(b"five")
        assert writer.flush()
        writer.close()
        assert read(dirfd, 4) == ([(4, b"four"), (5, b"five")], StopKind.END)
