"""Recoveries of eight real brokers, killed with SIGKILL: each is one event of `resource.eventlog`, and right."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from conftest import MakeTree
from kit import Expect, eventually, process_gone
from treekit import Tree
from treework import Work

from fluxres.base.eventlog import decode
from fluxres.base.json import JsonValue
from fluxres_shell import claim

SIZE = 8
BUSY = (0, 1, 3, 7)
"""Ranks with a job of their own."""
SPANNING = (2, 4, 5)
"""Ranks that one job has together."""
CLOCK = 0.1
"""Seconds by which the test's view of when something was may differ from a broker's."""

Told = Mapping[str, JsonValue]


def recoveries(tree: Tree) -> list[Told]:
    """The contexts of all recovery events, as `fluxres kvs get` shows the eventlog; [] where nobody answers."""
    done = tree.fluxres("kvs", "get", "--raw", "resource.eventlog", check=False)
    return [event.context for event in decode(done.stdout) if event.name == "recovery"]


def recovered(tree: Tree, count: int) -> Told:
    """The last of so many recovery events, when it is there."""
    eventually(lambda: len(recoveries(tree)) >= count, what=f"recovery {count}")
    found = recoveries(tree)
    assert len(found) == count, found
    return found[-1]


def shell_pid(directory: Path) -> int:
    """The pid in the claim of a shell's directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = claim.read(descriptor)
    finally:
        os.close(descriptor)
    assert found is not None
    return found.pid


def begin(tree: Tree) -> Work:
    """Have jobs running all over the tree."""
    tree.start_all()
    work = Work(tree)
    for rank in BUSY:
        work.begin(rank)
    work.begin(*SPANNING)
    work.wait_running()
    assert recoveries(tree) == []
    return work


RUNNING = len(BUSY) + 1


def check(told: Told, **expected: JsonValue) -> None:
    """Fail unless the event says that, and of the times that they make sense."""
    other = {"began", "seconds", "why"}
    assert {key: value for key, value in told.items() if key not in other} == expected
    began, seconds = told["began"], told["seconds"]
    assert isinstance(began, float)
    assert isinstance(seconds, float)
    assert seconds > 0
    assert began + seconds <= time.time() + CLOCK


def test_rank_0_a_router_and_a_leaf_are_killed(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE, fanout=2, cores=2)
    work = begin(tree)
    pending = [work.queue(rank, cores=2) for rank in (0, 3)]
    before = tree.uuids()

    killed = time.time()
    tree.kill_rank(0)
    work.wait_progress()
    tree.spawn(0)
    told = recovered(tree, 1)
    check(
        told,
        ranks="0-7",
        root=0,
        restarted="0",
        panicked="1-7",
        running=RUNNING,
        rediscovered=RUNNING,
        finished=0,
        lost=0,
        pending=len(pending),
    )
    assert "rank 0 was restarted; rank 1: the parent, rank 0, is lost" in str(told["why"])
    began = told["began"]
    assert isinstance(began, float)
    assert killed - CLOCK <= began  # told by those who saw it, and not when rank 0 was back
    tree.wait_renewed(before)

    before = tree.uuids()
    tree.kill_rank(1)
    tree.spawn(1)
    told = recovered(tree, 2)
    check(
        told,
        ranks="1,3-4,7",
        root=1,
        restarted="1",
        panicked="3-4,7",
        running=4,
        rediscovered=4,
        finished=0,
        lost=0,
        pending=len(pending),
    )
    tree.wait_renewed(before, tree.subtree(1))

    tree.kill_rank(7)
    tree.spawn(7)
    told = recovered(tree, 3)
    check(
        told,
        ranks="7",
        root=7,
        restarted="7",
        panicked="",
        running=1,
        rediscovered=1,
        finished=0,
        lost=0,
        pending=len(pending),
    )
    work.wait_progress()
    work.finish()
    assert len(recoveries(tree)) == 3


def test_all_are_killed_and_a_shell_with_them(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE, fanout=2, cores=2)
    work = begin(tree)
    doomed = tree.submit(tree.job("mark('here'); time.sleep(1000)", constraint={"ranks": ["6"]}))
    tree.wait_marked(doomed, "here")
    [directory] = tree.directories(doomed)
    tree.kill_rank(*range(SIZE))
    shell = shell_pid(directory)
    os.kill(shell, signal.SIGKILL)
    eventually(lambda: process_gone(shell), what="the end of the shell")
    work.wait_progress()
    tree.spawn(*tree.shuffled(1))
    told = recovered(tree, 1)
    check(
        told,
        ranks="0-7",
        root=0,
        restarted="0-7",
        panicked="",
        running=RUNNING + 1,
        rediscovered=RUNNING,
        finished=0,
        lost=1,
        pending=0,
    )
    assert told["why"] == "rank 0 was restarted"
    work.wait_progress()
    work.finish(extra={doomed: Expect(exception="exec", status=signal.SIGKILL.value)})


def test_a_shutdown_is_none_and_a_restart_with_jobs_is_one(make_tree: MakeTree) -> None:
    tree = make_tree(size=SIZE, fanout=2, cores=2)
    tree.start_all()
    for rank in (7, 3, 1):
        assert tree.stop_rank(rank) == 0
    tree.wait_online([0, 2, 5, 6])
    tree.spawn(1, 3, 7)
    tree.wait_online()
    assert recoveries(tree) == []
    work = Work(tree)
    work.begin(7)
    work.wait_running()
    assert tree.stop_rank(0) == 0
    tree.spawn(0)
    told = recovered(tree, 1)
    assert told["root"] == 0
    assert (told["running"], told["rediscovered"], told["lost"]) == (1, 1, 0)
    assert "rank 0, is lost: it has cut us off: it is shut down" in str(told["why"])
    work.finish()
