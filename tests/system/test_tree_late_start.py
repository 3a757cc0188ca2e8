"""Brokers that start late, or in any order: jobs go to those that are there, the rest join when they come."""

from __future__ import annotations

from typing import Final

from conftest import MakeTree
from kit import Expect, check_invariants, eventually
from treework import Work

from fluxres.base.idset import IdSet
from fluxres.job.value import JobState

SIZE: Final = 12
SEED: Final = 3


def test_jobs_go_to_who_is_there_and_wait_for_the_rest(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE, cores=2)
    tree.spawn(0)
    tree.wait_online([0])
    assert tree.health()["status"] == "partial"
    work = Work(tree)
    first = [work.queue() for _ in range(3)]
    tree.wait_inactive(*first)

    more_than_all = tree.submit(tree.job(nodes=SIZE + 1, ntasks=SIZE + 1))
    tree.wait_inactive(more_than_all)
    assert "unsatisfiable" in str((tree.exception(more_than_all) or {})["note"])
    wide = work.queue(nodes=SIZE)
    tree.wait_event(wide, "priority")
    order = [rank for rank in tree.shuffled(SEED) if rank]
    for rank in order:
        assert work.states()[wide] is JobState.SCHED
        tree.spawn(rank)
        if tree.parent(rank) not in tree.brokers:
            waiting = f"waiting for the parent, rank {tree.parent(rank)}"
            eventually(lambda rank=rank, waiting=waiting: waiting in tree.log_of(rank), what=waiting)  # type: ignore[misc]
    tree.wait_online()
    tree.wait_inactive(wide)
    work.finish(extra={more_than_all: Expect(exception="alloc", tasks=0)})


def test_offline_ranks_get_nothing_and_are_waited_for(make_tree: MakeTree) -> None:
    tree = make_tree(size=6, cores=2)
    tree.spawn(4, 3, 0, 1)  # 2 and 5, below it, are away
    here = IdSet([0, 1, 3, 4])
    tree.wait_online(here)
    assert tree.child_status(2) == "offline"
    work = Work(tree)
    each = [work.queue(cores=2) for _ in range(8)]
    tree.wait_inactive(*each)
    ran_on = {int(str(job["ranks"])) for jobid, job in tree.jobs().items() if jobid in each}
    assert ran_on <= set(here)
    assert str(tree.rpc("resource.status")["offline"]) == "2,5"
    absent = work.queue(5)
    tree.wait_event(absent, "priority")
    tree.spawn(5)
    eventually(lambda: "waiting for the parent, rank 2" in tree.log_of(5), what="a child without its parent")
    assert work.states()[absent] is JobState.SCHED
    tree.spawn(2)
    tree.wait_online()
    tree.wait_inactive(absent)
    assert tree.jobs()[absent]["ranks"] == "5"
    work.finish()


def test_children_that_start_long_before_their_parents(make_tree: MakeTree) -> None:
    """From the leaves up, each level only when the one below has tried in vain to join."""
    tree = make_tree(size=7)
    for level in ((3, 4, 5, 6), (1, 2)):
        tree.spawn(*level)
        for rank in level:
            eventually(lambda rank=rank: "waiting for the parent" in tree.log_of(rank), what="a try")  # type: ignore[misc]
    tree.spawn(0)
    tree.wait_online()
    assert all(tree.log_of(rank).count("has joined") == (2 if rank < 3 else 0) for rank in range(7))
    everywhere = tree.submit(tree.job(nodes=7, ntasks=7))
    check_invariants(tree, {everywhere: Expect(tasks=7)})
