"""RPC tracking at every hop, downward and upward: a lost broker answers everything that waits on it, once (I5, #3800).

The tree is 0 over 1 and 2, 1 over 3 and 4, 2 over 5 and 6: rank 3 is two hops below rank 0, four away from rank 5. The
latencies that are printed are from the SIGKILL until a thousand requesters know; they are not asserted.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from conftest import MakeTree
from kit import eventually, stopped
from netkit import Requester, pending, requester, trackers, wait_trackers
from treekit import Tree

MANY = 1000
TARGET, PARENT, FAR = 3, 1, 5


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """Seven brokers, all online, over whose links nothing is under way but each rank's presence."""
    made = make_tree(size=7)
    made.start_all()
    wait_trackers(made, {rank: len(made.subtree(rank)) if rank else 0 for rank in range(made.size)})
    return made


def kill(tree: Tree, rank: int) -> float:
    """SIGKILL a broker; returns when."""
    begun = time.monotonic()
    tree.brokers[rank].kill()
    return begun


def tell(what: str, begun: float, *clients: Requester) -> None:
    """Print how long after `begun` the first and the last response came that ended a request."""
    times = [when - begun for client in clients for when, _ in client.terminal()]
    print(f"\n{what}: {len(times)} answers, {min(times) * 1000:.1f} to {max(times) * 1000:.1f} ms after the SIGKILL")


@pytest.mark.parametrize("victim", [TARGET, PARENT], ids=["the rank", "its parent"])
def test_requests_downward_end_when_a_broker_dies(tree: Tree, victim: int) -> None:
    before = trackers(tree)
    with requester(tree, 0) as near, requester(tree, FAR) as far:
        for client in (near, far):
            pending(client, at=TARGET, count=MANY)
        assert tree.tracked(PARENT) == before[PARENT] + 2 * MANY
        assert tree.tracked(FAR) == before[FAR] + MANY

        begun = kill(tree, victim)
        for client in (near, far):
            client.read_terminal(MANY)
        tell(f"rank {victim} killed", begun, near, far)
        tree.kill_rank(victim)
        for client in (near, far):
            client.check_unreachable(MANY)
            client.check_nothing_more()
        gone = {rank for rank in before if rank in tree.subtree(victim)}
        elsewhere = {rank: count for rank, count in before.items() if rank not in {*gone, PARENT}}
        wait_trackers(tree, elsewhere)

        tree.spawn(victim)
        tree.wait_online()
        wait_trackers(tree, before)
        for client in (near, far):
            client.check_nothing_more()


@pytest.mark.parametrize("victim", [PARENT, 0], ids=["the parent", "the root"])
def test_requests_upward_end_when_a_broker_dies(tree: Tree, victim: int) -> None:
    before = trackers(tree)
    uuid = tree.attribute(TARGET, "uuid")
    with requester(tree, TARGET) as client:
        client.ask("kvs.wait-version", {"rootseq": 1_000_000_000}, count=MANY)
        # They go up one after the other and so do not overtake each other: the last one is seen at every hop.
        wait_trackers(tree, {TARGET: before[TARGET] + MANY, PARENT: before[PARENT] + MANY})
        begun = kill(tree, victim)
        client.read_to_end()
        tell(f"rank {victim} killed, asked at rank {TARGET}", begun, client)
        tree.kill_rank(victim)
        client.check_unreachable(MANY)
    tree.spawn(victim)
    tree.wait_online()
    wait_trackers(tree, before)
    assert tree.attribute(TARGET, "uuid") != uuid


def test_what_a_lost_broker_answers_late_is_dropped(tree: Tree) -> None:
    """A stopped broker has a thousand requests to answer; it is lost, wakes, and answers to nobody."""
    before = trackers(tree)
    with requester(tree, 0) as near, requester(tree, FAR) as far:
        with stopped(tree.brokers[TARGET].pid):
            for client in (near, far):
                client.ask("broker.ping", {}, count=MANY, nodeid=TARGET)
            for client in (near, far):
                client.read_terminal(MANY)
        for client in (near, far):
            client.check_unreachable(MANY)
        tree.wait_online()
        wait_trackers(tree, before)
        for client in (near, far):
            client.check_nothing_more()


def test_requests_of_a_client_that_leaves_end_everywhere(tree: Tree) -> None:
    """Its service hears of it and answers each; nobody is there to take that, and no tracker keeps anything."""
    before = trackers(tree)
    with requester(tree, FAR) as client:
        pending(client, at=TARGET, count=MANY)
    wait_trackers(tree, before)
    # Also where the client's broker dies instead of saying that it is gone.
    with requester(tree, FAR) as client:
        pending(client, at=TARGET, count=MANY)
        tree.kill_rank(FAR)
        tree.spawn(FAR)
        tree.wait_online()
        wait_trackers(tree, before)


def test_requests_to_a_rank_that_is_away_end_at_once(tree: Tree) -> None:
    tree.kill_rank(TARGET)
    eventually(lambda: tree.child_status(TARGET) == "lost", what="the loss")
    with requester(tree, FAR) as client:
        client.ask("broker.ping", {}, count=MANY, nodeid=TARGET)
        client.read_terminal(MANY)
        client.check_unreachable(MANY)
        assert {os.fsdecode(message.payload or b"").split(":")[0] for _, message in client.responses} == {
            f"rank {TARGET} is not reachable"
        }


def test_a_clean_stop_answers_what_waits_on_it(tree: Tree) -> None:
    before = trackers(tree)
    with requester(tree, 0) as client:
        pending(client, at=TARGET, count=MANY)
        tree.brokers[PARENT].send_signal(signal.SIGTERM)
        client.read_terminal(MANY)
        client.check_unreachable(MANY)
        assert tree.died_rank(PARENT) == 0
        tree.spawn(PARENT)
        tree.wait_online()
        wait_trackers(tree, before)
        client.check_nothing_more()
