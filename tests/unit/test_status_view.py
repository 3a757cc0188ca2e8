"""A view and its readers: what a reader has is the view at the reader's position, exactly, whatever happens between."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from viewkit import job, messages_of, selected, told, without_empty

from fluxres.base.json import JsonObject
from fluxres.status import messages, view
from fluxres.status.board import Board
from fluxres.status.messages import Encoder, bodies, parse_body
from fluxres.status.mirror import Parts
from fluxres.status.picture import Picture
from fluxres.status.select import Filter
from fluxres.status.view import TOPICS, Cursor, Delta, Position, Snapshot, View, Why, check_topics

KEYS = [str(number) for number in range(3)]
STATES = ["SCHED", "RUN", "INACTIVE"]


def document(topic: str, key: str, value: int) -> JsonObject:
    return job(int(key), STATES[value % 3]) if topic == "jobs" else {"rank": int(key), "value": value}


CHANGES = st.lists(
    st.tuples(st.sampled_from(["jobs", "jobs", "overlay"]), st.sampled_from(KEYS), st.none() | st.integers(0, 5)),
    max_size=4,
    unique_by=lambda change: change[:2],
)


@dataclass
class Reader:
    """A client: what it wants, what it has, and what is on its way to it."""

    topics: tuple[str, ...]
    states: frozenset[str] | None
    cursor: Cursor
    picture: Picture = field(default_factory=Picture)
    coming: list[JsonObject] = field(default_factory=list)

    @property
    def select(self) -> Filter | None:
        return None if self.states is None else Filter.parse({"states": [*sorted(self.states)]})


class Watching(RuleBasedStateMachine):
    """A feed, a mirror of it, and readers of both that move between them, are slow, break off and resume."""

    def __init__(self) -> None:
        super().__init__()
        self.small = [
            mock.patch.object(view, "RING_DELTAS", 6),
            mock.patch.object(view, "RING_DOCUMENTS", 16),
            mock.patch.object(messages, "PART", 120),
            mock.patch.object(messages, "EXAMINED", 3),
        ]
        for patch in self.small:
            patch.start()
        self.encoder = Encoder(cache=1000)
        self.readers: list[Reader] = []
        self.epochs = 1
        self.root = View("e1")
        self.history: dict[Position, dict[str, dict[str, JsonObject]]] = {Position("e1", 0): {}}
        self.board = Board(View())
        self.parts = Parts(self.board)
        self.feed = Cursor(self.root, TOPICS)

    def teardown(self) -> None:
        for patch in self.small:
            patch.stop()

    def note(self) -> None:
        state = {topic: self.root.documents(topic) for topic in TOPICS}
        self.history[self.root.position] = copy.deepcopy(without_empty(state))

    @initialize(first=CHANGES)
    def begin(self, first: list[tuple[str, str, int | None]]) -> None:
        self.change(first)

    @rule(several=st.lists(CHANGES, min_size=1, max_size=3), follow=st.booleans())
    def change_several(self, several: list[list[tuple[str, str, int | None]]], follow: bool) -> None:
        for changes in several:
            self.change(changes)
        if follow:
            self.mirror(9)

    def change(self, changes: list[tuple[str, str, int | None]]) -> None:
        put: dict[str, dict[str, JsonObject]] = {}
        delete: dict[str, list[str]] = {}
        for topic, key, value in changes:
            if value is None:
                delete.setdefault(topic, []).append(key)
            else:
                put.setdefault(topic, {})[key] = document(topic, key, value)
        before = self.root.position
        assert self.root.change(put, delete) is (self.root.position.seq == before.seq + 1)
        self.note()

    @rule()
    def restart(self) -> None:
        """Rank 0 begins another life; its feed has what there is then."""
        self.epochs += 1
        documents = {topic: self.root.documents(topic) for topic in TOPICS}
        self.root.begin(f"e{self.epochs}", documents)
        self.note()

    @rule(most=st.integers(1, 3))
    def mirror(self, most: int) -> None:
        """The mirror takes what comes; where that breaks off in the middle, it asks again."""
        body = self.feed.next()
        if body is None:
            return
        for number, payload in enumerate(bodies(body, 1.0)):
            if number >= most:
                self.feed = Cursor(self.root, TOPICS, position=self._mirrored())
                self.parts.forget()
                return
            self.parts.take(parse_body(payload))

    def _mirrored(self) -> Position | None:
        return self.board.view.position if self.board.view.begun else None

    @precondition(lambda self: len(self.readers) < 3)
    @rule(
        topics=st.lists(st.sampled_from(["jobs", "overlay"]), min_size=1, unique=True),
        states=st.none() | st.frozensets(st.sampled_from(STATES), min_size=1, max_size=2),
        at_root=st.booleans(),
    )
    def subscribe(self, topics: list[str], states: frozenset[str] | None, at_root: bool) -> None:
        reader = Reader(check_topics(topics), states, Cursor(self.root, []))
        reader.cursor = Cursor(self.root if at_root else self.board.view, topics, reader.select)
        self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 2), most=st.integers(1, 3), idle=st.booleans())
    def read(self, number: int, most: int, idle: bool) -> None:
        """A reader takes some of what is on its way; when that is all, it is told more."""
        reader = self.readers[number % len(self.readers)]
        if not reader.coming:
            body = reader.cursor.next(idle=idle)
            reader.coming = [] if body is None else list(messages_of(body, self.encoder))
        for message in reader.coming[:most]:
            reader.picture.apply(message)
        del reader.coming[:most]
        self.check(reader)

    def check(self, reader: Reader) -> None:
        if reader.picture.position is not None:
            whole = self.history[Position(*reader.picture.position)]
            wanted = {} if reader.states is None else {"jobs": reader.states}
            assert without_empty(reader.picture.documents) == selected(whole, reader.topics, wanted)

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 2), to_root=st.booleans())
    def resume(self, number: int, to_root: bool) -> None:
        """A reader's connection breaks, with parts under way; it comes back, maybe at another rank."""
        reader = self.readers[number % len(self.readers)]
        known = reader.picture.position
        position = None if known is None else Position(*known)
        target = self.root if to_root else self.board.view
        reader.cursor, reader.coming = Cursor(target, reader.topics, reader.select, position), []

    @invariant()
    def the_ring_is_bounded(self) -> None:
        for each in (self.root, self.board.view):
            assert len(each._ring) <= 6
            assert len(each._ring) == 1 or sum(change.size for change in each._ring) <= 16
            assert each._ring_size == sum(change.size for change in each._ring)

    @invariant()
    def the_mirror_is_what_the_feed_was(self) -> None:
        mirrored = {topic: self.board.view.documents(topic) for topic in TOPICS}
        if self.board.view.begun:
            assert without_empty(mirrored) == self.history[self.board.view.position]


