"""What a job asks of the scheduler. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fluxres.sched.constraint import ANY_RANK, Constraint


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job wants: `nslots` slots in all, spread evenly over `nnodes` nodes, or over any number of
    them if 0.

    `exclusive` takes whole nodes and needs `nnodes`. Raises ValueError for counts that make no sense.
    """

    nnodes: int = 0
    nslots: int = 1
    cores_per_slot: int = 1
    gpus_per_slot: int = 0
    exclusive: bool = False
    constraint: Constraint = ANY_RANK

    def __post_init__(self) -> None:
        in_range = min(self.nnodes, self.gpus_per_slot) >= 0 and min(self.nslots, self.cores_per_slot) >= 1
        uneven = self.nnodes and self.nslots % self.nnodes
        if not in_range or uneven or (self.exclusive and not self.nnodes):
            raise ValueError(f"cannot request resources: the counts do not fit together in {self}")
