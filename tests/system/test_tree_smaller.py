"""An instance is not started with fewer brokers than its jobs are on: nobody could ever end them."""

from __future__ import annotations

from conftest import MakeTree
from kit import Expect, check_invariants, wait_status

RUNS_UNTIL_TOLD = "while not os.path.exists('end'): time.sleep(0.02)\nsys.exit(3)"


def test_a_smaller_instance_is_refused_while_jobs_are_on_its_ranks(make_tree: MakeTree) -> None:
    tree = make_tree(size=3)
    tree.start_all()
    jobid = tree.submit(tree.job(RUNS_UNTIL_TOLD, nodes=3, ntasks=3))
    tree.wait_event(jobid, "start")
    for rank in range(tree.size):
        tree.stop_rank(rank)
    whole = tree.resize(2)
    tree.spawn(0)
    assert tree.died_rank(0) == 1
    assert "cannot be an instance of 2 broker(s): job " in tree.log_of(0)
    assert "has rank 2; start 3 or more" in tree.log_of(0)
    tree.resize(whole)
    tree.start_all()
    (tree.path / "end").touch()
    check_invariants(tree, {jobid: Expect(status=wait_status(3), tasks=3)})
