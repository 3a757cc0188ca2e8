"""A parent that dies and is back within 100 ms, faster than any heartbeat: its children notice (flux-core issue 3608).

The heartbeat is made so slow here that it could not tell. The parent's successor is a process that has everything but
its beginning behind it.
"""

from __future__ import annotations

import contextlib
import time

import pytest
from conftest import MakeTree
from kit import stopped
from treekit import Tree
from treework import Work

SLOW = {"heartbeat": "10s", "torpid_min": "100s", "timeout": "200s"}


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """Seven brokers, all online, that hardly ever say that they live."""
    made = make_tree(size=7, settings={"tbon": SLOW})
    made.start_all()
    return made


def replace(tree: Tree, rank: int) -> None:
    """Kill a broker and have another in its place at once."""
    begin = tree.warm(rank)
    killed = time.monotonic()
    tree.kill_rank(rank)
    begin()
    print(f"rank {rank} began again {1000 * (time.monotonic() - killed):.0f} ms after it was killed")


@pytest.mark.parametrize("parent", [0, 1])
@pytest.mark.parametrize("hanging", [False, True], ids=["awake", "stopped"])
def test_children_notice_that_their_parent_is_another(tree: Tree, parent: int, hanging: bool) -> None:
    """Also where they were stopped meanwhile, and had no chance to see it go."""
    work = Work(tree)
    below = tree.subtree(parent)
    work.begin(parent)
    work.begin(*below[1:])
    work.wait_running()
    before = tree.uuids()
    with contextlib.ExitStack() as stack:
        for child in below[1:] if hanging else []:
            stack.enter_context(stopped(tree.brokers[child].pid))
        replace(tree, parent)
        if hanging:
            tree.wait_online([rank for rank in range(tree.size) if rank not in below[1:]])
            assert set(tree.reachable()) == set(range(tree.size)) - set(below[1:])
    tree.wait_renewed(before, below)
    for child in below[1:]:
        assert f"panic: the parent, rank {tree.parent(child)}, is lost" in tree.log_of(child)
    work.wait_progress()
    work.finish()
