"""Real shells in trouble: floods of output, kill -9 at any point, two claims, full disks, stray processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import shellkit
from shellkit import (
    NONCE,
    PATIENCE,
    Starter,
    exit_of,
    make_spec,
    output,
    pids_printed,
    process_gone,
    sh,
    wait_until,
)

from fluxres_shell import cgroup, claim, find, leftover
from fluxres_shell.protocol import WINDOW_BYTES
from fluxres_shell.records import DataRecord, ExitRecord, Record
from fluxres_shell.segments import exit_record, list_segments

shell = shellkit.shell


class TestMuchOutput:
    SIZE = 50_000_000

    def test_a_slow_acker_gets_it_all_and_memory_stays_bounded(self, shell: Starter) -> None:
        one = shell(*sh(f"head -c {self.SIZE} /dev/zero"), journal_limit=1 << 20, segment_size=1 << 18)
        broker = one.attach()
        size = unacked = 0
        biggest_journal = 0
        while True:
            message = broker.receive()
            assert message is not None
            if message["type"] != "records":
                continue
            batch = message["records"]
            assert isinstance(batch, list)
            for payload in batch:
                assert isinstance(payload, bytes)
                size += len(payload)
                unacked += len(payload)
            assert unacked <= 2 * WINDOW_BYTES
            last = one_record(batch[-1])
            biggest_journal = max(biggest_journal, journal_bytes(one.dirfd))
            broker.send(type="ack", seq=last.seq)
            unacked = 0
            if isinstance(last, ExitRecord):
                break
        assert size > self.SIZE
        assert biggest_journal < 4 << 20
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{one.process.pid}/status").read_text())
        assert peak is not None
        assert int(peak[1]) < 40_000
        assert len(list_segments(one.dirfd)) <= 2

    def test_detached_it_stops_at_the_limit_and_goes_on(self, shell: Starter) -> None:
        one = shell(*sh("head -c 3000000 /dev/zero; echo; echo end >&2"), journal_limit=1 << 20)
        wait_until(lambda: journal_bytes(one.dirfd) >= 1 << 20)
        broker = one.attach()
        broker.read_to_exit()
        assert len(output(broker.seen)) == 3_000_001
        assert output(broker.seen, "stderr") == b"end\n"

    def test_a_killed_job_at_the_limit_keeps_what_was_in_the_pipes(self, shell: Starter) -> None:
        one = shell("cat", "/dev/zero", journal_limit=1 << 20, time_limit=0.2)
        one.wait()
        assert exit_of(one.records()).status == 142 << 8
        assert len(output(one.records())) > 1 << 20


def one_record(payload: object) -> Record:
    from fluxres_shell.records import decode

    assert isinstance(payload, bytes)
    return decode(payload)


def journal_bytes(dirfd: int) -> int:
    total = 0
    for name in os.listdir(dirfd):
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(name, dir_fd=dirfd).st_size if name.startswith("journal.") else 0
    return total


class TestDeath:
    def test_a_killed_shell_takes_its_tasks_along(self, shell: Starter) -> None:
        one = shell(*sh("echo $$; exec sleep 1000"), tasks=[{"rank": r, "local": r} for r in (0, 1)], ntasks_total=2)
        wait_until(lambda: len([r for r in one.records() if isinstance(r, DataRecord)]) == 2)
        pids = [int(output(one.records(), task=task)) for task in (0, 1)]
        one.process.kill()
        one.wait()
        wait_until(lambda: all(map(process_gone, pids)))
        assert exit_record(one.dirfd) is None
        with find.find(one.dirfd) as facts:
            assert facts.kind is find.Kind.DEAD

    def test_what_a_killed_shell_leaves_is_found_by_its_marker(self, shell: Starter) -> None:
        one = shell(*sh("setsid sleep 1000 & echo $!; wait"))
        wait_until(lambda: output(one.records()).endswith(b"\n"))
        (pid,) = pids_printed(one.records())
        one.process.kill()
        one.wait()
        assert not process_gone(pid)
        assert leftover.kill_marked("fBukQL", "another nonce") == []
        assert pid in leftover.kill_marked("fBukQL", NONCE)
        wait_until(lambda: process_gone(pid))

    @pytest.mark.parametrize(
        "script",
        [
            "sleep 1000 & echo $!",
            "setsid sleep 1000 & echo $!",
            "sh -c 'setsid sh -c \"echo \\$\\$; sleep 1000; :\" & echo $!' ",
        ],
        ids=["child", "own session", "grandchild"],
    )
    def test_grandchildren_holding_the_pipe_are_killed(self, shell: Starter, script: str) -> None:
        one = shell(*sh(script))
        assert one.wait() == 0
        records = one.records()
        assert exit_of(records).info == {}
        assert pids_printed(records)
        assert all(map(process_gone, pids_printed(records)))

    @pytest.mark.parametrize("point", ["first-record.before", "first-record.after", "claim.before", "claim.after"])
    def test_killed_at_the_start_nothing_ran(self, shell: Starter, tmp_path: Path, point: str) -> None:
        one = shell("touch", "ran", env={"FLUXRES_FAILPOINT": point})
        assert one.wait() == -signal.SIGKILL
        assert exit_record(one.dirfd) is None
        assert not (tmp_path / "ran").exists()
        with find.find(one.dirfd) as facts:
            kinds = (find.Kind.UNCLAIMED,) if point == "claim.before" else (find.Kind.DEAD,)
            assert facts.kind in kinds

    @pytest.mark.parametrize(("point", "there"), [("exit-record.before", False), ("exit-record.after", True)])
    def test_killed_at_the_end(self, shell: Starter, point: str, there: bool) -> None:
        one = shell("true", env={"FLUXRES_FAILPOINT": point})
        assert one.wait() == -signal.SIGKILL
        assert (exit_record(one.dirfd) is not None) == there

    def test_an_error_of_the_shell_itself_is_an_exit_record(self, shell: Starter, tmp_path: Path) -> None:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "spec").write_text(json.dumps(make_spec(tmp_path / "s", "sleep", "1000")))
        program = (
            "import sys; from fluxres_shell import loop, main\n"
            "def run(self): raise RuntimeError('a bug')\n"
            "loop.ShellLoop.run = run; sys.exit(main.main())"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "s")]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        dirfd = os.open(tmp_path / "s", os.O_RDONLY)
        record = exit_record(dirfd)
        os.close(dirfd)
        assert record is not None
        assert "a bug" in str(record.info["exception"])
        assert "RuntimeError" in str(record.info["traceback"])


class TestClaims:
    def test_of_two_shells_one_runs(self, shell: Starter, tmp_path: Path) -> None:
        one = shell(*sh("echo run >> runs; sleep 1000"))
        one.attach().expect("attached")
        command = [sys.executable, "-m", "fluxres_shell.main", str(one.path)]
        before = sorted(os.listdir(one.dirfd))
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert sorted(os.listdir(one.dirfd)) == before
        wait_until(lambda: (tmp_path / "runs").exists() and (tmp_path / "runs").read_text() == "run\n")

    def test_voided_before_the_claim_it_never_runs(self, tmp_path: Path) -> None:
        directory = tmp_path / "shell"
        directory.mkdir()
        (directory / "spec").write_text(json.dumps(make_spec(directory, "touch", str(tmp_path / "ran"))))
        dirfd = os.open(directory, os.O_RDONLY)
        process = subprocess.Popen([sys.executable, "-m", "fluxres_shell.main", str(directory)])
        process.send_signal(signal.SIGSTOP)  # an interpreter takes far longer to get to the claim
        try:
            assert claim.void(dirfd, NONCE, "cancelled")
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(PATIENCE) == 0
        assert not (tmp_path / "ran").exists()
        assert sorted(os.listdir(dirfd)) == ["claim", "spec"]
        os.close(dirfd)


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 512 KiB."""
        path = tmp_path / "small"
        path.mkdir()
        if (
            os.geteuid() != 0
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)],
                check=False,
                capture_output=True,
            ).returncode
        ):
            pytest.skip("cannot mount a tmpfs here")
        yield path
        subprocess.run(["umount", "-l", str(path)], check=True)

    def test_the_exit_record_fits_into_its_reserve(self, shell: Starter, small_disk: Path) -> None:
        one = shell(*sh("read x; exit 5"), at=small_disk, tmpdir_base=str(small_disk.parent))
        broker = one.attach()
        broker.read_to_event("shell.start")
        fill(small_disk)
        broker.send(type="stdin", task=-1, offset=0, data=b"\n", eof=True)
        broker.close_when("stdin-ack")
        assert one.wait() == 0
        assert exit_of(one.records()).status == 5 << 8

    def test_output_waits_for_room_and_nothing_is_lost(self, shell: Starter, small_disk: Path) -> None:
        one = shell(
            *sh("read x; head -c 1000000 /dev/zero; echo; exit 6"), at=small_disk, tmpdir_base=str(small_disk.parent)
        )
        broker = one.attach()
        broker.read_to_event("shell.start")
        filler = fill(small_disk)
        broker.send(type="stdin", task=-1, offset=0, data=b"\n", eof=True)
        # Served from memory, as far as it goes; the rest when there is room.
        broker.read_until(lambda record: isinstance(record, DataRecord), ack=False)
        filler.unlink()
        broker.send(type="ack", seq=broker.seen[-1].seq)
        assert broker.read_to_exit().status == 6 << 8
        assert len(output(broker.seen)) == 1_000_001
        assert [record.seq for record in broker.seen] == list(range(1, len(broker.seen) + 1))

    def test_no_room_for_the_reserve_starts_nothing(self, shell: Starter, small_disk: Path) -> None:
        filler = fill(small_disk)
        os.truncate(filler, filler.stat().st_size - 32 * 1024)  # room for spec and claim, not for the reserve
        ran = small_disk.parent / "ran"
        one = shell("touch", str(ran), at=small_disk, tmpdir_base=str(small_disk.parent))
        one.wait()
        assert "No space left" in str(exit_of(one.records()).info["exception"])
        assert not ran.exists()

    def test_what_fits_nowhere_is_served_from_memory(self, shell: Starter, small_disk: Path) -> None:
        # No more than a pipe holds: with the journal stuck and nothing acknowledged, the task has to be able to end.
        script = "read x; head -c 60000 /dev/zero; exit 7"
        one = shell(*sh(script), at=small_disk, tmpdir_base=str(small_disk.parent))
        broker = one.attach()
        broker.read_to_event("shell.start")
        (one.path / "reserve").unlink()
        fill(small_disk)
        broker.send(type="stdin", task=-1, offset=0, data=b"\n", eof=True)
        broker.close_when("stdin-ack")
        first = len(broker.seen) + 1
        for _ in range(2):
            again = one.attach(first)
            again.expect("attached")
            assert again.read_to_exit(ack=False).status == 7 << 8
            assert len(output(again.seen)) == 60_000
            again.close()
        last = one.attach(again.seen[-1].seq + 1)
        last.expect("attached")
        last.send(type="release")
        assert one.wait() == 0
        assert exit_record(one.dirfd) is None


