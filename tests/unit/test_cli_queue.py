"""fluxres queue: what it asks and says."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from clikit import Run
from fakebroker import Answer, FakeBroker

from fluxres.cli.main import main
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap

RUNNING, SCHED, ACTIVE = 16 | 32, 8, 2 | 4 | 8 | 16 | 32


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    with FakeBroker(tmp_path / "local-0") as made:
        monkeypatch.setenv("FLUXRES_URI", made.uri)
        monkeypatch.setattr("fluxres.cli.queue.POLL_EVERY", 0.005)
        yield made


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


class Queue:
    """The queue's service, and jobs given as (state, priority)."""

    def __init__(self, broker: FakeBroker) -> None:
        self.status: dict[str, bool | str] = {"enable": True, "start": True}
        self.jobs: list[tuple[int, int]] = []
        self.after: list[list[tuple[int, int]]] = []
        broker.handlers["job-manager.queue-status"] = lambda _message, _payload: [{**self.status}]
        broker.handlers["job-manager.queue-start"] = self.change
        broker.handlers["job-manager.queue-enable"] = self.change
        broker.handlers["job-list.list"] = self.list

    def change(self, _message: Message, payload: WireMap) -> Iterator[Answer]:
        for key, reason in (("start", "stop_reason"), ("enable", "disable_reason")):
            if key in payload:
                self.status[key] = bool(payload[key])
                self.status[reason] = str(payload.get("reason", ""))
        yield {}

    def list(self, _message: Message, payload: WireMap) -> Iterator[Answer]:
        if self.after:
            self.jobs = self.after.pop(0)
        constraint = payload["constraint"]
        assert isinstance(constraint, dict)
        states = constraint["states"]
        assert isinstance(states, list)
        mask = states[0]
        assert isinstance(mask, int)
        found = [{"id": n, "priority": priority} for n, (state, priority) in enumerate(self.jobs) if state & mask]
        yield {"jobs": [*found[: int(str(payload["max_entries"])) or None]]}
        yield errno.ENODATA


@pytest.fixture
def queue(broker: FakeBroker) -> Queue:
    return Queue(broker)


def test_queue_control(run: Run, queue: Queue) -> None:
    assert run("queue", "status") == (0, "Job submission is enabled\nScheduling is started\n", "")
    assert run("queue", "stop", "for", "repair") == (0, "Scheduling is stopped: for repair\n", "")
    assert run("queue", "disable") == (0, "Job submission is disabled: disabled by administrator\n", "")
    assert run("queue", "disable", "-m", "no") == (0, "Job submission is disabled: no\n", "")
    assert run("queue", "list", "-o", "{submission} {scheduling} {enabled.ascii}") == (
        0,
        "SUBMIT SCHED EN\ndisabled stopped n\n",
        "",
    )
    assert run("queue", "enable", "--quiet") == (0, "", "")
    assert run("queue", "start", "--all") == (0, "Scheduling is started\n", "")
    assert run("queue", "stop") == (0, "Scheduling is stopped\n", "")
    assert run("queue", "list", "-n") == (0, " enabled  stopped\n", "")
    assert run("queue", "list") == (0, "  SUBMIT    SCHED\n enabled  stopped\n", "")
    assert run("queue", "stop", "-m", "a", "b") == (
        1,
        "",
        "fluxres-queue: cannot stop the queue: the reason is given twice\n",
    )


def test_queue_refusals(run: Run, broker: FakeBroker) -> None:
    broker.on("job-manager.queue-start", (errno.EPERM, "it is for the instance owner"))
    assert run("queue", "stop")[2] == "fluxres-queue: cannot stop the queue: it is for the instance owner\n"
    assert run("queue")[0] == 2


def test_drain_waits_for_all_jobs(run: Run, queue: Queue) -> None:
    queue.after = [[(SCHED, 0), (16, 16)], [(SCHED, 0)], [(2, 0)], []]
    assert run("queue", "drain") == (0, "", "")
    assert queue.after == []
    queue.jobs = [(SCHED, 0)]
    status, out, err = run("queue", "drain", "--timeout", "20ms")
    assert (status, out) == (1, "")
    assert err == "fluxres-queue: cannot wait longer for the queue to be empty: 20ms have passed\n"


@pytest.mark.parametrize(
    ("started", "jobs", "idle"),
    [
        (True, [], True),
        (True, [(SCHED, 16)], False),
        (True, [(SCHED, 0)], True),  # held
        (True, [(2, 0)], True),  # waits for other jobs
        (False, [(SCHED, 16)], True),
        (False, [(SCHED, 16), (16, 16)], False),
        (False, [(32, 16)], False),
    ],
)
def test_idle(run: Run, queue: Queue, started: bool, jobs: list[tuple[int, int]], idle: bool) -> None:
    queue.status["start"] = started
    queue.jobs = jobs
    if idle:
        assert run("queue", "idle", "--timeout", "20ms") == (0, f"{len(jobs)} jobs\n", "")
        assert run("queue", "idle", "--quiet") == (0, f"{len(jobs)} jobs\n" if jobs else "", "")
    else:
        assert run("queue", "idle", "--timeout", "20ms")[0] == 1


def test_idle_sees_a_job_that_starts_between_its_questions(run: Run, queue: Queue) -> None:
    queue.after = [[(SCHED, 16)], [(16, 16)], [(16, 16)], [(16, 16)], []]
    assert run("queue", "idle") == (0, "0 jobs\n", "")
    assert queue.after == []
