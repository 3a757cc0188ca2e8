"""What a broker's own health follows from, against a naive model; and the controls that carry it."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.overlay.control import DISCONNECT, MAX_REASON, REFUSED, STATUS, Credit, health_of, reason, reason_of
from fluxres.overlay.errors import HostUnreachable
from fluxres.overlay.health import Health, Subtree
from fluxres.wire.messages import control
from fluxres.wire.payload import Wire, pack

FULL, PARTIAL, DEGRADED, LOST, OFFLINE = Health


@pytest.mark.parametrize(
    ("children", "own"),
    [
        ([], FULL),
        ([FULL], FULL),
        ([FULL, FULL], FULL),
        ([OFFLINE], PARTIAL),
        ([PARTIAL], PARTIAL),
        ([FULL, OFFLINE], PARTIAL),
        ([FULL, PARTIAL], PARTIAL),
        ([LOST], DEGRADED),
        ([DEGRADED], DEGRADED),
        ([FULL, LOST], DEGRADED),
        ([OFFLINE, DEGRADED], DEGRADED),
        ([PARTIAL, LOST, FULL], DEGRADED),
    ],
)
def test_what_follows(children: list[Health], own: Health) -> None:
    subtree = Subtree(range(len(children)), 0.0)
    for rank, health in enumerate(children):
        subtree.set(rank, health, 1.0)
    assert subtree.status is own


def test_words_and_numbers() -> None:
    assert [(int(h), h.word) for h in Health] == [
        (1, "full"),
        (2, "partial"),
        (3, "degraded"),
        (4, "lost"),
        (5, "offline"),
    ]


def test_a_bring_up_and_a_loss() -> None:
    subtree = Subtree((3, 4), 10.0)
    assert (subtree.status, subtree.since) == (PARTIAL, 10.0)
    assert not subtree.set(3, FULL, 11.0)
    assert subtree.set(4, FULL, 12.0)
    assert not subtree.set(4, FULL, 13.0)
    assert list(subtree.children()) == [(3, FULL, 11.0), (4, FULL, 12.0)]
    assert subtree.set(3, LOST, 14.0)
    assert (subtree.status, subtree.since, subtree.child(3), subtree.child(4)) == (
        *(DEGRADED, 14.0),
        *((LOST, 14.0), (FULL, 12.0)),
    )
    assert subtree.set(3, OFFLINE, 15.0)
    assert subtree.status is PARTIAL


def test_a_stranger_is_no_child() -> None:
    subtree = Subtree((1,), 0.0)
    with pytest.raises(KeyError):
        subtree.set(2, FULL, 1.0)
    with pytest.raises(KeyError):
        subtree.child(2)
    assert subtree.status is PARTIAL


def naive(children: list[Health]) -> Health:
    if all(health is FULL for health in children):
        return FULL
    return DEGRADED if any(health in (DEGRADED, LOST) for health in children) else PARTIAL


@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Health))))
def test_against_a_naive_model(size: int, changes: list[tuple[int, Health]]) -> None:
    subtree = Subtree(range(size), 0)
    children = [OFFLINE] * size
    since, own_since = [0] * size, 0
    for now, (rank, health) in enumerate(changes, 1):
        if rank >= size:
            continue
        before = naive(children)
        if children[rank] is not health:
            children[rank], since[rank] = health, now
        changed = naive(children) is not before
        own_since = now if changed else own_since
        assert subtree.set(rank, health, now) is changed
        assert (subtree.status, subtree.since) == (naive(children), own_since)
        assert list(subtree.children()) == list(zip(range(size), children, since, strict=True))


# --- the controls


def test_a_status_is_a_health() -> None:
    assert [health_of(control(STATUS, health)) for health in Health] == list(Health)
    for status in (0, 6):
        with pytest.raises(ProtocolError, match=f"{status} is none"):
            health_of(control(STATUS, status))


def test_reasons() -> None:
    assert reason_of(control(DISCONNECT, payload=reason("an administrator said so"))) == "an administrator said so"
    assert len(reason_of(control(REFUSED, errno.EPERM, reason("x" * (MAX_REASON + 1))))) == MAX_REASON
    for payload in (None, pack({}), pack({"reason": 1}), pack([]), b"\xff"):
        with pytest.raises(ProtocolError):
            reason_of(control(DISCONNECT, payload=payload))


@given(st.lists(st.text(max_size=5)), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_credit_round_trip(route: list[str], matchtag: int, size: int) -> None:
    credit = Credit(route=tuple(route), matchtag=matchtag, size=size)
    assert Credit.decode(credit.encode()) == credit


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"route": "a", "matchtag": 1, "bytes": 1},
        {"route": ["a", 1], "matchtag": 1, "bytes": 1},
        {"route": ["a"], "matchtag": True, "bytes": 1},
        {"route": ["a"], "matchtag": 1, "bytes": -1},
        {"route": ["a"], "matchtag": 1, "bytes": 1.0},
    ],
)
def test_a_malformed_credit(payload: dict[str, Wire]) -> None:
    with pytest.raises(ProtocolError, match="cannot read a credit"):
        Credit.decode(pack(payload))


def test_host_unreachable_is_an_rpc_error() -> None:
    import pickle

    error = HostUnreachable("rank 3 is lost")
    assert (error.errnum, error.text, str(error)) == (errno.EHOSTUNREACH, "rank 3 is lost", "rank 3 is lost")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is HostUnreachable
    assert (copy.errnum, copy.text) == (error.errnum, error.text)
