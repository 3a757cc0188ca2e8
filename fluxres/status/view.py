"""What is watched, as numbered changes of small JSON documents; and the cursors of those who watch. Pure.

A view is topic -> key -> document. Its position is `[epoch, seq]`: the epoch names one life of a feed, and `seq` rises
with each change. A reader gets a snapshot, then deltas `prev -> seq`; what it has then is the view at `seq`, exactly.
Nothing is implied: what falls off a bounded list is deleted by a change of its own.

The view keeps a ring of its latest changes, each with every document before and after it. A reader is only a cursor
into that: what it has not seen is merged into one delta when it asks, however much that is, and when its place has
fallen off the ring it gets a new snapshot and the word `behind`. So a slow reader costs what a fast one does.

Three rules make a resume exact at any rank that shows the same epoch:

- A delta names every key that was touched since `prev`, also one that is again as it was. So it applies exactly to any
  position between `prev` and `seq`, and a mirror may skip positions without its readers having to be at the same ones.
- With a filter: a document that matches is set, one that matched before and does not now is deleted.
- The first delta after a resume deletes every touched key that does not match now: what the reader had of it is not
  known for certain. Deleting what is not there is no error.

States of a cursor: NEW -> (snapshot) -> FOLLOWING; RESUMING -> (delta, be it empty, or snapshot) -> FOLLOWING.
A view whose epoch is "" has not begun (a mirror that has heard nothing yet): its cursors have nothing to say.

Documents are never changed in place once a view has them: a source makes new ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject

TOPICS: Final = ("instance", "overlay", "resources", "jobs", "events", "log")
"""All there is to watch, in the order of snapshots. `log` is for the instance owner only."""
OWNER_TOPICS: Final = frozenset({"log"})

RING_DELTAS: Final = 4096
"""Changes that the ring keeps."""
RING_DOCUMENTS: Final = 32_768
"""Documents that the changes in the ring may name together; one change is kept however large it is."""
REUSE: Final = 4
"""A copy of the view serves new readers until a REUSE-th of its documents has changed: then copying costs no more
than changing does, however many readers come, and slow ones hold few copies."""
MERGED: Final = 64
"""Merged changes that are kept for other readers at the same place, until the next change."""

Documents: TypeAlias = "Mapping[str, Mapping[str, JsonObject]]"
"""Topic -> key -> document."""
Keys: TypeAlias = "Mapping[str, Iterable[str]]"
"""Topic -> keys."""
_Pair: TypeAlias = "tuple[JsonObject | None, JsonObject | None]"
"""A document before and after a change, None where there was none."""


class Position(NamedTuple):
    """A place in the history of a view: the life of its feed, and the number of the change that led there."""

    epoch: str
    seq: int


class Why(Enum):
    """Why a reader gets a snapshot."""

    FIRST = "first"
    RESTARTED = "restarted"
    """The feed's life that the reader knew is over: rank 0 has restarted."""
    BEHIND = "behind"
    """The ring does not reach back to the reader's position."""


class Select(Protocol):
    """A filter of documents. Two of the same `text` select the same."""

    @property
    def text(self) -> str:
        """The filter in one canonical form."""

    def matches(self, topic: str, document: JsonObject) -> bool:
        """Whether the reader wants to see this document."""


