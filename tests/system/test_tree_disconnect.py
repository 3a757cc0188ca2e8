"""`fluxres overlay disconnect`: a live subtree is declared dead, and restarts as if its parent had crashed (#3805)."""

from __future__ import annotations

import pytest
from conftest import MakeTree
from kit import eventually
from treework import Work


@pytest.mark.parametrize("rank", [1, 2, 6], ids=["router", "other-router", "leaf"])
def test_a_disconnected_subtree_restarts(make_tree: MakeTree, rank: int) -> None:
    tree = make_tree(size=7)
    tree.start_all()
    work = Work(tree)
    subtree = tree.subtree(rank)
    for ranks in ([rank], subtree, [0, subtree[-1]], [0, 3, 4]):
        work.begin(*ranks)
    work.wait_running()
    before = tree.uuids()
    pids = {each: broker.pid for each, broker in tree.brokers.items()}

    said = tree.fluxres("overlay", "disconnect", str(rank))
    assert f"rank {rank}" in said.stderr.decode()
    tree.wait_renewed(before, subtree)
    parent = tree.parent(rank)
    assert f"panic: the parent, rank {parent}, is lost: it has cut us off" in tree.log_of(rank)
    assert "an administrator" in tree.log_of(rank)
    assert f"disconnecting rank {rank}" in tree.log_of(parent)
    assert {each: broker.pid for each, broker in tree.brokers.items() if broker.poll() is None} == pids
    work.wait_progress()
    work.check_same()
    work.finish()


def test_only_a_child_that_is_there_can_be_disconnected(make_tree: MakeTree) -> None:
    tree = make_tree(size=4)
    tree.spawn(0, 1, 2)
    tree.wait_online([0, 1, 2])
    before = tree.uuids([0, 1, 2])
    for args, why in (
        (("0",), "it is the root"),
        (("3",), "not connected"),
        (("-r", "2", "3"), "no child of rank 2"),
        (("9",), "rank 9"),
    ):
        failed = tree.fluxres("overlay", "disconnect", *args, check=False)
        assert failed.returncode == 1
        assert why in failed.stderr.decode(), failed.stderr
    assert tree.uuids([0, 1, 2]) == before
    tree.spawn(3)
    eventually(lambda: tree.health()["status"] == "full", what="full health")
