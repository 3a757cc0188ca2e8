"""The status page in a real browser, of a feed that tells what no test could bring about: see fakefeed.

Large instances, many jobs, hostile text, the keyboard, phones, dark and light; and what the page's modules compute.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Final, cast

import pytest
from fakefeed import Docs, FakeFeed, counted, event, every, instance_documents, job_document
from pagekit import DESKTOP, PHONE, Browser
from selenium.webdriver.common.keys import Keys

from fluxres.base.json import JsonObject, JsonValue

RECOVERY: Final[JsonObject] = {
    "ranks": "0-7", "root": 0, "restarted": "0", "panicked": "1-7", "seconds": 2.31, "why": "rank 0 was restarted",
    "running": 12, "rediscovered": 12, "finished": 0, "lost": 0, "pending": 40,
}  # fmt: skip
HOSTILE: Final = "</td><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>\u202etxt.exe\u0007"
LIVE: Final = '[data-connection="live"]'
AWAY: Final = '[data-banner="away"]'


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A browser, in whose console there must be no errors in the end."""
    with Browser() as made:
        yield made
        assert made.errors() == []


# --- connection


def test_it_resumes_where_it_was(browser: Browser) -> None:
    with FakeFeed(instance_documents(8, fanout=2)) as feed:
        browser.open(feed.url)
        browser.wait_for(LIVE)
        feed.change({"jobs": job_document(1)})
        browser.wait_for('[data-job="ƒ000001"]')
        feed.drop()
        browser.wait(lambda: feed.accepted > 1, "another connection")
        browser.wait_for(LIVE)
        browser.wait(lambda: [m for m in feed.subscribed if m["id"] == 1 and "position" in m], "a position")
        feed.change({"jobs": job_document(2)}, {"jobs": list(job_document(1))})
        browser.wait_for('[data-job="ƒ000002"]')
        assert browser.count('[data-job="ƒ000001"]') == 0


def test_it_tells_what_happened_meanwhile(browser: Browser) -> None:
    now = time.time()
    docs = instance_documents(8, fanout=2)
    docs["events"]["1.0"] = {"t": now - 60, "name": "online", "context": {"idset": "0-7"}}
    for number in range(3):
        docs["jobs"].update(job_document(number, "RUN", t_run=now, ranks="0"))
    with FakeFeed(docs) as feed:
        browser.open(feed.url)
        browser.wait_for(LIVE)
        feed.stop()
        browser.wait_for(AWAY, "cannot be reached")
        feed.docs["instance"]["about"]["uuid"] = "another"
        feed.docs["instance"]["recovery"] = {
            **_without(RECOVERY, "seconds"),
            "began": now,
            "away": "3-5",
            "detached": 2,
        }
        feed.docs["jobs"].update(job_document(1, "INACTIVE", result="FAILED", t_run=now, t_inactive=now + 1))
        feed.docs["jobs"].update(job_document(7, t_submit=time.time()))
        # Another life lists other jobs that have long ended: nobody has submitted them just now.
        feed.docs["jobs"].update(job_document(8, "INACTIVE", result="COMPLETED", t_inactive=now - 200))
        feed.start()
        browser.wait_for('[data-banner="recovering"]', "ranks 3-5")
        banner = '[data-banner="meanwhile"]'
        browser.wait_for(banner, "2 jobs ran on through it, 1 submitted, 1 ended (1 of them not well)")
        browser.screenshot("recovering")
        ended: JsonObject = {"t": time.time(), "name": "recovery", "context": {**RECOVERY, "began": now}}
        feed.change({"events": {"9.0": ended}}, {"instance": ["recovery"]})
        browser.wait_for(f"{banner} .recovery.t-good", "all 12 jobs")
        browser.wait_gone('[data-banner="recovering"]')
        lost: JsonObject = {"t": time.time(), "name": "recovery", "context": {**RECOVERY, "began": now, "lost": 2}}
        feed.change({"events": {"10.0": lost}})
        browser.wait_for(".events .recovery.t-bad", "2 jobs")
        browser.press(f"{banner} button")
        browser.wait_gone(banner)


