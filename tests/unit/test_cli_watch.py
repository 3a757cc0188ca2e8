"""`fluxres watch`: which jobs, their output and states, the line of progress, the exit status, the broker's death."""

from __future__ import annotations

import errno
import os
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
from clikit import Run
from fakejobs import data, line
from feedkit import NOW, PATIENCE, FeedBroker, job, jobs

from fluxres.base.jobid import f58
from fluxres.base.json import JsonObject
from fluxres.cli import watch_jobs
from fluxres.cli.feed_jobs import as_entry
from fluxres.cli.joblist import IDS_AT_ONCE
from fluxres.cli.main import main
from fluxres.cli.watch_output import Lines, labelled
from fluxres.cli.watch_state import Phase, WatchedJob, progress
from fluxres.testing.terminal import OnTerminal
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit status, stdout and stderr."""

    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


class WatchBroker(FeedBroker):
    """A broker with jobs: those of the feed, and others that only job-list has; each with an output eventlog."""

    def __init__(self, path: Path, *documents: JsonObject, forgotten: Iterable[JsonObject] = ()) -> None:
        super().__init__(path, {"jobs": jobs(*documents)})
        self.forgotten = {str(each["dec"]): each for each in forgotten}
        self.output: dict[int, list[str]] = {}
        self.errors: dict[int, int] = {}
        """The errors that output ends with, where that is not its end."""
        self.handlers["job-list.list"] = self._list
        self.handlers["job-list.list-id"] = self._one
        self.handlers["job-info.eventlog-watch"] = self._watch
        self.on("attr.get", {"value": str(NOW)})

    def _entries(self) -> dict[int, WireMap]:
        documents = {**self.forgotten, **self.docs["jobs"]}
        return {int(key): cast("WireMap", as_entry(each)) for key, each in documents.items()}

    def _list(self, _message: Message, _payload: WireMap) -> list[WireMap | int]:
        return [{"jobs": list(self._entries().values())[::-1]}, errno.ENODATA]

    def _one(self, _message: Message, payload: WireMap) -> list[WireMap | int]:
        entry = self._entries().get(cast("int", payload["id"]))
        return [errno.ENOENT if entry is None else {"job": entry}]

    def _watch(self, _message: Message, payload: WireMap) -> list[WireMap | int]:
        jobid = cast("int", payload["id"])
        events = self.output.get(jobid, []) if payload["path"] == "guest.output" else [line("clean", NOW)]
        answers: list[WireMap | int] = [{"event": each, "position": [1, n]} for n, each in enumerate(events)]
        return [*answers, self.errors.get(jobid, errno.ENODATA)]

    def watched(self) -> list[object]:
        """The jobs whose output was asked for."""
        return [payload["id"] for topic, payload in self.seen if topic == "job-info.eventlog-watch"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[WatchBroker]:
    """A broker with a job that succeeded (1) and one that failed (2)."""
    documents = (job(1, "INACTIVE"), job(2, "INACTIVE", result="FAILED", waitstatus=3 << 8))
    with WatchBroker(tmp_path / "socket", *documents) as made:
        made.output = {1: [data("one\n")], 2: [data("two\n"), data("trouble\n", stream="stderr")]}
        yield made


class Later(threading.Thread):
    """Runs `fluxres watch` while the test goes on."""

    def __init__(self, broker: FeedBroker, *argv: str) -> None:
        super().__init__(daemon=True)
        self.argv = ["watch", "--uri", broker.uri, *argv]
        self.status = -1
        self.start()

    def run(self) -> None:
        """Run it."""
        self.status = main(self.argv)

    def end(self) -> int:
        """Wait for its end; the exit status."""
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.status


# --- which jobs


def test_jobs_that_have_ended(broker: WatchBroker, run: Run) -> None:
    assert run("watch", "--uri", broker.uri, "--all") == (3, "one\ntwo\n", "trouble\n")
    assert run("watch", "--uri", broker.uri, "1") == (0, "one\n", "")
    assert not any(topic == "status.watch" for topic, _ in broker.seen), "nothing is active"


def test_labels(broker: WatchBroker, run: Run) -> None:
    broker.output[1] = [data("a\nb"), data("c\nd", rank="1"), data("", rank="0", eof=True)]
    status, out, _ = run("watch", "--uri", broker.uri, "-l", "1")
    ours = f58(1)
    assert status == 0
    assert sorted(out.splitlines()) == [f"{ours}: 0: a", f"{ours}: 0: b", f"{ours}: 1: c", f"{ours}: 1: d"]
    assert out.endswith("\n")


def test_a_job_that_is_not_there(broker: WatchBroker, run: Run) -> None:
    status, out, err = run("watch", "--uri", broker.uri, "1", "77")
    assert (status, out) == (1, "one\n")
    assert err == f"fluxres-watch: cannot find {f58(77)}: no such job\n"


def test_no_job_matches(tmp_path: Path, run: Run) -> None:
    with WatchBroker(tmp_path / "empty") as broker:
        assert run("watch", "--uri", broker.uri, "-v", "--active") == (0, "", "fluxres-watch: watching 0 jobs\n")


def test_a_selection_is_wanted(broker: WatchBroker, run: Run) -> None:
    assert run("watch", "--uri", broker.uri)[0] == 2
    assert run("watch", "--uri", broker.uri, "--since", str(time.time() + 1000))[0] == 2
    assert run("watch", "--uri", broker.uri, "--filter", "nonsense")[0] == 2


def test_at_most_so_many(broker: WatchBroker, run: Run) -> None:
    status, out, err = run("watch", "--uri", broker.uri, "--all", "-c", "1")
    assert (status, out) == (3, "two\n")
    assert "only the latest 1 jobs are watched" in err
    assert next(payload for topic, payload in broker.seen if topic == "job-list.list")["max_entries"] == 2


def test_options_beside_jobids_are_ignored(broker: WatchBroker, run: Run) -> None:
    status, _, err = run("watch", "--uri", broker.uri, "--active", "1")
    assert status == 0
    assert "ignored" in err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"only_active": True}, [{"states": [2 + 4 + 8 + 16 + 32]}]),
        ({"only_pending": True}, [{"states": [14]}]),
        ({"only_running": True, "only_inactive": True}, [{"states": [48 + 64]}]),
        ({"since": 5.0}, [{"states": [126]}]),
        ({"only_all": True}, [{"states": [126]}]),
        ({"filter": [(0, 2)]}, [{"results": [2]}]),
        ({"filter": [(16, 2), (0, 4)]}, [{"states": [16]}, {"results": [6]}]),
    ],
)
def test_constraints(options: dict[str, object], wanted: list[WireMap]) -> None:
    args = Namespace(filter=[], since=0.0, **{f"only_{name}": False for name in watch_jobs._STATES})
    for name, value in options.items():
        setattr(args, name, value)
    assert watch_jobs.constraint_of(args) == {"and": [{"userid": [os.getuid()]}, {"or": wanted}]}


# --- jobs that live


def test_a_jobs_life(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with WatchBroker(tmp_path / "socket", job(1, "SCHED"), job(2), job(3)) as broker:
        broker.output = {1: [data("hello\n")], 2: []}
        watch = Later(broker, "-v", "1", "2")
        broker.wait_asked()
        broker.push({"jobs": jobs(job(1, "RUN", t_submit=NOW - 70))})
        broker.push({"jobs": jobs(job(1, "INACTIVE"), job(3, "INACTIVE"))})
        broker.push({"jobs": jobs(job(2, "INACTIVE", result="FAILED", waitstatus=9))})
        assert watch.end() == 128 + 9
        out, err = capfd.readouterr()
    assert out == "hello\n"
    assert err.splitlines()[0] == "fluxres-watch: watching 2 jobs"
    one, two = f58(1), f58(2)
    assert sorted(err.splitlines()[1:]) == sorted(
        [
            f"{one}: 40.000s: running on n0",
            f"{one}: 90.000s: complete",
            f"{two}: 40.000s: running on n0",
            f"{two}: 90.000s: failed: Killed",
        ]
    )
    assert sorted(map(str, broker.watched())) == ["1", "2"], "each once"


def test_a_job_that_never_ran(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with WatchBroker(tmp_path / "socket", job(1, "SCHED")) as broker:
        watch = Later(broker, "1")
        broker.wait_asked()
        cause = {"exception_occurred": True, "exception_severity": 0, "exception_type": "cancel"}
        gone = {**job(1, "INACTIVE", result="CANCELED", exception_note="no\x1b", **cause)}
        for key in ("t_run", "waitstatus"):
            del gone[key]
        broker.push({"jobs": {"1": gone}})
        assert watch.end() == 1
        assert broker.watched() == []
    assert capfd.readouterr().err == f"fluxres-watch: {f58(1)}: exception type=cancel: no?\n"


def test_jobs_that_the_feed_does_not_show_any_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The feed has only the latest of those that have ended: what it has lost is looked up."""
    many = 2 * IDS_AT_ONCE + 10
    with WatchBroker(tmp_path / "socket", *(job(n, "SCHED") for n in range(1, many + 1))) as broker:
        watch = Later(broker, "--active")
        broker.wait_asked()
        broker.forgotten = {str(n): job(n, "INACTIVE", waitstatus=0) for n in range(1, many)}
        broker.forgotten[str(many)] = job(many, "INACTIVE", result="FAILED", waitstatus=7 << 8)
        broker.push(delete={"jobs": [str(n) for n in range(1, many + 1)]})
        assert watch.end() == 7
        assert sorted(map(int, map(str, broker.watched()))) == list(range(1, many + 1))


