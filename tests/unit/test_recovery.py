"""Recoveries as a fold: what opens an episode and what ends it, what it tells, and what cannot happen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.errors import IllegalTransition
from fluxres.base.eventlog import Event as LogEvent
from fluxres.base.eventlog import encode
from fluxres.base.idset import IdSet
from fluxres.exec.attachments import Fate
from fluxres.exec.episode import MAX_WHYS, Document
from fluxres.exec.recall import recall
from fluxres.exec.recovery import (
    LAG,
    LIMIT,
    TRANSITIONS,
    Begun,
    Closed,
    Counted,
    Declared,
    Event,
    Found,
    Joined,
    Leaving,
    Left,
    Opened,
    Over,
    Phase,
    Recovery,
    Shell,
    Tick,
)
from fluxres.overlay.topology import Topology

TREE = Topology.kary(7, 2)
NOBODY = IdSet()
ALL = IdSet(range(7))
LIFE = 1000.0
"""When this life of rank 0 begins."""
PARENT_LOST = "the parent is lost"


def begun(
    known: IdSet = NOBODY,
    *jobs: int,
    expected: IdSet | None = None,
    pending: int = 0,
    alive: float = LIFE - 100,
) -> Begun:
    return Begun(
        at=LIFE,
        known=known,
        expected=known if expected is None else expected,
        alive=alive,
        jobs=frozenset(jobs),
        pending=pending,
    )


def left(rank: int, at: float = LIFE) -> Left:
    return Left(at=at, rank=rank)


def joined(rank: int, at: float = LIFE, *, ago: float | None = None, why: str = PARENT_LOST) -> Joined:
    return Joined(at=at, rank=rank, ago=ago, why="" if ago is None else why)


def shell(fate: Fate, rank: int, job: int = 1, at: float = LIFE) -> Shell:
    return Shell(at=at, job=job, rank=rank, fate=fate)


def found(job: int, ranks: str, at: float = LIFE) -> Found:
    return Found(at=at, job=job, ranks=IdSet.parse(ranks))


HERE: Sequence[Event] = (begun(), *(joined(rank) for rank in range(7)))
"""A first life in which everybody is online."""


def fold(*events: Event) -> tuple[Recovery, list[Document | None]]:
    """The machine after these events, and the episodes that have ended."""
    machine = Recovery(TREE)
    ended = [effect.document for event in events for effect in machine.apply(event) if isinstance(effect, Closed)]
    return machine, ended


def brief(document: Document | None) -> str:
    """The numbers of a document: ranks of root, restarted, panicked; running = rediscovered + finished + lost."""
    assert document is not None
    jobs = f"{document.running}={document.rediscovered}+{document.finished}+{document.lost}"
    away = f" away {document.away} {document.detached}" if document.away or document.detached else ""
    ranks = f"{document.ranks} of {document.root}: {document.restarted} {document.panicked}"
    return f"{ranks}; {jobs}{away}"


# --- a life of rank 0


def test_a_first_start_is_none() -> None:
    machine, ended = fold(*HERE)
    assert (machine.phase, ended, machine.current(), machine.began) == (Phase.IDLE, [], None, None)


def test_a_life_ends_its_episode_when_all_is_back() -> None:
    back = [joined(rank, ago=1.0) for rank in range(1, 7)]
    attached = [shell(Fate.ATTACHED, rank, at=LIFE + 3) for rank in (2, 3)]
    events: list[Event] = [begun(ALL, 1, 2, pending=5), joined(0), *back, found(1, "2-3"), *attached, found(2, "")]
    for count in range(1, len(events)):
        machine, ended = fold(*events[:count])
        assert (machine.phase, ended) == (Phase.UNDER_WAY, [])
        document = machine.current()
        assert document is not None
        assert document.seconds is None
        assert document.ranks == ALL
    machine, [document] = fold(*events)
    assert brief(document) == "0-6 of 0: 0 1-6; 1=1+0+0"
    assert document is not None
    assert document.pending == 5
    assert document.began == LIFE - 1
    assert document.seconds == 1.0  # the last event was as early as that
    assert document.why == f"rank 0 was restarted; rank 1: {PARENT_LOST}"
    assert machine.phase is Phase.IDLE


@pytest.mark.parametrize("events", [(begun(NOBODY, pending=1),), (begun(NOBODY, 4),), (begun(IdSet([0])),)])
def test_a_life_that_finds_anything_is_one(events: Sequence[Event]) -> None:
    machine, _ = fold(*events)
    assert machine.phase is Phase.UNDER_WAY
    assert brief(machine.current()).startswith("0 of 0: ")


def test_a_life_after_a_shutdown_is_one_only_where_there_are_jobs() -> None:
    machine, _ = fold(begun(ALL, expected=NOBODY))
    assert machine.phase is Phase.IDLE
    machine, _ = fold(begun(ALL, expected=NOBODY, pending=1))
    assert machine.phase is Phase.UNDER_WAY
    events = (joined(0), joined(1), found(1, "0"), shell(Fate.ATTACHED, 0))
    _, [document] = fold(begun(ALL, 1, expected=NOBODY), *events)
    assert brief(document) == "0-1 of 0: 0-1 ; 1=1+0+0"
    assert document is not None
    assert document.why == "rank 0 was shut down"


@pytest.mark.parametrize(
    ("ago", "began"),
    [
        (5.0, LIFE - 5),
        (0.0, LIFE),
        (100.0, LIFE - 100),
        (100.0 + LAG, LIFE - 100 - LAG),
        (101.0 + LAG, LIFE),  # before rank 0 logged for the last time: that was about something else
        (-5.0, LIFE),
        (float("nan"), LIFE),
        (float("inf"), LIFE),
    ],
)
def test_only_what_is_credible_says_when_it_began(ago: float, began: float) -> None:
    machine, _ = fold(begun(ALL), joined(1, ago=ago))
    assert machine.began == began


def test_the_earliest_says_when_it_began_and_a_clock_set_back_nothing() -> None:
    machine, _ = fold(begun(ALL), joined(1, ago=2.0), joined(2, ago=4.0), joined(3, LIFE + 3, ago=1.0))
    assert machine.began == LIFE - 4
    machine, _ = fold(begun(ALL, alive=LIFE + 1e6), joined(1, ago=2.0))
    assert machine.began == LIFE - 2


def test_a_panic_of_rank_0_itself() -> None:
    _, [document] = fold(begun(IdSet([0, 1])), joined(1, ago=1.0), joined(0, ago=2.0, why="a bug"))
    assert brief(document) == "0-1 of 0:  0-1; 0=0+0+0"
    assert document is not None
    assert (document.why, document.began) == ("rank 0: a bug", LIFE - 2)


def test_ranks_that_were_not_here_are_not_awaited() -> None:
    """Unless they have shells; and where one was shut down, those below it cannot come."""
    machine, ended = fold(begun(ALL, expected=IdSet([0, 2, 3, 6])), joined(0), joined(2))
    assert ended == []  # rank 6 is awaited, rank 3 is below rank 1
    machine, [document] = fold(begun(ALL, expected=IdSet([0, 2, 3, 6])), joined(0), joined(2), joined(4), joined(6))
    assert brief(document) == "0,2-4,6 of 0: 0,2,4,6 ; 0=0+0+0"
    machine, ended = fold(begun(ALL, 1, expected=IdSet([0])), joined(0), found(1, "5"))
    assert ended == []
    assert brief(machine.current()) == "0,5 of 0: 0 ; 1=0+0+0 away 5 1"


# --- a loss


def test_a_router_is_lost_and_comes_back() -> None:
    gone: list[Event] = [*HERE, shell(Fate.DETACHED, 4), left(4, LIFE + 10), left(3, LIFE + 10), left(1, LIFE + 10)]
    machine, ended = fold(*gone, Counted(pending=3))
    assert ended == []
    assert brief(machine.current()) == "1,3-4 of 1:  ; 1=0+0+0 away 1,3-4 1"
    back: list[Event] = [joined(1, LIFE + 12), joined(3, LIFE + 12, ago=2.0), joined(4, LIFE + 13, ago=3.0)]
    machine, [document] = fold(*gone, Counted(pending=3), *back, shell(Fate.ATTACHED, 4, at=LIFE + 14))
    assert brief(document) == "1,3-4 of 1: 1 3-4; 1=1+0+0"
    assert document is not None
    assert (document.began, document.seconds, document.pending) == (LIFE + 10, 4.0, 3)
    assert document.why == f"rank 1 was restarted; rank 3: {PARENT_LOST}"


def test_what_is_lost_meanwhile_belongs_to_it() -> None:
    _, [document] = fold(*HERE, left(5), left(4), joined(5), left(5), joined(4), left(3), joined(5, ago=1.0), joined(3))
    assert brief(document) == "3-5 of 3: 3-5 ; 0=0+0+0"


def test_a_shell_that_is_lost_with_its_request_only_belongs_to_none() -> None:
    """Its rank is there, and refuses: that is the rank's affair, until it is lost as well."""
    machine, ended = fold(*HERE, shell(Fate.DETACHED, 4))
    assert machine.phase is Phase.IDLE
    machine, ended = fold(*HERE, shell(Fate.DETACHED, 4), left(4), joined(4))
    assert ended == []
    assert brief(machine.current()) == "4 of 4: 4 ; 1=0+0+0 away  1"


