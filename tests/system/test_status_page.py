"""The status page in a real browser, of live instances. Screenshots of what it looks like are kept; see pagekit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote

import pytest
from conftest import MakeTree
from pagekit import DESKTOP, PHONE, Browser
from treekit import Tree

from fluxres.base.jobid import f58

LIVE: Final = '[data-connection="live"]'
AWAY: Final = '[data-banner="away"]'
TALK: Final = """
go, n = sys.argv[1], 0
while not os.path.exists(go + ".end"):
    n += 1
    print("line", n, flush=True)
    if n % 5 == 0:
        print("trouble", n, file=sys.stderr, flush=True)
    time.sleep(0.05)
print("the last line", flush=True)
"""
"""A task that writes to both streams until a file says that it is enough."""
WAIT: Final = "while not os.path.exists(sys.argv[1]): time.sleep(0.05)"


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A browser, in whose console there must be no errors in the end."""
    with Browser() as made:
        yield made
        assert made.errors() == []


@pytest.fixture
def tree(make_tree: MakeTree) -> Tree:
    """A live instance of eight brokers, all online."""
    made = make_tree(size=8)
    made.start_all()
    return made


def uri_of(tree: Tree) -> str:
    """Where rank 0 serves the page."""
    return tree.fluxres("getattr", "status.uri").stdout.decode().strip()


def condition(browser: Browser, rank: int) -> str:
    """The condition that a rank is drawn in."""
    script = "return document.querySelector(`.tree [data-rank='${arguments[0]}']`)?.dataset.condition ?? '';"
    return cast("str", browser.js(script, rank))


# --- a live instance


def test_the_tree_of_a_live_instance(tree: Tree, browser: Browser) -> None:
    browser.open(uri_of(tree))
    browser.wait_for(LIVE)
    browser.wait(lambda: all(condition(browser, rank) == "full" for rank in range(8)), "eight full ranks")
    assert browser.count(".tree [role=treeitem]") == 8
    assert "8 / 8" in browser.text(".strip").replace("\n", " ")
    label = "return document.querySelector(`.tree [data-rank='1']`).getAttribute('aria-label');"
    assert "full since" in cast("str", browser.js(label))
    browser.screenshot("live-8")
    tree.kill_rank(7)
    browser.wait(lambda: condition(browser, 7) == "lost", "rank 7 lost")
    browser.wait(lambda: condition(browser, 3) == "degraded", "its parent degraded")
    browser.wait_for(".events .line", "rank 7 went offline")
    browser.screenshot("live-8-leaf-lost")
    tree.spawn(7)
    tree.wait_online()
    browser.wait(lambda: condition(browser, 7) == "full", "rank 7 full again")
    browser.wait_for(".events .recovery", "rank 7")


def test_a_jobs_life_without_reloading(tree: Tree, browser: Browser, tmp_path: Path) -> None:
    browser.open(uri_of(tree))
    browser.wait_for(".g-running", "Nothing runs")
    browser.js("window.unloaded = false;")
    go = tmp_path / "go"
    job = tree.submit(tree.job(WAIT, str(go), nodes=8, cores_per_task=4, ntasks=8, duration=600.0, name="life"))
    row = f'[data-job="{f58(job)}"]'
    browser.wait_for(f".running {row}", "of 10m 00s")
    browser.wait_for(".nodes-rows", "4/4")
    waits = tree.submit(tree.job("", name="waits"))
    browser.wait_for(f'.queued [data-job="{f58(waits)}"]', "for resources")
    browser.screenshot("live-8-jobs")
    go.touch()
    browser.wait_for(f".ended {row}", "completed")
    browser.wait_for(f'.ended [data-job="{f58(waits)}"]', "completed")
    browser.wait_for(".g-running", "Nothing runs")
    assert browser.js("return window.unloaded;") is False
    tree.wait_inactive()