def test_a_job_that_is_gone_altogether(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with WatchBroker(tmp_path / "socket", job(1, "SCHED")) as broker:
        watch = Later(broker, "1")
        broker.wait_asked()
        broker.push(delete={"jobs": ["1"]})
        assert watch.end() == 1
    assert capfd.readouterr().err == f"fluxres-watch: cannot watch {f58(1)}: no such job\n"


def test_output_that_cannot_be_read(broker: WatchBroker, run: Run) -> None:
    broker.errors[1] = errno.EPERM
    status, out, err = run("watch", "--uri", broker.uri, "1")
    assert (status, out) == (1, "one\n")
    assert err == f"fluxres-watch: cannot watch {f58(1)}: {os.strerror(errno.EPERM)}\n"


@pytest.mark.parametrize("verbose", ["-v", "-vv"])
def test_another_users_jobs_are_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str], verbose: str) -> None:
    """They run on, and the command ends with the last job that can be watched; each is told of once."""
    with WatchBroker(tmp_path / "socket", job(1), job(2), job(3, "INACTIVE")) as broker:
        refused = {n: (errno.EPERM, f"job {f58(n)} is another user's") for n in (1, 2)}
        watch_well = broker.handlers["job-info.eventlog-watch"]
        broker.output = {3: [data("mine\n")]}
        broker.handlers["job-info.eventlog-watch"] = lambda message, payload: (
            [refused[cast("int", payload["id"])]] if payload["id"] in refused else watch_well(message, payload)
        )
        assert Later(broker, verbose, "1", "2", "3").end() == 1
    out, err = capfd.readouterr()
    assert out == "mine\n"
    said = [each for each in err.splitlines() if "cannot" in each]
    assert said == [f"fluxres-watch: cannot watch {f58(n)}: job {f58(n)} is another user's" for n in (1, 2)]


