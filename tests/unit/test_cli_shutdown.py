"""fluxres shutdown, and commands in a broker's absence, with the real broker and `fluxres start --no-restart`."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakebroker import FakeBroker

from fluxres.base.errors import FluxresError
from fluxres.cli import shutdown
from fluxres.cli.instancedir import CONFIG, LOCK, remove_left
from fluxres.cli.shutdown import _holds, _tell_supervisor
from fluxres.client import Client, wait_ended

if TYPE_CHECKING:
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import WireMap

PATIENCE = 60.0
FLUXRES = [sys.executable, "-m", "fluxres.cli.main"]
BROKER = [sys.executable, "-m", "fluxres.broker.main"]


class Site:
    """A directory for one instance, and the processes that a test starts on it."""

    def __init__(self, path: Path) -> None:
        self.state = path / "state"
        self.run = path / "run"
        self.uri = f"local://{self.run}/local-0"
        self._processes: list[subprocess.Popen[str]] = []

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        env = {**os.environ, "FLUXRES_URI": self.uri}
        pipe = subprocess.PIPE
        made = subprocess.Popen(argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._processes.append(made)
        return made

    def fluxres(self, *argv: str) -> tuple[int, str, str]:
        process = self.popen(*FLUXRES, *argv)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start an instance, and return when it is online. COMMAND runs until it is ended, or its input is."""
        made = self.popen(*FLUXRES, "start", f"--rundir={self.run}", *options, "sh", "-c", "echo up; exec cat")
        assert made.stdout is not None
        assert made.stdout.readline() == "up\n"
        return made

    def kill_broker(self) -> None:
        """Kill the broker, and wait until it is gone."""
        with Client.connect(self.uri) as client:
            pidfd = client.broker_pidfd()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert wait_ended(pidfd, PATIENCE)
        os.close(pidfd)

    def restart_broker(self) -> subprocess.Popen[str]:
        return self.popen(*BROKER, "--config", f"{self.run}/fluxres.toml", "--rank", "0")

    def clean_up(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.communicate(timeout=PATIENCE)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.clean_up()


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "temporary"])
def test_shutdown_ends_what_the_caller_has_restarted(site: Site, durable: bool) -> None:
    start = site.start("--no-restart", *([f"--statedir={site.state}"] if durable else []))
    site.kill_broker()
    asking = site.popen(*FLUXRES, "getattr", "rank")  # in the gap, and nobody has restarted the broker yet
    broker = site.restart_broker()
    assert asking.communicate(timeout=PATIENCE) == ("0\n", "")
    assert site.fluxres("shutdown") == (0, "", "")
    assert broker.wait(PATIENCE) == 0
    assert start.wait(PATIENCE) == 128 + signal.SIGTERM
    assert site.run.exists() == durable
    if durable:
        assert not (site.run / "local-0").exists()
        assert site.fluxres("start", f"--rundir={site.run}", f"--statedir={site.state}", "true") == (0, "", "")


def test_shutdown_of_brokers_whose_start_was_killed(site: Site) -> None:
    """A second `fluxres start` refuses, and says what to do; that done, it starts."""
    options = (f"--rundir={site.run}", f"--statedir={site.state}")
    start = site.start(f"--statedir={site.state}")
    with Client.connect(site.uri) as client:
        broker = client.broker_pidfd()
    start.kill()
    start.wait(PATIENCE)
    status, out, err = site.fluxres("start", *options, "true")
    remedy = f"fluxres --uri local://{site.run}/local-0 shutdown"
    assert (status, out) == (1, "")
    assert err == (
        f"fluxres-start: cannot start: a broker of {site.state} still runs, but its fluxres start is gone "
        f"(end it first, by {remedy}; its jobs run on)\n"
    )
    assert site.fluxres(*shlex.split(remedy)[1:]) == (0, "", "")
    assert wait_ended(broker, 0)
    os.close(broker)
    assert site.fluxres("start", *options, "true") == (0, "", "")


