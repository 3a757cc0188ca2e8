"""Who may join: the verdict as a table, its order, and the bytes of hello and welcome."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.overlay.hello import (
    MAX_TEXT,
    PROTOCOL,
    RETRYABLE,
    Accept,
    Hello,
    Known,
    Refuse,
    Welcome,
    check_welcome,
    judge,
)
from fluxres.wire.payload import Wire, pack, unpack_map

CHILD = Hello(
    rank=3,
    uuid="uuid-9",
    protocol=PROTOCOL,
    software="0.1.0",
    instance="inst",
    statedir="sd-3",
    incarnation=9,
    boot_id="boot",
    host="node3",
    size=16,
    topo="kary:2",
    owner=0,
)
PARENT = replace(CHILD, rank=1, uuid="uuid-p", statedir="sd-1", incarnation=2, host="node1")
ONLINE = Known(uuid="uuid-8", statedir="sd-3", incarnation=8, online=True)
OFFLINE = replace(ONLINE, online=False)
WELCOME = Welcome(rank=1, uuid="uuid-p", instance="inst", software="0.1.0")

JOINS = Accept(supersedes=False)
SUPERSEDES = Accept(supersedes=True)


def verdict(hello: Hello, known: Known | None, parent: Hello = PARENT) -> Accept | Refuse:
    return judge(hello, parent=parent, children=frozenset({3, 4}), known=known)


@pytest.mark.parametrize(
    ("hello", "known", "expected"),
    [
        (CHILD, None, JOINS),
        (CHILD, OFFLINE, JOINS),
        (CHILD, ONLINE, SUPERSEDES),
        (replace(CHILD, instance=""), None, JOINS),
        (replace(CHILD, software="9.9.9"), None, JOINS),
        (replace(CHILD, host="elsewhere", boot_id="other"), ONLINE, SUPERSEDES),
        (replace(CHILD, incarnation=100), ONLINE, SUPERSEDES),
        # another statedir: not while the rank is online
        (replace(CHILD, statedir="sd-x"), OFFLINE, JOINS),
        (replace(CHILD, statedir="sd-x", incarnation=1), OFFLINE, JOINS),
        (replace(CHILD, statedir="sd-x"), ONLINE, errno.EADDRINUSE),
        (replace(CHILD, statedir="sd-x", incarnation=1), ONLINE, errno.EADDRINUSE),
        # incarnations of one statedir are ordered
        (replace(CHILD, incarnation=8), ONLINE, errno.ESTALE),
        (replace(CHILD, incarnation=7), ONLINE, errno.ESTALE),
        (replace(CHILD, incarnation=8), OFFLINE, errno.ESTALE),
        (replace(CHILD, incarnation=7), OFFLINE, errno.ESTALE),
        (replace(CHILD, incarnation=8, uuid="uuid-8"), ONLINE, errno.ESTALE),
        (replace(CHILD, incarnation=8, uuid="uuid-8"), OFFLINE, errno.ESTALE),
        # an incarnation joins once (I6), whatever count it gives
        (replace(CHILD, uuid="uuid-8"), ONLINE, errno.ESTALE),
        (replace(CHILD, uuid="uuid-8", statedir="sd-x"), OFFLINE, errno.ESTALE),
        # strangers
        (replace(CHILD, protocol=PROTOCOL + 1), None, errno.EPROTO),
        (replace(CHILD, instance="other"), None, errno.EPERM),
        (replace(CHILD, size=15), None, errno.EINVAL),
        (replace(CHILD, topo="kary:3"), None, errno.EINVAL),
        (replace(CHILD, owner=1), None, errno.EPERM),
        (replace(CHILD, rank=5), None, errno.EINVAL),
        (replace(CHILD, rank=1), None, errno.EINVAL),
        # what is checked first
        (replace(CHILD, protocol=0, instance="other", size=1), ONLINE, errno.EPROTO),
        (replace(CHILD, instance="other", size=1), ONLINE, errno.EPERM),
        (replace(CHILD, rank=5, statedir="sd-x"), ONLINE, errno.EINVAL),
    ],
)
def test_verdicts(hello: Hello, known: Known | None, expected: Accept | int) -> None:
    given = verdict(hello, known)
    assert given == expected if isinstance(expected, Accept) else isinstance(given, Refuse) and given.errnum == expected


@pytest.mark.parametrize(
    ("hello", "known", "words"),
    [
        (replace(CHILD, protocol=7), None, ("version 7", f"version {PROTOCOL}", "same release")),
        (replace(CHILD, instance="other"), None, ("rank 3", "other", "inst")),
        (replace(CHILD, size=15), None, ("the size 15", "16")),
        (replace(CHILD, topo="kary:3"), None, ("the topology kary:3", "kary:2")),
        (replace(CHILD, rank=5), None, ("rank 5 is not a child of rank 1", "kary:2 of size 16")),
        (replace(CHILD, statedir="sd-x"), ONLINE, ("sd-3", "sd-x", "stop one")),
        (replace(CHILD, incarnation=7), ONLINE, ("incarnation 7", "incarnation 8")),
        (replace(CHILD, uuid="uuid-8"), ONLINE, ("uuid-8", "joined before")),
    ],
)
def test_a_refusal_names_both_sides(hello: Hello, known: Known | None, words: tuple[str, ...]) -> None:
    given = verdict(hello, known)
    assert isinstance(given, Refuse)
    assert [word for word in words if word not in given.text] == []


def test_a_parent_that_has_not_joined_itself_says_later() -> None:
    given = verdict(CHILD, None, parent=replace(PARENT, instance=""))
    assert isinstance(given, Refuse)
    assert given.errnum == errno.EAGAIN
    assert given.errnum in RETRYABLE


def test_which_refusals_pass_by_themselves() -> None:
    assert {errno.EAGAIN, errno.EADDRINUSE} == RETRYABLE


@given(
    st.lists(
        st.tuples(st.sampled_from(["sd-a", "sd-b"]), st.integers(1, 6), st.sampled_from("uvwxyz"), st.booleans()),
        max_size=30,
    )
)
def test_nobody_joins_after_its_successor(arrivals: list[tuple[str, int, str, bool]]) -> None:
    """I6 as one parent sees it: of one statedir in succession, only ever later incarnations; at most one is online."""
    known: Known | None = None
    for statedir, incarnation, uuid, leaves in arrivals:
        if known is not None and leaves:
            known = replace(known, online=False)
        given = verdict(replace(CHILD, statedir=statedir, incarnation=incarnation, uuid=uuid), known)
        if isinstance(given, Refuse):
            assert known is not None
            continue
        if known is not None:
            assert given.supersedes is known.online
            assert uuid != known.uuid
            assert incarnation > known.incarnation if statedir == known.statedir else not known.online
        known = Known(uuid=uuid, statedir=statedir, incarnation=incarnation, online=True)


# --- the welcome


def test_the_right_welcome() -> None:
    assert check_welcome(WELCOME, parent_rank=1, instance="inst") is None
    assert check_welcome(WELCOME, parent_rank=1, instance="") is None


def test_the_wrong_welcome() -> None:
    assert "rank 1 answered in place of rank 0" in (check_welcome(WELCOME, parent_rank=0, instance="inst") or "")
    assert "belongs to the instance inst" in (check_welcome(WELCOME, parent_rank=1, instance="other") or "")


# --- bytes

texts = st.text(min_size=1, max_size=20)
numbers = st.integers(0, 2**63 - 1)


@given(
    st.builds(
        Hello,
        **dict.fromkeys(("rank", "incarnation", "size", "owner"), numbers),
        **dict.fromkeys(("uuid", "statedir"), texts),
        **dict.fromkeys(("software", "instance", "boot_id", "host", "topo"), st.just("") | texts),
        protocol=st.just(PROTOCOL),
    )
)
def test_hello_round_trip(hello: Hello) -> None:
    assert Hello.decode(hello.encode()) == hello


@given(st.builds(Welcome, rank=numbers, uuid=texts, instance=texts, software=texts))
def test_welcome_round_trip(welcome: Welcome) -> None:
    assert Welcome.decode(welcome.encode()) == welcome


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rank", value) for value in (-1, None, "3", True, 3.0, 2**63)),
        *(("uuid", value) for value in ("", 1, None, b"uuid", "x" * (MAX_TEXT + 1))),
        *(("statedir", ""), ("instance", None), ("topo", []), ("protocol", None), ("protocol", "1"), ("size", -1)),
    ],
)
def test_a_malformed_hello(key: str, value: Wire) -> None:
    with pytest.raises(ProtocolError, match=f"cannot read a hello: {key} is not a"):
        Hello.decode(pack({**unpack_map(CHILD.encode()), key: value}))


@pytest.mark.parametrize("payload", [None, b"", b"\xff", pack([]), pack({})])
def test_no_hello_at_all(payload: bytes | None) -> None:
    with pytest.raises(ProtocolError):
        Hello.decode(payload)
    with pytest.raises(ProtocolError):
        Welcome.decode(payload)


@pytest.mark.parametrize("key", ["rank", "uuid", "instance"])
def test_a_welcome_says_who_and_where(key: str) -> None:
    message = unpack_map(WELCOME.encode())
    del message[key]
    with pytest.raises(ProtocolError, match=key):
        Welcome.decode(pack(message))


def test_what_a_later_release_adds_is_passed_over() -> None:
    assert Hello.decode(pack({**unpack_map(CHILD.encode()), "colour": "green"})) == CHILD


@pytest.mark.parametrize("message", [{}, {"rank": 3, "software": "9.0", "uuid": 5, "statedir": ["another form"]}])
def test_another_protocol_is_refused_by_its_version_whatever_else_it_says(message: dict[str, Wire]) -> None:
    hello = Hello.decode(pack({"protocol": PROTOCOL + 1, **message}))
    given = verdict(hello, None)
    assert isinstance(given, Refuse)
    assert given.errnum == errno.EPROTO
