"""`fluxres top`: what is shown of a picture, what keys do, the feed behind it, and one picture as text."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from clikit import Run
from feedkit import EPOCH, NOW, Docs, FeedBroker, delta, job, jobs, picture, snapshot
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import FluxresError
from fluxres.base.json import JsonObject
from fluxres.cli import feed as feed_module
from fluxres.cli.feed import Feed, Link
from fluxres.cli.main import main
from fluxres.cli.spans import Line, Span, apart, cells, clip, column, fitted, length, plain, wrapped
from fluxres.cli.top import TOPICS
from fluxres.cli.top_header import recovered
from fluxres.cli.top_keys import SECTIONS, Controls, Keys, press
from fluxres.cli.top_view import page, part, scene, screen, share
from fluxres.session import Session

LIVE = Link(first=True)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit status, stdout and stderr."""

    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


def shown(
    docs: Docs, controls: Controls | None = None, *, link: Link = LIVE, size: tuple[int, int] = (100, 30)
) -> list[str]:
    """The lines of a screen, without styles."""
    lines = screen(scene(docs, link, controls or Controls(), NOW, lambda userid: f"u{userid}"), *size)
    assert len(lines) == size[1]
    assert all(length(line) <= size[0] for line in lines)
    return [plain(line).rstrip() for line in lines]


def find(lines: list[str], text: str) -> str:
    """The one line with `text`."""
    (found,) = (line for line in lines if text in line)
    return found


# --- text


@pytest.mark.parametrize(
    ("text", "width", "clipped"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab+"),
        ("abc", 0, ""),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本+"),
        ("日本", 2, "+"),
    ],
)
def test_clip(text: str, width: int, clipped: str) -> None:
    assert clip(text, width) == clipped


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=5), st.integers(0, 30))
def test_fitted_lines_fit(texts: list[str], width: int) -> None:
    line: Line = tuple(Span(text) for text in texts)
    cut = fitted(line, width)
    assert length(cut) <= width
    assert length(line) > width or cut == line
    assert length(apart(line, (Span("right"),), width)) <= width
    assert all(length(each) <= width for each in wrapped(line, width, 0))
    assert cells(column("".join(texts), width)) == width


def test_no_text_of_a_job_drives_the_terminal() -> None:
    docs = picture()
    docs["jobs"]["11"]["name"] = "a\x1b[2Jb\n"
    docs["instance"]["about"]["instance"] = "x\x07"
    lines = shown(docs, Controls(details=True, selected="11"))
    assert not any(char in "".join(lines) for char in "\x1b\x07\n")


# --- the picture


def test_what_a_picture_says() -> None:
    lines = shown(picture())
    assert lines[0].startswith("toy on n0  size 4  up 2h")
    assert "1.2" in lines[0]
    assert lines[1] == "degraded  1 lost (2)  1 drained (3)"
    nodes = find(lines, "nodes [")
    assert "1/4]" in nodes
    assert nodes.endswith(" 1 pending, 1 running")
    assert find(lines, "cores [").count("|") > 10
    assert find(lines, "cores [").endswith(" 3 complete")
    assert find(lines, " failed").strip() == "1 failed, 1 canceled"
    assert find(lines, "running (1)")
    running = find(lines, "job11")
    assert "[=====     ]" in running
    assert "] 50% 1m" in running
    assert "job12" in lines[lines.index("pending (1)") + 1]
    assert lines[lines.index("ended (1)") + 1].endswith("Exit 1")
    assert "drain 3 why not" in find(lines, "drain 3")
    assert lines[-1].startswith("q quit")


def test_an_instance_that_is_well() -> None:
    docs = picture()
    docs["resources"] = {key: each for key, each in docs["resources"].items() if key in "01"}
    assert shown(docs)[1] == "healthy"


def test_what_the_tree_says_of_health() -> None:
    docs = picture()
    docs["overlay"] = {
        "0": {"rank": 0, "status": "degraded", "torpid": False},
        "1": {"rank": 1, "status": "full", "torpid": True},
        "3": {"rank": 3, "status": "lost", "torpid": False},
    }
    docs["resources"]["3"]["online"] = False
    docs["resources"]["0"]["online"] = False
    assert shown(docs)[1] == "degraded  2 lost (2-3)  1 torpid (1)  1 offline (0)  1 drained (3)"