def test_shutdown_removes_what_a_killed_start_of_a_temporary_instance_left(site: Site) -> None:
    start = site.start()
    start.kill()
    start.wait(PATIENCE)
    assert (site.run / "fluxres.toml").exists()
    assert site.fluxres("shutdown") == (0, "", "")
    assert not site.run.exists()


@pytest.mark.parametrize("word", ["", "remove"])
def test_what_is_left_is_removed_only_by_whom_its_lock_says_so(tmp_path: Path, word: str) -> None:
    rundir = tmp_path / "run"
    rundir.mkdir()
    (rundir / "start.lock").write_text(f"1\n{word}\n")
    held, lock = (os.open(rundir / "start.lock", os.O_RDONLY) for _ in range(2))
    fcntl.flock(held, fcntl.LOCK_EX)
    remove_left(str(rundir), lock)
    assert rundir.exists()
    os.close(held)
    remove_left(str(rundir), lock)
    assert rundir.exists() == (not word)
    rundir.mkdir(exist_ok=True)
    (rundir / "start.lock").unlink(missing_ok=True)
    (rundir / "start.lock").write_text("2\nremove\n")  # the next instance's, which is not the one we ended
    remove_left(str(rundir), lock)
    os.close(lock)
    assert rundir.exists()


# --- whom the signal goes to


def resources(rank: str) -> WireMap:
    children: WireMap = {"core": "0"}
    return {"execution": {"R_lite": [{"rank": rank, "children": children}], "nodelist": [f"n[{rank}]"]}}


@pytest.mark.parametrize(
    ("config", "waited", "said"),
    [
        ("temporary = true", 0.0, "cannot cancel what runs on rank 2: "),
        ("temporary = true", 600.0, ""),
        ("temporary = false", 0.0, ""),
        ("temporary", 0.0, ""),
    ],
)
def test_jobs_that_could_not_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, waited: float, said: str
) -> None:
    monkeypatch.setattr(shutdown, "IN_VAIN", waited)
    monkeypatch.setattr(shutdown, "ASK_EVERY", 0.01)
    (tmp_path / LOCK).touch()
    (tmp_path / CONFIG).write_text(f"[broker]\n{config}\n")
    with FakeBroker(tmp_path / "local-0") as broker:
        broker.on("broker.shutdown", {})
        broker.on("resource.status", {"offline": "2-3"})
        broker.on("resource.sched-status", {"allocated": resources("1-2")})
        monkeypatch.setattr(shutdown, "wait_ended", lambda _pidfd, _timeout: True)
        receive = Client.receive

        def end_then(client: Client, timeout: float | None = None) -> Reply | None:
            broker.cut()
            return receive(client, timeout)

        monkeypatch.setattr(Client, "receive", end_then)
        if said:
            with pytest.raises(FluxresError, match=f"^{said}"):
                shutdown.main(["--uri", broker.uri])
        else:
            assert shutdown.main(["--uri", broker.uri]) == 0


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "start.lock", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
if sys.argv[2] == "lock":
    fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that has the lock's file open, and with "lock" holds the lock."""
    made: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / "start.lock"), how]
        made.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout is not None
        made[-1].stdout.readline()
        return made[-1]

    yield start
    for each in made:
        each.kill()
        each.communicate(timeout=PATIENCE)


def test_the_holder_is_told(lock: int, holder: Callable[[str], subprocess.Popen[str]]) -> None:
    process = holder("lock")
    os.pwrite(lock, f"{process.pid}\n".encode(), 0)
    assert _holds(process.pid, lock)
    _tell_supervisor(lock)
    assert process.wait(PATIENCE) == -signal.SIGTERM


def test_nobody_else_is_told(lock: int, holder: Callable[[str], subprocess.Popen[str]]) -> None:
    """Not a process that has the pid by chance, even with the file open while somebody else holds the lock."""
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = holder("open")
    os.pwrite(lock, f"{process.pid}\n".encode(), 0)
    assert not _holds(process.pid, lock)
    _tell_supervisor(lock)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("text", ["", "0\n", "x\n", f"{2**22 + 1}\n"])
def test_a_lock_that_names_nobody(lock: int, text: str) -> None:
    os.pwrite(lock, text.encode(), 0)
    _tell_supervisor(lock)
