"""`fluxres uptime`: one line about the instance, like uptime(1)'s (flux-uptime(1)).

    16:12:07 run 2.1h,  owner grond,  depth 0,  size 8,  1 drained,  3 offline (2 lost)

Offline is who is not there, lost are those of them that were and went without saying so, and all behind them.
Unless the broker is in state `run`, the duration is that of its state, and nothing is said of the instance.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.idset import IdSet
from fluxres.cli.common import Explain, attribute, field, number, parser
from fluxres.client import Client

if TYPE_CHECKING:
    from fluxres.wire.payload import WireMap

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s"))


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser("uptime", "Show how long the instance has been running").parse_args(argv)
    with Client.connect(args.uri) as client, Explain("tell the uptime"):
        reply = client.call("state-machine.get", {})
        state, duration = field(reply, "state", str), number(reply, "duration")
        size = int(attribute(client, "size"))
        extra, second = "", []
        if state == "run":
            duration = time.time() - float(attribute(client, "broker.starttime", 0))
            extra = _counts(client, size)
            second = _disabled(client)
        owner = _username(int(attribute(client, "security.owner")))
        now = time.strftime("%H:%M:%S")
        print(f" {now} {state} {short(duration)},  owner {owner},  depth {_depth(client)},  size {size}{extra}")
        if second:
            print(f"  {',  '.join(second)}")
    return 0


def short(seconds: float) -> str:
    """A duration to two digits, as `2.1h`."""
    for unit, suffix in _UNITS:
        if seconds >= unit or unit == 1.0:
            value = max(seconds, 0.0) / unit
            return f"{value:.1f}".removesuffix(".0") + suffix if value < 9.95 else f"{value:.0f}{suffix}"
    raise AssertionError(seconds)


def _counts(client: Client, size: int) -> str:
    drain = _ask(client, "resource.status").get("drain")
    drained = sum(len(IdSet.parse(ids)) for ids in drain) if isinstance(drain, dict) else 0
    online = _ask(client, "groups.get", {"name": "broker.online"}).get("members")
    offline = size - len(IdSet.parse(online)) if isinstance(online, str) else 0
    lost = _lost(client, size) if offline else 0
    away = f"offline ({lost} lost)" if lost else "offline"
    return "".join(f",  {n} {what}" for n, what in ((drained, "drained"), (offline, away)) if n)


def _lost(client: Client, size: int) -> int:
    """How many ranks are lost, or behind one that is; 0 where the tree does not tell."""
    from fluxres.cli.overlay import TIMEOUT, Gather
    from fluxres.cli.ranks import get_topology
    from fluxres.overlay.report import LOST, assemble

    try:
        topology = get_topology(client.call, size)
        seen = assemble(0, topology, Gather(client, topology, TIMEOUT).run(0))
    except FluxresError:
        return 0  # of no use here: what is offline has been counted
    return sum(what.status == LOST for what in seen.values())


def _disabled(client: Client) -> list[str]:
    queue = _ask(client, "job-manager.queue-status")
    told = (("enable", "submit disabled"), ("start", "scheduler disabled"))
    return [text for key, text in told if queue.get(key) is False]


def _ask(client: Client, topic: str, payload: WireMap | None = None) -> WireMap:
    """What rank 0 says to `topic`; nothing where it has no such service."""
    try:
        return client.call(topic, payload or {}, nodeid=0)
    except RpcError as error:
        if error.errnum != errno.ENOSYS:
            raise
        return {}


def _depth(client: Client) -> str:
    """How many instances this one is in."""
    try:
        return field(client.call("attr.get", {"name": "instance-level"}), "value", str)
    except RpcError as error:
        if error.errnum != errno.ENOENT:
            raise
        return "0"


def _username(userid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(userid).pw_name
    except KeyError:
        return str(userid)