class Touched(NamedTuple):
    """One key that a delta or a snapshot names; `document` None: it is deleted."""

    topic: str
    key: str
    document: JsonObject | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """All documents of a view at one position. Readers share it."""

    position: Position
    documents: Mapping[str, tuple[tuple[str, JsonObject], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a reader of `topics` is to see at `position`, and why it is not a delta."""

    position: Position
    why: Why
    topics: tuple[str, ...]
    select: Select | None
    copy: Copy

    @property
    def content(self) -> tuple[object, ...]:
        """What names the content: snapshots of one view with equal ones show the same documents."""
        return ("snapshot", self.position, self.topics, self.select and self.select.text)

    @property
    def size(self) -> int:
        """Documents of the topics, those included that the filter leaves out."""
        return sum(len(self.copy.documents.get(topic, ())) for topic in self.topics)

    def items(self, start: int, stop: int) -> Iterator[tuple[int, Touched]]:
        """The documents from number `start` up to `stop` (of `size`) with their numbers, but for the filtered ones."""
        before = 0
        for topic in self.topics:
            documents = self.copy.documents.get(topic, ())
            for index in range(max(0, start - before), min(stop - before, len(documents))):
                key, document = documents[index]
                if self.select is None or self.select.matches(topic, document):
                    yield before + index, Touched(topic, key, document)
            before += len(documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What leads a reader from `prev` to `position` (of the same epoch)."""

    prev: int
    position: Position
    content: tuple[object, ...]
    """What names the changes: deltas of one view with equal ones have the same."""
    changes: tuple[Touched, ...]

    @property
    def size(self) -> int:
        """How many keys it names."""
        return len(self.changes)

    def items(self, start: int, stop: int) -> Iterator[tuple[int, Touched]]:
        """The changes from number `start` up to `stop` with their numbers."""
        return enumerate(self.changes[start:stop], start)


class _Change(NamedTuple):
    """One change in the ring: topic -> key -> its document before and after."""

    prev: int
    seq: int
    touched: dict[str, dict[str, _Pair]]
    size: int


class View:
    """The documents as they are now, and how they have come to be so, as far as the ring reaches back."""

    def __init__(self, epoch: str = "") -> None:
        self._documents: dict[str, dict[str, JsonObject]] = {}
        self._ring: list[_Change] = []
        self._ring_size = 0
        self._merged: dict[tuple[object, ...], tuple[Touched, ...]] = {}
        self._copy: Copy | None = None
        self._since_copy = 0
        self._position = Position(epoch, 0)

    @property
    def position(self) -> Position:
        """Where the view is."""
        return self._position

    @property
    def begun(self) -> bool:
        """Whether there is anything to see yet."""
        return self._position.epoch != ""

    def documents(self, topic: str) -> Mapping[str, JsonObject]:
        """The documents of a topic as they are now."""
        return self._documents.get(topic, {})

    def begin(self, epoch: str, documents: Documents | None = None, seq: int = 0) -> None:
        """Begin another life, or the same one anew, with these documents; "" for none that has begun."""
        self._documents = {topic: dict(docs) for topic, docs in (documents or {}).items()}
        self._position = Position(epoch, seq)
        self._ring.clear()
        self._ring_size = 0
        self._merged.clear()
        self._copy = None

    def change(self, put: Documents, delete: Keys | None = None, *, seq: int | None = None) -> bool:
        """Set documents and delete keys (other ones) as one change; returns whether it was one.

        What is as it was already is left out, and a change of nothing has no number. A mirror gives the `seq` that
        the change has at its origin; it may have skipped some, and then all of it is kept as it came.
        """
        touched: dict[str, dict[str, _Pair]] = {}
        for topic, documents in put.items():
            old = self._documents.get(topic, {})
            found: dict[str, _Pair] = {
                key: (old.get(key), document)
                for key, document in documents.items()
                if seq is not None or old.get(key) != document
            }
            if found:
                touched[topic] = found
        for topic, keys in (delete or {}).items():
            old = self._documents.get(topic, {})
            gone = {key: (old.get(key), None) for key in keys if seq is not None or key in old}
            if gone:
                touched.setdefault(topic, {}).update(gone)
        if not touched and (seq is None or seq == self._position.seq):
            return False
        self._take(touched, self._position.seq + 1 if seq is None else seq)
        return True

    def _take(self, touched: dict[str, dict[str, _Pair]], seq: int) -> None:
        for topic, keys in touched.items():
            documents = self._documents.setdefault(topic, {})
            for key, (_, after) in keys.items():
                if after is None:
                    documents.pop(key, None)
                else:
                    documents[key] = after
        size = sum(map(len, touched.values()))
        self._ring.append(_Change(self._position.seq, seq, touched, size))
        self._ring_size += size
        self._since_copy += size
        self._position = self._position._replace(seq=seq)
        self._merged.clear()
        self._trim()

    def _trim(self) -> None:
        drop, left = 0, len(self._ring)
        while left > 1 and (left > RING_DELTAS or self._ring_size > RING_DOCUMENTS):
            self._ring_size -= self._ring[drop].size
            drop, left = drop + 1, left - 1
        del self._ring[:drop]
        if self._copy is not None and not self.reaches(self._copy.position.seq):
            self._copy = None

    # --- for cursors

    def reaches(self, seq: int) -> bool:
        """Whether the ring leads from there to the present."""
        return (self._ring[0].prev if self._ring else self._position.seq) <= seq <= self._position.seq

    def copy(self, *, fresh: bool = False) -> Copy:
        """The documents at a position, the present one where `fresh`, else one that `changes` leads on from."""
        total = sum(map(len, self._documents.values()))
        stale = self._copy is not None and (
            (fresh and self._copy.position != self._position) or self._since_copy * REUSE > total
        )
        if self._copy is None or stale:
            documents = {topic: tuple(docs.items()) for topic, docs in self._documents.items()}
            self._copy = Copy(position=self._position, documents=documents)
            self._since_copy = 0
        return self._copy

    def changes(
        self, since: int, topics: tuple[str, ...], select: Select | None, *, certain: bool
    ) -> tuple[tuple[object, ...], tuple[Touched, ...]]:
        """What has changed in the topics after `since`, under the name of that content.

        `certain` false: for a reader of which we do not know what it has (see the head of this module).
        """
        name = ("delta", since, self._position, topics, select and select.text, certain)
        changes = self._merged.get(name)
        if changes is None:
            if len(self._merged) >= MERGED:
                self._merged.clear()
            changes = self._merged[name] = tuple(self._merge(since, topics, select, certain))
        return name, changes

    def _merge(self, since: int, topics: tuple[str, ...], select: Select | None, certain: bool) -> Iterator[Touched]:
        first = bisect_right(self._ring, since, key=lambda change: change.seq)
        for topic in topics:
            merged: dict[str, _Pair] = {}
            for change in islice(self._ring, first, None):
                for key, (before, after) in change.touched.get(topic, {}).items():
                    merged[key] = (merged[key][0] if key in merged else before, after)
            for key, (before, after) in merged.items():
                if select is None or (after is not None and select.matches(topic, after)):
                    yield Touched(topic, key, after)
                elif not certain or (before is not None and select.matches(topic, before)):
                    yield Touched(topic, key, None)


class Cursor:
    """One reader's place in a view.

    `topics` in any order; `select` leaves documents out; `position` is where the reader was, with the same topics and
    the same filter, be it at another rank.
    """

    __slots__ = ("_at", "_known", "_resuming", "_seen", "_select", "_topics", "_view")

    def __init__(
        self,
        view: View,
        topics: Iterable[str],
        select: Select | None = None,
        position: Position | None = None,
    ) -> None:
        wanted = set(topics)
        self._view = view
        self._topics = tuple(topic for topic in TOPICS if topic in wanted)
        self._select = select
        self._known = position
        """What the reader has been told, None before its first snapshot."""
        self._at = position.seq if position is not None else 0
        """How far we have looked: nothing between there and what is known is for this reader."""
        self._resuming = position is not None
        self._seen: Position | None = None

    @property
    def topics(self) -> tuple[str, ...]:
        """What it reads, in the order of `TOPICS`."""
        return self._topics

    @property
    def seen(self) -> Position | None:
        """Where the view was when the cursor looked, for `Board.news`: anywhere else there may be something to say."""
        return self._seen

    def next(self, *, idle: bool = False) -> Snapshot | Delta | None:
        """What the reader is to be told now; None where nothing is new for it.

        `idle`: it has been told nothing for so long that it is to learn by an empty delta that all is well, and the
        present position, to which it may have been led by changes that are not for it. Who has been told anything
        gets one in any case.
        """
        view, position, known = self._view, self._view.position, self._known
        self._seen = position
        if not view.begun:
            return self._still() if idle else None
        if known is None:
            return self._snapshot(Why.FIRST)
        if known.epoch != position.epoch:
            return self._snapshot(Why.RESTARTED)
        if position.seq < self._at <= position.seq + RING_DELTAS:  # a mirror, not as far as the reader's last one was
            return self._still() if idle else None
        if not view.reaches(self._at):
            return self._snapshot(Why.BEHIND)
        content, changes = view.changes(self._at, self._topics, self._select, certain=not self._resuming)
        self._at = position.seq
        if not (changes or self._resuming or idle):
            return None
        self._known, self._resuming = position, False
        return Delta(prev=known.seq, position=position, content=content, changes=changes)

    def _still(self) -> Delta | None:
        """The view is not where the reader is, yet or again: it stays there, if it is known to have been there."""
        if self._known is None or self._resuming:
            return None
        return Delta(prev=self._known.seq, position=self._known, content=("still",), changes=())

    def _snapshot(self, why: Why) -> Snapshot:
        copy = self._view.copy()
        self._known = self._seen = copy.position
        self._at, self._resuming = copy.position.seq, False
        return Snapshot(position=copy.position, why=why, topics=self._topics, select=self._select, copy=copy)


def as_documents(items: Iterable[Touched]) -> tuple[dict[str, dict[str, JsonObject]], dict[str, list[str]]]:
    """The same as nested maps: what is set, and what is deleted."""
    put: dict[str, dict[str, JsonObject]] = {}
    delete: dict[str, list[str]] = {}
    for topic, key, document in items:
        if document is None:
            delete.setdefault(topic, []).append(key)
        else:
            put.setdefault(topic, {})[key] = document
    return put, delete


def check_topics(topics: Sequence[str]) -> tuple[str, ...]:
    """The topics in the order of `TOPICS`. Raises ValueError for none at all and for one that does not exist."""
    if not topics:
        raise ValueError(f"cannot watch nothing: name some of {', '.join(TOPICS)}")
    for topic in topics:
        if topic not in TOPICS:
            raise ValueError(f"cannot watch {topic!r:.80}: there are {', '.join(TOPICS)}")
    return tuple(topic for topic in TOPICS if topic in topics)
