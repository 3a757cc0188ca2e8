"""A leaf with jobs on it is killed, and killed again at several instants while it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from conftest import MakeTree
from kit import eventually
from treekit import Tree
from treework import Work

from fluxres.base.jobid import JobId

SIZE: Final = 5
LEAF: Final = 4
PARENT: Final = 1


def begun(tree: Tree) -> int:
    """How many incarnations the leaf has begun."""
    return tree.incarnations(LEAF)


def joined(tree: Tree) -> int:
    """How often the leaf has joined its parent."""
    return tree.log_of(PARENT).count(f"rank {LEAF} has joined")


def online(tree: Tree) -> int:
    """How often rank 0 has taken the leaf."""
    return tree.log_of(LEAF).count(f"rank {LEAF} online")


def stored(tree: Tree, jobid: JobId) -> int:
    """How many bytes of the job's output are stored: more, when its shell has been found again."""
    return len(tree.output(jobid))


def test_a_killed_leaf_comes_back_to_its_job(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE)
    tree.start_all()
    work = Work(tree)
    alone = work.begin(LEAF, puts=True)
    work.begin(0, 3, LEAF)
    work.wait_running()
    pending = work.queue(LEAF, cores=4)
    before = tree.uuids()

    tree.kill_rank(LEAF)
    eventually(lambda: tree.child_status(LEAF) == "lost", what="the loss of the leaf")
    tree.wait_online([rank for rank in range(SIZE) if rank != LEAF])
    work.wait_progress()
    assert work.states()[alone].name == "RUN"
    assert work.states()[pending].name == "SCHED"
    tree.spawn(LEAF)
    tree.wait_renewed(before, [LEAF])
    so_far = stored(tree, alone)
    eventually(lambda: stored(tree, alone) > so_far, what="more output")
    work.wait_progress()
    work.finish()


INSTANTS: Final[dict[str, Callable[[Tree], int]]] = {"begun": begun, "joined": joined, "online": online}


@pytest.mark.parametrize("instant", [*INSTANTS, "reattached"])
def test_a_leaf_is_killed_again_while_it_rejoins(make_tree: MakeTree, instant: str) -> None:
    tree = make_tree(size=SIZE)
    tree.start_all()
    work = Work(tree)
    alone = work.begin(LEAF)
    work.begin(0, 3, LEAF)
    work.wait_running()
    before = tree.uuids()
    count = INSTANTS[instant] if instant in INSTANTS else lambda tree: stored(tree, alone)
    for _ in range(3):
        tree.kill_rank(LEAF)
        so_far = count(tree)
        tree.spawn(LEAF)
        eventually(lambda so_far=so_far: count(tree) > so_far, what=f"{instant} again")  # type: ignore[misc]
    tree.kill_rank(LEAF)
    tree.spawn(LEAF)
    tree.wait_renewed(before, [LEAF])
    work.wait_progress()
    work.finish()