@pytest.mark.parametrize(
    ("link", "text"),
    [
        (Link(first=True, away_for=3.0, lost_at=NOW, why="it died"), "The broker is away since"),
        (Link(first=False, away_for=3.0, lost_at=NOW, why="it died"), "No broker since"),
        (Link(first=True, back_for=1.0, gap=2.5), "The broker is back after 2.5s"),
        (Link(first=False), "Waiting for the first picture"),
    ],
)
def test_the_connection_is_said_first(link: Link, text: str) -> None:
    lines = shown(picture() if link.first else {}, link=link)
    assert text in lines[0]
    assert ("it died" in lines[0]) == bool(link.why)
    if link.first:
        assert lines[1].startswith("toy on n0")
    assert shown(picture(), link=Link(back_for=6.0))[0].startswith("toy")


def test_recoveries_are_shown_as_what_they_are() -> None:
    docs = picture()
    context: JsonObject = {
        "ranks": "0-2", "restarted": "0", "panicked": "1-2", "seconds": 1.3, "running": 12, "rediscovered": 11,
        "finished": 1, "lost": 0, "pending": 0, "root": 0, "began": NOW - 20, "why": "killed",
    }  # fmt: skip
    docs["events"]["9.0"] = {"t": NOW - 10, "name": "recovery", "context": context}
    said = "recovered ranks 0-2 in 1.3s: none lost, 11 of 12 running jobs rediscovered, 1 ended meanwhile"
    assert said in shown(docs, size=(120, 30))[2]
    assert "\n".join(shown(docs)).count("recovered") == 1
    assert plain(recovered(docs["events"]["9.0"])) == f"{said} (restarted 0, panicked 1-2)"
    docs["instance"]["recovery"] = {
        "ranks": "1-2",
        "began": NOW - 5,
        "away": "2",
        "detached": 1,
        "pending": 2,
        "why": "x",
    }
    assert "recovery of ranks 1-2 for 5s: away 2, 1 shell not attached yet, 2 jobs waiting; x" in shown(docs)[2]
    context.update(lost=2, restarted="", panicked="")
    assert "2 lost" in plain(recovered(docs["events"]["9.0"]))
    assert plain(recovered({"name": "recovery"})) == "recovered"


def test_a_recovery_of_one_rank_and_one_that_is_given_up() -> None:
    docs = picture()
    docs["instance"]["recovery"] = {"ranks": "7", "began": NOW - 5, "detached": 4, "why": "rank 7 was lost"}
    assert shown(docs)[2] == "recovery of rank 7 for 5s, 4 shells not attached yet; rank 7 was lost"
    context: JsonObject = {"ranks": "7", "restarted": "7", "panicked": "", "seconds": 2.0, "running": 0, "lost": 0}
    event: JsonObject = {"t": NOW, "name": "recovery", "context": context}
    assert plain(recovered(event)) == "recovered rank 7 in 2s: no job ran there (restarted 7)"
    context.update(restarted="", running=1, lost=1, rediscovered=0, away="7")
    given_up = recovered(event)
    assert plain(given_up) == "given up on rank 7 after 2s: 1 lost, 0 of 1 running job rediscovered"
    assert given_up[0].style == "bad"


def test_canceled_jobs_have_not_failed() -> None:
    docs = picture()
    docs["instance"]["jobs"].update(failed=2, timeout=3, canceled=4)
    assert find(shown(docs, size=(80, 30)), "canceled").strip() == "5 failed, 4 canceled"
    assert find(shown(docs, size=(56, 30)), "complete") == "1 pending, 1 running  3 complete  5 failed, 4 canceled"


def test_what_is_stopped_is_said() -> None:
    docs = picture()
    docs["instance"]["queue"] = {"enabled": False, "started": False, "reason": "maintenance"}
    assert "submission is disabled, scheduling is stopped: maintenance" in shown(docs)


def test_marks_of_jobs() -> None:
    docs = picture()
    docs["jobs"]["11"].update(detached="0-3", restarts=2)
    line = find(shown(docs, size=(140, 30)), "detached")
    assert "[detached 0-3, 2 restarts]" in line
    docs["jobs"]["11"].update(detached="", restarts=1)
    assert "job11 [1 restart]" in find(shown(docs, size=(140, 30)), "job11")