def test_an_orderly_shutdown_is_no_crash(browser: Browser) -> None:
    with FakeFeed(instance_documents(8, fanout=2)) as feed:
        browser.open(feed.url)
        browser.wait_for(LIVE)
        with feed.refusing():
            feed.drop(1001, "the broker is shut down")
            browser.wait_for(AWAY, "rank 0's broker was shut down")
            feed.stop()
        browser.wait_for(AWAY, "tries so far")  # of which none has heard that it was shut down
        said = browser.text(AWAY)
        assert "rank 0's broker was shut down. What you see is the last picture; in a durable instance" in said
        assert "cannot be reached" not in said
        assert "without it" not in said
        browser.screenshot("shut-down")
        feed.start()
        browser.wait_for(LIVE)
        browser.wait_gone(AWAY)
        feed.stop()  # a crash, this time
        said = "the broker cannot be reached. What you see is the last picture; jobs run on without it."
        browser.wait_for(AWAY, said)


def test_absences_are_added_up(browser: Browser) -> None:
    meanwhile = '[data-banner="meanwhile"]'
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        browser.open(feed.url)
        browser.wait_for(LIVE)
        feed.drop()
        browser.wait_for(meanwhile, "Back after ")
        feed.drop()
        browser.wait_for(meanwhile, "Away twice, ")
        feed.drop()
        said = browser.wait_for(meanwhile, "Away 3 times, ").text
        assert " together, the last until " in said
        assert "Back after" not in said


def test_what_is_not_known_any_more(browser: Browser) -> None:
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        feed.why = "behind"
        browser.open(feed.url)
        browser.wait_for(LIVE)
        with feed.refusing():
            feed.drop()
            browser.wait_for(AWAY)
            feed.change({"jobs": job_document(1)})
        said = "what happened meanwhile is not known any more, and this is a new picture."
        browser.wait_for('[data-banner="meanwhile"]', said)


def test_a_token_is_asked_for(browser: Browser) -> None:
    with FakeFeed(instance_documents(1, fanout=2), token="the secret of sixteen") as feed:
        browser.open(feed.url)
        browser.wait_for("form.token", "wants a token")
        browser.screenshot("token")
        browser.keys("a wrong one" + Keys.ENTER)
        browser.wait_for("form.token", "was refused")
        browser.js("document.getElementById('token').value = '';")
        browser.keys("the secret of sixteen" + Keys.ENTER)
        browser.wait_for(LIVE)
        browser.wait_gone("form.token")
        browser.open(feed.url)  # kept for as long as the tab is open
        browser.wait_for(LIVE)
        assert browser.js("return localStorage.length;") == 0
    browser.forgive("401 (")


# --- what there is to see


def test_a_recovery_of_which_nothing_came_back(browser: Browser) -> None:
    docs = instance_documents(8, fanout=2)
    facts: JsonObject = {**RECOVERY, "ranks": "7", "root": 7, "restarted": "", "panicked": "", "seconds": 600.0}
    none: JsonObject = {**facts, "running": 1, "rediscovered": 0, "away": "7", "detached": 1}
    docs["events"] = {
        "1.0": {"t": time.time(), "name": "recovery", "context": none},
        "2.0": {"t": time.time(), "name": "recovery", "context": {**none, "ranks": "6", "away": "6", "lost": 1}},
    }
    with FakeFeed(docs) as feed:
        browser.open(feed.url)
        browser.wait_for(".events .recovery.t-warn", "Given up: rank 7")
        browser.wait_for(".events .recovery.t-bad", "Given up: rank 6")
        browser.wait_for(".recovery .t-warn", "0 of 1 job")
        assert browser.count(".recovery.t-good") == 0
        browser.screenshot("given-up")


def test_the_list_of_ended_jobs_says_that_it_is_cut(browser: Browser) -> None:
    docs = instance_documents(1, fanout=2)
    now = time.time()

    def ended(number: int) -> dict[str, JsonObject]:
        return job_document(number, "INACTIVE", result="COMPLETED", t_inactive=now - number)

    docs["jobs"].update(ended(0))
    with FakeFeed(docs) as feed:
        browser.open(feed.url)
        browser.wait_for("#ended-title", "Ended 1")
        feed.change({"instance": counted(docs)})
        feed.change({"jobs": ended(1)})
        browser.wait_for("#ended-title", "Ended 2")  # as many as were counted, and one that is not yet
        feed.change({"instance": {"jobs": {"inactive": 3}}})
        browser.wait_for("#ended-title", "Ended newest 2")
        feed.change({"instance": {"jobs": {}}, "jobs": {k: d for n in range(256) for k, d in ended(n).items()}})
        browser.wait_for("#ended-title", "Ended newest 256")
        browser.js("document.getElementById('job-filter').focus();")
        browser.keys("job255")
        browser.wait_for("#ended-title", "Ended 1 of newest 256")


