"""Builds a shell's `spec` from jobspec and R: what one rank is to run (read by `fluxres_shell.spec`). Pure.

Rank 0 builds it, all but what depends on the node: the rank that the job runs on completes it with its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import lt
from typing import Final, cast

import msgspec

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject, JsonValue
from fluxres.exec.progress import guest_namespace

SPEC_VERSION: Final = 1
MAX_LISTED: Final = 64
"""Ranks of a job that a spec lists one by one; more are an idset, so that a large job's spec stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSettings:
    """What the instance sets for all its jobs (`[exec]` of rank 0's configuration).

    `kill_timeout` is seconds between SIGTERM and SIGKILL.
    """

    kill_timeout: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """What a rank sets for the shells on it (`[exec]` of its own configuration).

    `uri` is where its broker takes local clients. `journal_limit` and `segment_size` are bytes. `bind` says that the
    cores of R are those of the system, to which tasks can be bound.
    """

    uri: str
    journal_limit: int = 64 * 1024 * 1024
    segment_size: int = 4 * 1024 * 1024
    tmpdir_base: str = "/tmp"
    cgroup_parent: str | None = None
    bind: bool = True


@dataclass(frozen=True, kw_only=True)
class SpecBuilder:
    """Builds the specs of one job, for `complete_spec` on its ranks; what these share is made once.

    `layout` gives each rank of the job, in order, its global task ranks.
    """

    jobid: JobId
    nonce: str
    instance: str
    userid: int
    jobspec: JsonObject
    resources: JsonObject
    layout: Mapping[int, list[int]]
    taskmap: JsonValue
    t_submit: float

    def build(self, rank: int) -> bytes:
        """The spec for `rank`."""
        own: JsonObject = {
            "rank": rank,
            "tasks": [{"rank": task, "local": local} for local, task in enumerate(self.layout[rank])],
            "cpus": [] if self._options.get("cpu-affinity") == "off" else self._cpus(rank),
        }
        return self._shared[:-1] + b"," + msgspec.json.encode(own)[1:]  # two objects without a common key, as one

    @cached_property
    def _system(self) -> JsonObject:
        return cast("JsonObject", cast("JsonObject", self.jobspec["attributes"])["system"])

    @cached_property
    def _options(self) -> JsonObject:
        shell = cast("JsonObject", self._system.get("shell") or {})
        return cast("JsonObject", shell.get("options") or {})

    @cached_property
    def _shared(self) -> bytes:
        """The object of all that is the same on every rank."""
        shared: JsonObject = {
            "version": SPEC_VERSION,
            "id": int(self.jobid),
            "nonce": self.nonce,
            "instance": self.instance,
            "userid": self.userid,
            "jobspec": self.jobspec,
            "R": self.resources,
            "ranks": _ranks(list(self.layout)),
            "nnodes": len(self.layout),
            "ntasks_total": sum(len(tasks) for tasks in self.layout.values()),
            "taskmap": self.taskmap,
            "env": self._system.get("environment") or {},
            "cwd": self._system.get("cwd") or "/",
            "time_limit": self._system.get("duration") or 0,
            "t_submit": self.t_submit,
            "namespace": guest_namespace(self.jobid),
            "options": self._options,
        }
        return msgspec.json.encode(shared)

    def _cpus(self, rank: int) -> list[JsonValue]:
        """The cores that R gives the job on `rank` (RFC 20): the CPUs to which its tasks are bound."""
        return next(([*cores] for ranks, cores in self._cores if rank in ranks), [])

    @cached_property
    def _cores(self) -> list[tuple[IdSet, IdSet]]:
        """The cores of each set of ranks in R."""
        execution = cast("JsonObject", self.resources["execution"])
        return [
            (
                IdSet.parse(str(entry["rank"])),
                IdSet.parse(str(cast("JsonObject", entry["children"])["core"])),
            )
            for entry in cast("list[JsonObject]", execution["R_lite"])
        ]


_decode: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def complete_spec(spec: bytes, local: LocalSettings) -> bytes:
    """The spec as it is written for the shell. Raises ValueError where `spec` is no JSON object.

    What rank 0 wrote is copied as it is, jobspec and R unread: this is done for each start.
    """
    whole: dict[str, object] = {
        **_decode(spec),
        "uri": local.uri,
        "tmpdir_base": local.tmpdir_base,
        "cgroup_parent": local.cgroup_parent,
        "journal_limit": local.journal_limit,
        "segment_size": local.segment_size,
    }
    if not local.bind:
        whole["cpus"] = []
    return msgspec.json.encode(whole)


def _ranks(ranks: list[int]) -> JsonValue:
    """The ranks of a job in order: an idset where they are many, and in the order that an idset has."""
    if len(ranks) > MAX_LISTED and all(map(lt, ranks, islice(ranks, 1, None))):
        return str(IdSet(ranks))
    return [*ranks]