@pytest.mark.parametrize(
    ("name", "detached", "restarts", "width", "told"),
    [
        ("python3.11", "0-3", 0, 80, "python3.11  [detached] 50% 1m"),
        ("python3.11", "", 2, 80, "python3.11  [2 restarts] 50% 1m"),
        ("python3.11", "0-3", 2, 80, "python3.11  [D, R2] 50% 1m"),
        ("a-long-name-of-a-job", "0-3", 2, 80, "a-long-nam+ [D, R2] 50% 1m"),
        ("sh", "0", 0, 80, "sh          [detached 0] 50% 1m"),
        ("sh", "0", 12, 60, "sh [D, R12]"),
        ("a-long-name-of-a-job-indeed", "0", 1, 56, "a-long-name-of-a+"),
        ("python3.11", "0-3", 2, 120, "[detached 0-3, 2 restarts] 50% 1m"),
        ("sh", "0-3", 2, 120, "sh [detached 0-3, 2 restarts]  [=====     ] 50% 1m"),
    ],
)
def test_a_mark_takes_nothing_from_the_name(name: str, detached: str, restarts: int, width: int, told: str) -> None:
    docs = picture()
    docs["jobs"]["11"].update(name=name, detached=detached, restarts=restarts)
    lines = shown(docs, size=(width, 30))
    row = lines[lines.index("running (1)") + 1]
    assert row.endswith(told)
    assert name[:10] in row


def test_details_of_the_selected_job() -> None:
    docs = picture()
    docs["jobs"]["10"].update(exception_occurred=True, exception_severity=0, exception_type="exec", exception_note="no")
    text = "\n".join(shown(docs, Controls(details=True, selected="10")))
    assert "(10)" in text
    assert "exception=exec: no" in text
    assert "3 completed, 1 failed, 1 canceled, 0 timeout" in text
    assert "select a job" in "\n".join(shown(docs, Controls(details=True)))


def test_sections_filters_and_queues() -> None:
    docs = picture()
    docs["jobs"]["11"]["queue"] = "fast"
    assert not any("job12" in line for line in shown(docs, Controls(section="running")))
    assert find(shown(docs, Controls(filter="JOB12")), "job12")
    assert "no jobs that match 'nothing'" in shown(docs, Controls(filter="nothing"))
    lines = shown(docs, Controls(queue="fast", section="pending"))
    assert "no pending jobs in queue fast" in lines
    assert lines[-1].endswith("[only pending, queue fast]")
    assert shown(docs, Controls(typing=True, filter="ab"))[-1] == "filter: ab_"


def test_order_of_jobs() -> None:
    docs = picture()
    docs["jobs"] = jobs(
        job(1, t_run=NOW - 9), job(2, t_run=NOW - 1), job(3, "SCHED", priority=1), job(4, "SCHED", priority=9),
        job(5, "INACTIVE", t_inactive=NOW - 1), job(6, "INACTIVE", t_inactive=NOW - 2),
    )  # fmt: skip
    assert scene(docs, LIVE, Controls(), NOW, str).rows == ["2", "1", "4", "3", "5", "6"]


def test_many_jobs_on_a_small_screen() -> None:
    docs = picture()
    docs["jobs"] = jobs(
        *(job(n) for n in range(1, 201)), *(job(n, "SCHED") for n in range(201, 401)), job(500, "INACTIVE")
    )
    lines = shown(docs, size=(80, 24))
    assert find(lines, "running (200, 1 to")
    assert find(lines, "pending (200, 1 to")
    assert find(lines, "job500")
    lines = shown(docs, Controls(selected="100"), size=(80, 24))
    assert find(lines, "job100")


@given(st.integers(0, 160), st.integers(0, 60), st.booleans(), st.booleans())
def test_any_size_is_filled_and_kept_to(width: int, height: int, details: bool, helped: bool) -> None:
    docs = picture()
    docs["jobs"]["11"]["name"] = "日本語" * 20
    for selected in ("", "11"):
        shown(docs, Controls(details=details, selected=selected, help=helped), size=(width, height))


@given(st.integers(0, 100), st.lists(st.integers(0, 50), max_size=5))
def test_lines_are_shared_fairly(room: int, wants: list[int]) -> None:
    got = share(room, wants)
    assert sum(got) == min(room, sum(wants))
    assert all(0 <= each <= want for each, want in zip(got, wants, strict=True))
    lacking = [each for each, want in zip(got, wants, strict=True) if each < want]
    assert (
        not lacking
        or max(got) <= min(lacking) + 1
        or all(each == want for each, want in zip(got, wants, strict=True) if each > min(lacking) + 1)
    )