def test_a_job_that_there_is_not(browser: Browser) -> None:
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        feed.unknown.add("ƒ000009")
        browser.open(feed.url + "#/job/ƒ000009")
        browser.wait_for(".alert", "no such job")
        said = browser.text("main")
        assert not [word for word in ("Output", "following", "Timeline", "No events yet", "listed") if word in said]
        browser.screenshot("no-such-job")
        feed.unknown.clear()  # it is followed again by the next connection
        _write_logs(feed, "ƒ000009")
        feed.drop()
        browser.wait_for(".o-stdout .text", "step 0")
        browser.wait_gone(".alert")
        assert "flux-restart" in browser.text(".timeline")


# --- looks


def test_the_keyboard(browser: Browser) -> None:
    docs = instance_documents(8, fanout=2)
    docs["jobs"].update(job_document(1, "RUN", t_run=time.time(), ranks="0"))
    with FakeFeed(docs) as feed:
        browser.open(feed.url)
        browser.wait_for(".tree")
        browser.keys(Keys.TAB)
        assert _focused(browser, ".skip")
        browser.keys(Keys.ENTER)
        assert _focused(browser, "#main")
        browser.keys("?")
        browser.wait_for("dialog[open]", "Keys")
        browser.screenshot("help")
        browser.keys(Keys.ESCAPE)
        browser.wait_gone("dialog")
        browser.keys("o")
        assert _focused(browser, '[data-key="0"]')
        browser.wait_for(".card", "rank 0")
        for key, rank in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, 3), (Keys.END, 6), (Keys.HOME, 0)):
            browser.keys(key)
            browser.wait(lambda rank=rank: _focused(browser, f'[data-key="{rank}"]'), f"focus on rank {rank}")  # type: ignore[misc]
        browser.screenshot("focus")
        browser.keys(Keys.ARROW_LEFT)
        browser.wait_for('[data-key="0"][aria-expanded="false"]', "+7")
        assert browser.count(".tree [role=treeitem]") == 1
        browser.keys(Keys.ENTER)
        browser.wait_for('[data-key="0"][aria-expanded="true"]')
        browser.keys("/")
        assert _focused(browser, "#job-filter")
        browser.keys("nothing")
        browser.wait_for(".g-running", "None is like that")
        browser.keys(Keys.BACKSPACE * 7)
        browser.wait_for('[data-job="ƒ000001"]')
        browser.keys(Keys.TAB + Keys.ENTER)
        browser.wait_for("#job-title", "ƒ000001")
        browser.keys(Keys.ESCAPE)
        browser.wait(lambda: _focused(browser, '[data-job="ƒ000001"] a'), "the focus back on the job")


def test_dark_and_light_and_a_phone(browser: Browser) -> None:
    with FakeFeed(_busy(8, fanout=2)) as feed:
        browser.open(feed.url)
        browser.wait_for(".tree")
        grounds = set()
        for dark in (False, True):
            browser.prefer(dark=dark)
            name = "dark" if dark else "light"
            browser.wait_for(f':root[data-theme="{name}"]')
            grounds.add(browser.js("return getComputedStyle(document.documentElement).backgroundColor;"))
            for size, device in ((DESKTOP, "desktop"), (PHONE, "phone")):
                browser.resize(size)
                browser.wait(lambda: browser.overflow() == 0, "a page as wide as its window")
                browser.screenshot(f"8-{device}-{name}", whole=True)
        assert len(grounds) == 2
        browser.press("button[title^=Dark]")
        browser.wait_for(':root[data-theme="light"]')
        browser.open(feed.url)
        browser.wait_for(':root[data-theme="light"]')  # chosen here, whatever the system says
        _write_logs(feed, "ƒ000001")
        browser.js("location.hash = '#/job/ƒ000001';")
        browser.wait_for(".o-stderr .text", "residual")
        assert browser.overflow() == 0
        browser.screenshot("job-phone", whole=True)
        browser.resize(DESKTOP)
        browser.screenshot("job-desktop")


