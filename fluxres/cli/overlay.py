"""`fluxres overlay`: the tree of brokers: its health, who is where, and cutting a part of it off (flux-overlay(1)).

`status` asks the brokers level by level, all of a level at once, and draws what they say; one that does not answer is
shown with the reason. `status --wait` follows `overlay.monitor`, through restarts of the broker as well, until the
subtree is in the state that is waited for.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.fsd import format_fsd, parse_fsd
from fluxres.cli.common import Explain, UsageError, argument, parser, subcommands, take_uri
from fluxres.cli.overlay_tree import Style, as_json, describe, draw, without_full
from fluxres.cli.ranks import (
    Hosts,
    check_rank,
    get_hosts,
    get_size,
    get_topology,
    no_answer,
    parse_targets,
    rank_number,
)
from fluxres.client import Client
from fluxres.overlay.report import (
    GONE,
    STATES,
    Failed,
    Report,
    Seen,
    assemble,
    failed,
    parse_report,
    worth_asking,
)
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.base.idset import IdSet
    from fluxres.cli.common import Parser
    from fluxres.cli.ranks import Ask
    from fluxres.overlay.topology import Topology
    from fluxres.wire.payload import WireMap

TIMEOUT: Final = 5.0
"""Seconds in which a broker answers that keeps up."""
COLOR: Final = ("always", "never", "auto")


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("overlay", "Show and control the tree of brokers")
    sub = subcommands(made)
    _add_status(sub.add_parser("status", help="show the health of the tree", allow_abbrev=False))
    lookup = sub.add_parser("lookup", help="hosts of ranks, or ranks of hosts", allow_abbrev=False)
    lookup.add_argument("target", metavar="TARGET", help="an idset or a hostlist")
    parent = sub.add_parser("parentof", help="show the parent of a rank", allow_abbrev=False)
    parent.add_argument("rank", metavar="RANK", type=rank_number)
    cut = sub.add_parser("disconnect", help="cut a subtree off: it restarts and joins again", allow_abbrev=False)
    cut.add_argument("-r", "--parent", type=rank_number, metavar="RANK", help="the parent (default: as in the tree)")
    cut.add_argument("target", metavar="TARGET", help="a rank or host")
    for each in sub.choices.values():
        take_uri(each)
    args = made.parse_args(argv)
    commands = {"status": _status, "lookup": _lookup, "parentof": _parentof, "disconnect": _disconnect}
    commands[args.subcommand](args)
    return 0


def _add_status(status: Parser) -> None:
    add = status.add_argument
    add("-r", "--rank", type=rank_number, default=0, help="the subtree of this rank (0)")
    add("-v", "--verbose", action="count", default=0, help="show since when; twice: how long each answer took")
    add("-t", "--timeout", metavar="FSD", type=argument(parse_fsd), help="wait this long at most (5s), 0: without end")
    add("--summary", action="store_true", help="only the status of the subtree as a whole")
    add("--down", action="store_true", help="only what is not full")
    add("--no-pretty", action="store_true", help="one rank a line, no drawing")
    add("--no-ghost", action="store_true", help="leave out what is below ranks that are lost or offline")
    add("--json", action="store_true", help="print JSON")
    add("-L", "--color", nargs="?", choices=COLOR, const="always", default="auto", metavar="WHEN", help="colors")
    add("-H", "--highlight", metavar="TARGET", action="append", default=[], help="mark ranks or hosts, and the way")
    add("-w", "--wait", metavar="STATE", choices=STATES, help=f"first wait for one of {', '.join(STATES)}")


# --- status


def _status(args: Namespace) -> None:
    timeout = TIMEOUT if args.timeout is None else args.timeout or math.inf
    if args.wait is not None:
        _wait(args, math.inf if args.timeout is None else timeout)
    with Client.connect(args.uri) as client:
        ask = _asking(client, timeout)
        size = get_size(ask)
        check_rank(args.rank, size, f"show the status of rank {args.rank}")
        hosts = get_hosts(ask, size)
        marked = [_targets(text, hosts, size) for text in args.highlight]
        topology = get_topology(ask, size)
        gather = Gather(client, topology, timeout)
        answers = gather.run(args.rank, below=not args.summary, leaves=args.verbose > 1)
    style = Style(hosts, args.verbose, not args.no_pretty, _use_color(args.color), _union(marked))
    seen = assemble(args.rank, topology, answers)
    if args.summary:
        _print_summary(args.rank, seen[args.rank], style, as_text=not args.json)
    else:
        _print_tree(args, topology, seen, style)


class Gather:
    """Asks brokers for their health, all of a level at once; each has `timeout` seconds to answer."""

    def __init__(self, client: Client, topology: Topology, timeout: float) -> None:
        self._client = client
        self._topology = topology
        self._timeout = timeout

    def run(self, root: int, *, below: bool = True, leaves: bool = False) -> dict[int, Report | Failed]:
        """Ask `root`, and with `below` all that is there below it. Raises FluxresError where nobody knows of `root`.

        A root that does not answer is asked for at its parent.
        """
        answers = self._ask([root])
        first = answers[root]
        if isinstance(first, Failed):
            parent = self._topology.parent(root)
            answers |= {} if parent is None else self._ask([parent])
            told = None if parent is None else answers[parent]
            if not isinstance(told, Report) or root not in told.children:
                raise FluxresError(f"cannot show the status of rank {root}: {first.why}")
        todo = [root] if below else []
        while todo:
            reports = [answer for rank in todo if isinstance(answer := answers[rank], Report)]
            todo = [rank for each in reports for rank in worth_asking(each, self._topology, leaves=leaves)]
            answers |= self._ask(todo)
        return answers

    def _ask(self, ranks: list[int]) -> dict[int, Report | Failed]:
        """Ask these ranks at once; what each of them says, or why it says nothing."""
        begun = time.monotonic()
        asked = {rank: self._client.open("overlay.health", {}, nodeid=rank, streaming=False) for rank in ranks}
        answers: dict[int, Report | Failed] = {}
        for rank, matchtag in asked.items():
            reply = self._client.receive_for(matchtag, _left(begun + self._timeout))
            if reply is None:
                self._client.cancel(matchtag)
                answers[rank] = Failed(no_answer(self._timeout))
            elif reply.error is not None:
                answers[rank] = failed(reply.error)
            else:
                answers[rank] = parse_report(reply.payload, time.monotonic() - begun)
        return answers


def _print_summary(root: int, what: Seen, style: Style, *, as_text: bool) -> None:
    if as_text:
        print(describe(what, style))
    else:
        print(json.dumps({"rank": root, "status": what.status, "duration": what.duration}))


def _print_tree(args: Namespace, topology: Topology, seen: dict[int, Seen], style: Style) -> None:
    root = args.rank
    if args.down:
        seen = without_full(root, topology, seen)
    if args.no_ghost:
        seen = {rank: what for rank, what in seen.items() if not what.ghost}
    if args.json:
        print(json.dumps(as_json(root, topology, seen, style.hosts)))
    else:
        for line in draw(root, topology, seen, style):
            print(line)


def _use_color(when: str) -> bool:
    return sys.stdout.isatty() if when == "auto" else when == "always"


# --- waiting for a status


def _wait(args: Namespace, timeout: float) -> None:
    """Wait until the subtree of a rank is in a state. Raises FluxresError when the time is up.

    What a rank cannot say of itself, that it is lost or offline, its parent says.
    """
    deadline = time.monotonic() + timeout
    what = f"wait for rank {args.rank} to be {args.wait}"
    with Session(args.uri) as session:

        def ask(topic: str, payload: WireMap) -> WireMap:
            return session.call(topic, payload, idempotent=True, timeout=_left(deadline))

        size = get_size(ask)
        check_rank(args.rank, size, what)
        told_by: int | None = args.rank
        if args.wait in GONE:
            told_by = get_topology(ask, size).parent(args.rank)
        if told_by is None:
            raise UsageError(f"cannot {what}: it is the root, and has no parent to tell that")
        status = "unknown"
        handle = session.begin("overlay.monitor", {}, nodeid=told_by, streaming=True)
        while status != args.wait:
            reply = session.receive(_left(deadline))
            if reply is None:
                raise FluxresError(f"cannot {what}: after {format_fsd(timeout)} it is {status}")
            if reply.error is not None:
                raise FluxresError(f"cannot {what}: {reply.error.text}")
            report = parse_report(reply.payload)
            if told_by == args.rank:
                status = report.status
            elif args.rank in report.children:
                status = report.children[args.rank][0]
        session.end(handle)


# --- the others


def _lookup(args: Namespace) -> None:
    with Client.connect(args.uri) as client:
        ask = _asking(client)
        size = get_size(ask)
        hosts = get_hosts(ask, size)
    if not hosts:
        raise FluxresError(f"cannot look up {args.target}: the instance does not name a host for each rank")
    ranks = _targets(args.target, hosts, size)
    if args.target[:1].isdigit() or args.target.startswith("["):
        from fluxres.base.hostlist import Hostlist

        print(Hostlist(hosts.names[rank] for rank in ranks))
    else:
        print(ranks)


def _parentof(args: Namespace) -> None:
    with Client.connect(args.uri) as client:
        print(_parent(_asking(client), args.rank, f"tell the parent of rank {args.rank}"))


def _disconnect(args: Namespace) -> None:
    with Client.connect(args.uri) as client:
        ask = _asking(client)
        size = get_size(ask)
        hosts = get_hosts(ask, size)
        targets = list(_targets(args.target, hosts, size))
        if len(targets) != 1:
            raise FluxresError(f"cannot disconnect {args.target}: it is not one rank, but {len(targets)}")
        what = f"disconnect rank {targets[0]}"
        parent = _parent(ask, targets[0], what) if args.parent is None else args.parent
        check_rank(parent, size, what)
        print(
            f"fluxres-overlay: rank {hosts.label(parent)} is asked to disconnect rank {hosts.label(targets[0])}",
            file=sys.stderr,
        )
        with Explain(what):
            client.call("overlay.disconnect-subtree", {"rank": targets[0]}, nodeid=parent)


def _parent(ask: Ask, rank: int, what: str) -> int:
    size = get_size(ask)
    check_rank(rank, size, what)
    parent = get_topology(ask, size).parent(rank)
    if parent is None:
        raise FluxresError(f"cannot {what}: it is the root, and has no parent")
    return parent


# --- helpers


def _targets(text: str, hosts: Hosts, size: int) -> IdSet:
    try:
        return parse_targets(text, hosts, size)
    except ValueError as error:
        raise FluxresError(f"cannot find {text!r} in the tree: {error}") from error


def _union(sets: list[IdSet]) -> IdSet | None:
    union = None
    for each in sets:
        union = each if union is None else union | each
    return union


def _asking(client: Client, timeout: float = math.inf) -> Ask:
    """Calls of the broker that the client is connected to, each to be answered in time."""

    def ask(topic: str, payload: WireMap) -> WireMap:
        return client.call(topic, payload, timeout=None if math.isinf(timeout) else timeout)

    return ask


def _left(deadline: float) -> float | None:
    """Seconds until a deadline; None where it never comes."""
    return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
