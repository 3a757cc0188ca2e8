"""job-exec: what it makes of a start request, and of what a rank that comes back has on its disk."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from kvskit import OWNER, running_kvs

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec.attachments import Attachments
from fluxres.exec.job_exec import JobExec
from fluxres.exec.progress import Progress, RankState, progress_key
from fluxres.exec.ranks import Ranks
from fluxres.exec.spec import ExecSettings
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, Put
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.wire.payload import WireMap

RUNNING, LOST, BROKEN, ELSEWHERE, QUARANTINED, ENDED = (JobId(number) for number in range(1, 7))
ACTIVE = (RUNNING, LOST, BROKEN, ELSEWHERE)


@asynccontextmanager
async def nowhere(rank: int) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def job_exec(path: Path, ranks: Ranks | None = None) -> AsyncIterator[tuple[Handle, Kvs]]:
    router = Router(rank=0, size=4)
    handle = Handle(router, "test", OWNER)
    async with running_kvs(path / "kvs.sqlite") as kvs, trio.open_nursery() as nursery:
        made = JobExec(
            router=router,
            handle=handle,
            kvs=kvs,
            ranks=ranks or Ranks(),
            attachments=Attachments(trio.current_time),
            subtree=nowhere,
            instance="I",
            settings=ExecSettings(),
            is_active=ACTIVE.__contains__,
            is_known=(*ACTIVE, QUARANTINED).__contains__,
            now=lambda: 1.0,
        )
        await nursery.start(made.service.run)
        yield handle, kvs
        nursery.cancel_scope.cancel()


async def test_a_rank_is_told_what_to_forget_and_what_to_kill(tmp_path: Path) -> None:
    async with job_exec(tmp_path) as (handle, kvs):
        new = Progress(statedir="S")
        lost = new.moved(RankState.LOST, cursor=0, status=9)
        await kvs.commit(
            Put(PRIMARY, progress_key(RUNNING, 3), new.encode()),
            Put(PRIMARY, progress_key(LOST, 3), lost.encode()),
            Put(PRIMARY, progress_key(BROKEN, 3), b"{"),
            Put(PRIMARY, progress_key(ELSEWHERE, 2), lost.encode()),
            Put(PRIMARY, progress_key(ENDED, 3), lost.encode()),
        )
        ids = [int(jobid) for jobid in (*ACTIVE, QUARANTINED, ENDED)]
        answer = await handle.call("job-exec.inventory", {"rank": 3, "ids": [*ids]})
        assert answer == {"unknown": [ENDED], "lost": [LOST]}


async def test_a_declared_rank_that_is_back_at_once_is_told_what_is_being_given_up(tmp_path: Path) -> None:
    """The loss of its jobs' parts may be still under way; what has ended there is none of it."""
    ranks = Ranks()
    async with job_exec(tmp_path, ranks) as (handle, kvs):
        new = Progress(statedir="S")
        await kvs.commit(
            Put(PRIMARY, progress_key(RUNNING, 3), new.moved(RankState.RUNNING, cursor=1).encode()),
            Put(PRIMARY, progress_key(LOST, 3), new.moved(RankState.EXITED, cursor=2).encode()),
            Put(PRIMARY, progress_key(ELSEWHERE, 2), new.encode()),
        )
        ranks.declare(3, "gone")
        answer = await handle.call("job-exec.inventory", {"rank": 3, "ids": [int(jobid) for jobid in ACTIVE]})
        assert answer == {"unknown": [], "lost": [RUNNING]}


START: WireMap = {
    "id": int(RUNNING),
    "userid": OWNER,
    "jobspec": {},
    "R": {},
    "tasks": [[3, 0, 1]],
    "taskmap": [[0, 1, 1, 1]],
    "nonce": "N",
    "t_submit": 1.0,
    "reattach": False,
}


@pytest.mark.parametrize(("more", "errnum"), [({}, errno.ENOENT), ({"released": "3,1"}, errno.EPROTO)])
async def test_a_start_that_makes_no_sense_is_refused(tmp_path: Path, more: WireMap, errnum: int) -> None:
    async with job_exec(tmp_path) as (handle, kvs):
        if more:
            await kvs.commit(Put(PRIMARY, progress_key(RUNNING, 3), Progress(statedir="S").encode()))
        with pytest.raises(RpcError) as caught:
            await handle.call("job-exec.start", {**START, **more})
        assert caught.value.errnum == errnum


@pytest.mark.parametrize(
    ("topic", "payload", "errnum"),
    [
        ("job-exec.released", {"id": 9}, errno.ENOENT),
        ("job-exec.released", {"id": 9, "ranks": "2,1", "final": False}, errno.EPROTO),
        ("job-exec.kill", {"id": 9, "signum": 15}, errno.ENOENT),
    ],
)
async def test_what_is_asked_of_no_job_is_refused(tmp_path: Path, topic: str, payload: WireMap, errnum: int) -> None:
    async with job_exec(tmp_path) as (handle, _):
        with pytest.raises(RpcError) as caught:
            await handle.call(topic, payload)
        assert caught.value.errnum == errnum