@pytest.mark.parametrize("fanout", [2, 32, 1024])
def test_1024_ranks(browser: Browser, fanout: int) -> None:
    with FakeFeed(_busy(1024, fanout=fanout)) as feed:
        browser.open(feed.url)
        browser.wait_for(".tree")
        assert browser.count(".tree [role=treeitem]") < 100
        assert browser.count(".cells .cell") == 1024
        browser.wait_for(".overlay .tally", "lost")
        assert browser.overflow() == 0
        browser.screenshot(f"1024-fanout-{fanout}")
        browser.press(".overlay button", "Trouble only")
        browser.wait_for('.tree [data-rank="700"][data-condition="lost"]')
        browser.screenshot(f"1024-fanout-{fanout}-trouble")
        browser.press(".overlay button", "Expand all")
        browser.resize(PHONE)
        browser.wait(lambda: browser.overflow() == 0, "a page as wide as its window")


def test_10000_jobs(browser: Browser) -> None:
    docs = instance_documents(8, fanout=2)
    for number in range(10_000):
        docs["jobs"].update(job_document(number))
    docs["instance"].update(counted(docs))
    with FakeFeed(docs) as feed:
        browser.open(feed.url)
        browser.wait_for("#queued-title", "10,000")
        assert browser.count(".queued tbody tr") == 25
        numbers = iter(range(10_000, 20_000))
        with every(0.1, lambda: feed.change({"jobs": job_document(next(numbers), priority=20)})):
            browser.wait_for('.queued [data-job="ƒ010020"]')
            browser.press(".g-queued .more button")
            browser.wait(lambda: browser.count(".queued tbody tr") == 125, "a hundred rows more")
            browser.js("document.getElementById('job-filter').focus();")
            browser.keys("job4711")
            browser.wait_for("#queued-title", "1 of 10,0")
            assert browser.count(".queued tbody tr") == 1
        browser.screenshot("10000-jobs")
        assert browser.overflow() == 0


def test_hostile_text(browser: Browser) -> None:
    docs = instance_documents(4, fanout=2)
    now = time.time()
    facts: dict[str, JsonValue] = {
        "name": HOSTILE,
        "username": HOSTILE,
        "nodelist": HOSTILE,
        "t_run": now,
        "ranks": "0",
    }
    docs["jobs"].update(job_document(1, "RUN", **facts, exception_type=HOSTILE, exception_occurred=True))
    docs["jobs"].update(job_document(2, "INACTIVE", **facts, result=HOSTILE, exception_note=HOSTILE, t_inactive=now))
    docs["overlay"]["1"].update(host=HOSTILE, error=HOSTILE, status=HOSTILE)
    docs["resources"]["1"].update(host=HOSTILE, drained=HOSTILE, lost=HOSTILE, properties=[HOSTILE])
    docs["events"] = {
        "1.0": {"t": now, "name": HOSTILE, "context": {HOSTILE: HOSTILE}},
        "2.0": {"t": now, "name": "recovery", "context": {**RECOVERY, "why": HOSTILE, "ranks": HOSTILE}},
        "3.0": {"t": now, "name": "drain", "context": {"idset": "1", "reason": HOSTILE}},
    }
    docs["instance"]["queue"] = {"enabled": False, "started": False, "reason": HOSTILE}
    docs["log"]["1"] = {"line": HOSTILE}
    with FakeFeed(docs, instance=HOSTILE) as feed:
        browser.open(feed.url)
        browser.wait_for('[data-job="ƒ000002"]', "</td><img")
        feed.write(
            "ƒ000001", "eventlog", event("exception", now, type=HOSTILE, severity=0, note=HOSTILE), event(HOSTILE, now)
        )
        feed.write("ƒ000001", "guest.output", event("data", now, stream="stdout", rank=HOSTILE, data=HOSTILE + "\n"))
        browser.js("location.hash = '#/job/ƒ000001';")
        browser.wait_for(".out .text", "</td><img")
        assert browser.js("return window.hacked;") is None
        assert browser.count("img:not(.brand img), main script") == 0
        assert "\u202e" not in cast("str", browser.js("return document.body.textContent;"))


# --- the page's own modules