def fill(path: Path) -> Path:
    """Leave no room in the file system at `path`; the file that takes it."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


class TestCgroup:
    @pytest.fixture
    def parent(self) -> Iterator[str]:
        """A cgroup v2 directory of our own."""
        mount = cgroup.find_mount()
        if mount is None or not os.access(mount, os.W_OK):
            pytest.skip("no writable cgroup v2 here")
        path = os.path.join(mount, f"fluxres-test-{os.getpid()}")
        os.mkdir(path)
        yield path
        wait_until(lambda: remove_cgroup(path))

    def test_tasks_live_and_die_in_it(self, shell: Starter, parent: str) -> None:
        one = shell(*sh("cat /proc/self/cgroup >&2; setsid sleep 1000 & echo $!; kill -9 $$"), cgroup_parent=parent)
        one.wait()
        records = one.records()
        assert f"{os.path.basename(parent)}/job-fBukQL-0" in output(records, "stderr").decode()
        assert exit_of(records).status == 137 << 8
        assert all(map(process_gone, pids_printed(records)))
        assert not os.path.exists(f"{parent}/job-fBukQL-0")
        assert isinstance(exit_of(records).info.get("cpu_usec", 0), int)

    def test_a_parent_that_is_none_does_no_harm(self, shell: Starter, tmp_path: Path) -> None:
        one = shell(*sh("sleep 1000 & echo $!"), cgroup_parent=str(tmp_path))
        one.wait()
        assert all(map(process_gone, pids_printed(one.records())))
        assert not (tmp_path / "job-fBukQL-0").exists()


def remove_cgroup(path: str) -> bool:
    for name in ("shells", ""):
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(path, name))
    return not os.path.exists(path)
