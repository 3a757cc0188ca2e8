"""`fluxres top` and `fluxres watch` on a real instance, whose broker is killed and started again under them."""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path

from conftest import MakeInstance, MakeTree
from kit import PATIENCE, Expect, Instance, check_invariants, eventually, wait_status
from treework import Work

from fluxres.base.jobid import JobId, f58
from fluxres.testing.terminal import ENTER_SCREEN, LEAVE_SCREEN, OnTerminal

LINES = 300
TALK = f"""
for i in range({LINES}):
    print(sys.argv[1], i, flush=True)
    time.sleep(0.005)
sys.exit(int(sys.argv[2]))
"""
HELD = "import os\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(int(sys.argv[2]))"
DEATHS = 2


def top(instance: Instance, *args: str) -> OnTerminal:
    """`fluxres top` on a terminal of its own."""
    return OnTerminal("top", *args, env=instance.environ, columns=120, lines=40)


def test_a_life_and_a_death_on_the_screen(make_instance: MakeInstance) -> None:
    instance = make_instance(cores=1)
    instance.start()
    held = instance.path / "held"
    with top(instance) as terminal:
        terminal.expect("healthy")
        terminal.expect("no jobs")
        terminal.press(b"")
        running = instance.submit(instance.job(HELD, str(held), "3", duration=600.0))
        waiting = instance.submit(instance.job("sys.exit(0)"))
        terminal.expect("running (1)")
        terminal.expect(f58(running))
        terminal.expect("[          ] ")
        terminal.expect("pending (1)")
        terminal.press(b"\x1b[Bd")
        terminal.expect(f"{f58(running)} ({int(running)})")
        instance.kill()
        terminal.expect("The broker is away since")
        terminal.press(b"j")
        terminal.expect(f"{f58(waiting)} ({int(waiting)})")
        held.touch()  # the job ends while no broker is there
        terminal.press(b"")
        instance.start()
        terminal.expect("The broker is back after")
        terminal.expect("ended (2)")
        terminal.expect("incarnation 2")
        terminal.expect("Exit 3")
        terminal.press(b"q")
        assert terminal.wait() == 0
        assert terminal.raw.count(ENTER_SCREEN) == terminal.raw.count(LEAVE_SCREEN) == 1
        assert terminal.attributes == terminal.before
    check_invariants(instance, {running: Expect(status=wait_status(3)), waiting: Expect()})


def test_a_lost_rank_and_its_recovery(make_tree: MakeTree) -> None:
    """What befalls a subtree is told for what it is, and at last that no job was lost by it."""
    tree = make_tree(size=5)
    tree.start_all()
    work = Work(tree)
    work.begin(1, 3, 4)
    work.wait_running()
    before = tree.uuids()
    with top(tree) as terminal:
        terminal.expect("healthy")
        terminal.press(b"")
        tree.kill_rank(1)
        terminal.expect("degraded")
        terminal.expect("lost (1")
        terminal.expect("detached")
        terminal.press(b"")
        tree.spawn(1)
        tree.wait_renewed(before, [1, 3, 4])
        terminal.expect("none lost, 1 of 1 running job rediscovered")
        terminal.expect("healthy")
        terminal.press(b"q")
        assert terminal.wait() == 0
    work.finish()


def test_once_into_a_pipe(instance: Instance) -> None:
    jobid = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_marked(jobid)
    shown = instance.fluxres("top", "--once").stdout.decode()
    assert "\x1b" not in shown
    assert re.search(r"cores \[\|+ +1/4\]", shown)
    assert re.search(rf"{f58(jobid)} .*python", shown)
    instance.cancel(jobid)
    instance.wait_inactive(jobid)


def test_watch_over_deaths(instance: Instance) -> None:
    """What three jobs write is all there, once and in order, and the exit status is that of the worst."""
    jobids = [instance.submit(instance.job(TALK, name, str(code))) for name, code in (("a", 0), ("b", 5), ("c", 2))]
    path = instance.path / "out"
    with path.open("wb") as file:
        process = instance.popen("watch", "--active", "-l", stdout=file.fileno())
    for death in range(DEATHS):
        eventually(lambda n=death: path.stat().st_size > (n + 1) * 2000, what="some output")  # type: ignore[misc]
        instance.restart()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 5
    expected = {
        f58(jobid): [f"{f58(jobid)}: 0: {name} {i}" for i in range(LINES)]
        for jobid, name in zip(jobids, "abc", strict=True)
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {key: [line for line in lines if line.startswith(key + ":")] for key in expected} == expected
    assert len(lines) == 3 * LINES
    said = Counter(re.findall(r"the broker is (away|back)", errors.decode()))
    assert said["away"] == said["back"] >= 1
    late = instance.fluxres("watch", "--all", check=False)
    assert (late.returncode, sorted(late.stdout.splitlines())) == (5, sorted(_words(lines)))


def _words(lines: list[str]) -> list[bytes]:
    return [line.split(": ", 2)[2].encode() for line in lines]


def test_watch_many_short_jobs(make_instance: MakeInstance, tmp_path: Path) -> None:
    """More than the feed remembers of those that ended: each is seen, each one's output as well."""
    instance = make_instance(cores=4)
    instance.start()
    count = 300
    jobids = instance.submit_many([instance.jobspec("echo", str(n)) for n in range(count)])
    process = instance.popen("watch", "-v", *(f58(JobId(jobid)) for jobid in jobids))
    out, errors = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 0, errors.decode()
    assert sorted(map(int, out.split())) == list(range(count))
    assert errors.decode().count("complete") == count


def test_interrupting_watch_leaves_the_jobs_alone(instance: Instance) -> None:
    jobid = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_marked(jobid)
    with OnTerminal("watch", "--progress", "--active", env=instance.environ) as terminal:
        terminal.expect("running:1")
        terminal.signal(signal.SIGINT)
        assert terminal.wait() == 130
    assert "finish" not in instance.events(jobid)
    instance.cancel(jobid)
    instance.wait_inactive(jobid)