@pytest.mark.parametrize(
    ("fates", "counts"),
    [
        ([Fate.ATTACHED, Fate.ATTACHED], "1=1+0+0"),
        ([Fate.EXITED, Fate.EXITED], "1=0+1+0"),
        ([Fate.LOST, Fate.LOST], "1=0+0+1"),
        ([Fate.EXITED, Fate.ATTACHED], "1=1+0+0"),
        ([Fate.LOST, Fate.ATTACHED], "1=0+0+1"),
        ([Fate.EXITED, Fate.LOST], "1=0+0+1"),
        ([Fate.NOTHING, Fate.ATTACHED], "1=1+0+0"),
        ([Fate.NOTHING, Fate.NOTHING], "0=0+0+0"),
    ],
)
def test_a_job_is_counted_once(fates: Sequence[Fate], counts: str) -> None:
    lost: list[Event] = [left(3), left(4), joined(3), joined(4)]
    detached = (shell(Fate.DETACHED, rank) for rank in (3, 4))
    _, [document] = fold(
        *HERE, *detached, *lost, *(shell(fate, rank) for fate, rank in zip(fates, (3, 4), strict=True))
    )
    assert brief(document) == f"3-4 of 3: 3-4 ; {counts}"


def test_a_rank_that_says_goodbye_is_not_awaited() -> None:
    machine, ended = fold(*HERE, Leaving(rank=1), left(4), left(1), left(3))
    assert (machine.phase, ended) == (Phase.IDLE, [])
    machine, ended = fold(*HERE, left(4), Leaving(rank=1), left(1), left(3))
    assert (machine.phase, ended) == (Phase.IDLE, [None])  # the goodbye was late
    machine, ended = fold(*HERE, Leaving(rank=1), left(4), left(1), left(3), joined(1), joined(3), joined(4))
    assert (machine.phase, ended) == (Phase.IDLE, [])
    machine, ended = fold(*HERE, Leaving(rank=1), left(1), joined(1), left(1))
    assert brief(machine.current()) == "1 of 1:  ; 0=0+0+0 away 1 0"  # the second time it said nothing


