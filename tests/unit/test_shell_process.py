"""Real shells on hand-made directories: detached, attached to, and starts that fail (DESIGN §9)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shellkit
from shellkit import (
    NONCE,
    PATIENCE,
    Broker,
    Starter,
    event_names,
    exit_of,
    output,
    sh,
    wait_until,
)

from fluxres.wire.framing import frame
from fluxres.wire.payload import pack
from fluxres_shell import find
from fluxres_shell.protocol import MAX_REQUEST
from fluxres_shell.records import DataRecord, EofRecord, EventRecord, Record
from fluxres_shell.segments import exit_record

FILE = {"type": "file", "path": "out-{{id}}.txt"}

shell = shellkit.shell


class TestDetached:
    def test_everything_is_in_the_journal(self, shell: Starter) -> None:
        one = shell(*sh("echo out; echo err >&2; exit 3"))
        assert one.wait() == 0
        records = one.records()
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert event_names(records) == ["shell.init", "shell.start", "shell.task-exit"]
        assert (output(records), output(records, "stderr")) == (b"out\n", b"err\n")
        assert sum(isinstance(record, EofRecord) for record in records) == 2
        assert exit_of(records).status == 3 << 8
        assert exit_record(one.dirfd) == exit_of(records)
        assert not (one.path / "reserve").exists()
        with find.find(one.dirfd) as facts:
            assert facts.kind is find.Kind.DEAD

    def test_several_tasks(self, shell: Starter) -> None:
        one = shell(
            *sh("echo $FLUX_TASK_RANK $FLUX_TASK_LOCAL_ID $FLUX_JOB_SIZE; exit $FLUX_TASK_RANK"),
            ntasks_total=5, tasks=[{"rank": 3, "local": 0}, {"rank": 4, "local": 1}], ranks=[7, 0], nnodes=2,
        )  # fmt: skip
        broker = one.attach()
        broker.pass_barrier()
        broker.close()
        one.wait()
        records = one.records()
        assert [output(records, task=task) for task in (3, 4)] == [b"3 0 5\n", b"4 1 5\n"]
        assert exit_of(records).status == 4 << 8
        start = next(r for r in records if isinstance(r, EventRecord) and r.name == "shell.start")
        assert start.context == {"taskmap": {"version": 1, "map": [[0, 1, 3, 1], [1, 1, 2, 1]]}}

    def test_a_signal_is_an_exit_status(self, shell: Starter) -> None:
        one = shell(*sh("kill -9 $$"))
        one.wait()
        records = one.records()
        assert exit_of(records).status == 137 << 8
        event = next(r for r in records if isinstance(r, EventRecord) and r.name == "shell.task-exit")
        assert (event.context["wait_status"], event.context["signaled"]) == (9, 9)

    def test_the_tmpdir_is_there_and_then_gone(self, shell: Starter) -> None:
        one = shell(*sh("mkdir $FLUX_JOB_TMPDIR/a; touch $FLUX_JOB_TMPDIR/a/b; echo $FLUX_JOB_TMPDIR; pwd"))
        one.wait()
        tmpdir, cwd = output(one.records()).decode().split()
        assert not Path(tmpdir).exists()
        assert cwd == str(one.path.parent)
        assert exit_of(one.records()).status == 0

    def test_the_time_limit_holds(self, shell: Starter) -> None:
        one = shell("sleep", "1000", time_limit=0.05)
        one.wait()
        records = one.records()
        assert "shell.timeout" in event_names(records)
        assert exit_of(records).status == 142 << 8
        assert exit_of(records).info["timeout"] is True

    def test_sigterm_to_the_shell_is_for_the_tasks(self, shell: Starter) -> None:
        one = shell(*sh("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
        broker = one.attach()
        broker.read_until(lambda record: isinstance(record, DataRecord))
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            one.process.send_signal(signum)
        assert broker.read_to_exit().status == 7 << 8
        assert output(broker.seen) == b"ready\ncaught\n"


class TestFailedStarts:
    @pytest.mark.parametrize(
        ("command", "status", "said"),
        [
            ("no-such-program", 127, "task 0: cannot start 'no-such-program': No such file"),
            ("/no/such/program", 127, "No such file"),
            ("/etc/passwd", 126, "Permission denied"),
        ],
    )
    def test_no_program(self, shell: Starter, command: str, status: int, said: str) -> None:
        one = shell(command)
        one.wait()
        record = exit_of(one.records())
        assert record.status == status << 8
        exception = record.info["exception"]
        assert isinstance(exception, dict)
        assert (exception["type"], exception["severity"]) == ("exec", 0)
        assert said in str(exception["note"])
        assert "shell.start" not in event_names(one.records())

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"cwd": "/no/such/dir"}, "/no/such/dir"),
            (
                {"options": {"output": {"stdout": {"type": "file", "path": "/no/such/dir/x"}}}},
                "/no/such/dir/x",
            ),
            ({"options": {"input": {"stdin": {"type": "file", "path": "nothing"}}}}, "nothing"),
            ({"tmpdir_base": "/proc/x"}, "temporary directory"),
            ({"userid": 4_000_000_000 - 1}, "user 3999999999"),
        ],
    )
    def test_no_setting(self, shell: Starter, tmp_path: Path, changes: dict[str, object], said: str) -> None:
        one = shell("true", at=tmp_path, env=None, **changes)
        one.wait()
        record = exit_of(one.records())
        assert record.status == 1 << 8
        assert said in str(record.info["exception"])

    def test_a_bad_spec_claims_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "spec").write_text("{}")
        command = [sys.executable, "-m", "fluxres_shell.main", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert re.fullmatch(r"fluxres-shell: cannot start: cannot read the spec: 'version' .*\n", done.stderr)
        assert os.listdir(tmp_path) == ["spec"]

    @pytest.mark.parametrize(("words", "status"), [([], 2), (["--what"], 2), (["/no/such/dir"], 1)])
    def test_usage(self, words: list[str], status: int) -> None:
        command = [sys.executable, "-m", "fluxres_shell.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == status
        assert done.stderr.count("\n") == 1


class TestAttached:
    def test_output_is_streamed_and_released(self, shell: Starter) -> None:
        one = shell(*sh("echo one; read line; echo got $line"))
        broker = one.attach()
        answer = broker.expect("attached")
        assert answer["pid"] == one.process.pid
        assert answer["first"] == 1
        broker.send(type="stdin", task=-1, offset=0, data=b"hel", eof=False)
        broker.send(type="stdin", task=-1, offset=0, data=b"hello\n", eof=True)
        assert broker.read_to_exit().status == 0
        assert output(broker.seen) == b"one\ngot hello\n"
        broker.send(type="release")
        assert broker.ended()
        assert one.wait() == 0

    def test_stdin_is_acknowledged_as_it_is_consumed(self, shell: Starter) -> None:
        one = shell("wc", "-c")
        broker = one.attach()
        stdin = broker.expect("attached")["stdin"]
        assert isinstance(stdin, dict)
        window, total = stdin["window"], 1_000_000
        assert isinstance(window, int)
        sent = acked = 0
        while acked < total:
            while sent < total and sent - acked < window:
                piece = b"x" * min(50_000, total - sent, window - (sent - acked))
                broker.send(type="stdin", task=0, offset=sent, data=piece, eof=False)
                sent += len(piece)
            message = broker.receive()
            assert message is not None
            if message["type"] == "stdin-ack":
                assert isinstance(message["offset"], int)
                assert acked < message["offset"] <= sent
                acked = message["offset"]
        broker.send(type="stdin", task=-1, offset=total, data=b"", eof=True)
        broker.read_to_exit()
        assert output(broker.seen).split() == [b"1000000"]

    def test_stdin_that_nobody_reads_is_consumed_when_the_task_ends(self, shell: Starter) -> None:
        one = shell(*sh("exec <&-; echo closed; exec sleep 1000"))
        broker = one.attach()
        broker.read_until(lambda record: isinstance(record, DataRecord))
        broker.send(type="stdin", task=-1, offset=0, data=b"x" * 100_000, eof=False)
        assert broker.expect("stdin-ack")["offset"] == 100_000
        broker.send(type="kill", signum=15)
        assert broker.read_to_exit().status == 143 << 8

    @pytest.mark.parametrize("stdin", [{"type": "null"}, {"type": "file", "path": "input"}], ids=["null", "file"])
    def test_stdin_from_elsewhere(self, shell: Starter, tmp_path: Path, stdin: dict[str, str]) -> None:
        (tmp_path / "input").write_bytes(b"from the file")
        one = shell("cat", options={"input": {"stdin": stdin}})
        one.wait()
        assert output(one.records()) == (b"" if stdin["type"] == "null" else b"from the file")

    def test_kill(self, shell: Starter) -> None:
        one = shell(*sh("trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.01; done"))
        broker = one.attach()
        broker.read_until(lambda record: isinstance(record, DataRecord))
        broker.send(type="kill", signum=signal.SIGUSR1)
        assert broker.read_to_exit().status == 0
        assert output(broker.seen) == b"ready\nusr1\n"

    def test_a_reattach_gives_exactly_the_rest(self, shell: Starter) -> None:
        one = shell(*sh("for i in 1 2 3 4 5 6; do echo $i; read x; done"))
        everything: list[Record] = []
        for count in range(6):
            broker = one.attach(len(everything) + 1)
            answer = broker.expect("attached")
            stdin = answer["stdin"]
            assert isinstance(stdin, dict)
            assert stdin["offset"] == 2 * count
            broker.read_until(lambda record: isinstance(record, DataRecord))
            everything += broker.seen
            broker.send(type="stdin", task=-1, offset=2 * count, data=b"y\n", eof=False)
            broker.expect("stdin-ack")
            broker.close()
        one.wait()
        everything += one.records(len(everything) + 1)
        assert [record.seq for record in everything] == list(range(1, len(everything) + 1))
        assert output(everything) == b"1\n2\n3\n4\n5\n6\n"
        assert exit_of(everything).status == 0

    def test_a_newer_attach_ends_the_older(self, shell: Starter) -> None:
        one = shell("sleep", "1000")
        older = one.attach()
        older.expect("attached")
        newer = one.attach()
        newer.expect("attached")
        assert older.ended()
        newer.send(type="kill", signum=9)
        assert newer.read_to_exit().status == 137 << 8

    def test_losing_the_broker_at_the_end_is_an_exit_with_a_record(self, shell: Starter) -> None:
        one = shell(*sh("read x"))
        broker = one.attach()
        broker.send(type="stdin", task=-1, offset=0, data=b"", eof=True)
        broker.read_to_exit()
        assert one.process.poll() is None
        broker.close()
        assert one.wait() == 0
        assert exit_record(one.dirfd) is not None

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\xff" * 100,
            b"GET / HTTP/1.1\r\n\r\n",
            (MAX_REQUEST + 1).to_bytes(4, "big"),
            frame(b"\xff"),
            frame(pack({"type": "kill", "signum": 9})),
            frame(pack({"type": "attach", "nonce": "another job's", "from": 1})),
            frame(pack({"type": "attach", "nonce": NONCE, "from": 1000})),
        ],
    )
    def test_garbage_ends_only_its_own_connection(self, shell: Starter, garbage: bytes) -> None:
        one = shell(*sh("echo hi; read x"))
        good = one.attach()
        good.expect("attached")
        bad = Broker(one.dial())
        bad.sock.sendall(garbage)
        assert bad.expect("error")["errnum"]
        assert bad.ended()
        good.send(type="stdin", task=-1, offset=0, data=b"", eof=True)
        assert good.read_to_exit().seq == len(good.seen)

    @pytest.mark.parametrize("message", [{"type": "ack", "seq": 1000}, {"type": "release"}])
    def test_what_is_not_so_ends_the_attached_connection(self, shell: Starter, message: dict[str, int]) -> None:
        one = shell("sleep", "1000")
        broker = one.attach()
        broker.expect("attached")
        broker.send(**message)
        assert broker.ended()
        one.attach().expect("attached")

    def test_idle_strangers_do_not_keep_the_broker_out(self, shell: Starter) -> None:
        one = shell("sleep", "1000")
        for _ in range(20):
            one.dial()
        one.attach().expect("attached")

    def test_asking_for_the_socket_too_early_does_no_harm(self, shell: Starter) -> None:
        one = shell("sleep", "1000")
        wait_until(lambda: (one.path / "claim").exists())
        for _ in range(200):
            one.process.send_signal(signal.SIGUSR1)
        one.attach().expect("attached")

    def test_a_lost_socket_is_bound_again_when_asked(self, shell: Starter) -> None:
        one = shell("sleep", "1000")
        one.attach().expect("attached")
        os.unlink("sock", dir_fd=one.dirfd)
        one.process.send_signal(signal.SIGUSR1)
        one.attach().expect("attached")


class TestOutputFiles:
    def test_output_goes_to_the_file_and_not_to_the_journal(self, shell: Starter, tmp_path: Path) -> None:
        path = tmp_path / "out-fBukQL.txt"
        path.write_text("of an earlier job, and longer than what this one has to say")
        os.utime(path, (1, 1))
        one = shell(*sh("echo out; echo err >&2"), options={"output": {"stdout": FILE}})
        one.wait()
        assert path.read_bytes() == b"out\nerr\n"
        assert not any(isinstance(record, DataRecord | EofRecord) for record in one.records())
        assert exit_of(one.records()).status == 0

    def test_append(self, shell: Starter, tmp_path: Path) -> None:
        path = tmp_path / "out-fBukQL.txt"
        path.write_text("before\n")
        os.utime(path, (1, 1))
        one = shell(*sh("echo out; echo err >&2"), options={
            "output": {"stdout": FILE, "stderr": {"type": "kvs"}, "mode": "append"}
        })  # fmt: skip
        one.wait()
        assert path.read_bytes() == b"before\nout\n"
        assert output(one.records(), "stderr") == b"err\n"

    def test_tasks_that_share_a_file_do_not_truncate_each_other(self, shell: Starter, tmp_path: Path) -> None:
        tasks = [{"rank": rank, "local": rank} for rank in range(8)]
        one = shell(*sh("echo task"), options={"output": {"stdout": FILE}}, tasks=tasks, ntasks_total=8)
        one.wait()
        assert (tmp_path / "out-fBukQL.txt").read_bytes() == b"task\n" * 8


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run tasks as somebody else")
class TestOtherUsers:
    def test_tasks_run_as_the_jobs_owner(self, shell: Starter, tmp_path: Path) -> None:
        import pwd

        nobody = pwd.getpwnam("nobody")
        one = shell(
            *sh("id -u; id -g"), userid=nobody.pw_uid, cwd="/"
        )  # fmt: skip
        one.wait()
        words = output(one.records()).split()
        assert words == [str(nobody.pw_uid).encode(), str(nobody.pw_gid).encode()]

    def test_files_are_opened_with_the_owners_permissions(self, shell: Starter, tmp_path: Path) -> None:
        import pwd

        options = {"output": {"stdout": {"type": "file", "path": str(tmp_path / "roots-only" / "x")}}}
        (tmp_path / "roots-only").mkdir(mode=0o700)
        one = shell("true", userid=pwd.getpwnam("nobody").pw_uid, cwd="/", options=options)
        one.wait()
        assert "Permission denied" in str(exit_of(one.records()).info["exception"])
