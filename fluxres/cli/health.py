"""`fluxres health`: whether each service of a broker keeps up (flux-core issue 2797).

For each broker asked, a line about its event loop, a table of its services: how many requests are unanswered, and the
age of the oldest; then each request that waits too long, with the stack where its handler hangs. A broker that does not
answer in time is what one looks for, so all are asked at once, and each has its own verdict: a report, or an error line
on stderr. --timeout bounds it all, connecting included. Exit status 1 where any broker has not answered.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.common import argument, attribute, field, number, parser, printable
from fluxres.cli.ranks import complaint, rank_number
from fluxres.client import CONNECT_TIMEOUT, Client
from fluxres.wire.messages import NODEID_ANY

if TYPE_CHECKING:
    from fluxres.wire.payload import WireMap

TIMEOUT: Final = 5.0
"""Seconds in which a broker that keeps up has answered."""


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("health", "Show whether each service of a broker keeps up")
    which = made.add_mutually_exclusive_group()
    which.add_argument("-r", "--rank", type=rank_number, default=NODEID_ANY, help="ask this rank's broker")
    which.add_argument("--all", action="store_true", help="ask all brokers")
    made.add_argument("--tasks", action="store_true", help="show the tree of tasks, with their stacks")
    made.add_argument("--timeout", type=argument(parse_fsd), default=TIMEOUT, metavar="FSD", help="wait this long (5s)")
    args = made.parse_args(argv)
    deadline = time.monotonic() + args.timeout
    with Client.connect(args.uri, min(args.timeout, CONNECT_TIMEOUT)) as client:
        ranks = range(int(attribute(client, "size", timeout=_left(deadline)))) if args.all else [args.rank]
        asked = {
            rank: client.open("broker.health", {"tasks": args.tasks}, nodeid=rank, streaming=False) for rank in ranks
        }
        shown = 0
        for rank, matchtag in asked.items():
            reply = client.receive_for(matchtag, _left(deadline))
            why = complaint(reply, args.timeout)
            if reply is None or why is not None:
                name = "the broker" if rank == NODEID_ANY else f"rank {rank}"
                print(f"fluxres-health: cannot show the health of {name}: {why}", file=sys.stderr)
                continue
            print("\n".join([""] * bool(shown) + report(reply.payload)))
            shown += 1
    return 0 if shown == len(asked) else 1


def _left(deadline: float) -> float | None:
    """Seconds until a deadline; None where it never comes."""
    left = max(0.0, deadline - time.monotonic())
    return None if left == float("inf") else left


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
    lines += [line for each in services for line in _stuck(each)]
    tasks = health.get("tasks")
    if isinstance(tasks, str):
        lines += ["", *tasks.rstrip("\n").split("\n")]
    return lines


def _stuck(service: WireMap) -> list[str]:
    """The lines about the requests of a service that have waited too long."""
    lines: list[str] = []
    for each in field(service, "stuck", list):
        stack = field(each, "stack", list)
        where = "" if stack else " (no task of its own handles it)"
        lines += ["", f"{field(each, 'topic', str)} unanswered for {_age(number(each, 'age'))}{where}"]
        lines += [f"  {printable(str(line))}" for line in stack]
    return lines


def _age(seconds: float) -> str:
    return format_fsd(round(seconds, 4 if seconds < 1 else 1))
