"""Drains: what each mode does, what a declaration of loss does, and that it all comes back from its stored form."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import RpcError
from fluxres.base.idset import IdSet
from fluxres.broker.drain import Drain, Drains, Lost, Mode, decode


def ids(text: str) -> IdSet:
    return IdSet.parse(text)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.PLAIN, None),
        (Mode.UPDATE, {1: Drain(1.0, "fan"), 2: Drain(2.0, "disk"), 3: Drain(9.0, "disk")}),
        (Mode.OVERWRITE, {1: Drain(1.0, "disk"), 2: Drain(2.0, "disk"), 3: Drain(9.0, "disk")}),
        (Mode.FORCE, {1: Drain(9.0, "disk"), 2: Drain(9.0, "disk"), 3: Drain(9.0, "disk")}),
    ],
)
def test_drain_modes(mode: Mode, expected: dict[int, Drain] | None) -> None:
    drains = Drains({1: Drain(1.0, "fan"), 2: Drain(2.0, None)})
    before = dict(drains.drained)
    if expected is None:
        with pytest.raises(RpcError, match="rank 1 is already drained") as refused:
            drains.drain(ids("1-3"), now=9.0, reason="disk", mode=mode)
        assert refused.value.errnum == errno.EEXIST
        assert drains.drained == before
    else:
        assert drains.drain(ids("1-3"), now=9.0, reason="disk", mode=mode)
        assert drains.drained == expected
        assert not drains.drain(ids("1-3"), now=9.0, reason="disk", mode=Mode.UPDATE)


def test_a_drain_without_reason_gets_one_later() -> None:
    drains = Drains()
    assert drains.drain(ids("1"), now=1.0, reason=None)
    assert drains.drain(ids("1"), now=2.0, reason="fan")
    assert drains.drained == {1: Drain(1.0, "fan")}


def test_undrain() -> None:
    drains = Drains({1: Drain(1.0, "fan"), 2: Drain(1.0, "fan")})
    with pytest.raises(RpcError, match="ranks 3-4 are not drained"):
        drains.undrain(ids("1,3-4"))
    assert str(drains.ranks()) == "1-2"
    assert drains.undrain(ids("1,3-4"), mode=Mode.UPDATE)
    assert not drains.undrain(ids("3-4"), mode=Mode.OVERWRITE)
    assert str(drains.ranks()) == "2"


def test_declared_lost_drains_and_confirmed_undrains_what_it_drained() -> None:
    drains = Drains({1: Drain(1.0, "fan")})
    drains.declare(ids("1-2"), now=5.0, reason="burnt")
    assert drains.drained == {1: Drain(1.0, "fan"), 2: Drain(5.0, "burnt")}
    with pytest.raises(RpcError, match="rank 2 is already declared lost"):
        drains.declare(ids("2-3"), now=6.0, reason="again")
    assert 3 not in drains.lost
    with pytest.raises(RpcError, match="ranks 1-2 are declared lost") as refused:
        drains.undrain(ids("1-2"), mode=Mode.FORCE)
    assert refused.value.errnum == errno.EBUSY
    assert drains.confirm(2)
    assert not drains.confirm(1)
    assert drains.drained == {1: Drain(1.0, "fan")}
    assert drains.lost == {}


def test_a_drain_of_somebody_elses_outlives_the_declaration() -> None:
    drains = Drains()
    drains.declare(ids("2"), now=5.0, reason="burnt")
    assert drains.drain(ids("2"), now=6.0, reason="leftover", mode=Mode.UPDATE)
    assert not drains.drain(ids("2"), now=7.0, reason="more", mode=Mode.UPDATE)
    assert not drains.confirm(2)
    assert drains.drained == {2: Drain(5.0, "leftover")}


def test_groups_are_those_of_resource_status() -> None:
    drains = Drains({1: Drain(1.4, "fan"), 3: Drain(1.4, "fan"), 2: Drain(1.0, None)})
    assert drains.groups() == {"1,3": {"timestamp": 1, "reason": "fan"}, "2": {"timestamp": 1, "reason": ""}}


RANKS = st.integers(0, 20)
REASONS = st.text(max_size=3)


@given(
    st.dictionaries(RANKS, st.builds(Drain, st.floats(0, 1e9), st.none() | REASONS)),
    st.dictionaries(RANKS, st.builds(Lost, REASONS, drained=st.booleans())),
)
def test_stored_and_back(drained: dict[int, Drain], lost: dict[int, Lost]) -> None:
    back = decode(Drains(drained, lost).encode())
    assert (back.drained, back.lost) == (drained, lost)


@pytest.mark.parametrize("wrong", [b"", b"[]", b'{"drain":{"x":{"timestamp":1}}}', b'{"lost":{"1":{}}}'])
def test_malformed_ones_are_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError):
        decode(wrong)
