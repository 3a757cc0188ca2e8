"""`fluxres run` and `job attach` over a real socket that is cut at every message: they print the same."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakejobs import FakeInstance, FakeJob, data, ended_job, line

from fluxres.base.errors import FluxresError, RpcError
from fluxres.cli import job, job_attach, run
from fluxres.wire.payload import WireMap

ID = 5
OUTPUT = [
    data("one\ntw"),
    data("err\n", stream="stderr"),
    data("o\n"),
    data("/w==", encoding="base64"),
    data("1\n", rank="1"),
    line("redirect", 100.7, stream="stderr", rank="1", path="/x"),
    data("", eof=True),
    data("", rank="1", eof=True),
]
MESSAGES = 30
"""More responses than attaching to a job with that output takes."""


@pytest.fixture
def no_stdin() -> Iterator[None]:
    """Standard input at its end."""
    saved = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    yield
    os.dup2(saved, 0)
    os.close(nothing)
    os.close(saved)


def accept_stdin(fake: FakeJob, payload: WireMap) -> WireMap:
    """What `job-exec.stdin` does."""
    text, offset = payload["data"], payload["offset"]
    assert isinstance(text, str)
    assert isinstance(offset, int)
    at = len(fake.stdin) if offset < 0 else offset
    if at > len(fake.stdin):
        raise RpcError(errno.EINVAL, f"the input stands at {len(fake.stdin)}")
    fake.stdin += text.encode()[len(fake.stdin) - at :]
    fake.stdin_eof = fake.stdin_eof or payload["eof"] is True
    return {"offset": len(fake.stdin)}


def running_job() -> tuple[FakeJob, Callable[[], None]]:
    """A job that runs, and what ends it, once."""
    fake = ended_job()
    rest = fake.logs["eventlog"][6:]
    del fake.logs["eventlog"][6:]
    fake.ended.clear()

    def end() -> None:
        if not fake.ended:
            fake.logs["eventlog"] += rest
            fake.ended |= {"eventlog", "guest.output"}

    return fake, end


def serve(broker: FakeInstance, fake: FakeJob) -> None:
    broker.jobs[ID] = fake
    broker.services["job-exec.stdin"] = lambda payload: accept_stdin(fake, payload)
    broker.services["job-ingest.submit"] = lambda _payload: {"id": ID}
    broker.services["job-manager.kill"] = lambda _payload: {}
    broker.services["job-manager.raise"] = lambda _payload: {}


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize("cut", range(MESSAGES))
@pytest.mark.parametrize("label", [False, True])
def test_output_is_the_same_wherever_the_connection_is_cut(
    cut: int, label: bool, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with FakeInstance(tmp_path, cuts=[cut, 3]) as broker:
        serve(broker, ended_job(OUTPUT, status=2 << 8))
        status = run.main(["--uri", broker.uri, *(["-l"] if label else []), "x"])
    out, err = capfdbinary.readouterr()
    assert out == (b"0: one\n0: two\n1: 1\n0: \xff" if label else b"one\ntwo\n\xff1\n")
    said = b"err\n1: stderr redirected to /x\nfluxres-run: task(s) exited with exit code 2\n"
    assert err == (b"0: " + said if label else said)
    assert status == 2
    keys = {payload["key"] for payload in broker.payloads("job-ingest.submit")}
    assert len(keys) == 1


@pytest.mark.parametrize("cuts", [[], *([cut] for cut in range(1, 12)), [9, 1, 0, 2, 2, 4]])
def test_standard_input_arrives_once(cuts: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sent = b"".join(b"line %d\n" % number for number in range(60_000))
    fake, end = running_job()
    with FakeInstance(tmp_path, cuts=cuts) as broker:
        serve(broker, fake)

        def take(payload: WireMap) -> WireMap:
            answer = accept_stdin(fake, payload)
            if fake.stdin_eof:
                end()
            return answer

        broker.services["job-exec.stdin"] = take
        saved = os.dup(0)
        read, write = os.pipe()
        os.dup2(read, 0)
        os.close(read)

        def feed() -> None:
            with os.fdopen(write, "wb") as pipe:
                pipe.write(sent)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            assert run.main(["--uri", broker.uri, "cat"]) == 0
        finally:
            os.dup2(saved, 0)
            os.close(saved)
            feeder.join()
    assert bytes(fake.stdin) == sent
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_stdin")
def test_attaching_appends_to_the_input_that_is_there(tmp_path: Path) -> None:
    fake, end = running_job()
    fake.stdin += b"before"
    with FakeInstance(tmp_path) as broker:
        serve(broker, fake)

        def take(payload: WireMap) -> WireMap:
            answer = accept_stdin(fake, payload)
            if fake.stdin_eof:
                end()
            return answer

        broker.services["job-exec.stdin"] = take
        assert job.main(["attach", "--uri", broker.uri, "f6"]) == 0
        sent = [(payload["offset"], payload["eof"]) for payload in broker.payloads("job-exec.stdin")]
    assert sent == [(-1, False), (6, True)]
    assert fake.stdin == b"before"


@pytest.mark.usefixtures("no_stdin")
def test_input_from_a_file_or_read_only_sends_none(tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker:
        serve(broker, ended_job())
        assert run.main(["--uri", broker.uri, "--input=/x", "cat"]) == 0
        assert job.main(["attach", "--uri", broker.uri, "--read-only", "f6"]) == 0
        assert broker.payloads("job-exec.stdin") == []


def test_a_job_that_is_not_there(tmp_path: Path) -> None:
    with FakeInstance(tmp_path) as broker, pytest.raises(FluxresError, match="cannot attach to ƒ6: no such job"):
        job_attach.main(["--uri", broker.uri, "f6"])


def test_a_submission_that_is_refused(tmp_path: Path) -> None:
    def refuse(_payload: WireMap) -> WireMap:
        raise RpcError(errno.EINVAL, "unsatisfiable request")

    with FakeInstance(tmp_path) as broker:
        broker.services["job-ingest.submit"] = refuse
        with pytest.raises(FluxresError, match="cannot submit: unsatisfiable request"):
            run.main(["--uri", broker.uri, "x"])


@pytest.mark.usefixtures("no_stdin")
def test_signals_go_to_the_job_and_ctrl_c_twice_cancels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fake, end = running_job()
    seen: list[int] = []
    with FakeInstance(tmp_path) as broker:
        serve(broker, fake)

        def accept(payload: WireMap) -> WireMap:
            os.kill(os.getpid(), signal.SIGTERM)
            return accept_stdin(fake, payload)

        def kill(payload: WireMap) -> WireMap:
            signum = payload["signum"]
            assert isinstance(signum, int)
            seen.append(signum)
            os.kill(os.getpid(), signal.SIGINT)
            return {}

        def cancel(_payload: WireMap) -> WireMap:
            note = "interrupted by ctrl-C"
            fake.logs["eventlog"].append(line("exception", 100.9, type="cancel", severity=0, note=note))
            end()
            return {}

        broker.services.update({"job-exec.stdin": accept, "job-manager.kill": kill, "job-manager.raise": cancel})
        assert run.main(["--uri", broker.uri, "sleep", "inf"]) == 1
        raised = broker.payloads("job-manager.raise")[0]
    assert seen == [signal.SIGTERM, signal.SIGINT]
    assert raised == {"id": ID, "type": "cancel", "severity": 0, "note": "interrupted by ctrl-C"}
    err = capfd.readouterr().err.splitlines()
    assert err[0].startswith("fluxres-run: sending SIGINT to ƒ6;")
    assert err[1] == "0.900s: job.exception ƒ6 type=cancel severity=0 interrupted by ctrl-C"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("no_stdin")
def test_much_output_keeps_its_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [data(f"{number}\n" * 50) for number in range(500)]
    with FakeInstance(tmp_path, cuts=[250, 100]) as broker:
        serve(broker, ended_job(lines))
        assert run.main(["--uri", broker.uri, "x"]) == 0
    assert capfd.readouterr().out == "".join(f"{number}\n" * 50 for number in range(500))
