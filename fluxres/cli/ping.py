"""`fluxres ping`: the time to a service and back, and the route taken (flux-ping(1)).

One line a ping: `3!broker.ping pad=0 seq=0 time=0.774 ms (uuid!uuid)`. A ping that fails is reported, and the
next one sent; the exit status is 1 where any has failed.
"""

from __future__ import annotations

import sys
import time

from fluxres.base.errors import RpcError
from fluxres.base.fsd import parse_fsd
from fluxres.cli.common import argument, parser, whole_number
from fluxres.cli.ranks import MAX_RANK
from fluxres.client import Client
from fluxres.wire.messages import NODEID_ANY, NODEID_UPSTREAM

MAX_PAD = 1024 * 1024
"""Characters that may be added to a ping."""
_WORDS = {"any": NODEID_ANY, "upstream": NODEID_UPSTREAM}


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("ping", "Measure the round trip to a service; TARGET is a service, a rank, or RANK!SERVICE")
    made.add_argument("-r", "--rank", help="the rank to ping, 'any' or 'upstream'")
    made.add_argument("-c", "--count", type=whole_number, default=0, metavar="N", help="stop after N pings")
    made.add_argument(
        "-i",
        "--interval",
        type=argument(parse_fsd),
        default=1.0,
        metavar="FSD",
        help="time between pings (1s)",
    )
    made.add_argument("-p", "--pad", type=whole_number, default=0, metavar="N", help="add N bytes")
    made.add_argument("-u", "--userid", action="store_true", help="show userid and rolemask")
    made.add_argument("target", nargs="?", default="broker", metavar="TARGET")
    args = made.parse_args(argv)
    rank, service = _target(args.rank, args.target)
    if not (rank in _WORDS or (rank.isascii() and rank.isdigit() and int(rank) <= MAX_RANK)):
        made.error(f"{rank!r} is no rank")
    if args.pad > MAX_PAD:
        made.error(f"--pad is {MAX_PAD} at most")
    with Client.connect(args.uri) as client:
        failed = 0
        seq = 0
        while True:
            begun = time.monotonic()
            failed += _ping(client, rank, service, seq, pad=args.pad, userid=args.userid)
            seq += 1
            if seq == args.count:
                return 1 if failed else 0
            time.sleep(max(0.0, begun + args.interval - time.monotonic()))


def _target(rank: str | None, target: str) -> tuple[str, str]:
    """The rank and the service that are meant."""
    if rank is not None:
        return rank, target
    if "!" in target:
        rank, _, service = target.partition("!")
        return rank, service
    if target.isdigit() or target in _WORDS:
        return target, "broker"
    return "any", target


def _ping(client: Client, rank: str, service: str, seq: int, *, pad: int, userid: bool) -> bool:
    """Ping once; returns whether it failed."""
    topic = f"{service}.ping"
    where = topic if rank == "any" else f"{rank}!{topic}"
    sent = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    seconds, nanoseconds = divmod(sent, 1_000_000_000)
    try:
        reply = client.call(
            topic,
            {"seq": seq, "time.tv_sec": seconds, "time.tv_nsec": nanoseconds, "pad": "p" * pad},
            nodeid=_WORDS[rank] if rank in _WORDS else int(rank),
        )
    except RpcError as error:
        print(f"fluxres-ping: cannot ping {where}: {error.text}", file=sys.stderr)
        return True
    took = (time.clock_gettime_ns(time.CLOCK_MONOTONIC) - sent) / 1_000_000
    route, uid, roles = reply.get("route"), reply.get("userid"), reply.get("rolemask")
    who = ""
    if userid and isinstance(uid, int) and isinstance(roles, int):
        who = f" userid={uid} rolemask={roles:#x}"
    via = f" ({route})" if isinstance(route, str) else ""
    print(f"{where} pad={pad}{who} seq={seq} time={took:.3f} ms{via}", flush=True)
    return False
