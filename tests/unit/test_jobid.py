"""fluxres.base.jobid: the text forms of RFC 19, and a clock that never repeats an id."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import (
    MAX_GENERATOR_ID,
    MAX_JOBID,
    MAX_TIMESTAMP_MS,
    FluidClock,
    dothex,
    f58,
    fluid_timestamp_ms,
    kvs_path,
    parse_jobid,
)

EPOCH_MS = 1_700_000_000_000
IDS_PER_MS = 1024

jobids = st.integers(0, MAX_JOBID)


@pytest.mark.parametrize(
    "text",
    [
        # the forms of one id that RFC 19 shows
        "6731191091817518",
        "0x17e9fb8df16c2e",
        "0X17E9FB8DF16C2E",
        "0017.e9fb.8df1.6c2e",
        "job.0017.e9fb.8df1.6c2e",
        "ƒuZZybuNNy",
        "fuZZybuNNy",
        "  ƒuZZybuNNy\n",
    ],
)
def test_all_forms_of_an_id_are_read(text: str) -> None:
    assert parse_jobid(text) == 6731191091817518


def test_dothex_that_begins_with_f_is_not_taken_for_f58() -> None:
    assert parse_jobid("ffff.0000.0000.0001") == 0xFFFF_0000_0000_0001


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "x", "-1", "+1", "1 2", "1_0", "٣", "18446744073709551616", "9" * 5000),
        *("0x", "0xg", "0x10000000000000000"),
        *("ƒ", "f", "ƒ0", "fI", "ƒƒ1", "ƒzzzzzzzzzzz", "ƒ" + "1" * 100),
        *("0.0.0.1", "0000.0000.0000", "0000.0000.0000.0000.0000"),
        *("job.", "job.1", "job.0000.0000.0000.0001.eventlog"),
        *("reform-remote-galileo", "🚹💂"),
    ],
)
def test_bad_ids_are_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot parse jobid") as caught:
        parse_jobid(text)
    assert repr(text[:50])[:-1] in str(caught.value)
    assert len(str(caught.value)) < 200


def test_written_forms() -> None:
    assert f58(6731191091817518) == "ƒuZZybuNNy"
    assert f58(6731191091817518, ascii=True) == "fuZZybuNNy"
    assert f58(0) == "ƒ1"
    assert dothex(6731191091817518) == "0017.e9fb.8df1.6c2e"
    assert dothex(0) == "0000.0000.0000.0000"
    assert kvs_path(1) == "job.0000.0000.0000.0001"
    assert kvs_path(1, "guest", "exec.eventlog") == "job.0000.0000.0000.0001.guest.exec.eventlog"


@pytest.mark.parametrize("value", [-1, MAX_JOBID + 1])
def test_what_is_no_id_is_not_written(value: int) -> None:
    for write in (f58, dothex, kvs_path):
        with pytest.raises(ValueError, match="as a jobid: it must be from 0 to"):
            write(value)


@given(jobids)
def test_forms_round_trip(value: int) -> None:
    for text in (f58(value), f58(value, ascii=True), dothex(value), kvs_path(value), str(value), hex(value)):
        assert parse_jobid(text) == value


@given(jobids, jobids)
def test_dothex_sorts_as_the_number(one: int, other: int) -> None:
    assert (dothex(one) < dothex(other)) == (one < other)


def test_layout() -> None:
    clock = FluidClock(5, EPOCH_MS)
    assert clock.next(EPOCH_MS + 7) == 7 << 24 | 5 << 10
    assert clock.next(EPOCH_MS + 7) == 7 << 24 | 5 << 10 | 1
    assert clock.next(EPOCH_MS + 8) == 8 << 24 | 5 << 10
    assert fluid_timestamp_ms(clock.next(EPOCH_MS + 9), EPOCH_MS) == EPOCH_MS + 9


def test_a_full_millisecond_borrows_the_next() -> None:
    clock = FluidClock(0, EPOCH_MS)
    drawn = [clock.next(EPOCH_MS + 1) for _ in range(IDS_PER_MS + 1)]
    assert drawn[-2] == 1 << 24 | 1023
    assert drawn[-1] == 2 << 24


def test_a_clock_that_steps_back_changes_nothing() -> None:
    clock = FluidClock(0, EPOCH_MS)
    first = clock.next(EPOCH_MS + 1000)
    assert clock.next(EPOCH_MS - 1000) == first + 1
    assert clock.next(0) == first + 2


@pytest.mark.parametrize(
    ("last", "drawn"),
    [
        (0, 3 << 10),
        (9 << 24 | 2 << 10 | 1023, 9 << 24 | 3 << 10),  # a smaller generator id's: there is room above it
        (9 << 24 | 3 << 10 | 5, 9 << 24 | 3 << 10 | 6),
        (9 << 24 | 3 << 10 | 1023, 10 << 24 | 3 << 10),
        (9 << 24 | 4 << 10, 10 << 24 | 3 << 10),  # a larger one's: only the next millisecond is above it
    ],
)
def test_resumes_above_the_last_id_of_any_generator(last: int, drawn: int) -> None:
    assert FluidClock(3, EPOCH_MS, last=last).next(EPOCH_MS) == drawn


def test_the_first_id_is_never_zero() -> None:
    assert FluidClock(0, EPOCH_MS).next(EPOCH_MS) == 1


@given(
    generator_id=st.integers(0, MAX_GENERATOR_ID),
    last=st.integers(0, 50 << 24),
    times=st.lists(st.integers(EPOCH_MS - 5, EPOCH_MS + 60), max_size=50),
)
def test_ids_only_increase_and_are_the_generators_own(generator_id: int, last: int, times: list[int]) -> None:
    clock = FluidClock(generator_id, EPOCH_MS, last)
    above = last
    for now_ms in times:
        drawn = clock.next(now_ms)
        assert drawn > above
        assert (drawn >> 10) & MAX_GENERATOR_ID == generator_id
        assert fluid_timestamp_ms(drawn, EPOCH_MS) >= now_ms
        above = drawn


def test_a_used_up_timestamp_is_an_error_and_draws_nothing() -> None:
    clock = FluidClock(0, EPOCH_MS)
    with pytest.raises(FluxresError, match="cannot draw a jobid: its 40-bit timestamp is used up"):
        clock.next(EPOCH_MS + MAX_TIMESTAMP_MS + 1)
    assert clock.next(EPOCH_MS + 1) == 1 << 24
    with pytest.raises(FluxresError, match="used up"):
        FluidClock(MAX_GENERATOR_ID, EPOCH_MS, last=MAX_JOBID).next(EPOCH_MS)


@pytest.mark.parametrize("generator_id", [-1, MAX_GENERATOR_ID + 1])
def test_bad_generator_ids_are_refused(generator_id: int) -> None:
    with pytest.raises(ValueError, match=f"cannot use generator id {generator_id}"):
        FluidClock(generator_id, EPOCH_MS)