@pytest.mark.parametrize("order", ["shell first", "rank first"])
def test_but_its_shells_are(order: str) -> None:
    lost: list[Event] = [shell(Fate.DETACHED, 4), left(4)]
    machine, _ = fold(*HERE, Leaving(rank=4), *(lost if order == "shell first" else reversed(lost)))
    assert brief(machine.current()) == "4 of 4:  ; 1=0+0+0 away 4 1"
    events = [*HERE, Leaving(rank=4), *lost, joined(4), shell(Fate.EXITED, 4)]
    machine, [document] = fold(*events)
    assert brief(document) == "4 of 4: 4 ; 1=0+1+0"
    assert document is not None
    assert document.why == "rank 4 was shut down"


def test_those_below_come_with_it() -> None:
    lost: list[Event] = [Leaving(rank=1), shell(Fate.DETACHED, 1), left(3), left(1)]
    _, [document] = fold(*HERE, *lost, joined(1), joined(3, ago=1.0), shell(Fate.ATTACHED, 1))
    assert brief(document) == "1,3 of 1: 1 3; 1=1+0+0"


def test_a_rank_that_is_declared_lost_is_not_awaited() -> None:
    events = [*HERE, shell(Fate.DETACHED, 4), left(4), Declared(at=LIFE, rank=4)]
    _, ended = fold(*events)
    assert ended == []
    _, [document] = fold(*events, shell(Fate.LOST, 4))
    assert brief(document) == "4 of 4:  ; 1=0+0+1"
    assert document is not None
    assert document.why == "rank 4 was declared lost"
    _, ended = fold(*HERE, left(4), Declared(at=LIFE, rank=4))
    assert ended == [None]