@given(st.integers(1, 100), st.data())
def test_the_selected_row_is_in_its_part(total: int, data: st.DataObject) -> None:
    room = data.draw(st.integers(1, total))
    selected = data.draw(st.integers(0, total - 1))
    rows = part(total, room, selected)
    assert selected in rows
    assert (len(rows), rows.start >= 0, rows.stop <= total) == (room, True, True)


def test_a_narrow_screen_keeps_what_matters() -> None:
    titles = {width: find(shown(picture(), size=(width, 30)), "JOBID") for width in (30, 50, 80, 150)}
    assert "USER" not in titles[30]
    assert titles[30].split() == ["JOBID", "ST", "NAME"]
    assert "LIMIT/INFO" in titles[80]
    assert titles[150].split() == ["JOBID", "USER", "ST", "TASKS", "NODES", "TIME", "NAME", "LIMIT/INFO"]


def test_an_empty_picture() -> None:
    assert "no jobs" in shown({})
    assert page(scene({}, LIVE, Controls(), NOW, str), 80)


# --- keys


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"jk", ["j", "k"]),
        (b"\x1b[A\x1b[B\x1bOC\x1b[D", ["up", "down", "right", "left"]),
        (b"\x1b[5~\x1b[6~\x1b[1~\x1b[F\x1b[Z", ["pageup", "pagedown", "home", "end", "backtab"]),
        (b"\r\t\x0c\x7f", ["enter", "tab", "redraw", "backspace"]),
        ("ƒä".encode(), ["ƒ", "ä"]),
        (b"\x1b[99;5u", []),
        (b"\x1bx", ["escape", "x"]),
        (b"\x1b[" + b"1" * 40 + b"q", ["1"] * 26 + ["q"]),
    ],
)  # fmt: skip
def test_keys(data: bytes, keys: list[str]) -> None:
    assert Keys().feed(data) == keys
    split = Keys()
    assert [key for byte in data for key in split.feed(bytes([byte]))] == keys


def test_a_lone_escape() -> None:
    keys = Keys()
    assert keys.feed(b"a\x1b") == ["a"]
    assert keys.waiting
    assert keys.flush() == ["escape"]
    assert keys.flush() == []


def pressed(*keys: str, rows: list[str], start: Controls | None = None) -> Controls:
    """What these keys come to."""
    controls = start or Controls()
    for key in keys:
        controls = press(controls, key, rows)
    return controls


def test_moving() -> None:
    rows = ["a", "b", "c"]
    assert pressed("j", rows=rows).selected == "a"
    assert pressed("j", "down", "j", "j", rows=rows).selected == "c"
    assert pressed("end", "k", "up", "up", rows=rows).selected == "a"
    assert pressed("pagedown", "pagedown", rows=rows).selected == "c"
    assert pressed("home", "pageup", rows=rows).selected == "a"
    assert pressed("j", rows=[]).selected == ""
    gone = pressed("j", "j", rows=rows)
    assert press(gone, "j", ["a", "c"]).selected == "c", "it goes on where the one that is gone was"


def test_what_other_keys_do() -> None:
    assert pressed("q", rows=[]).quit
    assert pressed("d", rows=[]).details
    assert not pressed("enter", "d", rows=[]).details
    assert [pressed(*["tab"] * n, rows=[]).section for n in range(5)] == [*SECTIONS, ""]
    assert pressed("left", rows=[]).section == SECTIONS[-1]
    helped = pressed("?", rows=[])
    assert helped.help
    assert not pressed("j", rows=["a"], start=helped).selected
    assert press(helped, "q", []).quit
    typed = pressed("/", "q", "j", "enter", rows=[])
    assert (typed.filter, typed.typing, typed.quit) == ("qj", False, False)
    assert press(typed, "escape", []).filter == ""
    assert pressed("/", "a", "b", "backspace", "up", rows=[]).filter == "a"
    assert pressed("/", "a", "escape", rows=[]) == Controls()


# --- the feed


def there(feed: Feed) -> bool:
    """Whether there is a picture, and it is up to date."""
    return feed.first and not feed.away


def taken(session: Session, feed: Feed) -> bool:
    """Take replies until the feed has changed."""
    while True:
        feed.tick()
        reply = session.receive(feed.poll_timeout())
        if reply is not None and feed.take(reply):
            return True