def test_the_rest_of_a_refused_job_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where only one of its eventlogs is refused, the other one is let go, too."""
    with WatchBroker(tmp_path / "socket", job(1)) as broker:
        broker.handlers["job-info.eventlog-watch"] = lambda _message, payload: (
            [(errno.EIO, "it is damaged")] if payload["path"] == "guest.output" else []
        )
        assert Later(broker, "-vv", "1").end() == 1
    assert f"cannot watch {f58(1)}: it is damaged\n" in capfd.readouterr().err


def test_events_with_vv(broker: WatchBroker, run: Run) -> None:
    _, _, err = run("watch", "--uri", broker.uri, "-vv", "1")
    assert f"{f58(1)}: 0.000000 clean" in err.splitlines()


def test_the_brokers_death(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with WatchBroker(tmp_path / "socket", job(1)) as broker:
        broker.output = {1: []}
        broker.handlers["job-info.eventlog-watch"] = lambda _message, payload: (
            [errno.ENODATA] if "position" in payload else [{"event": data("early\n"), "position": [1, 1]}]
        )
        watch = Later(broker, "1")
        broker.wait_asked()
        out = ""
        while "early" not in out:
            out += capfd.readouterr().out
        broker.stop()
        broker.docs["jobs"] = jobs(job(1, "INACTIVE"))
        broker.seq += 1
        broker.start()
        assert watch.end() == 0
        err = capfd.readouterr().err
    assert out == "early\n"
    assert err.startswith("fluxres-watch: the broker is away (")
    assert "fluxres-watch: the broker is back after" in err


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    environ = {**os.environ}
    with WatchBroker(tmp_path / "socket", job(1), job(2, "SCHED")) as broker:
        environ["FLUXRES_URI"] = broker.uri
        broker.output = {1: [data("half a"), data(" line")], 2: [data("last\n")]}
        with OnTerminal("watch", "--progress", "--all", env=environ, columns=100) as terminal:
            broker.wait_asked()
            terminal.expect("pending:1 running:1 complete:0 failed:0")
            terminal.expect("half a line\r\n")
            broker.stop()
            terminal.expect("(broker away: ")
            broker.start()
            broker.wait_asked()
            broker.push({"jobs": jobs(job(1, "INACTIVE"))})
            terminal.expect("pending:1 running:0 complete:1 failed:0")
            broker.push({"jobs": jobs(job(2, "INACTIVE", result="FAILED", waitstatus=256))})
            assert terminal.wait() == 1
            assert terminal.text.endswith("\r\n")
            last = terminal.text.splitlines()[-1]
            assert "pending:0 running:0 complete:1 failed:1" in last
            assert "100.0%" in last
            assert "last" in terminal.text.replace("\r", "\n").splitlines()
            assert terminal.attributes == terminal.before


def test_progress_needs_a_terminal(broker: WatchBroker, run: Run) -> None:
    status, out, err = run("watch", "--uri", broker.uri, "--progress", "1")
    assert (status, out) == (0, "one\n")
    assert "--progress is ignored" in err


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with WatchBroker(tmp_path / "socket", job(1, "SCHED")) as broker:
        environ = {**os.environ, "FLUXRES_URI": broker.uri}
        with OnTerminal("watch", "--progress", "--all", env=environ) as terminal:
            terminal.expect("pending:1")
            terminal.press(b"\x03")
            assert terminal.wait() == 130
            assert "Traceback" not in terminal.text
            assert terminal.attributes == terminal.before


# --- pure parts


@pytest.mark.parametrize(
    ("state", "more", "phase", "code"),
    [
        ("DEPEND", {}, Phase.PENDING, 0),
        ("SCHED", {}, Phase.PENDING, 0),
        ("RUN", {}, Phase.RUNNING, 0),
        ("CLEANUP", {"waitstatus": 256}, Phase.RUNNING, 1),
        ("INACTIVE", {}, Phase.COMPLETE, 0),
        ("INACTIVE", {"result": "FAILED", "waitstatus": 5 << 8}, Phase.FAILED, 5),
        ("INACTIVE", {"result": "FAILED", "waitstatus": None}, Phase.FAILED, 1),
        ("INACTIVE", {"result": "TIMEOUT", "waitstatus": 15}, Phase.FAILED, 143),
        ("INACTIVE", {"result": "CANCELED", "waitstatus": 0}, Phase.FAILED, 1),
    ],
)
def test_phases_and_exit_codes(state: str, more: dict[str, object], phase: Phase, code: int) -> None:
    watched = WatchedJob(as_entry(job(1, state, **more)))
    assert (watched.phase, watched.exit_code) == (phase, code)


def test_what_cannot_be_watched_has_failed() -> None:
    watched = WatchedJob(as_entry(job(1, "RUN")))
    watched.given_up = True
    assert (watched.phase, watched.exit_code) == (Phase.FAILED, 1)


def test_what_is_over_stays_over() -> None:
    watched = WatchedJob(as_entry(job(1, "INACTIVE")))
    watched.update(as_entry(job(1, "RUN")))
    assert watched.ended


def test_the_line_of_progress() -> None:
    counts = Counter({Phase.PENDING: 2, Phase.RUNNING: 1, Phase.COMPLETE: 6, Phase.FAILED: 1})
    full = progress(counts, 3661.0, 100)
    assert full.startswith("pending:2 running:1 complete:6 failed:1 [")
    assert full.endswith("] 70.0% 01:01:01".replace("] 70", "]  70"))
    bar = full[full.index("[") + 1 : full.index("]")]
    assert bar.count("=") == len(bar) * 7 // 10
    assert progress(counts, 2.0, 100, jps=True).endswith("3.5 job/s")
    assert progress(counts, 2.0, 100, away="3s").endswith("(broker away: 3s)")
    assert "[" not in progress(counts, 2.0, 60)
    assert len(progress(counts, 2.0, 20)) == 20
    assert "100.0%" in progress(Counter(), 0.0, 100, jps=True)
    assert progress(counts, 200_000.0, 100).endswith("2.3d")


def test_lines_and_labels() -> None:
    lines = Lines()
    assert lines.take(1, b"a\nb") == b"a\n"
    assert lines.take(2, b"x") == b""
    assert lines.take(1, b"c\n") == b"bc\n"
    assert lines.finish() == [(2, b"x\n")]
    assert lines.finish() == []
    assert len(lines.take(1, b"y" * 100_000)) == 100_001
    assert labelled("j", b"a\nb") == b"j: a\nj: b\n"
