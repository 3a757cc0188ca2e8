"""The services that only rank 0 has: the store's, the jobs', the resources'. Wiring only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from fluxres.base.errors import Refusal
from fluxres.base.fsd import parse_fsd
from fluxres.base.jobid import FluidClock, JobId, f58
from fluxres.base.json import JsonObject
from fluxres.broker.config import Config
from fluxres.broker.recovery import Recoveries
from fluxres.broker.resource import ResourceService
from fluxres.broker.statedir import Identity
from fluxres.exec.attachments import Attachments
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
from fluxres.job.stats import JobStats
from fluxres.job.value import PENDING
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.service import KvsService
from fluxres.overlay.overlay import Overlay
from fluxres.rpc.handle import Handle
from fluxres.rpc.router import Router
from fluxres.rpc.server import Service
from fluxres.sched.pool import Pool
from fluxres.status.facts import LeaderFacts
from fluxres.status.feed import Feed, Origins
from fluxres.status.lines import LogLines


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
        log: LogLines,
        replayed: Replayed,
    ) -> None:
        self.replayed = replayed
        self._overlay = overlay
        self._kvs = kvs
        self._now = now
        self._started = now()
        size = overlay.topology.size
        self.ranks = Ranks()
        pool = Pool(size=size)
        self.stats = JobStats()
        self.manager = Manager(kvs=kvs, handle=handle, pool=pool, now=now, statedir_of=self.ranks.statedir)
        self.manager.listen(self.stats.changed)
        self.attachments = Attachments(trio.current_time)
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
            attachments=self.attachments,
        )
        clock = FluidClock(router.rank, identity.epoch_ms, replayed.last)
        ingest = Ingest(router=router, kvs=kvs, manager=self.manager, clock=clock, now=now)
        requests = JobRequests(router=router, handle=handle, manager=self.manager)
        queue = Queue(kvs=kvs, service=requests.service, manager=self.manager, ingest=ingest)
        self._resource = ResourceService(
            router=router,
            kvs=kvs,
            ranks=self.ranks,
            pool=pool,
            scheduler=self.manager.scheduler,
            size=size,
            now=now,
        )
        self.recovery = Recoveries(
            ranks=self.ranks,
            attachments=self.attachments,
            topology=overlay.topology,
            resource=self._resource,
            pending=self._pending,
            now=now,
        )
        self.feed = self._feed(router, handle, pool, queue, log)
        self.services: Sequence[Service] = (
            *KvsService(router=router, kvs=kvs, reserved=RESERVED, guests=GUEST_PREFIX).all,
            job_exec.service,
            JobInfo(router=router, kvs=kvs).service,
            JobList(router=router, kvs=kvs, manager=self.manager).service,
            requests.service,
            self._resource.service,
            self._resource.groups,
            ingest.service,
            self.feed.service,
        )

    def _feed(self, router: Router, handle: Handle, pool: Pool, queue: Queue, log: LogLines) -> Feed:
        """The status feed of all of these, listening to what it cannot find out by itself."""
        feed = Feed(
            Origins(
                manager=self.manager,
                stats=self.stats,
                pool=pool,
                ranks=self.ranks,
                overlay=self._overlay,
                kvs=self._kvs,
                handle=handle,
                log=log,
                now=self._now,
                about=self._about,
                queue=queue.document,
                drains=lambda: self._resource.drained,
                detached=self.attachments.detached,
                recovery=self.recovery.current,
            ),
            router=router,
        )
        self.attachments.listen(feed.touch_job)
        self.recovery.listen(feed.touch_recovery)
        return feed

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
        log: LogLines,
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
            log=log,
            replayed=replayed,
        )
        await leader._resource.load()
        found = [JobId(job.id) for job in replayed.jobs if job.needs_exec]
        leader.recovery.begin(found, pending=len(replayed.requests))
        return leader

    def _is_known(self, jobid: JobId) -> bool:
        """Whether a shell's directory is to be kept: its job is active, or in quarantine."""
        return jobid in self.manager.ledger or jobid in self.replayed.quarantined

    def _pending(self) -> int:
        return sum(count for state, count in self.stats.active.items() if state & PENDING)

    @property
    def facts(self) -> LeaderFacts:
        """What is measured of these services."""
        return LeaderFacts(
            size=self._overlay.topology.size,
            kvs=self._kvs,
            stats=self.stats,
            scheduler=self.manager.scheduler,
            ranks=self.ranks,
            quarantined=len(self.replayed.quarantined),
            attachments=self.attachments,
            recoveries=self.recovery,
            now=self._now,
        )

    def _about(self) -> JsonObject:
        """What the status feed shows of the instance itself."""
        hello = self._overlay.hello
        return {
            "instance": hello.instance,
            "size": hello.size,
            "version": hello.software,
            "host": hello.host,
            "uuid": hello.uuid,
            "incarnations": hello.incarnation,
            "started": round(self._started, 3),
        }

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after jobs until cancelled; those of the incarnations before are gone on with at once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.manager.run)
            self.manager.take_up(self.replayed)
            nursery.start_soon(self.feed.run)
            nursery.start_soon(self.recovery.run)
            task_status.started()

    async def cancel_all(self, grace: float) -> None:
        """Cancel every job, and wait `grace` seconds at most until they are gone."""
        for entry in self.manager.ledger.entries():
            note = "the instance is shutting down"
            self.manager.raise_exception(entry, kind="cancel", severity=0, note=note)
        with trio.move_on_after(grace):
            while len(self.manager.ledger):
                await self.manager.ended.wait()
