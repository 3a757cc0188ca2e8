"""Death at every step of jobs that span several ranks: of rank 0's broker, or of the broker of another rank.

As in test_failpoints.py a failpoint of a broker costs nothing at all. Each broker that one has killed is followed by
one that the next will kill, so that the job which runs into the one goes on into the other.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from typing import Final

import pytest
from conftest import MakeTree
from kit import BROKER_PLACES, Expect, check_invariants, eventually, wait_status
from treekit import Tree

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.failpoint import VARIABLE
from fluxres.base.jobid import JobId

SIZE: Final = 3
LEAF: Final = 2
TASKS: Final = 2 * SIZE
BODY: Final = """
for number in range(100):
    print(number, flush=number % 20 == 0)
sys.exit(int(os.environ["FLUX_TASK_RANK"]))
"""
OUTPUT: Final = b"".join(b"%d\n" % number for number in range(100))
EXPECT: Final = Expect(status=wait_status(TASKS - 1), output=dict.fromkeys(range(TASKS), OUTPUT), tasks=TASKS)
OF_ROOT: Final = [f"{place}.{side}" for place in BROKER_PLACES for side in ("before", "after")]
OF_LEAF: Final = ["launch.before", "launch.after"] * 2


def go_on_until_dead(tree: Tree, rank: int, jobs: list[JobId]) -> None:
    """Submit jobs, one after another, until the broker of `rank` has died of its failpoint."""
    spec = tree.job(BODY, nodes=SIZE, ntasks=TASKS)

    def dead() -> bool:
        if tree.brokers[rank].poll() is not None:
            return True
        with contextlib.suppress(RpcError, FluxresError):  # rank 0 is away, or goes away: the key is tried again
            if not jobs or "clean" in tree.events(jobs[-1]):
                jobs.append(tree.submit(spec, key=f"job {len(jobs)}"))
        return False

    eventually(dead, what="the failpoint")
    assert tree.died_rank(rank) == -signal.SIGKILL


@pytest.mark.parametrize(("rank", "failpoints"), [(0, OF_ROOT), (LEAF, OF_LEAF)], ids=["root", "leaf"])
def test_a_broker_dies_while_a_job_spans_it(make_tree: MakeTree, rank: int, failpoints: Sequence[str]) -> None:
    tree = make_tree(size=SIZE, cores=2)
    tree.spawn(*(other for other in range(SIZE) if other != rank))
    jobs: list[JobId] = []
    for failpoint in failpoints:
        print(f"{len(jobs)} jobs, next: {failpoint}")
        tree.spawn(rank, env={VARIABLE: failpoint})
        go_on_until_dead(tree, rank, jobs)
    tree.spawn(rank)
    tree.wait_online()
    jobs.append(tree.submit(tree.job(BODY, nodes=SIZE, ntasks=TASKS), key=f"job {len(jobs)}"))
    check_invariants(tree, dict.fromkeys(jobs, EXPECT))
