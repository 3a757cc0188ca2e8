"""`fluxres jobs`, `job …` and `cancel` against an instance of fake jobs."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from fakejobs import FakeInstance, FakeJob, cancelled_job, ended_job, line

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.eventlog import Event
from fluxres.cli import cancel, job, jobs
from fluxres.cli.eventfmt import EventFormat
from fluxres.cli.job_control import split_note
from fluxres.cli.job_events import Match
from fluxres.cli.job_info import parse_which
from fluxres.cli.signals import parse_signal, signal_name
from fluxres.wire.payload import WireMap

JOBS: list[WireMap] = [
    {"id": 3, "userid": os.getuid(), "state": 8, "name": "pending", "ntasks": 1, "urgency": 0, "duration": 0.0},
    {
        "id": 2,
        "userid": os.getuid(),
        "state": 64,
        "result": 2,
        "name": "a-long-name-indeed",
        "ntasks": 2,
        "nnodes": 1,
        "nodelist": "n0",
        "t_run": 10.0,
        "t_cleanup": 12.5,
        "waitstatus": 256,
    },
]


def listing(broker: FakeInstance) -> None:
    broker.services["job-list.list"] = lambda _payload: [{"jobs": [JOBS[0]], "version": 1}, {"jobs": [JOBS[1]]}]

    def one(payload: WireMap) -> WireMap:
        for entry in JOBS:
            if entry["id"] == payload["id"]:
                return {"job": entry}
        raise RpcError(errno.ENOENT)

    broker.services["job-list.list-id"] = one


# --- jobs


@pytest.mark.parametrize("cuts", [[], [0], [1], [2]])
def test_the_default_table(cuts: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pwd import getpwuid

    user = getpwuid(os.getuid()).pw_name
    with FakeInstance(tmp_path, cuts=cuts) as broker:
        listing(broker)
        assert jobs.main(["--uri", broker.uri, "-a"]) == 0
        asked = broker.payloads("job-list.list")[-1]
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["JOBID", "USER", "NAME", "ST", "NTASKS", "NNODES", "TIME", "INFO"]
    assert first.split() == ["ƒ4", user, "pending", "S", "1", "-", "-", "held"]
    assert second.split() == ["ƒ3", user, "a-long-na+", "F", "2", "1", "2.500s", "n0"]
    assert asked["max_entries"] == 1001
    assert asked["constraint"] == {"and": [{"states": [14 + 48 + 64]}, {"userid": [os.getuid()]}]}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], [{"states": [62]}, {"userid": [os.getuid()]}]),
        (["-A"], [{"states": [62]}]),
        (["-u", "all", "-f", "pending"], [{"states": [14]}]),
        (["-u", "77", "-f", "failed,running"], [{"or": [{"states": [48]}, {"results": [2]}]}, {"userid": [77]}]),
        (["-A", "--since=-1h"], [{"states": [126]}]),
    ],
)
def test_filters_are_the_brokers_work(argv: list[str], expected: object, tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        assert jobs.main(["--uri", broker.uri, *argv]) == 0
        assert broker.payloads("job-list.list")[0]["constraint"] == {"and": expected}


def test_formats_sorting_and_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        base = ["--uri", broker.uri]
        assert jobs.main([*base, "-n", "-o", "{id.dec} {returncode:h}", "--sort=id.dec"]) == 0
        assert capsys.readouterr() == ("2 1\n3 -\n", "")
        assert jobs.main([*base, "-c1", "-o", "{name:.3}"]) == 0
        out, err = capsys.readouterr()
        assert out == "NAME\npen\n"
        assert "only 1 jobs are shown" in err
        attrs = [payload["attrs"] for payload in broker.payloads("job-list.list")]
    assert attrs == [["result", "waitstatus"], ["name"]]


def test_jobs_are_chosen_by_name_and_queue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        base = ["--uri", broker.uri, "-no", "{id.dec}"]
        assert jobs.main([*base, "--name=pending", "-c1"]) == 0
        assert capsys.readouterr() == ("3\n", "")
        assert jobs.main([*base, "-q", "a,b"]) == 0
        assert capsys.readouterr().out == ""
        first, second = broker.payloads("job-list.list")
    assert (first["max_entries"], first["attrs"]) == (0, ["name"])
    assert second["attrs"] == ["queue"]


def test_single_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        base = ["--uri", broker.uri]
        assert jobs.main([*base, "-no", "{id.dec}", "f4", "f5", "f3", "f4", "f5"]) == 1
        out, err = capsys.readouterr()
        assert out == "3\n2\n"
        assert err == "fluxres-jobs: cannot find ƒ5: no such job\n"
        assert jobs.main([*base, "f5"]) == 1
        assert capsys.readouterr() == ("", "fluxres-jobs: cannot find ƒ5: no such job\n")
        assert jobs.main([*base, "--json", "f3"]) == 0
        assert json.loads(capsys.readouterr().out)["result"] == "FAILED"
        assert jobs.main([*base, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["jobs"]) == 2


def test_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states: WireMap = {"depend": 1, "priority": 0, "sched": 2, "run": 3, "cleanup": 1, "inactive": 9, "total": 16}
    with FakeInstance(tmp_path) as broker:
        broker.services["job-list.job-stats"] = lambda _payload: {
            "job_states": states,
            "successful": 5,
            "failed": 2,
            "canceled": 1,
            "timeout": 1,
        }
        assert jobs.main(["--uri", broker.uri, "--stats-only"]) == 0
        states |= {"inactive": 16}
        assert jobs.main(["--uri", broker.uri, "--stats-only"]) == 1
    assert capsys.readouterr().out == "4 running, 5 completed, 4 failed, 3 pending\n" * 2


def test_no_jobs_is_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        broker.services["job-list.list"] = lambda _payload: [{"jobs": [], "version": 1}]
        assert jobs.main(["--uri", broker.uri, "-no", "{id}"]) == 0
    assert capsys.readouterr().out == ""


# --- waiting


@pytest.mark.parametrize("cut", [None, 0, 1, 4, 9])
def test_wait_and_status(cut: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path, cuts=[] if cut is None else [cut] * 3) as broker:
        broker.jobs = {1: ended_job(), 2: ended_job(status=137 << 8), 3: cancelled_job()}
        base = ["--uri", broker.uri]
        assert job.main(["wait", *base, "f2"]) == 0
        assert capsys.readouterr().err == ""
        assert job.main(["wait", *base, "f3"]) == 1
        assert capsys.readouterr().err == "fluxres-job: ƒ3: task(s) Killed\n"
        assert job.main(["wait", *base, "f9"]) == 2
        assert capsys.readouterr().err == "fluxres-job: cannot wait for ƒ9: no such job\n"
        assert job.main(["status", *base, "f2", "f3", "f4"]) == 137
        assert job.main(["status", *base, "-e", "77", "--json", "f4"]) == 77
        assert json.loads(capsys.readouterr().out) == {
            "id": 3,
            "success": False,
            "exception_occurred": True,
            "exception_type": "cancel",
            "exception_note": "no",
            "exception_severity": 0,
        }


def test_wait_for_all_of_ones_own(tmp_path: Path) -> None:
    """Those that are active when it begins: what had failed before does not count."""
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        broker.jobs = {3: ended_job(), 2: ended_job()}
        assert job.main(["wait", "--uri", broker.uri, "--all"]) == 0
        asked = broker.payloads("job-list.list")[-1]
        assert asked["constraint"] == {"and": [{"userid": [os.getuid()]}, {"states": [62]}]}
        broker.jobs[2] = cancelled_job()
        assert job.main(["wait", "--uri", broker.uri, "--all"]) == 1


# --- events


def test_eventlogs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        broker.jobs[1] = ended_job(status=256)
        base = ["--uri", broker.uri]
        assert job.main(["eventlog", *base, "f2"]) == 0
        shown = capsys.readouterr().out
        assert shown.splitlines()[0].startswith("100.000000 submit userid=")
        assert "101.000000 finish status=256\n" in shown
        assert job.main(["eventlog", *base, "-F", "f2"]) == 0
        assert capsys.readouterr().out == shown
        assert job.main(["eventlog", *base, "--path=exec", "--format=json", "f2"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"timestamp": 100.41, "name": "init"}
        assert job.main(["eventlog", *base, "-T", "offset", "-p", "guest.exec.eventlog", "f2"]) == 0
        assert capsys.readouterr().out == "0.000000 init\n0.640000 done\n"
        with pytest.raises(FluxresError, match="cannot show eventlog of ƒ9: no such job"):
            job.main(["eventlog", *base, "f9"])


def test_time_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    human = EventFormat("human")
    events = [Event(0.25, "a"), Event(1.5, "b", {"k": "v", "n": [1, {"x": None}]}), Event(61.0, "c")]
    assert [human.line(each) for each in events] == [
        "[Jan01 02:00] a",
        '[  +1.250000] b k="v" n=[1,{"x":null}]',
        "[Jan01 02:01] c",
    ]
    assert EventFormat("iso").line(events[0]) == "1970-01-01T02:00:00.250000+02:00 a"


@pytest.mark.parametrize("cut", range(10))
def test_wait_event(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path, cuts=[cut]) as broker:
        broker.jobs[1] = ended_job(status=256)
        base = ["wait-event", "--uri", broker.uri]
        assert job.main([*base, "-v", "f2", "alloc"]) == 0
        names = [shown.split()[1] for shown in capsys.readouterr().out.splitlines()]
        assert names == ["submit", "validate", "depend", "priority", "alloc"]
        assert job.main([*base, "-m", "status=256", "f2", "finish"]) == 0
        assert capsys.readouterr().out == "101.000000 finish status=256\n"
        assert job.main([*base, "-q", "-p", "exec", "f2", "done"]) == 0
        assert capsys.readouterr().out == ""
        with pytest.raises(FluxresError, match="never came"):
            job.main([*base, "f2", "nosuch"])
        with pytest.raises(FluxresError, match=r"^cannot wait for event 'start' of ƒ9: no such job$"):
            job.main([*base, "f9", "start"])


def test_wait_event_gives_up(tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker:
        broker.jobs[1] = FakeJob(logs={"eventlog": [line("submit", 1.0)]})
        with pytest.raises(FluxresError, match=r"cannot wait any longer for event 'clean' of ƒ2: 0\.01s are over"):
            job.main(["wait-event", "--uri", broker.uri, "-t", "10ms", "f2", "clean"])


@pytest.mark.parametrize(
    ("match", "event", "fits"),
    [
        (Match("a"), Event(1, "a"), True),
        (Match("a"), Event(1, "b"), False),
        (Match("a", "k", "v"), Event(1, "a", {"k": "v"}), True),
        (Match("a", "k", '"v"'), Event(1, "a", {"k": "v"}), True),
        (Match("a", "k", "0"), Event(1, "a", {"k": 0}), True),
        (Match("a", "k", "1"), Event(1, "a", {"k": 0}), False),
        (Match("a", "k", "0"), Event(1, "a"), False),
    ],
)
def test_matching_events(match: Match, event: Event, fits: bool) -> None:
    assert match.fits(event) is fits


# --- looking up


def test_info_last_and_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        listing(broker)
        broker.jobs[1] = FakeJob(logs={"jobspec": ["{}"], "eventlog": [line("submit", 1.0)]})
        base = ["--uri", broker.uri]
        assert job.main(["info", *base, "f2", "jobspec"]) == 0
        assert job.main(["info", *base, "f2", "eventlog"]) == 0
        assert capsys.readouterr().out == '{}\n{"timestamp": 1.0, "name": "submit"}\n'
        with pytest.raises(FluxresError, match="cannot show R of ƒ2: no such job, or it has none"):
            job.main(["info", *base, "f2", "R"])
        assert job.main(["last", *base]) == 0
        assert job.main(["last", *base, "[::-1]"]) == 0
        assert job.main(["id", "--to=dec", "f4", "0x2"]) == 0
    assert capsys.readouterr().out.split() == ["ƒ4", "ƒ3", "ƒ4", "3", "2"]


@pytest.mark.parametrize(
    ("text", "which"), [("3", (None, 3, None)), ("[:]", (None, None, None)), ("[-1:]", (-1, None, None))]
)
def test_which_jobs(text: str, which: tuple[int | None, ...]) -> None:
    assert parse_which(text) == which


@pytest.mark.parametrize("text", ["", "x", "[1]", "[::0]", "-1"])
def test_which_jobs_makes_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        parse_which(text)


# --- acting


def acting(broker: FakeInstance, topic: str) -> None:
    def act(payload: WireMap) -> WireMap:
        if payload["id"] == 8:
            raise RpcError(errno.EINVAL, "job is inactive")
        return {"old_urgency": 16}

    broker.services[topic] = act


def test_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        acting(broker, "job-manager.kill")
        assert job.main(["kill", "--uri", broker.uri, "-s", "HUP", "f2", "f9", "f3"]) == 1
        assert broker.payloads("job-manager.kill") == [{"id": each, "signum": 1} for each in (1, 8, 2)]
    assert capsys.readouterr().err == "fluxres-job: cannot signal ƒ9: job is inactive\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["f2"], {"id": 1, "type": "cancel", "severity": 0}),
        (["f2", "out", "of", "it"], {"id": 1, "type": "cancel", "severity": 0, "note": "out of it"}),
        (["-t", "x", "-s", "5", "-m", "why", "f2"], {"id": 1, "type": "x", "severity": 5, "note": "why"}),
        (["--type=x", "--severity=1", "f2", "--", "f3"], {"id": 1, "type": "x", "severity": 1, "note": "f3"}),
    ],
)
def test_raise(argv: list[str], expected: WireMap, tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker:
        acting(broker, "job-manager.raise")
        assert job.main(["raise", "--uri", broker.uri, *argv]) == 0
        assert broker.payloads("job-manager.raise") == [expected]


def test_notes_follow_jobids() -> None:
    assert split_note(["f2", "f3", "all", "f4"], []) == ([1, 2], "all f4")
    assert split_note(["f2"], ["f3"]) == ([1], "f3")
    assert split_note(["why"], []) == ([], "why")


def test_urgency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        acting(broker, "job-manager.urgency")
        assert job.main(["urgency", "--uri", broker.uri, "-v", "f2", "hold"]) == 0
        assert broker.payloads("job-manager.urgency") == [{"id": 1, "urgency": 0}]
        with pytest.raises(FluxresError, match="cannot change the urgency of ƒ9: job is inactive"):
            job.main(["urgency", "--uri", broker.uri, "f9", "31"])
    assert capsys.readouterr().err == "fluxres-job: old urgency was 16\n"


def test_cancel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeInstance(tmp_path) as broker:
        acting(broker, "job-manager.raise")
        broker.services["job-manager.raiseall"] = lambda _payload: {"count": 2, "errors": 0}
        base = ["--uri", broker.uri]
        assert cancel.main([*base, "-m", "why", "f2", "f3"]) == 0
        assert job.main(["cancel", *base, "f9"]) == 1
        assert broker.payloads("job-manager.raise")[0] == {"id": 1, "type": "cancel", "severity": 0, "note": "why"}
        assert cancel.main([*base, "--all"]) == 0
        assert cancel.main([*base, "--states=pending", "-u", "all", "-n"]) == 0
        first, second = broker.payloads("job-manager.raiseall")
    assert (first["userid"], first["states"], first["dry_run"]) == (os.getuid(), 62, False)
    assert (second["userid"], second["states"], second["dry_run"]) == (0xFFFFFFFF, 14, True)
    assert capsys.readouterr().err.splitlines() == [
        "fluxres-cancel: cannot cancel ƒ9: job is inactive",
        "fluxres-cancel: cancelled 2 jobs",
        "fluxres-cancel: would cancel 2 jobs",
    ]


@pytest.mark.parametrize(
    "argv",
    [["wait"], ["wait", "-a", "f2"], ["nosuch"], [], ["raise", "x"], ["kill", "-s", "NO", "f2"], ["id", "!"]],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = job.main(argv)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert capsys.readouterr().err.startswith("fluxres-job: ")


def test_signals_have_names() -> None:
    assert [parse_signal(text) for text in ("9", "TERM", "sigint")] == [9, signal.SIGTERM, signal.SIGINT]
    assert signal_name(15) == "SIGTERM"
    assert signal_name(50) == "signal 50"
