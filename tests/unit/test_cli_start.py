"""fluxres start: real processes, with a stub for the broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from fluxres.base.errors import FluxresError
from fluxres.cli.instancedir import InstanceDir, dump, parse_settings, put

if TYPE_CHECKING:
    from fluxres.cli.instancedir import Toml

STUB = """
import os, signal, socket, sys, time
from fluxres.base.idset import IdSet
from fluxres.broker import forker
option = lambda name: sys.argv[sys.argv.index(name) + 1]
config = option("--config")
rundir = os.path.dirname(config)
mode = os.environ.get("STUB_MODE", "")
fork = os.fork
def fork_and_wait():
    pid = fork()
    if pid and mode == "slow":  # the forker ends when its brokers have long been online
        while not os.path.exists(f"{rundir}/../go"):
            time.sleep(0.005)
    return pid
def fork_one():
    os.fork = fail
    return fork()
def fail():
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(11, "out of processes")
os.fork = {"killed": fork_one, "no-fork": fork_one}.get(mode, fork_and_wait)
if "--fork-ranks" in sys.argv:
    ranks = IdSet.parse(option("--fork-ranks"))
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode in ("stuck", "deaf", "no-forker"):
        with open(f"{rundir}/../forker.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(file.name, f"{rundir}/../forker")
        sys.exit("bad") if mode == "no-forker" else signal.pause()
    logs = option("--logs") if "--logs" in sys.argv else None
    rank = forker.fork_each(ranks, int(option("--report")), logs)
    if rank is None:
        os._exit(0)
    forker.show_arguments(["--config", config, "--rank", str(rank)])
else:
    rank = int(option("--rank"))
def end(*_):
    open(f"{rundir}/../ends", "a").write(f"{rank}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if mode == "refuse":
    sys.exit("fluxres-broker: cannot use this")
if mode == "taken":  # and the orphan that has it writes to the same log, before and after
    with open(f"{rundir}/../lines") as lines:
        sys.exit(lines.read())
with open(f"{rundir}/../starts", "a") as file:
    file.write(f"{rank} {os.getpid()} {os.getsid(0) == os.getpid()}\\n")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1\\n", "\\0" + os.environ["NOTIFY_SOCKET"][1:])
while True:
    signal.pause()
"""
DRIVER = """
import os, sys
from fluxres.cli import start, supervisor
from fluxres.cli.main import main
if os.environ["STUB_MODE"] == "deaf":
    supervisor.SHUTDOWN_TIMEOUT = 0.1
start.broker_program = lambda: [sys.executable, {stub!r}]
sys.exit(main())
"""
PATIENCE = 20.0


class Start(Protocol):
    """Starts `fluxres start` with stub brokers of this mode."""

    def __call__(self, *argv: str, mode: str = "", verbose: bool = False) -> subprocess.Popen[str]: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `fluxres start` with stub brokers; its directory is tmp_path/run."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "driver.py").write_text(DRIVER.format(stub=str(tmp_path / "stub.py")))
    processes: list[subprocess.Popen[str]] = []

    def starter(*argv: str, mode: str = "", verbose: bool = False) -> subprocess.Popen[str]:
        options = ["--verbose"] * verbose
        made = subprocess.Popen(
            [sys.executable, str(tmp_path / "driver.py"), "start", *options, f"--rundir={tmp_path}/run", *argv],
            env={**os.environ, "STUB_MODE": mode},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(made)
        return made

    yield starter
    for each in processes:
        if each.poll() is None:
            each.terminate()
        each.communicate(timeout=PATIENCE)
    for _rank, pid in starts(tmp_path):
        assert not Path(f"/proc/{pid}").exists()


def starts(directory: Path) -> list[tuple[int, int]]:
    """Which brokers were started: (rank, pid) in order."""
    path = directory / "starts"
    lines = path.read_text().splitlines() if path.exists() else []
    assert all(line.endswith("True") for line in lines), "each leads a session of its own"
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def started_more_than(count: int, directory: Path) -> bool:
    return len(starts(directory)) > count


def until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_runs_a_command_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    process = start("-s", "3", "sh", "-c", "echo $FLUXRES_URI $NOTIFY_SOCKET; cat; exit 7")
    assert finish(process) == (7, f"local://{tmp_path}/run/local-0\n", "")
    assert sorted(rank for rank, _ in starts(tmp_path)) == [0, 1, 2]
    assert (tmp_path / "ends").read_text().split()[0] == "0"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "kill -9 $$"], 137), (["./no-such-command"], 127), (["/etc"], 126), (["--", "true"], 0)],
)
def test_exit_status(start: Start, command: list[str], status: int) -> None:
    assert finish(start(*command))[0] == status


def test_a_broker_that_refuses(start: Start, tmp_path: Path) -> None:
    assert finish(start("true", mode="refuse")) == (
        1,
        "",
        "fluxres-start: cannot start the instance: broker 0 exited with status 1 before it was online: "
        "fluxres-broker: cannot use this\n",
    )
    assert not (tmp_path / "run").exists()


def test_the_last_words_are_those_of_the_broker_that_failed(start: Start, tmp_path: Path) -> None:
    taken = "cannot use statedir /x/0: another broker (pid 77) is running on it"
    (tmp_path / "lines").write_text(f"orphan: hello\nfluxres-broker: {taken}\n" + "orphan: lost rank 0\n" * 300)
    run = tmp_path / "run"
    assert finish(start("--statedir", str(tmp_path / "state"), "true", mode="taken")) == (
        1,
        "",
        "fluxres-start: cannot start the instance: broker 0 exited with status 1 before it was online: "
        f"fluxres-broker: {taken}; end it with kill 77, or start only the brokers that are missing, each with "
        f"fluxres-broker --config {run}/fluxres.toml --rank RANK (see {run}/broker-0.log)\n",
    )
    (tmp_path / "lines").write_text("Traceback\n  oops\n")
    assert "before it was online: oops (see " in finish(start("--statedir", f"{tmp_path}/state", "x", mode="taken"))[2]


def test_a_broker_that_dies_is_started_again(start: Start, tmp_path: Path) -> None:
    process = start("-s", "2", "sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    for count in (2, 3, 4):
        os.kill(starts(tmp_path)[-1][1], signal.SIGKILL)
        until(partial(started_more_than, count, tmp_path))
    process.terminate()
    status, _out, err = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "was killed by signal 9 (Killed): starting it again" in err


# --- the forker


def shown_arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")[1:]


def test_forked_brokers_show_their_ranks_and_are_started_again(start: Start, tmp_path: Path) -> None:
    process = start("-s", "12", "sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    parents = set()
    for rank, pid in starts(tmp_path):
        arguments = ["--config", f"{tmp_path}/run/fluxres.toml", "--rank", str(rank)]
        assert shown_arguments(pid) == [str(tmp_path / "stub.py"), *arguments]
        parents.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parents == {str(process.pid)}
    rank, pid = starts(tmp_path)[5]
    os.kill(pid, signal.SIGKILL)
    until(partial(started_more_than, 12, tmp_path))
    assert starts(tmp_path)[-1][0] == rank
    process.terminate()
    _status, _out, err = finish(process)
    assert err == f"fluxres-start: broker {rank} was killed by signal 9 (Killed): starting it again\n"


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("no-forker", "exited with status 1"),
        ("no-fork", "exited with status 1"),
        ("killed", "was killed by signal 9 (Killed)"),
    ],
)
def test_what_the_forker_has_not_forked_is_started_singly(start: Start, tmp_path: Path, mode: str, said: str) -> None:
    status, _out, err = finish(start("-s", "3", "true", mode=mode))
    assert (status, err) == (0, f"fluxres-start: the process that forks the brokers {said}: starting the rest singly\n")
    assert sorted(rank for rank, _ in starts(tmp_path)) == [0, 1, 2]


def test_a_broker_that_dies_before_its_forker_has_ended(start: Start, tmp_path: Path) -> None:
    process = start("-s", "3", "true", mode="slow")
    until(partial(started_more_than, 0, tmp_path))
    os.kill(starts(tmp_path)[0][1], signal.SIGKILL)
    (tmp_path / "go").touch()
    status, _out, err = finish(process)
    assert (status, err) == (0, "fluxres-start: broker 0 was killed by signal 9 (Killed): starting it again\n")
    assert sorted(rank for rank, _ in starts(tmp_path)) == [0, 0, 1, 2]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_the_forker_is_at_work(start: Start, tmp_path: Path, signum: signal.Signals) -> None:
    process = start("-s", "3", "true", mode="stuck")
    until((tmp_path / "forker").exists)
    process.send_signal(signum)
    status, _out, err = finish(process)
    assert (status, err) == (128 + signum, "")
    assert starts(tmp_path) == []
    assert not (tmp_path / "run").exists()


def test_a_forker_that_does_not_end_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("-s", "3", "true", mode="deaf")
    until((tmp_path / "forker").exists)
    process.terminate()
    status, _out, err = finish(process)
    assert status == 128 + signal.SIGTERM
    assert err == "fluxres-start: the process that forks the brokers does not end: killing it\n"
    until(lambda: _is_zombie(int((tmp_path / "forker").read_text())))


def test_a_forked_broker_that_refuses(start: Start) -> None:
    status, _out, err = finish(start("-s", "2", "true", mode="refuse"))
    assert status == 1
    assert err.startswith("fluxres-start: cannot start the instance: broker ")
    assert err.endswith(" exited with status 1 before it was online: fluxres-broker: cannot use this\n")


def test_forked_brokers_without_logs(start: Start) -> None:
    status, _out, err = finish(start("-s", "2", "true", mode="refuse", verbose=True))
    assert status == 1
    assert "fluxres-broker: cannot use this\n" in err


def test_no_restart(start: Start, tmp_path: Path) -> None:
    process = start("--no-restart", "sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    ((_rank, pid),) = starts(tmp_path)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())  # its parent has taken notice
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert len(starts(tmp_path)) == 1


def test_interrupt_is_for_the_command(start: Start) -> None:
    process = start("sh", "-c", "trap 'echo got it; exit 3' INT; echo up; while :; do sleep 0.01; done")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.poll() is None
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM


def test_durable(start: Start, tmp_path: Path) -> None:
    process = start(
        "--statedir", str(tmp_path / "state"), "--conf", "resource.cores=4", "sh", "-c", "echo up; exec sleep 60"
    )
    assert process.stdout is not None
    process.stdout.readline()
    second = start("--statedir", str(tmp_path / "state"), "true")
    status, _out, err = finish(second)
    assert status == 1
    assert err == (
        f"fluxres-start: cannot start: {tmp_path}/state is in use by another fluxres start "
        f"(FLUXRES_URI=local://{tmp_path}/run/local-0)\n"
    )
    process.terminate()
    finish(process)
    config = (tmp_path / "run" / "fluxres.toml").read_text()
    assert "temporary = false\n[resource]\ncores = 4\n" in config
    assert finish(start("--statedir", str(tmp_path / "state"), "true"))[0] == 0


def test_background(start: Start, tmp_path: Path) -> None:
    process = start("--background", "-s", "2")
    assert finish(process) == (0, f"local://{tmp_path}/run/local-0\n", "")
    (rank, pid), _ = starts(tmp_path)
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert rank in (0, 1)
    os.kill(supervisor, signal.SIGTERM)
    until(lambda: not (tmp_path / "run").exists())
    until(lambda: not Path(f"/proc/{supervisor}").exists() or _is_zombie(supervisor))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_background_that_fails(start: Start) -> None:
    status, out, err = finish(start("--background", mode="refuse"))
    assert (status, out) == (1, "")
    assert err.startswith("fluxres-start: cannot start the instance: broker 0 exited with status 1")


def test_background_takes_no_command(start: Start) -> None:
    status, _out, err = finish(start("--background", "true"))
    assert (status, err) == (2, "fluxres-start: --background takes no COMMAND (see fluxres-start --help)\n")


# --- directories and settings


def test_durable_rundir_follows_from_the_statedir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first = InstanceDir("state", None)
    assert first.rundir.startswith(f"{tmp_path}/fluxres-{os.getuid()}-")
    for lock in first.locks:
        os.close(lock)
    again = InstanceDir(f"{tmp_path}/state", None)
    assert again.rundir == first.rundir
    assert os.stat(again.rundir).st_mode & 0o777 == 0o700
    for lock in again.locks:
        os.close(lock)


def test_directories_that_others_can_write_to_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(FluxresError, match=r"cannot use directory .*/state: others can write to it"):
        InstanceDir(str(tmp_path / "state"), str(tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(FluxresError, match="Not a directory"):
        InstanceDir(str(tmp_path / "file"), str(tmp_path / "run"))


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for statedir in (str(tmp_path / "a" / "state"), None):
        where = InstanceDir(statedir, str(tmp_path / "b" / "run"))
        with pytest.raises(FluxresError, match="is not UTF-8"):
            where.write_config(1, None, {"a.b": "\udcff"})
        where.abandon()
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(FluxresError, match="cannot make directory"):
        InstanceDir(str(tmp_path / "file" / "state"), str(tmp_path / "b" / "run"))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_start_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    first = InstanceDir(str(state), str(run))
    first.write_config(1, None, {})
    with pytest.raises(FluxresError, match="is in use by another fluxres start"):
        InstanceDir(str(state), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    for lock in first.locks:
        os.close(lock)
    again = InstanceDir(str(state), str(run))
    with pytest.raises(FluxresError, match="is not UTF-8"):
        again.write_config(1, None, {"a.b": "\udcff"})
    again.abandon()
    assert sorted(each.name for each in run.iterdir()) == ["fluxres.toml", "start.lock"]


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("resource.cores=4", "resource.cores", 4),
        ("exec.kill-timeout=5s", "exec.kill-timeout", "5s"),
        ('exec.kill-timeout="5s"', "exec.kill-timeout", "5s"),
        ("access.allow-guest-user=true", "access.allow-guest-user", True),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("a.b=x=y", "a.b", "x=y"),
        ("a.b=1\nc = 2", "a.b", "1\nc = 2"),
    ],
)
def test_settings(setting: str, key: str, value: object) -> None:
    assert parse_settings([setting]) == {key: value}


@pytest.mark.parametrize("setting", ["cores=4", "resource.cores", "resource.=4", "broker.statedir=/x"])
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(FluxresError, match="cannot set"):
        parse_settings([setting])


def test_dump_is_what_tomllib_reads() -> None:
    import tomllib

    tables: dict[str, Toml] = {
        "bootstrap": {"size": 3},
        "broker": {"statedir": 'a"b\\c\n\x7fé', "temporary": False},
        "a b": {"x": {"y": {"z": [1.5, "q", {"k": True}]}}},
    }
    assert tomllib.loads(dump(tables)) == tables


def test_a_setting_inside_a_value() -> None:
    tables: dict[str, Toml] = {"a": 1}
    with pytest.raises(FluxresError, match=r"cannot set a\.b: a is no table"):
        put(tables, "a.b", 2)
