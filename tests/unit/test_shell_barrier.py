"""Real shells of a job on two ranks: no task before every shell is in the barrier, whoever comes and goes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Protocol

import pytest
import shellkit
from shellkit import (
    JOBID,
    Broker,
    Shell,
    Starter,
    event_names,
    exit_of,
    output,
    sh,
)

from fluxres.base.jobid import f58
from fluxres.wire.framing import frame
from fluxres.wire.payload import WireMap, pack
from fluxres_shell import find
from fluxres_shell.records import DataRecord, EofRecord
from fluxres_shell.segments import exit_record
from fluxres_shell.stdin import STDIN_BUFFER

START: WireMap = {"name": "start", "seq": 0}

shell = shellkit.shell


class OneOfTwo(Protocol):
    """What the `half` fixture is: starts one of the two shells of a job, each with one task."""

    def __call__(self, *command: str, rank: int = ..., stdin: str | None = ...) -> Shell:
        """Start it, with its standard input from a file or from the broker."""
        ...


@pytest.fixture
def half(shell: Starter) -> OneOfTwo:
    """Starts the shell of one rank of a job on two."""

    def start(*command: str, rank: int = 0, stdin: str | None = None) -> Shell:
        options = {} if stdin is None else {"input": {"stdin": {"type": "file", "path": stdin}}}
        tasks = [{"rank": rank, "local": 0}]
        return shell(*command, rank=rank, tasks=tasks, options=options, ranks="0-1", nnodes=2, ntasks_total=2)

    return start


def entered(broker: Broker) -> list[str]:
    """The types of the messages up to `barrier`, which is checked."""
    types: list[str] = []
    while True:
        message = broker.receive()
        assert message is not None, types
        types.append(str(message["type"]))
        if types[-1] == "barrier":
            assert message == {"type": "barrier", **START}
            return types


def tmpdirs(one: Shell) -> list[str]:
    """What there is of the job's temporary directory."""
    return [name for name in os.listdir(one.path.parent / "tmp") if f58(JOBID, ascii=True) in name]


class TestWaiting:
    def test_each_broker_is_told_after_the_records_and_the_tasks_start_once(
        self, half: OneOfTwo, tmp_path: Path
    ) -> None:
        one = half(*sh("echo ran >> ran; cat"))
        first = one.attach()
        assert entered(first) == ["attached", "records", "barrier"]
        first.close()
        second = one.attach()
        assert entered(second) == ["attached", "records", "barrier"]
        third = one.attach(from_seq=2)
        assert second.ended()
        assert entered(third) == ["attached", "barrier"]
        for name, seq in (("start", 1), ("finish", 0)):
            third.send(type="barrier-done", name=name, seq=seq)
        third.send(type="kill", signum=signal.SIGCONT)
        fourth = one.attach()  # what came before is handled by now, and has changed nothing
        assert entered(fourth) == ["attached", "records", "barrier"]
        assert not (tmp_path / "ran").exists()
        assert event_names(one.records()) == ["shell.init"]
        for _ in range(3):
            fourth.send(type="barrier-done", **START)
        fourth.send(type="stdin", task=-1, offset=0, data=b"late", eof=True)
        assert fourth.read_to_exit().status == 0
        assert event_names(fourth.seen) == ["shell.start", "shell.task-exit"]
        assert output(fourth.seen) == b"late"
        assert (tmp_path / "ran").read_text() == "ran\n"

    def test_two_shells_start_together(self, half: OneOfTwo, tmp_path: Path) -> None:
        """Each task needs the other one to be there."""
        for name in ("0", "1"):
            os.mkfifo(tmp_path / name)
        script = "echo hello > $((1 - FLUX_TASK_RANK)) & read line < $FLUX_TASK_RANK; wait; echo $line"
        shells = [half(*sh(script), rank=rank) for rank in (0, 1)]
        brokers = [one.attach() for one in shells]
        for broker in brokers:
            entered(broker)
        for broker in brokers:
            broker.send(type="barrier-done", **START)
        for rank, broker in enumerate(brokers):
            assert broker.read_to_exit().status == 0
            assert output(broker.seen, task=rank) == b"hello\n"

    def test_a_lost_socket_is_bound_again(self, half: OneOfTwo) -> None:
        one = half("true")
        entered(one.attach())
        os.unlink("sock", dir_fd=one.dirfd)
        one.process.send_signal(signal.SIGUSR1)
        broker = one.attach()
        entered(broker)
        broker.send(type="barrier-done", **START)
        assert broker.read_to_exit().status == 0

    def test_detached_after_the_barrier_the_tasks_run(self, half: OneOfTwo) -> None:
        one = half("echo", "hi")
        broker = one.attach()
        broker.pass_barrier()
        broker.close()
        assert one.wait() == 0
        assert output(one.records()) == b"hi\n"
        assert exit_of(one.records()).status == 0