TestWatching = Watching.TestCase
TestWatching.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def some(*jobs: JsonObject) -> dict[str, dict[str, JsonObject]]:
    return {"jobs": {str(each["dec"]): each for each in jobs}}


def test_first_a_snapshot_then_deltas() -> None:
    feed = View("e")
    feed.change(some(job(1)))
    reader = Cursor(feed, ["jobs"])
    first = reader.next()
    assert isinstance(first, Snapshot)
    assert (first.position, first.why) == (Position("e", 1), Why.FIRST)
    assert reader.next() is None
    feed.change(some(job(1, "CLEANUP")))
    feed.change(some(job(2)), {"jobs": ["1"]})
    [delta] = told(reader)
    assert delta["prev"] == 1
    assert delta["position"] == ["e", 3]
    assert delta["set"] == some(job(2))
    assert delta["delete"] == {"jobs": ["1"]}


def test_a_view_that_has_not_begun_says_nothing() -> None:
    feed = View()
    reader, resumed = Cursor(feed, TOPICS), Cursor(feed, TOPICS, position=Position("e", 3))
    assert reader.next() is None
    assert resumed.next(idle=True) is None
    feed.begin("e", some(job(1)), 5)
    assert isinstance(reader.next(), Snapshot)
    [snapshot] = told(resumed)
    assert snapshot["why"] == "behind"


def test_a_reader_of_a_view_that_was_lost_stays_where_it_is() -> None:
    feed = View("e")
    feed.change(some(job(1)))
    reader = Cursor(feed, ["jobs"])
    assert len(told(reader)) == 1
    feed.begin("")
    assert told(reader) == []
    [still] = told(reader, idle=True)
    assert (still["prev"], still["position"], still["set"], still["delete"]) == (1, ["e", 1], {}, {})
    feed.begin("e", some(job(2)), 2)
    [snapshot] = told(reader)
    assert (snapshot["why"], snapshot["docs"]) == ("behind", some(job(2)))


def test_what_is_as_it_was_is_no_change() -> None:
    feed = View("e")
    assert feed.change(some(job(1)))
    assert not feed.change(some(job(1)), {"jobs": ["2"], "log": []})
    assert feed.position.seq == 1


def test_a_resume_is_answered_in_any_case() -> None:
    feed = View("e")
    feed.change(some(job(1)))
    [empty] = told(Cursor(feed, ["jobs"], position=Position("e", 1)))
    assert (empty["type"], empty["prev"], empty["position"]) == ("delta", 1, ["e", 1])
    [delta] = told(Cursor(feed, ["jobs"], position=Position("e", 0)))
    assert (delta["prev"], delta["set"]) == (0, some(job(1)))


@pytest.mark.parametrize(
    ("position", "why"),
    [(Position("old", 1), "restarted"), (Position("e", 0), "behind"), (Position("e", 99), "behind")],
)
def test_a_new_snapshot_says_why(position: Position, why: str) -> None:
    feed = View("e")
    with mock.patch.object(view, "RING_DELTAS", 2):
        for state in ("SCHED", "RUN", "CLEANUP", "INACTIVE"):
            feed.change(some(job(1, state)))
        [snapshot] = told(Cursor(feed, ["jobs"], position=position))
    assert snapshot["why"] == why
    assert snapshot["docs"] == some(job(1, "INACTIVE"))