def test_the_picture_is_the_servers(browser: Browser) -> None:
    """What the page makes of snapshots and deltas, in parts, is what the server's view has."""
    from fluxres.status.messages import Encoder
    from fluxres.status.view import Cursor, View

    chance = random.Random(4)
    view = View("epoch")
    cursor, encoder = Cursor(view, ("jobs", "events"), None, None), Encoder()
    said: list[str] = []
    for number in range(300):
        body = cursor.next() if number % 3 == 0 else None
        if body is not None:
            said += [part.decode() for part in encoder.parts(body, 1, time.time())]
        text = "x" * chance.choice((1, 100, 30_000))
        view.change(
            {chance.choice(("jobs", "events")): {str(chance.randrange(40)): {"text": text}}},
            {"jobs": [str(chance.randrange(40))]},
        )
    last = cursor.next()
    assert last is not None
    said += [part.decode() for part in encoder.parts(last, 1, time.time())]
    script = """
        const [said, done] = arguments;
        import("/static/picture.js").then(({Picture}) => {
          const picture = new Picture();
          const applied = said.map(text => JSON.parse(text)).map(
            m => m.type === "snapshot" ? picture.snapshot(m) || m.more : picture.delta(m));
          const docs = topic => Object.fromEntries(picture.docs(topic));
          done([applied.every(Boolean), picture.position, {jobs: docs("jobs"), events: docs("events")}]);
        }).catch(error => done(String(error)));
    """
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        browser.open(feed.url)
        found = browser.driver.execute_async_script(script, said)
    copy = view.copy()
    assert found == [True, list(copy.position), {topic: dict(copy.documents[topic]) for topic in ("jobs", "events")}]


def test_time_away_is_without_the_time_between(browser: Browser) -> None:
    script = """
        const done = arguments[0];
        import("/static/picture.js").then(({Picture, absence}) => {
          const picture = new Picture();
          const one = absence(null, {...picture.memory(90), lostAt: 100}, picture, 101, "behind");
          const two = absence(one, {...picture.memory(190), lostAt: 200}, picture, 224, "restarted");
          done([one, two].map(({lostAt, backAt, away, times, why, before}) =>
            [lostAt, backAt, away, times, why, before.news]));
        }).catch(error => done(String(error)));
    """
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        browser.open(feed.url)
        found = browser.driver.execute_async_script(script)
    assert found == [[100, 101, 1, 1, "behind", 90], [100, 224, 25, 2, "behind", 90]]


def test_words(browser: Browser) -> None:
    """Tables for functions of the page that are pure."""
    script = """
        const done = arguments[0];
        const names = ["format", "overlay", "backoff", "outputlines", "timeline"];
        Promise.all(names.map(name => import(`/static/${name}.js`)))
          .then(([f, overlay, backoff, output, timeline]) => {
            const lines = new output.OutputLines();
            const data = (data, more) => ({name: "data", context: {stream: "stdout", rank: "0", data, ...more}});
            const [half, other] = ["ww==", "vA=="].map(text => data(text, {encoding: "base64"}));
            lines.take([data("one\\ntw"), data("o\\n"), data("50%\\r100%\\n"), half, other]);
            lines.take([data("\\u001b[31mred\\u001b[0m\\n")]);
            const docs = new Map(Array.from({length: 1023}, (_, rank) => [String(rank),
              {rank, parent: rank ? (rank - 1) >> 1 : null, status: rank === 1022 ? "lost" : "full"}]));
            const root = overlay.build(docs);
            done({
              durations: [0.314, 42, 185, 7620, 360000, NaN].map(f.duration),
              idset: [f.size("0-3,7"), f.has("0-3,7", 7), f.has("0-3,7", 5)],
              ranks: ["3", "0-1", "<b>"].map(f.ranks),
              clean: f.clean("a\\u202eb\\n", 10), cut: f.clean("abcdef", 3),
              delays: [1, 2, 3, 50].map(n => backoff.delay(n, 1)), least: backoff.delay(50, 0),
              lines: lines.lines.map(line => line.text),
              tree: [root.size, root.tally, overlay.openAtFirst(root, 40).size, overlay.troubled(root)],
              wait: [timeline.waitWords(0), timeline.waitWords(256 * 3), timeline.waitWords(9)],
            });
          }).catch(error => done(String(error)));
    """
    with FakeFeed(instance_documents(1, fanout=2)) as feed:
        browser.open(feed.url)
        found = browser.driver.execute_async_script(script)
    assert found == {
        "durations": ["0.31 s", "42.0 s", "3m 05s", "2h 07m", "4d 04h", "–"],
        "idset": [5, True, False],
        "ranks": ["rank 3", "ranks 0-1", ""],
        "clean": "a\ufffdb\ufffd",
        "cut": "abc…",
        "delays": [0.4, 0.8, 1.6, 6],
        "least": 0.15,
        "lines": ["one", "two", "100%", "\u00fcred"],
        "tree": [1023, {"full": 1022, "lost": 1}, 31, True],
        "wait": ["exit code 0", "exit code 3", "killed by signal 9"],
    }


