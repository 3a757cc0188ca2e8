"""The `exec` service of a rank, and what it does where the disk or a directory is not as it should be."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec import forget, jobdir
from fluxres.exec.forget import Forgetting
from fluxres.exec.launcher import Launcher
from fluxres.exec.shells import Shells
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

JOB = JobId(1234)
OTHER = JobId(5678)
PATIENCE = 60
POLL = 0.01


class Rank:
    """Rank 0 with its shells, and a job-exec that takes their inventory."""

    def __init__(self, statedir: Path) -> None:
        router = Router(rank=0, size=1)
        self.handle = Handle(router, "test", 1000)
        self.statedir = str(statedir)
        self.known: list[WireMap] = []
        self.job_exec = Service("job-exec", router)
        self.job_exec.method("inventory", self._inventory)
        self.shells = Shells(
            router=router,
            handle=self.handle,
            launcher=Launcher(),
            statedir=self.statedir,
            statedir_id="S",
            instance="I",
        )

    def _inventory(self, request: Request) -> WireMap:
        self.known.append(request.payload)
        return {"unknown": []}

    def directory(self, jobid: JobId) -> Path:
        """The job's directory, made."""
        path = Path(jobdir.job_path(self.statedir, jobid, 0))
        path.mkdir(parents=True)
        return path


@asynccontextmanager
async def rank(statedir: Path) -> AsyncIterator[Rank]:
    made = Rank(statedir)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.job_exec.run)
        await nursery.start(made.shells.run)
        yield made
        nursery.cancel_scope.cancel()


async def until(check: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not check():
            await trio.testing.wait_all_tasks_blocked(POLL)


async def test_a_void_claim_that_cannot_be_written_is_an_error_to_the_caller(tmp_path: Path) -> None:
    """A full disk, say. The service goes on, and is asked again."""
    (tmp_path / "jobs").write_text("in the way")
    async with rank(tmp_path) as here:
        ask: WireMap = {"id": int(JOB), "nonce": "N", "note": "cancelled"}
        with pytest.raises(RpcError, match="cannot void job") as caught:
            await here.handle.call("exec.void", ask)
        assert caught.value.errnum == errno.ENOTDIR
        (tmp_path / "jobs").unlink()
        assert await here.handle.call("exec.void", ask) == {"void": True}


@pytest.mark.parametrize(("nonce", "note"), [("9" * 5000, ""), ("", ""), ("N", "☃" * 5000)])
async def test_what_no_claim_can_hold_is_refused(tmp_path: Path, nonce: str, note: str) -> None:
    async with rank(tmp_path) as here:
        with pytest.raises(RpcError) as caught:
            await here.handle.call("exec.void", {"id": int(JOB), "nonce": nonce, "note": note})
        assert caught.value.errnum == errno.EPROTO


async def test_a_spec_that_cannot_be_read_keeps_no_broker_from_coming_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left alone: nobody knows whose it is."""
    async with rank(tmp_path) as here:
        (here.directory(JOB) / "spec").mkdir()
        (here.directory(OTHER) / "spec").write_text('{"nonce": "N", "instance": "I"}')
        await here.shells.report()
        assert here.known == [{"rank": 0, "ids": [int(OTHER)]}]
        assert "cannot read" in caplog.text


def test_a_spec_that_makes_no_sense_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "spec").write_text("[" * 100_000)
    assert jobdir.spec_identity(str(tmp_path)) is None


async def test_a_trash_that_cannot_be_emptied_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No process can be started for it: a job may have used all that there are."""
    path, other = (jobdir.job_path(str(tmp_path), jobid, 0) for jobid in (JOB, OTHER))
    trash = jobdir.trash_path(str(tmp_path))
    os.makedirs(path)
    forgetting = Forgetting(str(tmp_path), 0)
    monkeypatch.setattr(forget, "ROUND", POLL)
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as nothing:
            nothing.setenv("PATH", "")
            nursery.start_soon(forgetting.run)
            forgetting.add(JOB)
            await until(lambda: "cannot empty" in caplog.text)
        assert os.listdir(trash)
        os.makedirs(other)
        forgetting.add(OTHER)
        await until(lambda: not os.listdir(trash))
        nursery.cancel_scope.cancel()
    assert not jobdir.exists(path)
