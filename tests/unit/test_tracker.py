"""The tracker against a naive model: whatever the order of answers, losses and disconnects, each request that left
has exactly one terminal response, or its requester is gone (invariant I5)."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.rpc.tracker import MAX_TEXT, Tracker, came_through, cancel_request, error_response, is_terminal
from fluxres.wire.messages import NODEID_UPSTREAM, Message, MessageFlag, MessageType, Role, request, response_to
from fluxres.wire.payload import unpack_map

HOPS = ("parent", "child1", "child2")
CLIENTS = (("c1",), ("c2",), ("deep", "child1"), ("c1", "child2"))


def asked(route: tuple[str, ...] = ("c1",), matchtag: int = 1, *, streaming: bool = False) -> Message:
    flags = MessageFlag.STREAMING if streaming else MessageFlag.NONE
    return request("kvs.get", b"big", matchtag=matchtag, flags=flags, userid=5, rolemask=2)._replace(route=route)


@pytest.mark.parametrize(
    ("streaming", "errnum", "terminal"),
    [(False, 0, True), (False, 2, True), (True, 0, False), (True, errno.ENODATA, True), (True, 2, True)],
)
def test_what_ends_a_request(streaming: bool, errnum: int, terminal: bool) -> None:
    question = asked(streaming=streaming)
    answer = response_to(question, errnum=errnum)
    assert is_terminal(answer) is terminal
    tracker = Tracker()
    tracker.sent("parent", question)
    assert tracker.answered("parent", answer)
    assert len(tracker) == (not terminal)
    assert tracker.answered("parent", answer) is not terminal


def test_a_lost_hop_answers_once_for_each() -> None:
    tracker = Tracker()
    for tag in (1, 2):
        tracker.sent("child1", asked(matchtag=tag))
    tracker.sent("child2", asked(matchtag=3))
    failed = tracker.lost("child1", "child1 is lost")
    assert [(m.matchtag, m.errnum, m.payload, m.route) for m in failed] == [
        (1, errno.EHOSTUNREACH, b"child1 is lost", ("c1",)),
        (2, errno.EHOSTUNREACH, b"child1 is lost", ("c1",)),
    ]
    assert all(m.type is MessageType.RESPONSE for m in failed)
    assert tracker.lost("child1", "again") == []
    assert not tracker.answered("child1", response_to(asked(matchtag=1)))
    assert len(tracker) == 1


def test_a_response_over_another_hop_is_dropped() -> None:
    tracker = Tracker()
    tracker.sent("child1", asked())
    assert not tracker.answered("child2", response_to(asked()))
    assert not tracker.answered("child1", response_to(asked(route=("c2",))))
    assert tracker.answered("child1", response_to(asked()))


def test_what_is_under_way_is_not_sent_again() -> None:
    tracker = Tracker()
    assert tracker.sent("child1", asked())
    assert not tracker.sent("child2", asked())
    assert tracker.sent("child2", asked(("c2",)))
    assert len(tracker.lost("child1", "lost")) == 1
    assert tracker.sent("child2", asked())


def test_a_disconnect_from_one_service_leaves_the_others() -> None:
    tracker = Tracker()
    tracker.sent("parent", asked(matchtag=1))
    tracker.sent("parent", asked(matchtag=2)._replace(topic="job-info.lookup"))
    assert [cancel.topic for _, cancel in tracker.disconnected(("c1",), "kvs")] == ["kvs.cancel"]
    assert [cancel.topic for _, cancel in tracker.disconnected(("c1",))] == ["job-info.cancel"]


def test_among_many_exactly_those_end() -> None:
    tracker = Tracker()
    for number in range(1000):
        tracker.sent(f"hop{number % 10}", asked(("far", f"child{number % 20}"), number + 1))
    assert tracker.disconnected(("client",)) == []
    assert tracker.lost("hop10", "lost") == []
    assert {hop for hop, _ in tracker.disconnected(("child13",))} == {"hop3"}
    assert {failed.route for failed in tracker.lost("hop3", "lost")} == {("far", "child3")}
    assert {failed.matchtag % 10 for failed in tracker.lost("hop4", "lost")} == {5}
    assert len(tracker) == 800


def test_what_wants_no_response_is_not_kept() -> None:
    tracker = Tracker()
    tracker.sent("parent", asked(matchtag=0))
    assert len(tracker) == 0


def test_a_disconnect_cancels_what_came_through() -> None:
    """A child that is lost takes the requests of everybody below it along, not only its own."""
    tracker = Tracker()
    for route in (("child1",), ("c9", "child1"), ("c9", "child2"), ("child1", "child2")):
        tracker.sent("parent", asked(route))
    cancels = tracker.disconnected(("child1",))
    assert [(hop, cancel.route) for hop, cancel in cancels] == [("parent", ("child1",)), ("parent", ("c9", "child1"))]
    assert len(tracker) == 2


@pytest.mark.parametrize(
    ("route", "via", "expected"),
    [
        (("a",), ("a",), True),
        (("a", "b"), ("b",), True),
        (("a", "b"), ("a", "b"), True),
        (("a", "b"), ("a",), False),
        (("b",), ("a", "b"), False),
        ((), ("a",), False),
    ],
)
def test_came_through(route: tuple[str, ...], via: tuple[str, ...], expected: bool) -> None:
    assert came_through(route, via) is expected


def test_a_cancel_goes_the_way_of_its_request() -> None:
    question = asked(("c1", "child1"), 7)._replace(
        topic="job-info.eventlog-watch",
        aux=NODEID_UPSTREAM,
        flags=MessageFlag.STREAMING | MessageFlag.UPSTREAM,
        rolemask=Role.USER,
    )
    cancel = cancel_request(question)
    assert (cancel.topic, cancel.route, cancel.nodeid) == ("job-info.cancel", question.route, NODEID_UPSTREAM)
    assert (cancel.userid, cancel.rolemask) == (5, Role.USER)
    assert cancel.flags == MessageFlag.UPSTREAM | MessageFlag.NORESPONSE
    assert unpack_map(cancel.payload) == {"matchtag": 7}


def test_an_error_text_can_hold_anything() -> None:
    assert error_response(asked(), 2, "no file \udcff").payload == b"no file ?"
    assert len(error_response(asked(), 2, "x" * 10_000_000).payload or b"") == MAX_TEXT


# -- the model


@dataclass(slots=True)
class Asked:
    """A request in the model: over which hop it went, and what came back to its requester."""

    hop: str
    message: Message
    parts: int = 0
    terminals: int = 0
    gone: bool = False

    @property
    def open(self) -> bool:
        return not self.terminals and not self.gone


Operation = tuple[str, int, int, bool]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "answer", "answer", "fail", "lose", "disconnect"]),
        st.integers(0, 30),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=60,
)


class World:
    """A tracker, and beside it the list of all that was ever asked."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self.all: list[Asked] = []

    def ask(self, hop: str, route: tuple[str, ...], *, streaming: bool) -> None:
        entry = Asked(hop, asked(route, len(self.all) + 1, streaming=streaming))
        self.all.append(entry)
        assert self.tracker.sent(hop, entry.message)

    def answer(self, entry: Asked, errnum: int) -> None:
        """A response arrives, wanted or not; what the tracker lets pass reaches the requester."""
        response = response_to(entry.message, errnum=errnum)
        passed = self.tracker.answered(entry.hop, response)
        assert passed is entry.open
        if passed:
            self.arrived(response)

    def lose(self, hop: str) -> None:
        expected = [entry.message.matchtag for entry in self.all if entry.open and entry.hop == hop]
        failed = self.tracker.lost(hop, "lost")
        assert [response.matchtag for response in failed] == expected
        for response in failed:
            self.arrived(response)

    def disconnect(self, route: tuple[str, ...]) -> None:
        going = [entry for entry in self.all if entry.open and entry.message.route[-len(route) :] == route]
        cancels = self.tracker.disconnected(route)
        told = sorted((hop, int(str(unpack_map(cancel.payload)["matchtag"]))) for hop, cancel in cancels)
        assert told == sorted((entry.hop, entry.message.matchtag) for entry in going)
        for entry in going:
            entry.gone = True

    def arrived(self, response: Message) -> None:
        entry = self.all[response.matchtag - 1]
        assert entry.open
        if is_terminal(response):
            entry.terminals += 1
        else:
            entry.parts += 1

    def step(self, operation: Operation) -> None:
        what, which, where, flag = operation
        if what == "ask":
            self.ask(HOPS[which % len(HOPS)], CLIENTS[where], streaming=flag)
        elif what == "lose":
            self.lose(HOPS[which % len(HOPS)])
        elif what == "disconnect":
            self.disconnect(CLIENTS[where])
        elif self.all:
            self.answer(self.all[which % len(self.all)], 0 if what == "answer" else errno.ENODATA)
        assert len(self.tracker) == sum(entry.open for entry in self.all)


@settings(max_examples=300)
@given(OPERATIONS)
def test_exactly_one_terminal_response_whatever_the_order(operations: list[Operation]) -> None:
    world = World()
    for operation in operations:
        world.step(operation)
    for hop in HOPS:
        world.lose(hop)
    assert len(world.tracker) == 0
    for entry in world.all:
        assert entry.terminals == (0 if entry.gone else 1)