# --- documents


def _focused(browser: Browser, selector: str) -> bool:
    return bool(browser.js("return document.activeElement.matches(arguments[0]);", selector))


def _without(doc: JsonObject, key: str) -> JsonObject:
    return {name: value for name, value in doc.items() if name != key}


def _busy(size: int, *, fanout: int) -> Docs:
    """An instance that has work and some trouble."""
    chance, now = random.Random(3), time.time()
    docs = instance_documents(size, fanout=fanout)
    for number in range(12):
        low = chance.randrange(size)
        high = min(size - 1, low + chance.randrange(max(2, size // 16)))
        began = now - chance.uniform(5, 580)
        limit: dict[str, JsonValue] = {"duration": 0.0} if number % 5 == 4 else {"expiration": began + 600}
        extra: dict[str, JsonValue] = {"restarts": 1, "detached": str(low)} if number == 2 else {}
        nodes = high - low + 1
        facts: dict[str, JsonValue] = {"name": chance.choice(_NAMES), "ranks": f"{low}-{high}", "nnodes": nodes}
        more: dict[str, JsonValue] = {"t_run": began, "ncores": 4 * nodes, "nodelist": f"node[{low:04d}-{high:04d}]"}
        docs["jobs"].update(job_document(number, "RUN", **facts, **more, **limit, **extra))
        for rank in range(low, high + 1):
            node = docs["resources"][str(rank)]
            node["cores_used"] = min(16, cast("int", node["cores_used"]) + 4)
    for number in range(12, 52):
        docs["jobs"].update(job_document(number, "SCHED", name=chance.choice(_NAMES), t_submit=now - 60 * number))
    for number, result in enumerate(("COMPLETED", "COMPLETED", "FAILED", "CANCELED", "TIMEOUT"), 52):
        end = now - 30 * number
        ended: dict[str, JsonValue] = {
            "result": result,
            "t_run": end - 99,
            "t_cleanup": end,
            "t_inactive": end,
            "ranks": "0",
        }
        docs["jobs"].update(job_document(number, "INACTIVE", name=chance.choice(_NAMES), **ended))
    _trouble(docs, size, fanout, now)
    docs["instance"].update(counted(docs))
    return docs


_NAMES: Final = ("lammps", "train-gpt", "make -j8", "sweep[3]", "gromacs-md", "nightly-tests")


def _trouble(docs: Docs, size: int, fanout: int, now: float) -> None:
    lost = 5 if size <= 8 else 700
    docs["overlay"][str(lost)].update(status="lost", since=now - 95)
    docs["resources"][str(lost)].update(online=False)
    above = lost
    while above:
        above = (above - 1) // fanout
        docs["overlay"][str(above)].update(status="degraded", since=now - 95)
    docs["overlay"]["3"]["torpid"] = docs["resources"]["3"]["torpid"] = True
    docs["resources"]["6"]["drained"] = "bad DIMM, ticket 4711"
    recovered: JsonObject = {**RECOVERY, "began": now - 600}
    docs["events"] = {
        "1.0": {"t": now - 7000, "name": "online", "context": {"idset": f"0-{size - 1}"}},
        "2.0": {"t": now - 900, "name": "drain", "context": {"idset": "6", "reason": "bad DIMM, ticket 4711"}},
        "3.0": {"t": now - 600, "name": "restart", "context": {"ranks": f"0-{size - 1}", "online": ""}},
        "4.0": {"t": now - 595, "name": "recovery", "context": recovered},
        "5.0": {"t": now - 95, "name": "offline", "context": {"idset": str(lost)}},
    }


def _write_logs(feed: FakeFeed, job: str) -> None:
    at = time.time() - 120
    main = [("submit", 0.0), ("validate", 0.01), ("depend", 0.02), ("priority", 0.03), ("alloc", 12.4), ("start", 12.6)]
    feed.write(job, "eventlog", *(event(name, at + after) for name, after in main), event("flux-restart", at + 60))
    feed.write(job, "guest.exec.eventlog", event("shell.init", at + 12.5), event("shell.start", at + 12.6))
    for number in range(200):
        stream, text = (
            ("stderr", "\x1b[31mresidual\x1b[0m is large") if number % 9 == 5 else ("stdout", f"step {number}")
        )
        where: dict[str, JsonValue] = {"stream": stream, "rank": str(number % 4), "data": f"{text}\n"}
        feed.write(job, "guest.output", event("data", at + 13 + number / 10, **where))
