"""Shells of a real node: directories on disk, a launcher, processes; and a disk that is not as it should be."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
import trio.testing
from shellkit import make_spec, process_gone, sh

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec import forget, jobdir
from fluxres.exec.forget import Forgetting
from fluxres.exec.launcher import Launcher
from fluxres.exec.reattach import Facts
from fluxres.exec.shelldir import LocalShellHost
from fluxres.exec.shells import Shells
from fluxres.exec.spec import LocalSettings
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service
from fluxres.wire.payload import Wire, WireMap
from fluxres_shell import claim
from fluxres_shell.find import Kind
from fluxres_shell.journal import JournalWriter
from fluxres_shell.records import EXIT, DataRecord, EventRecord, ExitRecord, Record, decode, encode

JOB = JobId(123456789)
OTHER = JobId(5678)
PATIENCE = 60
POLL = 0.01


class Node:
    """Rank 0 with real shells, and what it reports to."""

    def __init__(self, statedir: Path) -> None:
        router = Router(rank=0, size=1)
        self.statedir = str(statedir)
        self.handle = Handle(router, "test", os.getuid())
        self.launcher = Launcher()
        self.host = LocalShellHost(self.statedir, 0, self.launcher)
        self.answer: WireMap = {"unknown": [], "lost": []}
        self.confirmed = trio.Event()
        self.job_exec = Service("job-exec", router)
        self.job_exec.method("inventory", lambda _: self.answer)
        self.resource = Service("resource", router)
        self.resource.method("confirm", lambda _: self.confirmed.set())
        self.shells = Shells(
            router=router,
            handle=self.handle,
            host=self.host,
            local=LocalSettings(uri="local:///nowhere", tmpdir_base=str(statedir / "tmp")),
            statedir_id="S",
            instance="an-instance",
        )

    @property
    def path(self) -> Path:
        """The job's directory."""
        return Path(jobdir.job_path(self.statedir, JOB, 0))

    def start(self, *command: str) -> WireMap:
        """A start of the job."""
        spec = make_spec(Path(self.statedir) / "x", *command)
        return {
            "id": int(JOB),
            "nonce": str(spec["nonce"]),
            "statedir": "S",
            "cursor": 0,
            "start": True,
            "spec": json.dumps(spec).encode(),
        }


@asynccontextmanager
async def node(statedir: Path) -> AsyncIterator[Node]:
    made = Node(statedir)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for run in (made.launcher.run, made.job_exec.run, made.resource.run, made.shells.run):
                await nursery.start(run)
            yield made
            nursery.cancel_scope.cancel()