def test_a_jobs_page_follows_its_output(tree: Tree, browser: Browser, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job = tree.submit(tree.job(TALK, str(go), name="talks"))
    browser.open(f"{uri_of(tree)}#/job/{quote(f58(job))}")
    for name in ("submit", "alloc", "start", "shell.init", "shell.start"):
        browser.wait_for(f'.timeline [data-event="{name}"]')
    browser.wait_for(".o-stdout .text", "line 3")
    browser.wait_for(".o-stderr .text", "trouble 5")
    browser.wait_for('[data-following="true"]', "following")
    browser.wait(lambda: browser.js(f"{_CONSOLE} return c.scrollHeight > c.clientHeight + 200;"), "enough to scroll")
    browser.wait(lambda: browser.js(f"{_CONSOLE} return c.scrollHeight - c.scrollTop - c.clientHeight < 2;"), "its end")
    browser.js(f"{_CONSOLE} c.scrollTop = 0;")
    browser.wait_for('[data-following="false"]', "not following")
    lines = browser.count(".out")
    browser.wait(lambda: browser.count(".out") > lines, "more output")
    assert browser.js(f"{_CONSOLE} return c.scrollTop;") == 0
    browser.screenshot("live-job")
    (tmp_path / "go.end").touch()
    browser.wait_for(".o-stdout .text", "the last line")
    for name in ("complete", "finish", "clean"):
        browser.wait_for(f'.timeline [data-event="{name}"]')
    browser.wait_for('[data-following="false"]', "complete")
    browser.wait_for(".facts .chip", "completed")
    assert browser.js(_STDOUT) == tree.output(job).decode().splitlines()


def test_output_is_followed_across_a_restart(make_tree: MakeTree, browser: Browser, tmp_path: Path) -> None:
    tree = make_tree(size=1)
    tree.start_all()
    job = tree.submit(tree.job(TALK, str(tmp_path / "go"), name="talks"))
    browser.open(f"{uri_of(tree)}#/job/{quote(f58(job))}")
    browser.wait_for(".o-stdout .text", "line 5")
    tree.kill_rank(0)
    browser.wait_for(AWAY)
    assert browser.count(".out") > 0
    tree.spawn(0)
    browser.wait_for(LIVE)
    browser.wait_for('.timeline [data-event="flux-restart"]')
    (tmp_path / "go.end").touch()
    browser.wait_for(".o-stdout .text", "the last line")
    browser.wait_for('.timeline [data-event="clean"]')
    assert browser.count('.timeline [data-event="submit"]') == 1
    assert browser.js(_STDOUT) == tree.output(job).decode().splitlines()


_STDOUT: Final = "return [...document.querySelectorAll('.o-stdout .text')].map(e => e.textContent);"
_CONSOLE: Final = "const c = document.querySelector('.console');"


def test_the_death_of_rank_0(tree: Tree, browser: Browser, tmp_path: Path) -> None:
    go = tmp_path / "go"
    jobs = [tree.submit(tree.job(WAIT, str(go), nodes=4, ntasks=4, name="runs")) for _ in range(2)]
    for job in jobs:
        tree.wait_event(job, "start")
    browser.open(uri_of(tree))
    for job in jobs:
        browser.wait_for(f'.running [data-job="{f58(job)}"]')
    tree.kill_rank(0)
    browser.wait_for(AWAY, "The broker is away since")
    assert browser.count(".tree [role=treeitem]") == 8, "the last picture is kept"
    assert browser.count("main.stale") == 1
    browser.screenshot("rank-0-away")
    tree.spawn(0)
    browser.wait_for(LIVE)
    browser.wait_gone(AWAY)
    browser.wait_gone("main.stale")
    banner = '[data-banner="meanwhile"]'
    browser.wait_for(banner, "rank 0 began anew")
    browser.wait_for(banner, "2 jobs ran on through it")
    recovery = browser.wait_for(f"{banner} .recovery", "rank 0 (new process)").text
    assert "all 2 jobs" in recovery
    assert "none" in recovery
    assert "0-7" in recovery
    tree.wait_online()
    browser.wait(lambda: all(condition(browser, rank) == "full" for rank in range(8)), "eight full ranks")
    browser.screenshot("rank-0-back")
    browser.resize(PHONE)
    browser.screenshot("rank-0-back-phone")
    assert browser.overflow() == 0
    browser.resize(DESKTOP)
    browser.wait_for(".events .recovery", "all 2 jobs")
    go.touch()
    for job in jobs:
        browser.wait_for(f'.ended [data-job="{f58(job)}"]', "completed")
