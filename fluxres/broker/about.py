"""What a broker tells of itself by its attributes (flux-broker-attributes(7))."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from fluxres import __version__
from fluxres.broker.config import Config
from fluxres.broker.statedir import Identity
from fluxres.overlay.overlay import Overlay
from fluxres.rpc.router import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is not in the configuration. `started` is in seconds since 1970."""

    identity: Identity
    started: float
    host: str
    pid: int
    statedir: str


def attributes(facts: Facts, config: Config, overlay: Overlay, router: Router) -> Mapping[str, Callable[[], str]]:
    """The attributes, each a function, so that what changes is told as it is."""
    topology, rank = overlay.topology, overlay.rank
    parent = topology.parent(rank)
    rundir = os.path.abspath(config.broker.rundir)
    fixed = {
        "rank": str(rank),
        "size": str(topology.size),
        "hostname": facts.host,
        "uuid": overlay.hello.uuid,
        "broker.pid": str(facts.pid),
        "broker.boot-count": str(facts.identity.incarnations),
        "broker.starttime": f"{facts.started:.6f}",
        "tbon.topo": str(topology),
        "tbon.level": str(topology.level(rank)),
        "tbon.maxlevel": str(topology.maxlevel),
        "tbon.parent": "" if parent is None else str(parent),
        "statedir": facts.statedir,
        "rundir": rundir,
        "local-uri": f"local://{rundir}/local-{rank}",
        "version": __version__,
        "instance-id": facts.identity.instance,
        "instance-level": "0",
        "security.owner": str(os.getuid()),
    }
    told: dict[str, Callable[[], str]] = {name: partial(str, value) for name, value in fixed.items()}
    return {
        **told,
        "hostlist": lambda: str(config.hostlist(facts.host)),  # these two take long in a large instance
        "tbon.descendants": lambda: str(sum(1 for _ in topology.subtree(rank)) - 1),
        "rpc.tracked": lambda: str(len(router.tracker)),
    }