async def until(check: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not check():
            await trio.testing.wait_all_tasks_blocked(POLL)


async def run_until(here: Node, start: WireMap, last: Callable[[Record], bool]) -> list[Record]:
    """Start the job, ack what comes, and stop at a record; its shell is then detached."""
    records: list[Record] = []
    async with here.handle.stream("exec.start", start) as replies:
        async for message in replies:
            for record in _records(message.get("records")):
                records.append(record)
                here.handle.send("exec.ack", {"id": int(JOB), "seq": record.seq})
                if last(record):
                    return records
    raise AssertionError("the stream has ended")


def _records(payloads: Wire) -> list[Record]:
    return [decode(payload) for payload in payloads if isinstance(payload, bytes)] if isinstance(payloads, list) else []


def is_exit(record: Record) -> bool:
    return isinstance(record, ExitRecord)


def facts(here: Node) -> Facts:
    with closing(here.host.shell(JOB)) as shell:
        return shell.look()


# --- real shells


async def test_a_job_from_its_start_to_its_end(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        start = here.start("echo", "hello")
        records: list[Record] = []
        async with here.handle.stream("exec.start", start) as replies:
            async for message in replies:
                records += _records(message.get("records"))
                if records and is_exit(records[-1]):
                    here.handle.send("exec.release", {"id": int(JOB), "seq": records[-1].seq})
        assert [r.data for r in records if isinstance(r, DataRecord)] == [b"hello\n"]
        await until(lambda: facts(here).kind is Kind.DEAD)
        here.handle.send("exec.forget", {"ids": [int(JOB)]})
        await until(lambda: not here.path.exists())
        await until(lambda: not jobdir.discarded(here.statedir))


async def test_a_shell_outlives_its_attendant_and_is_found_again(tmp_path: Path) -> None:
    """Also the launcher, and the whole incarnation."""
    go = tmp_path / "go"
    async with node(tmp_path) as here:
        start = here.start(*sh(f"echo 1; until test -e {go}; do sleep 0.01; done; echo 2; exit 3"))
        first = await run_until(here, start, lambda record: isinstance(record, DataRecord))
    async with node(tmp_path) as here:
        assert facts(here).kind is Kind.ALIVE
        go.touch()
        again = {**start, "cursor": first[-1].seq}
        rest = await run_until(here, again, is_exit)
        assert [record.seq for record in first + rest] == list(range(1, rest[-1].seq + 1))
        assert [r.data for r in rest if isinstance(r, DataRecord)] == [b"2\n"]
        assert isinstance(rest[-1], ExitRecord)
        assert rest[-1].status == 3 << 8


async def test_a_shell_that_is_killed_is_lost_and_its_tasks_with_it(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        start = here.start(*sh("trap '' HUP; setsid sleep 1000 & echo $! $$; wait"))
        said: list[WireMap] = []
        pids: list[int] = []
        async with here.handle.stream("exec.start", start) as replies:
            async for message in replies:
                said.append(message)
                for record in _records(message.get("records")):
                    if isinstance(record, DataRecord):
                        pids += [int(word) for word in record.data.split()]
                        await here.handle.call("exec.kill", {"id": int(JOB), "signum": 9, "force": True})
                if message["type"] == "lost":
                    here.handle.send("exec.release", {"id": int(JOB), "seq": 0})
        assert len(pids) == 2
        assert str(said[-1]["note"]).startswith("the job shell was killed")
        assert (said[-1]["status"], said[-1]["leftover"]) == (signal.SIGKILL, 0)
        assert all(process_gone(pid) for pid in pids)


async def test_what_rank_0_has_given_up_is_dead_before_that_is_confirmed(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        start = here.start(*sh("setsid sleep 1000 & echo $! $$; wait"))
        records = await run_until(here, start, lambda record: isinstance(record, DataRecord))
        assert isinstance(records[-1], DataRecord)
        pids = [int(word) for word in records[-1].data.split()]
        here.answer = {"unknown": [], "lost": [int(JOB)]}
        await here.shells.report()
        await here.confirmed.wait()
        assert all(process_gone(pid) for pid in pids)
        assert not here.path.exists()


async def test_a_void_claim_keeps_a_shell_from_starting(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        start = here.start(sys.executable, "-c", "print('never')")
        void: WireMap = {"id": int(JOB), "nonce": start["nonce"], "statedir": "S", "note": "cancelled"}
        assert await here.handle.call("exec.void", void) == {"void": True}
        async with here.handle.stream("exec.start", start) as replies:
            assert await anext(aiter(replies)) == {"type": "void", "note": "cancelled"}
        assert here.host.inventory() == [JOB]


# --- looking


def test_what_a_look_sees(tmp_path: Path) -> None:
    host = LocalShellHost(str(tmp_path), 0, Launcher())
    with closing(host.shell(JOB, "N")) as shell:
        assert shell.look() == Facts(kind=Kind.NOTHING)
        assert host.prepare(JOB, b'{"nonce": "N", "instance": "I"}')
        assert not host.prepare(JOB, b'{"nonce": "M", "instance": "I"}'), "a spec is written once"
        assert shell.look() == Facts(kind=Kind.UNCLAIMED)
        assert shell.void("cancelled")
        assert not shell.void("again")
        assert shell.look() == Facts(kind=Kind.VOID, reason="cancelled")
        host.discard(JOB)
        assert shell.look() == Facts(kind=Kind.NOTHING)
    host.discard(JOB)  # once more does no harm


def test_another_jobs_directory_is_seen_as_that(tmp_path: Path) -> None:
    host = LocalShellHost(str(tmp_path), 0, Launcher())
    host.prepare(JOB, b'{"nonce": "N", "instance": "I"}')
    for nonce, matches in (("N", True), ("M", False), (None, True)):
        with closing(host.shell(JOB, nonce)) as shell:
            assert shell.look().nonce_matches is matches


@pytest.mark.parametrize("spec", [b"", b"[]", b'{"nonce": 1}', b"[" * 100_000])
def test_a_spec_that_was_cut_off_is_written_again(tmp_path: Path, spec: bytes) -> None:
    host = LocalShellHost(str(tmp_path), 0, Launcher())
    host.prepare(JOB, spec)
    with closing(host.shell(JOB, "N")) as shell:
        assert shell.look() == Facts(kind=Kind.NOTHING)
        assert not host.prepare(JOB, b'{"nonce": "N", "instance": "I"}')
        assert shell.look() == Facts(kind=Kind.UNCLAIMED)


def test_a_dead_shells_journal_is_read_out(tmp_path: Path) -> None:
    host = LocalShellHost(str(tmp_path), 0, Launcher())
    host.prepare(JOB, b'{"nonce": "N", "instance": "I"}')
    with jobdir.opened(jobdir.job_path(str(tmp_path), JOB, 0)) as dirfd:
        claim.take(dirfd, "N", "0" * 64).close()
        journal = JournalWriter(dirfd, segment_size=1, limit=1 << 20)
        for seq in range(1, 6):
            journal.add(encode(seq, 0.0, "event", "shell.init", {}) if seq < 5 else encode(seq, 0.0, EXIT, 0, {}))
            journal.flush()
        journal.close()
        os.unlink("journal.0000000000000003", dir_fd=dirfd)
    with closing(host.shell(JOB, "N")) as shell:
        assert shell.look() == Facts(kind=Kind.DEAD)
        assert shell.has_exit_record()
        parts = [(first, [decode(payload) for payload in payloads]) for first, payloads in shell.journal(2)]
    assert [(first, [record.seq for record in records]) for first, records in parts] == [(2, [2]), (4, [4, 5])]
    assert isinstance(parts[0][1][0], EventRecord)


async def test_descriptors_are_given_back(tmp_path: Path) -> None:
    async with node(tmp_path) as here:
        await run_until(here, here.start(*sh("echo; sleep 1000")), lambda record: isinstance(record, DataRecord))
        await trio.testing.wait_all_tasks_blocked()  # the attendant has let go of it
        before = len(os.listdir("/proc/self/fd"))
        with closing(here.host.shell(JOB)) as shell:
            for _ in range(3):
                assert shell.look().kind is Kind.ALIVE
                link = shell.dial()
                assert link is not None
                await link.aclose()
            shell.kill()
            await shell.death()
            await until(lambda: shell.look().kind is Kind.DEAD)
            assert await shell.how_it_died() == "by SIGKILL"
            assert await shell.kill_tasks() == 0
        assert len(os.listdir("/proc/self/fd")) == before


# --- a disk that is not as it should be


async def test_a_void_claim_that_cannot_be_written_is_an_error_to_the_caller(tmp_path: Path) -> None:
    """A full disk, say. The service goes on, and is asked again."""
    (tmp_path / "jobs").write_text("in the way")
    async with node(tmp_path) as here:
        ask: WireMap = {"id": int(JOB), "nonce": "N", "statedir": "S", "note": "cancelled"}
        with pytest.raises(RpcError, match="cannot void job") as caught:
            await here.handle.call("exec.void", ask)
        assert caught.value.errnum == errno.ENOTDIR
        (tmp_path / "jobs").unlink()
        assert await here.handle.call("exec.void", ask) == {"void": True}


async def test_a_spec_that_cannot_be_read_keeps_no_broker_from_coming_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left alone: nobody knows whose it is."""
    async with node(tmp_path) as here:
        (here.path / "spec").mkdir(parents=True)
        await here.shells.report()
        assert "cannot read" in caplog.text


async def test_a_trash_that_cannot_be_emptied_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No process can be started for it: a job may have used all that there are."""
    host = LocalShellHost(str(tmp_path), 0, Launcher())
    host.prepare(JOB, b"{}")
    forgetting = Forgetting(host)
    monkeypatch.setattr(forget, "ROUND", POLL)
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as nothing:
            nothing.setenv("PATH", "")
            nursery.start_soon(forgetting.run)
            forgetting.add(JOB)
            await until(lambda: "cannot empty" in caplog.text)
        assert jobdir.discarded(str(tmp_path))
        host.prepare(OTHER, b"{}")
        forgetting.add(OTHER)
        await until(lambda: not jobdir.discarded(str(tmp_path)))
        nursery.cancel_scope.cancel()
    assert not host.inventory()
