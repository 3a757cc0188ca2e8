"""Builds a shell's `spec` from jobspec and R: what one rank is to run (read by `fluxres_shell.spec`). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

import msgspec

from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject, JsonValue
from fluxres.exec.progress import guest_namespace

SPEC_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSettings:
    """What the instance sets for all its shells (`[exec]` of the configuration).

    `journal_limit` and `segment_size` are bytes, `kill_timeout` seconds between SIGTERM and SIGKILL. `bind` says that
    the cores of R are those of the system, to which tasks can be bound.
    """

    journal_limit: int = 64 * 1024 * 1024
    segment_size: int = 4 * 1024 * 1024
    kill_timeout: float = 5.0
    tmpdir_base: str = "/tmp"
    cgroup_parent: str | None = None
    bind: bool = True


def build_spec(
    *,
    jobid: JobId,
    rank: int,
    nonce: str,
    instance: str,
    userid: int,
    jobspec: JsonObject,
    resources: JsonObject,
    layout: Mapping[int, list[int]],
    taskmap: JsonValue,
    uri: str,
    t_submit: float,
    settings: ExecSettings,
) -> bytes:
    """The spec for `rank`. `layout` gives each rank of the job, in order, its global task ranks."""
    system = cast("JsonObject", cast("JsonObject", jobspec["attributes"])["system"])
    shell = cast("JsonObject", system.get("shell") or {})
    options = cast("JsonObject", shell.get("options") or {})
    spec: JsonObject = {
        "version": SPEC_VERSION,
        "id": int(jobid),
        "rank": rank,
        "nonce": nonce,
        "instance": instance,
        "userid": userid,
        "jobspec": jobspec,
        "R": resources,
        "ranks": list(layout),
        "nnodes": len(layout),
        "ntasks_total": sum(len(tasks) for tasks in layout.values()),
        "tasks": [{"rank": task, "local": local} for local, task in enumerate(layout[rank])],
        "taskmap": taskmap,
        "env": system.get("environment") or {},
        "cwd": system.get("cwd") or "/",
        "time_limit": system.get("duration") or 0,
        "t_submit": t_submit,
        "uri": uri,
        "namespace": guest_namespace(jobid),
        "options": options,
        "tmpdir_base": settings.tmpdir_base,
        "cgroup_parent": settings.cgroup_parent,
        "cpus": _cpus(resources, rank) if settings.bind and options.get("cpu-affinity") != "off" else [],
        "journal_limit": settings.journal_limit,
        "segment_size": settings.segment_size,
    }
    return msgspec.json.encode(spec)


def _cpus(resources: JsonObject, rank: int) -> list[JsonValue]:
    """The cores that R gives the job on `rank` (RFC 20): the CPUs to which its tasks are bound."""
    execution = cast("JsonObject", resources["execution"])
    for entry in cast("list[JsonObject]", execution["R_lite"]):
        if rank in IdSet.parse(str(entry["rank"])):
            return [*IdSet.parse(str(cast("JsonObject", entry["children"])["core"]))]
    return []