# --- the limit


def test_what_stays_away_is_given_up_and_its_return_is_an_episode() -> None:
    lost = [*HERE, shell(Fate.DETACHED, 4), left(4), left(5)]
    machine = Recovery(TREE)
    assert [effect for event in lost for effect in machine.apply(event)] == [Opened(deadline=LIFE + LIMIT)]
    assert machine.apply(Tick(at=LIFE + LIMIT - 1)) == []
    [closed] = machine.apply(Tick(at=LIFE + LIMIT))
    assert isinstance(closed, Closed)
    assert brief(closed.document) == "4-5 of 4:  ; 1=0+0+0 away 4-5 1"
    late = LIFE + 2 * LIMIT
    assert machine.apply(joined(5, late)) == []
    assert machine.apply(joined(4, late)) == [Opened(deadline=late + LIMIT)]
    [closed] = machine.apply(shell(Fate.ATTACHED, 4, at=late + 1))
    assert isinstance(closed, Closed)
    assert brief(closed.document) == "4 of 4: 4 ; 1=1+0+0"
    assert closed.document is not None
    assert (closed.document.began, closed.document.seconds) == (LIFE, 2 * LIMIT + 1)


def test_a_job_that_is_never_taken_up_does_not_keep_it_open() -> None:
    _, ended = fold(begun(ALL, 1), *(joined(rank) for rank in ALL))
    assert ended == []
    _, [document] = fold(begun(ALL, 1), *(joined(rank) for rank in ALL), Over(at=LIFE, job=1))
    assert brief(document) == "0-6 of 0: 0-6 ; 0=0+0+0"


def test_reasons_are_kept_of_those_nearest_to_the_root() -> None:
    tree = Topology.kary(1000, 2)
    machine = Recovery(tree)
    machine.apply(begun(IdSet(range(1000))))
    for rank in reversed(range(1, 1000)):
        machine.apply(joined(rank, ago=1.0, why=f"why of {rank}"))
        assert machine._episode is not None
        assert len(machine._episode._whys) <= MAX_WHYS
    document = machine.current()
    assert document is not None
    assert document.why == "rank 0 was lost; rank 1: why of 1"


# --- what cannot be


@pytest.mark.parametrize(
    ("before", "event", "words"),
    [
        ((), left(1), "new"),
        ((begun(),), begun(), "idle"),
        ((begun(),), Counted(pending=1), "idle"),
        ((begun(),), left(1), "left"),
        ((begun(ALL),), left(1), "under way"),
        (HERE, joined(1), "joined"),
        (HERE, shell(Fate.ATTACHED, 4), "attached"),
        ((*HERE, shell(Fate.DETACHED, 4)), shell(Fate.DETACHED, 4), "detached"),
    ],
)
def test_what_cannot_be_is_refused(before: Sequence[Event], event: Event, words: str) -> None:
    machine, _ = fold(*before)
    with pytest.raises(IllegalTransition, match=words) as caught:
        machine.apply(event)
    assert len(caught.value.history) == len(before)


def test_the_table_has_every_event() -> None:
    assert {each.__name__ for each in TRANSITIONS} == {each.__name__ for each in Event.__args__}


# --- against a naive model


class Naive:
    """Says the same by looking at all that has happened since the last time nothing was lost."""

    def __init__(self) -> None:
        self.online = set(ALL)
        self.detached: set[tuple[int, int]] = set()
        self.lost: set[int] = set()
        self.shells: set[tuple[int, int]] = set()
        self.fates: dict[int, set[Fate]] = {}

    @property
    def under_way(self) -> bool:
        return bool(self.lost)

    def apply(self, event: Event) -> None:
        match event:
            case Left(rank=rank):
                self.online.discard(rank)
                self.lost.add(rank)
                self.shells |= {each for each in self.detached if each[1] == rank}
            case Joined(rank=rank):
                self.online.add(rank)
            case Shell(job=job, rank=rank, fate=Fate.DETACHED):
                self.detached.add((job, rank))
                if rank in self.lost:
                    self.shells.add((job, rank))
            case Shell(job=job, rank=rank, fate=fate):
                self.detached.discard((job, rank))
                if (job, rank) in self.shells and self.under_way:
                    self.shells.discard((job, rank))
                    self.fates.setdefault(job, set()).add(fate)

    def document(self) -> tuple[set[int], int, int, int, int]:
        told = {job: fates - {Fate.NOTHING} for job, fates in self.fates.items()}
        lost = {job for job, fates in told.items() if Fate.LOST in fates}
        attached = {job for job, fates in told.items() if Fate.ATTACHED in fates} - lost
        finished = {job for job, fates in told.items() if fates} - lost - attached
        running = {job for job, _ in self.shells} | {job for job, fates in told.items() if fates}
        return set(self.lost), len(running), len(attached), len(finished), len(lost)

    def settle(self) -> bool:
        """Whether the episode is over; then the next one may begin."""
        if not self.lost or self.lost - self.online or self.shells:
            return False
        self.lost, self.fates = set(), {}
        return True


