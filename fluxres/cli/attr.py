"""`fluxres getattr`, `setattr` and `lsattr`: a broker's attributes (flux-getattr(1))."""

from __future__ import annotations

from fluxres.cli.common import Explain, attribute, field, parser
from fluxres.cli.ranks import rank_number
from fluxres.client import Client
from fluxres.wire.messages import NODEID_ANY

NAME_WIDTH = 40


def getattr_main(argv: list[str]) -> int:
    """`fluxres getattr [-r RANK] NAME`: print a value."""
    made = parser("getattr", "Show the value of a broker attribute")
    made.add_argument("-r", "--rank", type=rank_number, default=NODEID_ANY, help="ask this rank's broker")
    made.add_argument("name", metavar="NAME")
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client:
        print(attribute(client, args.name, args.rank))
    return 0


def setattr_main(argv: list[str]) -> int:
    """`fluxres setattr [-r RANK] NAME VALUE`: set a value; immutable attributes refuse."""
    made = parser("setattr", "Set the value of a broker attribute")
    made.add_argument("-r", "--rank", type=rank_number, default=NODEID_ANY, help="ask this rank's broker")
    made.add_argument("name", metavar="NAME")
    made.add_argument("value", metavar="VALUE")
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client, Explain(f"set attribute {args.name}"):
        client.call("attr.set", {"name": args.name, "value": args.value}, nodeid=args.rank)
    return 0


def lsattr_main(argv: list[str]) -> int:
    """`fluxres lsattr [-v] [-r RANK]`: print all names, with -v their values too."""
    made = parser("lsattr", "List broker attributes (-v: with their values)")
    made.add_argument("-r", "--rank", type=rank_number, default=NODEID_ANY, help="ask this rank's broker")
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client, Explain("list attributes"):
        attrs = field(client.call("attr.list", {}, nodeid=args.rank), "attrs", list)
    for each in sorted(attrs, key=lambda each: field(each, "name", str)):
        name = field(each, "name", str)
        print(f"{name:<{NAME_WIDTH}}{each.get('value', '-')}" if args.verbose else name)
    return 0