def test_the_feed_goes_on_after_the_brokers_death(tmp_path: Path) -> None:
    with FeedBroker(tmp_path / "socket") as broker, Session(broker.uri) as session:
        feed = Feed(session, TOPICS)
        assert not there(feed)
        assert taken(session, feed)
        assert feed.docs == picture()
        broker.push({"jobs": jobs(job(13))})
        assert taken(session, feed)
        assert "13" in feed.docs["jobs"]
        broker.stop()
        assert taken(session, feed)
        assert not there(feed)
        assert feed.link().away_for is not None
        assert "13" in feed.docs["jobs"], "the last picture stays"
        broker.start()
        assert taken(session, feed)
        assert there(feed)
        assert feed.link().back_for is not None
        assert broker.seen[-1][1]["position"] == [EPOCH, 2]
        broker.push(delete={"jobs": ["13"]})
        assert taken(session, feed)
        assert "13" not in feed.docs["jobs"]


def test_a_rank_0_that_cannot_be_reached_is_away(tmp_path: Path) -> None:
    with FeedBroker(tmp_path / "socket") as broker, Session(broker.uri) as session:
        feed = Feed(session, TOPICS)
        assert taken(session, feed)
        broker.fail(errno.EHOSTUNREACH)
        assert taken(session, feed)
        assert not there(feed)
        assert taken(session, feed)
        assert there(feed)


def test_half_a_snapshot_is_asked_for_again(tmp_path: Path) -> None:
    with FeedBroker(tmp_path / "socket") as broker, Session(broker.uri) as session:
        half = {**snapshot(picture()), "more": True, "position": None}
        broker.on("status.watch", half)
        feed = Feed(session, TOPICS)
        broker.wait_asked()
        reply = session.receive()
        assert reply is not None
        assert not feed.take(reply)
        assert not there(feed)
        broker.handlers["status.watch"] = lambda _message, _payload: [snapshot(picture())]
        broker.cut()
        assert taken(session, feed)
        assert not there(feed)
        assert taken(session, feed)
        assert there(feed)
        assert "position" not in broker.seen[-1][1]


def test_a_delta_that_does_not_go_on_from_here(tmp_path: Path) -> None:
    with FeedBroker(tmp_path / "socket") as broker, Session(broker.uri) as session:
        feed = Feed(session, TOPICS)
        assert taken(session, feed)
        broker.send(delta(7, 8))
        assert taken(session, feed)
        assert "position" not in broker.seen[-1][1]
        assert feed.docs == picture()


def test_a_feed_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeedBroker(tmp_path / "socket") as broker, Session(broker.uri) as session:
        broker.on("status.watch", (errno.EPERM, "not yours"))
        feed = Feed(session, TOPICS)
        with pytest.raises(FluxresError, match="cannot watch the instance: not yours"):
            taken(session, feed)
        broker.on("status.watch", (errno.ENOSYS, "no such service"))
        monkeypatch.setitem(feed_module._AGAIN, errno.ENOSYS, 0.3)
        feed = Feed(session, TOPICS)
        with pytest.raises(FluxresError, match="no such service"):
            for _ in range(100):
                taken(session, feed)


# --- the command


def test_once(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    with FeedBroker(tmp_path / "socket") as broker:
        status, out, err = run("top", "--once", broker.uri)
        assert (status, err) == (0, "")
        assert out.startswith("toy on n0")
        assert "job11" in out
        assert "\x1b" not in out
        assert max(map(len, out.splitlines())) <= 90
        status, out, _ = run("top", "--once", "--color=always", "--uri", broker.uri)
        assert status == 0
        assert "\x1b[" in out
        status, out, _ = run("top", "--once", "-q", "other", broker.uri)
        assert "no jobs in queue other" in out


def test_once_without_any_job(tmp_path: Path, run: Run) -> None:
    with FeedBroker(tmp_path / "socket", {}) as broker:
        assert run("top", "--once", broker.uri)[0] == 0


def test_it_wants_a_terminal(tmp_path: Path, run: Run) -> None:
    with FeedBroker(tmp_path / "socket") as broker:
        status, _, err = run("top", broker.uri)
        assert status == 1
        assert "no terminal (--once prints one picture)" in err
        assert run("top", "--uri", broker.uri, broker.uri)[0] == 2
