"""`fluxres health`: whether each service of a broker keeps up (flux-core issue 2797).

For each broker asked, a line about its event loop, and a table of its services: how many requests are
unanswered, and the age of the oldest. A broker that does not answer in time is what one looks for, so all are
asked at once, and each has its own verdict. Exit status 1 where any broker has not answered.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.common import argument, attribute, field, number, parser, whole_number
from fluxres.client import Client
from fluxres.wire.messages import NODEID_ANY

if TYPE_CHECKING:
    from fluxres.rpc.calls import Reply
    from fluxres.wire.payload import WireMap

TIMEOUT: Final = 5.0
"""Seconds in which a broker that keeps up has answered."""


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("health", "Show whether each service of a broker keeps up")
    which = made.add_mutually_exclusive_group()
    which.add_argument("-r", "--rank", type=whole_number, default=NODEID_ANY, help="ask this rank's broker")
    which.add_argument("--all", action="store_true", help="ask all brokers")
    made.add_argument("--tasks", action="store_true", help="show the tree of tasks, with their stacks")
    made.add_argument("--timeout", type=argument(parse_fsd), default=TIMEOUT, metavar="FSD", help="wait this long (5s)")
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client:
        ranks = range(int(attribute(client, "size"))) if args.all else [args.rank]
        deadline = time.monotonic() + args.timeout
        asked = {
            rank: client.open("broker.health", {"tasks": args.tasks}, nodeid=rank, streaming=False) for rank in ranks
        }
        healthy = True
        for index, (rank, matchtag) in enumerate(asked.items()):
            reply = client.receive_for(matchtag, max(0.0, deadline - time.monotonic()))
            name = "the broker" if rank == NODEID_ANY else f"rank {rank}"
            if index:
                print()
            healthy &= _show(name, reply, args.timeout)
    return 0 if healthy else 1


def _show(name: str, reply: Reply | None, timeout: float) -> bool:
    """Print one broker's health; returns whether it answered."""
    if reply is None:
        print(f"{name}: no answer within {format_fsd(timeout)}")
        return False
    if reply.error is not None:
        print(f"{name}: {reply.error.text}")
        return False
    for line in report(reply.payload):
        print(line)
    return True


def report(health: WireMap) -> list[str]:
    """The lines about one broker, from what `broker.health` answers. Raises FluxresError."""
    stall = field(health, "stall", dict)
    services = field(health, "services", list)
    if not all(isinstance(each, dict) for each in services):
        raise FluxresError("cannot show health: the broker's answer lists no services")
    width = max([len("SERVICE"), *(len(field(each, "name", str)) for each in services)])
    lines = [
        f"rank {field(health, 'rank', int)}: event loop stalled for {_age(number(stall, 'worst'))} at worst, "
        f"{_age(number(stall, 'recent'))} recently",
        f"{'SERVICE':<{width}}  QUEUE  OLDEST",
    ]
    for each in services:
        queue = field(each, "queue", int)
        oldest = _age(number(each, "oldest")) if queue else "-"
        lines.append(f"{field(each, 'name', str):<{width}}  {queue:>5}  {oldest:>6}")
    tasks = health.get("tasks")
    if isinstance(tasks, str):
        lines += ["", *tasks.rstrip("\n").split("\n")]
    return lines


def _age(seconds: float) -> str:
    return format_fsd(round(seconds, 4 if seconds < 1 else 1))
