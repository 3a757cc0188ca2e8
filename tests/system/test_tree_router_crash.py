"""An interior broker is killed: its subtree is lost until it is back and restarts, nobody else does, jobs run on."""

from __future__ import annotations

import json

from conftest import MakeTree
from kit import eventually
from treekit import Tree
from treework import Work

from fluxres.base.idset import IdSet
from fluxres.job.value import JobState

SIZE = 15
ROUTER = 1
ABOVE = 0
UNDER = (1, 3, 8, 10)
BESIDE = (2, 12)


def shown(tree: Tree) -> dict[int, tuple[str, bool]]:
    """What `fluxres overlay status` says of each rank: its status, and whether it is only inferred (a ghost)."""
    found: dict[int, tuple[str, bool]] = {}
    todo = [json.loads(tree.fluxres("overlay", "status", "--json").stdout)]
    while todo:
        here = todo.pop()
        found[here["rank"]] = here["status"], here.get("ghost", False)
        todo += here["children"]
    return found


def test_the_subtree_of_a_killed_router_comes_back(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE, fanout=2)
    tree.start_all()
    subtree = tree.subtree(ROUTER)
    rest = [rank for rank in range(SIZE) if rank not in subtree]
    work = Work(tree)
    running = [work.begin(rank) for rank in (*UNDER, *BESIDE)] + [work.begin(4, 7, 13, puts=True)]
    work.wait_running()
    before = tree.uuids()
    full = dict.fromkeys(range(SIZE), ("full", False))
    assert shown(tree) == full

    tree.kill_rank(ROUTER)
    eventually(lambda: tree.health()["status"] == "degraded", what="a degraded tree")
    assert tree.child_status(ROUTER) == "lost"
    expected = {rank: ("lost", rank != ROUTER) for rank in subtree} | {ABOVE: ("degraded", False)}
    assert shown(tree) == full | expected
    tree.wait_online(rest)
    assert {rank: before[rank] for rank in rest} == tree.uuids(rest)
    work.wait_progress()
    work.check_same()
    assert all(work.states()[jobid] is JobState.RUN for jobid in running)
    meanwhile, later = work.queue(*rest, nodes=4), work.queue(*subtree, nodes=4)
    tree.wait_event(meanwhile, "clean")
    assert work.states()[later] is JobState.SCHED

    tree.spawn(ROUTER)
    tree.wait_renewed(before, subtree)
    assert shown(tree) == full
    assert tree.online() == IdSet(range(SIZE))
    tree.wait_event(later, "clean")
    work.wait_progress()
    work.finish()


def test_routers_on_one_way_die_one_after_the_other(make_tree: MakeTree) -> None:
    """Those below restart as often as somebody above them dies; in the end all are there."""
    tree = make_tree(size=7, fanout=1)
    tree.start_all()
    work = Work(tree)
    for ranks in ([6], [2, 5], [0]):
        work.begin(*ranks)
    work.wait_running()
    for rank in (5, 3, 1):
        before = tree.uuids()
        tree.kill_rank(rank)
        tree.spawn(rank)
        tree.wait_renewed(before, tree.subtree(rank))
    before = tree.uuids()
    tree.kill_rank(1, 3, 5)
    tree.spawn(5, 1, 3)
    tree.wait_renewed(before, tree.subtree(1))
    work.wait_progress()
    work.finish()
