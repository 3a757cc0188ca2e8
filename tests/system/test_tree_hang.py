"""A broker that hangs: torpid first, and given nothing new; then lost, to its parent and its children alike.

It is stopped with SIGSTOP, so nothing of it closes: silence is all that the others have. When it goes on, it finds out
that it was given up, and panics. Its shells do not notice any of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from conftest import MakeTree
from kit import Expect, check_invariants, eventually, stopped
from netkit import births, check_alive, pending, requester, start_on, submit_on, wait_log, waited
from treekit import Tree

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId

SIZE = 7
INTERIOR, LEAF, FAR = 1, 5, 6
TIMES = {"heartbeat": "0.2s", "torpid_min": "1s", "timeout": "5s"}
ASKED = 10


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """Seven brokers, all online, that give a silent one up after five seconds."""
    made = make_tree(size=SIZE, settings={"tbon": TIMES})
    made.start_all()
    return made


def start_jobs(tree: Tree, *places: Sequence[int]) -> dict[JobId, Expect]:
    """Start a job on each of these sets of ranks; what is to become of them."""
    return {start_on(tree, *ranks): waited(len(ranks)) for ranks in places}


def torpid(tree: Tree) -> str:
    """The ranks that rank 0 calls torpid: those that hang, and whoever is behind them."""
    return str(tree.rpc("resource.status")["torpid"])


@pytest.mark.parametrize("victim", [INTERIOR, LEAF], ids=["interior", "leaf"])
def test_a_hanging_broker_is_torpid_then_lost_and_comes_back(tree: Tree, victim: int) -> None:
    subtree = tree.subtree(victim)
    expect = start_jobs(tree, [victim], [subtree[-1], FAR], [FAR])
    tasks = births(tree)
    before = tree.uuids()
    with requester(tree, 0) as near, requester(tree, FAR) as far:
        for client in (near, far):
            pending(client, at=subtree[-1], count=ASKED)
        begun = time.monotonic()
        with stopped(tree.brokers[victim].pid):
            eventually(lambda: torpid(tree) == str(IdSet(tree.subtree(victim))), what="torpid ranks")
            avoiding = tree.submit(tree.job(constraint={"ranks": [f"{victim}-{victim + 1}"]}))
            tree.wait_event(avoiding, "alloc")
            assert tree.online() == IdSet(range(SIZE)), "it was lost too soon for this test"
            assert tree.jobs()[avoiding]["ranks"] == str(victim + 1)

            for client in (near, far):
                client.read_terminal(ASKED)
                client.check_unreachable(ASKED)
            print(f"\nEHOSTUNREACH {time.monotonic() - begun:.2f}s after the SIGSTOP, timeout {TIMES['timeout']}")
            eventually(lambda: tree.online() == IdSet(range(SIZE)) - IdSet(subtree), what="the loss of the subtree")
            assert tree.child_status(victim) == "lost"
            assert torpid(tree) == ""
            for child in subtree[1:]:
                why = f"panic: the parent, rank {victim}, is lost: it has been silent"
                wait_log(tree, child, why)
        tree.wait_online()
        for client in (near, far):
            client.check_nothing_more()
    assert f"panic: the parent, rank {tree.parent(victim)}, is lost" in tree.log_of(victim)
    assert f"rank {victim} is lost: it has been silent for 5s" in tree.log_of(tree.parent(victim))
    after = tree.uuids()
    assert {rank for rank in before if before[rank] != after[rank]} == set(subtree)
    finish(tree, {**expect, avoiding: Expect()}, tasks)


def test_a_short_hang_is_no_loss(tree: Tree) -> None:
    expect = start_jobs(tree, [INTERIOR], [3, 5])
    tasks = births(tree)
    before = tree.uuids()
    with requester(tree, 0) as client:
        pending(client, at=3, count=ASKED)
        with stopped(tree.brokers[INTERIOR].pid):
            eventually(lambda: torpid(tree) == str(IdSet(tree.subtree(INTERIOR))), what="torpid ranks")
            held = submit_on(tree, "", INTERIOR)
            client.ask("broker.ping", {}, count=ASKED, nodeid=3)
        eventually(lambda: torpid(tree) == "", what="a lively rank")
        client.read_until(lambda: len(client.responses) == 2 * ASKED, "the answers")
        assert not [message for _, message in client.responses if message.errnum]
    assert tree.uuids() == before
    finish(tree, {**expect, held: Expect()}, tasks)


def test_a_hanging_root_is_lost_to_everybody(tree: Tree) -> None:
    """All others panic; it goes on as what it was, and they come back to it."""
    expect = start_jobs(tree, [0], [3, 5], [6])
    tasks = births(tree)
    before = tree.uuids()
    with stopped(tree.brokers[0].pid):
        for rank in range(1, SIZE):
            wait_log(tree, rank, "panic: ")
    tree.wait_online()
    after = tree.uuids()
    assert {rank for rank in before if before[rank] == after[rank]} == {0}
    finish(tree, expect, tasks)


def finish(tree: Tree, expect: dict[JobId, Expect], tasks: list[tuple[int, int]]) -> None:
    """Let the tasks end, and check that they are those that there were."""
    check_alive(tasks)
    (tree.path / "end").touch()
    check_invariants(tree, expect)