class TestStdin:
    def test_what_comes_early_reaches_the_task(self, half: OneOfTwo) -> None:
        one = half("wc", "-c")
        broker = one.attach()
        entered(broker)
        sent = 0
        while sent < STDIN_BUFFER:
            broker.send(type="stdin", task=0, offset=sent, data=b"x" * (STDIN_BUFFER // 2), eof=False)
            sent += STDIN_BUFFER // 2
        broker.expect("stdin-ack")  # of what the pipe takes; the rest waits
        broker.close()
        again = one.attach(2)
        answer = again.expect("attached")["stdin"]
        assert isinstance(answer, dict)
        assert (answer["offset"], answer["eof"]) == (sent, False)
        again.pass_barrier()
        again.send(type="stdin", task=0, offset=sent, data=b"", eof=True)
        assert again.read_to_exit().status == 0
        assert output(again.seen).split() == [str(sent).encode()]

    def test_the_end_of_input_may_come_before_the_task(self, half: OneOfTwo) -> None:
        one = half("cat")
        broker = one.attach()
        entered(broker)
        broker.send(type="stdin", task=-1, offset=0, data=b"early", eof=True)
        broker.send(type="barrier-done", **START)
        assert broker.read_to_exit().status == 0
        assert output(broker.seen) == b"early"

    def test_a_start_that_fails_consumes_it(self, half: OneOfTwo) -> None:
        one = half("no-such-program")
        broker = one.attach()
        entered(broker)
        broker.send(type="stdin", task=-1, offset=0, data=b"x" * STDIN_BUFFER, eof=False)
        broker.send(type="barrier-done", **START)
        assert broker.read_to_exit().status == 127 << 8
        assert "shell.start" not in event_names(one.records())
        assert tmpdirs(one) == []


class TestEnds:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
    def test_a_kill_while_it_waits_starts_nothing(self, half: OneOfTwo, tmp_path: Path, signum: int) -> None:
        one = half("touch", "ran")
        broker = one.attach()
        entered(broker)
        assert len(tmpdirs(one)) == 1
        broker.send(type="stdin", task=-1, offset=0, data=b"x" * STDIN_BUFFER, eof=False)
        for harmless in (signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD):
            broker.send(type="kill", signum=harmless)
        broker.send(type="kill", signum=signum)
        broker.send(type="barrier-done", **START)
        record = broker.read_to_exit()
        assert (record.status, dict(record.info)) == ((128 + signum) << 8, {})
        assert tmpdirs(one) == []
        broker.send(type="release")
        assert broker.ended()
        assert one.wait() == 0
        assert not (tmp_path / "ran").exists()
        records = one.records()
        assert event_names(records) == ["shell.init"]
        assert {(r.stream, r.task) for r in records if isinstance(r, EofRecord)} == {("stdout", 0), ("stderr", 0)}

    def test_a_kill_right_after_the_barrier_reaches_the_task(self, half: OneOfTwo) -> None:
        one = half("sleep", "1000")
        broker = one.attach()
        entered(broker)
        both = ({"type": "barrier-done", **START}, {"type": "kill", "signum": int(signal.SIGTERM)})
        broker.sock.sendall(b"".join(frame(pack(message)) for message in both))
        assert broker.read_to_exit().status == 143 << 8
        assert event_names(broker.seen) == ["shell.start", "shell.task-exit"]

    def test_sigterm_to_the_detached_shell(self, half: OneOfTwo, tmp_path: Path) -> None:
        one = half("touch", "ran")
        broker = one.attach()
        entered(broker)
        broker.close()
        one.process.send_signal(signal.SIGTERM)
        assert one.wait() == 0
        assert exit_of(one.records()).status == 143 << 8
        assert tmpdirs(one) == []
        assert not (tmp_path / "ran").exists()

    def test_a_shell_killed_while_it_waits_leaves_its_claim_free(self, half: OneOfTwo, tmp_path: Path) -> None:
        one = half("touch", "ran")
        entered(one.attach())
        one.process.kill()
        one.wait()
        with find.find(one.dirfd) as facts:
            assert facts.kind is find.Kind.DEAD
        assert exit_record(one.dirfd) is None
        assert event_names(one.records()) == ["shell.init"]
        assert not (tmp_path / "ran").exists()

    def test_what_cannot_be_set_up_ends_before_the_barrier(self, half: OneOfTwo) -> None:
        one = half("true", stdin="nothing")
        assert one.wait() == 0  # though nobody has told it that the barrier is done
        assert "nothing" in str(exit_of(one.records()).info["exception"])
        assert event_names(one.records()) == ["shell.init"]
        assert tmpdirs(one) == []

    def test_one_node_never_waits(self, shell: Starter) -> None:
        one = shell("cat", ranks="0")
        broker = one.attach()
        broker.expect("attached")
        broker.send(type="barrier-done", **START)
        broker.send(type="stdin", task=-1, offset=0, data=b"hi", eof=True)
        broker.read_until(lambda record: isinstance(record, DataRecord))
        assert event_names(broker.seen)[:2] == ["shell.init", "shell.start"]
        assert broker.read_to_exit().status == 0
