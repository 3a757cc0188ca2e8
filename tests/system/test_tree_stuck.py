"""A stuck service is seen and named from another node, with the stack where it hangs (flux-core #2797).

It is wedged for real: the launcher of a rank is stopped, so that nothing in the broker that asked it for a shell comes
to its end, and nothing times out. Everything else there goes on, and says so.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import MakeTree
from kit import Expect, check_invariants, eventually, stopped
from netkit import births, check_alive, start_on, submit_on, waited
from treekit import Tree

STUCK = 5
"""Two hops away from rank 0."""
SIZE = 7


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """Seven brokers, all online, in which a silent one is not given up while a test lasts."""
    made = make_tree(size=SIZE, settings={"tbon": {"torpid_min": "50s", "timeout": "100s"}})
    made.start_all()
    return made


def launcher_of(tree: Tree, rank: int) -> int:
    """The pid of the launcher of a broker, which has to have started a job."""
    for pid in tree.processes():
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--launcher" in arguments and int(stat[1]) == tree.brokers[rank].pid:
            return pid
    raise AssertionError(f"rank {rank} has no launcher")


def health(tree: Tree) -> str:
    """What `fluxres health -r 5` shows at rank 0."""
    return tree.fluxres("health", "-r", str(STUCK)).stdout.decode()


def stuck_health(tree: Tree) -> str:
    """The same, when something is stuck there; else nothing."""
    shown = health(tree)
    return shown if "unanswered" in shown else ""


def test_a_stuck_service_is_named_with_its_stack(tree: Tree) -> None:
    running = start_on(tree, STUCK)
    tasks = births(tree)
    assert "unanswered" not in health(tree)
    with stopped(launcher_of(tree, STUCK)):
        hanging = submit_on(tree, "", STUCK)
        shown = eventually(lambda: stuck_health(tree), what="a stuck service")
        print(f"\n{shown}")
        first, *_ = shown.splitlines()
        assert re.fullmatch(rf"rank {STUCK}: event loop stalled for \S+ at worst, \S+ recently", first)
        rows = dict(re.findall(r"^(\S+) +(\d+) +\S+$", shown, re.MULTILINE))
        assert rows["exec"] == "1", "only the start: the job that runs has been answered, its stream is open"
        assert rows["rexec"] == rows["event"] == "0"
        _, _, stuck = shown.partition("\n\n")
        assert re.match(r"exec\.start unanswered for [\d.]+m?s\n", stuck), "only the stuck request is told, and its age"
        assert "Shells._attend" in stuck
        assert "Attendant._start" in stuck
        assert re.search(r"Launcher\.launch:\d+: await trio\.lowlevel\.wait_readable", stuck)
        assert stuck.count("unanswered") == 1
        # Nothing else is held up by it, and it shows at no other rank but where the job is waited for.
        assert tree.fluxres("ping", "-c", "1", "-r", str(STUCK)).returncode == 0
        everything = tree.fluxres("health", "--all").stdout.decode()
        assert everything.count("SERVICE") == SIZE
        assert re.findall(r"^(\S+) unanswered", everything, re.MULTILINE) == ["job-exec.start", "exec.start"]
    tree.wait_inactive(hanging)
    assert "unanswered" not in health(tree)
    check_alive(tasks)
    (tree.path / "end").touch()
    check_invariants(tree, {running: waited(), hanging: Expect()})


def test_a_broker_that_says_nothing_is_named_too(tree: Tree) -> None:
    with stopped(tree.brokers[STUCK].pid):
        done = tree.fluxres("health", "--all", "--timeout", "3s", check=False)
        assert done.returncode == 1
        assert done.stderr.decode().startswith(f"fluxres-health: cannot show the health of rank {STUCK}: ")
        assert done.stdout.decode().count("SERVICE") == SIZE - 1
    assert "unanswered" not in health(tree)
