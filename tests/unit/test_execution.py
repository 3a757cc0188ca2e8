"""What job-exec answers to a start (RFC 32): each response once, in order, whatever the order of the ranks and wherever
rank 0 is restarted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.exec.execution import Execution, Response
from fluxres.exec.progress import Problem, Progress, RankState

S = RankState
NEW = Progress(statedir="s")
GONE = Problem(type="exec", severity=0, note="the shell died")


def types(responses: list[Response]) -> list[str]:
    return [response.type for response in responses]


def running() -> Progress:
    return NEW.moved(S.RUNNING, cursor=1)


def exited(status: int = 0) -> Progress:
    return running().moved(S.EXITED, cursor=2, status=status)


def test_a_job_of_two_ranks() -> None:
    execution = Execution({4: NEW, 2: NEW}, reattach=False)
    assert execution.begin() == []
    assert execution.missing() == [2, 4]
    assert execution.advanced(4, running()) == []
    assert types(execution.advanced(2, running())) == ["start"]
    assert execution.advanced(2, exited(256)) == []
    assert execution.missing() == [4]
    finish, release = execution.advanced(4, exited())
    assert finish == Response(type="finish", data={"status": 256})
    assert release == Response(type="release", data={"ranks": "2,4", "final": True})
    assert execution.ended
    assert execution.missing() == []


def test_a_rank_that_is_over_at_once_has_started_too() -> None:
    execution = Execution({0: NEW}, reattach=False)
    assert types(execution.begin()) == []
    assert types(execution.advanced(0, exited())) == ["start", "finish", "release"]


def test_a_rank_that_is_lost_is_an_exception_first() -> None:
    execution = Execution({0: running(), 1: running()}, reattach=True)
    assert types(execution.begin()) == ["reattached"]
    responses = execution.advanced(1, running().moved(S.LOST, cursor=1, status=9, problems=(GONE,)))
    assert responses == [Response(type="exception", data={"type": "exec", "severity": 0, "note": "the shell died"})]
    assert types(execution.advanced(0, exited())) == ["finish", "release"]
    assert execution.status() == 9


def test_where_nothing_ran_nothing_finishes() -> None:
    void = NEW.moved(S.VOID, cursor=0, problems=(GONE,))
    execution = Execution({0: NEW, 1: NEW}, reattach=False)
    assert types(execution.advanced(0, void)) == ["exception"]
    assert execution.failed
    assert types(execution.advanced(1, void)) == ["release"]
    assert execution.status() == 0


def test_a_void_rank_does_not_hide_that_others_ran() -> None:
    execution = Execution({0: running(), 1: NEW}, reattach=False)
    assert execution.begin() == []
    assert types(execution.advanced(1, NEW.moved(S.VOID, cursor=0))) == ["start"]
    assert execution.advanced(0, exited(15))[0].data == {"status": 15}


@pytest.mark.parametrize("reattach", [False, True])
def test_a_restart_says_all_of_it_again(reattach: bool) -> None:
    lost = running().moved(S.LOST, cursor=2, status=9, problems=(GONE,))
    execution = Execution({0: exited(), 1: lost}, reattach=reattach)
    begin = "reattached" if reattach else "start"
    assert types(execution.begin()) == ["exception", begin, "finish", "release"]


def test_problems_are_told_once() -> None:
    warned = running().moved(S.RUNNING, cursor=2, problems=(Problem(type="w", severity=1, note="slow"),))
    execution = Execution({0: warned, 1: running()}, reattach=True)
    assert types(execution.begin()) == ["exception", "reattached"]
    assert types(execution.advanced(0, warned.moved(S.RUNNING, cursor=3))) == []


def test_what_several_ranks_say_alike_is_told_once() -> None:
    late = Problem(type="timeout", severity=0, note="resource allocation expired")
    execution = Execution(dict.fromkeys(range(3), running()), reattach=False)
    execution.begin()
    told = [execution.advanced(rank, running().with_problem(late)) for rank in range(3)]
    assert [types(responses) for responses in told] == [["exception"], [], []]
    again = Execution(execution.ranks, reattach=True)
    assert types(again.begin()) == ["exception", "reattached"]


def test_what_has_ended_is_released_while_the_rest_runs() -> None:
    execution = Execution(dict.fromkeys(range(4), running()), reattach=False)
    execution.begin()
    can = [execution.can_release]
    assert execution.release_early() == []
    for rank in (1, 3):
        execution.advanced(rank, exited())
        can.append(execution.can_release)
    assert execution.release_early() == [Response(type="release", data={"ranks": "1,3", "final": False})]
    can.append(execution.can_release)
    execution.advanced(0, exited())
    can.append(execution.can_release)
    last = execution.advanced(2, exited())
    can.append(execution.can_release)
    assert can == [False, True, True, False, True, False]
    assert execution.release_early() == []
    assert last[-1] == Response(type="release", data={"ranks": "0,2", "final": True})


def test_what_is_released_durably_is_not_released_again() -> None:
    ranks = {0: exited(), 1: exited(), 2: running()}
    execution = Execution(ranks, reattach=True, released=[0])
    assert types(execution.begin()) == ["reattached"]
    assert execution.release_early()[0].data == {"ranks": "1", "final": False}
    assert execution.advanced(2, exited())[-1].data == {"ranks": "2", "final": True}


LIVES: list[list[tuple[RankState, int]]] = [
    [(S.RUNNING, 0), (S.RUNNING, 0), (S.EXITED, 256)],
    [(S.RUNNING, 0), (S.LOST, 9)],
    [(S.EXITED, 0)],
    [(S.LOST, 9)],
    [(S.VOID, 0)],
]


def advance(rank: int, progress: Progress, state: RankState, status: int) -> Progress:
    problems = (Problem(type="exec", severity=0, note=f"rank {rank} is lost"),) if state is S.LOST else ()
    return progress.moved(state, cursor=progress.cursor + 1, status=status, problems=problems)


@given(st.lists(st.sampled_from(LIVES), min_size=1, max_size=4), st.data())
def test_each_response_once_and_in_order(lives: list[list[tuple[RankState, int]]], data: st.DataObject) -> None:
    steps = data.draw(st.permutations([rank for rank, life in enumerate(lives) for _ in life]))
    restart = data.draw(st.integers(0, len(steps)))
    ranks = dict.fromkeys(range(len(lives)), NEW)
    execution = Execution(ranks, reattach=False)
    said = types(execution.begin())
    left = [list(life) for life in lives]
    for count, rank in enumerate(steps):
        if count == restart:  # the records are what rank 0 has; it forgets what it has said
            execution = Execution(ranks, reattach=True)
            said = types(execution.begin())
        ranks[rank] = advance(rank, ranks[rank], *left[rank].pop(0))
        said += types(execution.advanced(rank, ranks[rank]))
        assert execution.ended is all(not life for life in left)
        assert (said[-1:] == ["release"]) is execution.ended
    ran = any(life[-1][0] is not S.VOID for life in lives)
    begin = "start" if restart == len(steps) else "reattached"
    order = [kind for kind, _ in itertools.groupby(kind for kind in said if kind != "exception")]
    assert order == ([begin, "finish", "release"] if ran else ["release"])
    assert len(said) - said.count("exception") == len(order)
    assert said.count("exception") == sum(life[-1][0] is S.LOST for life in lives)
    assert execution.status() == max((life[-1][1] for life in lives), default=0)
