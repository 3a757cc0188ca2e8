"""Nodes, cores and GPUs by state, each in exactly one, so that the states add up to all there is.

A node is the first of these that is true of it: lost (declared so), offline, drained, torpid, up. A core or GPU is
`used` by a job, wherever it is; otherwise `free` on a node that is up, or `down`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from fluxres.exec.ranks import Ranks
from fluxres.sched.pool import Pool

NODE_STATES: Final = ("up", "torpid", "drained", "offline", "lost")
PART_STATES: Final = ("used", "free", "down")


class Census(NamedTuple):
    """How many nodes, cores and GPUs are in each state."""

    nodes: Mapping[str, int]
    cores: Mapping[str, int]
    gpus: Mapping[str, int]


def census(pool: Pool, ranks: Ranks, size: int) -> Census:
    """The resources of an instance of `size` ranks. A rank that never came is offline, and has no cores."""
    cores, gpus = dict.fromkeys(PART_STATES, 0), dict.fromkeys(PART_STATES, 0)
    for rank in range(size):
        usage = pool.usage(rank)
        if usage is None:
            continue
        idle = "free" if usage.usable else "down"
        cores["used"] += usage.cores_used
        gpus["used"] += usage.gpus_used
        cores[idle] += usage.cores_idle
        gpus[idle] += usage.gpus_idle
    return Census(_nodes(pool, ranks, size), cores, gpus)


def _nodes(pool: Pool, ranks: Ranks, size: int) -> dict[str, int]:
    lost = set(ranks.declarations())
    up = set(ranks.online_ranks()) - lost
    drained = up & set(pool.drained_ranks())
    torpid = (up & set(pool.torpid_ranks())) - drained
    counts = (len(up) - len(drained) - len(torpid), len(torpid), len(drained), size - len(up | lost), len(lost))
    return dict(zip(NODE_STATES, counts, strict=True))
