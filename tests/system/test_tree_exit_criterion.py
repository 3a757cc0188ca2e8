"""The exit criterion at size 16: rank 0 is killed, or stopped, with jobs all over the tree, and nothing is lost.

All other brokers panic, join again as new incarnations (I6, broker by broker), and the jobs go on as they were.
"""

from __future__ import annotations

import pytest
from conftest import MakeTree
from treework import Work

from fluxres.job.value import JobState

SIZE = 16
BUSY = (0, 1, 3, 9, 15)
"""Ranks with a job of their own: the root, interior ranks, leaves."""
SPANNING = ((2, 5, 11), (0, 4, 8, 14))
"""Ranks that one job has together."""


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_loss_of_rank_0_loses_nothing(make_tree: MakeTree, how: str) -> None:
    tree = make_tree(size=SIZE, fanout=2, cores=2)
    tree.start_all()
    work = Work(tree)
    running = [work.begin(rank, puts=rank in BUSY[:3]) for rank in BUSY]
    running += [work.begin(*ranks, puts=ranks == SPANNING[0]) for ranks in SPANNING]
    pending = [work.queue(rank, cores=2) for rank in BUSY] + [work.queue(nodes=SIZE)]
    work.wait_running()
    states = work.states()
    assert all(states[jobid] is JobState.RUN for jobid in running)
    assert all(states[jobid] is JobState.SCHED for jobid in pending)
    before = tree.uuids()

    if how == "killed":
        tree.kill_rank(0)
    else:
        assert tree.stop_rank(0) == 0
    work.wait_progress()
    work.check_same()
    tree.spawn(0)

    tree.wait_renewed(before)
    assert work.states() == states
    for jobid in running:
        tree.wait_event(jobid, "reattach", "guest.exec.eventlog")
    work.wait_progress()
    work.finish()
    assert tree.stop_rank(0) == 0
