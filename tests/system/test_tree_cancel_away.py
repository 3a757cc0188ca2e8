"""A job is cancelled while its rank is cut off: when the rank is back its tasks are killed there, exactly those.

Until then the cancellation is durable and waits; it survives rank 0, too. What had not begun on the rank never does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from conftest import MakeTree
from kit import Expect, birth, check_invariants, eventually, process_gone, stopped, wait_status
from netkit import births, check_alive, start_on, submit_on, waited
from treekit import Tree

from fluxres.base.failpoint import VARIABLE
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId

LEAF, PARENT, SIBLING = 5, 2, 6
CANCELLED = Expect(status=wait_status(128 + signal.SIGTERM), exception="cancel", tasks=None)
NEVER_RAN = Expect(status=None, exception="cancel", tasks=0)
SIZE = 7


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """Seven brokers, all online."""
    made = make_tree(size=SIZE)
    made.start_all()
    return made


def cut_off(tree: Tree, *ranks: int) -> None:
    """Kill the brokers of `ranks`; returns when rank 0 knows that they, and what is below, are not there."""
    tree.kill_rank(*ranks)
    away = {below for rank in ranks for below in tree.subtree(rank)}
    tree.wait_online(set(range(SIZE)) - away)


def all_dead(tasks: list[tuple[int, int]]) -> Callable[[], bool]:
    """Whether these processes are gone."""
    return lambda: all(birth(pid) != (pid, start) or process_gone(pid) for pid, start in tasks)


@pytest.mark.parametrize("victim", [LEAF, PARENT], ids=["its broker is killed", "the broker above it is killed"])
def test_exactly_the_cancelled_tasks_are_killed_when_the_rank_is_back(tree: Tree, victim: int) -> None:
    doomed, spanning = start_on(tree, LEAF), start_on(tree, 0, LEAF)
    others = {start_on(tree, LEAF): waited(), start_on(tree, LEAF, SIBLING): waited(2)}
    doomed_tasks, surviving_tasks = births(tree, doomed), births(tree, *others)
    far_tasks = [birth(m.pid) for m in tree.marked(spanning) if m.task == 1]
    near_tasks = [birth(m.pid) for m in tree.marked(spanning) if m.task == 0]

    cut_off(tree, victim)
    for jobid in (doomed, spanning):
        tree.cancel(jobid)
    eventually(all_dead(near_tasks), what="the end of the task on rank 0")
    check_alive([*doomed_tasks, *far_tasks, *surviving_tasks])
    assert not {"finish", "release", "clean"} & set(tree.events(doomed))

    tree.spawn(victim)
    eventually(all_dead([*doomed_tasks, *far_tasks]), what="the end of the cancelled tasks")
    tree.wait_inactive(doomed, spanning)
    check_alive(surviving_tasks)
    tree.wait_online()
    (tree.path / "end").touch()
    check_invariants(tree, {doomed: CANCELLED, spanning: CANCELLED, **others})


def test_the_cancellation_waits_also_while_rank_0_restarts(tree: Tree) -> None:
    doomed, other = start_on(tree, LEAF), start_on(tree, LEAF)
    doomed_tasks, surviving_tasks = births(tree, doomed), births(tree, other)
    cut_off(tree, LEAF)
    tree.cancel(doomed)
    tree.kill_rank(0)
    tree.spawn(0)
    tree.wait_online(IdSet(range(SIZE)) - IdSet([LEAF]))
    check_alive([*doomed_tasks, *surviving_tasks])
    assert "clean" not in tree.events(doomed)

    tree.spawn(LEAF)
    tree.wait_inactive(doomed)
    assert all_dead(doomed_tasks)()
    check_alive(surviving_tasks)
    (tree.path / "end").touch()
    check_invariants(tree, {doomed: CANCELLED, other: waited()})


def start_unheard(tree: Tree) -> JobId:
    """A job that rank 0 has asked the leaf to start, which never heard of it."""
    with stopped(tree.brokers[LEAF].pid):
        jobid = submit_on(tree, "", LEAF)
        tree.wait_event(jobid, "alloc")
        cut_off(tree, LEAF)
    return jobid


def start_written(tree: Tree) -> JobId:
    """A job whose spec the leaf has written, and no more."""
    cut_off(tree, LEAF)
    tree.spawn(LEAF, env={VARIABLE: "launch.before"})
    tree.wait_online()
    jobid = submit_on(tree, "", LEAF)
    assert tree.died_rank(LEAF) == -signal.SIGKILL
    assert (tree.directories(jobid)[0] / "spec").exists()
    return jobid


@pytest.mark.parametrize("begin", [start_unheard, start_written])
def test_what_had_not_begun_never_does(tree: Tree, begin: Callable[[Tree], JobId]) -> None:
    other = start_on(tree, LEAF)
    tasks = births(tree, other)
    jobid = begin(tree)
    tree.cancel(jobid)
    assert "clean" not in tree.events(jobid)
    tree.spawn(LEAF)
    check_invariants(tree, {jobid: NEVER_RAN}, exact=False)
    check_alive(tasks)
    (tree.path / "end").touch()
    check_invariants(tree, {jobid: NEVER_RAN, other: waited()})


def test_what_was_not_allocated_ends_at_once(tree: Tree) -> None:
    """A pending job for an absent rank has nothing anywhere: nobody has to be waited for."""
    cut_off(tree, LEAF)
    jobid = submit_on(tree, "", LEAF)
    tree.cancel(jobid)
    check_invariants(tree, {jobid: NEVER_RAN})
    tree.spawn(LEAF)
    tree.wait_online()
    assert not tree.marked(jobid)
