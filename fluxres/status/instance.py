"""The topic `instance`: what it is, how many jobs and resources, the queue, and the recovery that is under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import trio

from fluxres.base.json import JsonObject
from fluxres.job.queue import KEY as QUEUE_KEY
from fluxres.job.result import JobResult
from fluxres.job.stats import JobStats
from fluxres.kvs.kvs import Kvs
from fluxres.status.jobs import JobsSource
from fluxres.status.nodes import NodesSource
from fluxres.status.source import Built, Wake, follow

ENDED: Final[Mapping[str, JobResult]] = {how.name.lower(): how for how in JobResult}


class InstanceSource:
    """Sums of what other sources know (to be built before it), and what functions tell."""

    topic = "instance"

    def __init__(
        self,
        *,
        kvs: Kvs,
        jobs: JobsSource,
        nodes: NodesSource,
        stats: JobStats,
        about: Callable[[], JsonObject],
        queue: Callable[[], JsonObject],
        recovery: Callable[[], JsonObject | None],
        wake: Wake,
    ) -> None:
        self._kvs = kvs
        self._jobs = jobs
        self._nodes = nodes
        self._stats = stats
        self._about = about
        self._queue = queue
        self._recovery = recovery
        self._wake = wake

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the queue until cancelled."""
        task_status.started()
        await follow(self._kvs, QUEUE_KEY, self._wake)

    def documents(self) -> Built:
        """All of them: they are few, and those that are as they were are left out by the view."""
        yield "about", self._about()
        yield "jobs", self._job_counts()
        yield "resources", self._nodes.totals()
        yield "queue", self._queue()
        yield "recovery", self._recovery()

    def _job_counts(self) -> JsonObject:
        stats = self._stats
        counts: JsonObject = {state.name.lower(): count for state, count in stats.active.items()}
        if (inactive := self._jobs.inactive) is not None:
            counts["inactive"] = inactive
        return {
            **counts,
            "submitted": stats.submitted,
            **{name: stats.ended[how] for name, how in ENDED.items()},
        }
