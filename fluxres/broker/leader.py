"""The services that only rank 0 has: the store's, the jobs', the resources'. Wiring only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from fluxres.base.errors import Refusal
from fluxres.base.fsd import parse_fsd
from fluxres.base.jobid import FluidClock, JobId, f58
from fluxres.broker.config import Config
from fluxres.broker.resource import ResourceService
from fluxres.broker.statedir import Identity
from fluxres.exec.job_exec import JobExec
from fluxres.exec.progress import GUEST_PREFIX
from fluxres.exec.ranks import Ranks
from fluxres.exec.spec import ExecSettings
from fluxres.job.info import JobInfo
from fluxres.job.ingest import Ingest
from fluxres.job.keys import RESERVED
from fluxres.job.listing import JobList
from fluxres.job.manager import Manager
from fluxres.job.queue import Queue
from fluxres.job.replay import Replayed, replay
from fluxres.job.requests import JobRequests
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.service import KvsService
from fluxres.overlay.overlay import Overlay
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service
from fluxres.sched.pool import Pool


class Leader:
    """Rank 0's own services, on what the store had at the beginning of the incarnation."""

    def __init__(
        self,
        *,
        config: Config,
        router: Router,
        handle: Handle,
        kvs: Kvs,
        overlay: Overlay,
        identity: Identity,
        now: Callable[[], float],
        replayed: Replayed,
    ) -> None:
        self.replayed = replayed
        size = overlay.topology.size
        self.ranks = Ranks()
        pool = Pool(size=size)
        self.manager = Manager(kvs=kvs, handle=handle, pool=pool, now=now, statedir_of=self.ranks.statedir)
        job_exec = JobExec(
            router=router,
            handle=handle,
            kvs=kvs,
            ranks=self.ranks,
            subtree=overlay.subtree,
            instance=identity.instance,
            settings=ExecSettings(kill_timeout=parse_fsd(config.exec.kill_timeout)),
            is_active=lambda jobid: jobid in self.manager.ledger,
            is_known=self._is_known,
            now=now,
        )
        clock = FluidClock(router.rank, identity.epoch_ms, replayed.last)
        ingest = Ingest(router=router, kvs=kvs, manager=self.manager, clock=clock, now=now)
        requests = JobRequests(router=router, handle=handle, manager=self.manager)
        Queue(kvs=kvs, service=requests.service, manager=self.manager, ingest=ingest)
        self._resource = ResourceService(
            router=router,
            kvs=kvs,
            ranks=self.ranks,
            pool=pool,
            scheduler=self.manager.scheduler,
            size=size,
            now=now,
        )
        self.services: Sequence[Service] = (
            *KvsService(router=router, kvs=kvs, reserved=RESERVED, guests=GUEST_PREFIX).all,
            job_exec.service,
            JobInfo(router=router, kvs=kvs).service,
            JobList(router=router, kvs=kvs, manager=self.manager).service,
            requests.service,
            self._resource.service,
            self._resource.groups,
            ingest.service,
        )

    @classmethod
    async def load(
        cls,
        *,
        config: Config,
        router: Router,
        handle: Handle,
        kvs: Kvs,
        overlay: Overlay,
        identity: Identity,
        now: Callable[[], float],
    ) -> Leader:
        """Replay the store, and build the services on what it has. Raises Refusal: that is of a larger instance."""
        replayed = await replay(kvs)
        size = overlay.topology.size
        if replayed.farthest is not None and replayed.farthest[0] >= size:
            rank, jobid = replayed.farthest
            raise Refusal(
                f"cannot be an instance of {size} broker(s): job {f58(jobid)} has rank {rank}; "
                f"start {rank + 1} or more, and make the instance smaller when its jobs have ended"
            )
        leader = cls(
            config=config,
            router=router,
            handle=handle,
            kvs=kvs,
            overlay=overlay,
            identity=identity,
            now=now,
            replayed=replayed,
        )
        await leader._resource.load()
        return leader

    def _is_known(self, jobid: JobId) -> bool:
        """Whether a shell's directory is to be kept: its job is active, or in quarantine."""
        return jobid in self.manager.ledger or jobid in self.replayed.quarantined

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after jobs until cancelled; those of the incarnations before are gone on with at once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.manager.run)
            self.manager.take_up(self.replayed)
            task_status.started()

    async def cancel_all(self, grace: float) -> None:
        """Cancel every job, and wait `grace` seconds at most until they are gone."""
        for entry in self.manager.ledger.entries():
            note = "the instance is shutting down"
            self.manager.raise_exception(entry, kind="cancel", severity=0, note=note)
        with trio.move_on_after(grace):
            while len(self.manager.ledger):
                await self.manager.ended.wait()
