"""The services that only rank 0 has: the store's, the jobs', the resources'. Wiring only."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import trio

from fluxres.base.fsd import parse_fsd
from fluxres.base.idset import IdSet
from fluxres.base.jobid import FluidClock, JobId
from fluxres.broker.cgroups import parent_cgroup
from fluxres.broker.config import Config
from fluxres.broker.resource import ResourceService, local_inventory
from fluxres.broker.statedir import Identity
from fluxres.exec.job_exec import JobExec
from fluxres.exec.progress import GUEST_PREFIX
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
        identity: Identity,
        uri: str,
        replayed: Replayed,
    ) -> None:
        self.replayed = replayed
        self.cgroup = parent_cgroup(config.exec.cgroup, f"fluxres-{identity.instance[:8]}-{router.rank}")
        pool = Pool([local_inventory(router.rank, socket.gethostname(), config.resource)])
        pool.set_up(IdSet([router.rank]))
        self.manager = Manager(kvs=kvs, handle=handle, pool=pool, now=time.time, statedir_of=lambda _rank: identity.id)
        job_exec = JobExec(
            router=router,
            handle=handle,
            kvs=kvs,
            instance=identity.instance,
            uri=uri,
            settings=exec_settings(config, self.cgroup),
            is_active=lambda jobid: jobid in self.manager.ledger,
            is_known=self._is_known,
            now=time.time,
        )
        clock = FluidClock(router.rank, identity.epoch_ms, replayed.last)
        ingest = Ingest(router=router, kvs=kvs, manager=self.manager, clock=clock, now=time.time)
        requests = JobRequests(router=router, handle=handle, manager=self.manager)
        Queue(kvs=kvs, service=requests.service, manager=self.manager, ingest=ingest)
        resource = ResourceService(
            router=router, pool=pool, scheduler=self.manager.scheduler, size=config.bootstrap.size
        )
        self.services: Sequence[Service] = (
            *KvsService(router=router, kvs=kvs, reserved=RESERVED, guests=GUEST_PREFIX).all,
            job_exec.service,
            JobInfo(router=router, kvs=kvs).service,
            JobList(router=router, kvs=kvs, manager=self.manager).service,
            requests.service,
            resource.service,
            resource.groups,
            ingest.service,
        )

    @classmethod
    async def load(
        cls, *, config: Config, router: Router, handle: Handle, kvs: Kvs, identity: Identity, uri: str
    ) -> Leader:
        """Replay the store, and build the services on what it has."""
        return cls(
            config=config,
            router=router,
            handle=handle,
            kvs=kvs,
            identity=identity,
            uri=uri,
            replayed=await replay(kvs),
        )

    def _is_known(self, jobid: JobId) -> bool:
        """Whether a shell's directory is to be kept: its job is active, or in quarantine."""
        return jobid in self.manager.ledger or jobid in self.replayed.quarantined

    def take_up(self) -> None:
        """Go on with the jobs of the incarnations before: the manager must be running."""
        self.manager.take_up(self.replayed)

    async def cancel_all(self, grace: float) -> None:
        """Cancel every job, and wait `grace` seconds at most until they are gone."""
        for entry in self.manager.ledger.entries():
            note = "the instance is shutting down"
            self.manager.raise_exception(entry, kind="cancel", severity=0, note=note)
        with trio.move_on_after(grace):
            while len(self.manager.ledger):
                await self.manager.ended.wait()


def exec_settings(config: Config, cgroup: str | None) -> ExecSettings:
    """The `[exec]` table as the exec room takes it; `cgroup` is the directory of the jobs' parent cgroup."""
    table = config.exec
    return ExecSettings(
        journal_limit=table.journal_limit,
        segment_size=table.segment_size,
        kill_timeout=parse_fsd(table.kill_timeout),
        tmpdir_base=table.tmpdir,
        cgroup_parent=cgroup,
        bind=config.resource.cores is None,
    )