def test_a_mirror_that_is_behind_lets_its_reader_wait() -> None:
    mirror = View("e")
    reader = Cursor(mirror, ["jobs"], position=Position("e", 3))
    assert reader.next() is None
    mirror.change(some(job(1)), seq=2)
    assert reader.next() is None
    mirror.change(some(job(2)), seq=5)
    [delta] = told(reader)
    assert (delta["prev"], delta["position"], delta["set"]) == (3, ["e", 5], some(job(2)))


def test_what_is_filtered_out_is_told_as_a_number_only() -> None:
    feed = View("e")
    feed.change(some(job(1), job(2, userid=2)))
    reader = Cursor(feed, ["jobs"], Filter.parse({"userid": [1]}))
    [snapshot] = told(reader)
    assert snapshot["docs"] == some(job(1))
    feed.change(some(job(2, "CLEANUP", userid=2)))
    assert reader.next() is None
    assert reader.seen == feed.position
    [idle] = told(reader, idle=True)
    assert (idle["prev"], idle["position"], idle["set"], idle["delete"]) == (1, ["e", 2], {}, {})
    [again] = told(reader, idle=True)
    assert (again["prev"], again["position"]) == (2, ["e", 2])


def test_what_matches_no_more_is_deleted() -> None:
    feed = View("e")
    feed.change(some(job(1), job(2, "INACTIVE")))
    reader = Cursor(feed, ["jobs"], Filter.parse({"states": ["active"]}))
    told(reader)
    feed.change(some(job(1, "INACTIVE"), job(2, "INACTIVE", result="FAILED")))
    [delta] = told(reader)
    assert (delta["set"], delta["delete"]) == ({}, {"jobs": ["1"]})


def test_readers_share_copies_and_merged_changes() -> None:
    feed = View("e")
    feed.change(some(*(job(number) for number in range(100))))
    readers = [Cursor(feed, ["jobs"]) for _ in range(50)]
    first = [reader.next() for reader in readers[:25]]
    feed.change(some(job(0, "CLEANUP")))
    later = [reader.next() for reader in readers[25:]]
    copies = {id(each.copy) for each in (*first, *later) if isinstance(each, Snapshot)}
    assert len(copies) == 1
    deltas = [delta for reader in readers if isinstance(delta := reader.next(), Delta)]
    assert len(deltas) == 50
    assert len({id(delta.changes) for delta in deltas}) == 1


def test_a_copy_is_made_anew_when_much_has_changed() -> None:
    feed = View("e")
    feed.change(some(*(job(number) for number in range(8))))
    old = feed.copy()
    feed.change(some(job(0, "CLEANUP"), job(1, "CLEANUP")))
    assert feed.copy() is old
    assert feed.copy(fresh=True).position == feed.position
    feed.change(some(job(2, "CLEANUP"), job(3, "CLEANUP"), job(4, "CLEANUP")))
    assert feed.copy().position == feed.position


@pytest.mark.parametrize(("topics", "why"), [([], "nothing"), (["jobs", "all"], "'all'")])
def test_topics_are_checked(topics: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_topics(topics)


def mirrored(*states: str, skip: int) -> tuple[list[View], View]:
    """A feed after each change of one job's state, and its mirror, which was told of the first and of the last `skip`
    changes at once."""
    feed, mirror = View("e"), View("e")
    moments = []
    cursor = Cursor(feed, TOPICS, position=Position("e", 0))
    for number, state in enumerate(states):
        feed.change(some(job(1, state)))
        moments.append(copy.deepcopy(feed))
        if number < len(states) - skip or number == len(states) - 1:
            delta = cursor.next()
            assert isinstance(delta, Delta)
            put = {"jobs": {each.key: each.document for each in delta.changes if each.document is not None}}
            mirror.change(put, seq=delta.position.seq)
    assert mirror.position == feed.position
    return moments, mirror


def test_what_a_mirror_has_skipped_is_told_to_who_had_it() -> None:
    """At the mirror the job has not changed; for the reader, who was told of the moment between, it has."""
    moments, mirror = mirrored("SCHED", "RUN", "SCHED", skip=2)
    [delta] = told(Cursor(mirror, ["jobs"], position=moments[1].position))
    assert delta["set"] == some(job(1, "SCHED"))


def test_what_matched_in_between_only_is_deleted() -> None:
    """The job never matched at the mirror; the reader saw it match, at the feed."""
    moments, mirror = mirrored("SCHED", "RUN", "CLEANUP", skip=2)
    running = Filter.parse({"states": ["run"]})
    [first] = told(Cursor(moments[1], ["jobs"], running))
    assert first["docs"] == some(job(1, "RUN"))
    [delta] = told(Cursor(mirror, ["jobs"], running, moments[1].position))
    assert (delta["set"], delta["delete"]) == ({}, {"jobs": ["1"]})
