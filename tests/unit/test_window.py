"""Flow control over one link: the two sides against a naive model, and that a full sender is always let go on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.overlay.window import LINK_WINDOW, OVERHEAD, STEP, WINDOW, Credits, Key, Window, cost
from fluxres.wire.messages import Message, MessageType

A: Key = (("client",), 1)
B: Key = (("client",), 2)


def test_what_a_response_counts_for() -> None:
    assert cost(Message(MessageType.RESPONSE)) == OVERHEAD
    assert cost(Message(MessageType.RESPONSE, payload=b"12345")) == OVERHEAD + 5


def test_a_window_is_full_beyond_its_size_and_opens_with_credit() -> None:
    window = Window()
    window.sent(A, WINDOW)
    assert window.has_room(A)
    window.sent(A, 1)
    assert not window.has_room(A)
    assert window.has_room(B)
    window.credited(A, STEP)
    assert window.has_room(A)
    window.ended(A)
    window.ended(A)
    assert len(window) == 0


def test_credit_for_what_has_ended_is_nothing() -> None:
    window = Window()
    window.sent(A, 10)
    window.ended(A)
    window.credited(A, 10)
    assert len(window) == 0
    window.sent(A, 5)  # another stream of the same matchtag
    window.credited(A, 10)
    window.sent(A, WINDOW)
    assert window.has_room(A)


def test_many_streams_have_smaller_windows_but_never_less_than_a_step() -> None:
    window = Window()
    streams: list[Key] = [(("client",), tag) for tag in range(LINK_WINDOW // STEP)]
    for key in streams:
        window.sent(key, STEP)
    assert all(window.has_room(key) for key in streams)
    window.sent(streams[0], 1)
    assert not window.has_room(streams[0])
    for key in streams[: len(streams) // 2]:
        window.ended(key)
    window.sent(streams[-1], STEP)
    assert window.has_room(streams[-1])
    window.sent(streams[-1], 1)
    assert not window.has_room(streams[-1])


def test_a_credit_is_due_for_each_step_and_only_then() -> None:
    given_back = Credits()
    assert not given_back.took(A, STEP - 1)
    assert not given_back.took(B, 1)
    assert given_back.took(A, 1)
    assert not given_back.took(A, 10 * STEP)  # one is due already
    assert given_back.grant(A) == 11 * STEP
    assert not given_back.took(A, 1)
    assert given_back.took(A, STEP)
    given_back.ended(A)
    assert given_back.grant(A) == 0
    given_back.ended(B)
    assert len(given_back) == 0


Operation = tuple[str, int, int]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "send", "receive", "receive", "read", "end"]),
        st.integers(0, 2),
        st.sampled_from([1, 1000, STEP - 1, STEP, WINDOW, 3 * WINDOW]),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(OPERATIONS)
def test_no_more_is_out_than_a_window_and_one_response_and_nobody_waits_for_ever(operations: list[Operation]) -> None:
    """`flying` is on its way to the receiver; `due` waits for the reader there."""
    window, given_back = Window(), Credits()
    keys: list[Key] = [(("client",), tag) for tag in range(3)]
    flying: dict[Key, list[int]] = {key: [] for key in keys}
    due: set[Key] = set()

    def receive(key: Key) -> None:
        size = flying[key].pop(0)
        if size == 0:
            given_back.ended(key)
            due.discard(key)
        elif given_back.took(key, size):
            due.add(key)

    def read(key: Key) -> None:
        if key in due:
            due.discard(key)
            window.credited(key, given_back.grant(key))

    for what, which, size in operations:
        key = keys[which]
        if what == "send" and window.has_room(key):
            window.sent(key, size)
            flying[key].append(size)
        elif what == "receive" and flying[key]:
            receive(key)
        elif what == "read":
            read(key)
        elif what == "end":
            window.ended(key)
            flying[key].append(0)
        assert all(sum(flying[key]) <= WINDOW + 3 * WINDOW for key in keys if 0 not in flying[key])
    for key in keys:
        while flying[key]:
            receive(key)
        read(key)
        assert window.has_room(key)
    for key in keys:
        window.ended(key)
        given_back.ended(key)
    assert (len(window), len(given_back)) == (0, 0)


@pytest.mark.parametrize("key", [A, B])
def test_an_unknown_stream_has_room(key: Key) -> None:
    assert Window().has_room(key)
