"""`fluxres dmesg`: the broker's log, from its ring buffer (flux-dmesg(1))."""

from __future__ import annotations

from fluxres.cli.common import Explain, field, parser, whole_number
from fluxres.client import Client
from fluxres.wire.messages import NODEID_ANY


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("dmesg", "Show the broker's log")
    made.add_argument("-r", "--rank", type=whole_number, default=NODEID_ANY, help="ask this rank's broker")
    made.add_argument("-f", "--follow", action="store_true", help="go on with new lines as they come")
    made.add_argument("-n", "--new", action="store_true", help="with --follow: new lines only")
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client, Explain("read the log"):
        lines = client.stream("log.dmesg", {"follow": args.follow, "nobacklog": args.new}, nodeid=args.rank)
        for line in lines:
            print(field(line, "line", str).rstrip("\n"), flush=args.follow)
    return 0