_SHELL_STEPS = st.tuples(st.sampled_from(list(Fate)), st.integers(1, 3), st.integers(0, 6))
_RANK_STEPS = st.tuples(st.just(None), st.just(0), st.integers(0, 6))


@settings(max_examples=300)
@given(st.lists(st.one_of(_SHELL_STEPS, _RANK_STEPS), max_size=60))
def test_it_says_what_a_naive_model_says(steps: list[tuple[Fate | None, int, int]]) -> None:
    machine, _ = fold(*HERE)
    naive = Naive()
    for at, (fate, job, rank) in enumerate(steps):
        now = LIFE + at
        event: Event
        if fate is None:
            event = left(rank, now) if rank in naive.online else joined(rank, now)
        elif ((job, rank) in naive.detached) is (fate is Fate.DETACHED):
            continue  # it cannot be
        else:
            event = shell(fate, rank, job, now)
        naive.apply(event)
        expected = naive.document()
        over = naive.settle()
        closed = [effect.document for effect in machine.apply(event) if isinstance(effect, Closed)]
        document = closed[0] if closed else machine.current()
        assert bool(closed) is over
        assert (machine.phase is Phase.UNDER_WAY) is naive.under_way
        if document is not None:
            counts = document.running, document.rediscovered, document.finished, document.lost
            assert (set(document.ranks), *counts) == expected
            assert not over or document.running == document.rediscovered + document.finished + document.lost


# --- what is told, and recalled


def test_the_document_as_json() -> None:
    machine, _ = fold(begun(ALL, pending=2), *(joined(rank) for rank in range(1, 7)))
    document = machine.current()
    assert document is not None
    under_way = document.context(1e9)
    common = {
        "ranks": "0-6",
        "root": 0,
        "panicked": "",
        "began": 1e9 + LIFE,
        "running": 0,
        "rediscovered": 0,
        "finished": 0,
        "lost": 0,
        "pending": 2,
    }
    assert under_way == {**common, "restarted": "1-6", "why": "rank 0 was lost", "away": "0", "detached": 0}
    [closed] = machine.apply(joined(0, LIFE + 1.5))
    assert isinstance(closed, Closed)
    assert closed.document is not None
    assert closed.document.context(1e9) == {
        **common,
        "restarted": "0-6",
        "why": "rank 0 was restarted",
        "seconds": 1.5,
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", ""),
        ("restart online:0-3", "0-3"),
        ("restart online:0-3 offline:2", "0-3"),  # lost: rank 0 awaited it
        ("restart online:0-3 offline:2:clean", "0-1,3"),
        ("restart online:0-3 restart online:0-1", "0-3"),
        ("restart online:0-3 restart online:0-3 offline:2:clean", "0-1,3"),
        ("restart online:0-3 offline:2 recovery:2", "0-1,3"),
        ("restart online:0-3 offline:2 recovery:2 online:2", "0-3"),
        ("online:3 torpid:3 lively:3 drain:1", "3"),
    ],
)
def test_whom_a_life_may_expect(names: str, expected: str) -> None:
    log = []
    for number, text in enumerate(names.split(), 1):
        name, ranks, clean = [*text.split(":"), "", ""][:3]
        reason = {"reason": "shut down"} if clean else {}
        log.append(LogEvent(number, name, {"away" if name == "recovery" else "idset": ranks, **reason}))
    recalled = recall("".join(map(encode, log)).encode())
    assert (str(recalled.expected), recalled.alive) == (expected, len(log))
