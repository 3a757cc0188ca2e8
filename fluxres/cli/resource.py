"""`fluxres resource`: what there is, what of it can be used, and who takes it out of use (flux-resource(1)).

`list` is the scheduler's view: what is free, allocated and down. `status` is the view of who runs the system: which
nodes are available, drained, excluded, and whether they are online (an asterisk marks a state's offline nodes). `drain`
without targets is the part of it that tells of drained nodes. What changes something is in `cli.resource_drain`.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import ProtocolError
from fluxres.base.idset import IdSet
from fluxres.cli import resource_drain
from fluxres.cli.common import Explain, argument, field, number, parser, subcommands, take_uri
from fluxres.cli.format import OutputFormat
from fluxres.cli.resource_set import EMPTY, Resources, parse_resources
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping, Sequence

    from fluxres.cli.common import Parser
    from fluxres.cli.format import FieldValue
    from fluxres.wire.payload import WireMap

LIST_TITLES: Final = {name: name.upper() for name in ("state", "nnodes", "ncores", "ngpus", "ranks", "nodelist")}
STATUS_TITLES: Final = {
    **LIST_TITLES,
    "status": "STATUS",
    "reason": "REASON",
    "statex": "STATE",
    "up": "UP",
    "up.ascii": "UP",
    "timestamp": "TIMESTAMP",
}
"""Fields, with flux-resource(1)'s names."""
JSON_FIELDS: Final = (*LIST_TITLES, "status", "reason", "timestamp")
"""The fields of which the others are other ways to write them."""
LIST_FORMAT: Final = "{state:>10} {nnodes:>6} {ncores:>6} {ngpus:>5} {nodelist}"
STATUS_FORMAT: Final = "{state:>10} {up:>2} {nnodes:>6} {ncores:>6} {ngpus:>5} ?:{reason:<20.20+} {nodelist}"
DRAIN_FORMAT: Final = "{timestamp!d:%b%d %R::<12} {state:<8.8} {reason:<30.30+} {nodelist}"
LIST_STATES: Final = ("free", "allocated", "down")
"""What `list` shows by default; `up` and `all` overlap with these."""
STATUS_STATES: Final = ("avail", "exclude", "draining", "drained", "torpid")
_ALIASES: Final = {"drain": ("draining", "drained")}


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("resource", "Show resources, and take them out of use")
    sub = subcommands(made)
    for name, what, states in (
        ("list", "the scheduler's view: free, allocated, down", (*LIST_STATES, "up", "all")),
        ("status", "which nodes are available, drained, online", (*STATUS_STATES, *_ALIASES)),
    ):
        each: Parser = sub.add_parser(name, help=what, description=what.capitalize(), allow_abbrev=False)
        each.set_defaults(run=_show)
        take_uri(each)
        each.add_argument(
            "-s",
            "--states",
            metavar="STATES",
            type=argument(_states_parser(states)),
            help=f"only these, separated by commas: {', '.join(states)}",
        )
        _add_output(each, *_columns(name))
    _add_output(resource_drain.add_drain(sub, lambda args: _show(args, _ALIASES["drain"])), *_columns("drain"))
    resource_drain.add_others(sub)
    args = made.parse_args(argv)
    run: Callable[[Namespace], int] = args.run
    return run(args)


def _add_output(to: Parser, titles: Mapping[str, str], shape: str) -> None:
    to.add_argument("-o", "--format", metavar="FORMAT", default=shape, help=f"fields: {', '.join(titles)}")
    to.add_argument("-n", "--no-header", action="store_true", help="no titles")
    to.add_argument("--json", action="store_true", help="print JSON")


def _show(args: Namespace, states: Sequence[str] | None = None) -> int:
    """Show resources; `states` are those of `drain`, which leaves out what there is nothing of."""
    titles, _ = _columns(args.subcommand)
    shown = OutputFormat(args.format, titles.get)
    with Session(args.uri) as session, Explain(f"{'list' if args.subcommand == 'list' else 'show'} resources"):
        if args.subcommand == "list":
            rows = _list(session, args.states)
        else:
            stamped = args.json or "timestamp" in args.format
            rows = _status(session, states or args.states, stamped=stamped)
    if states:
        rows = [row for row in rows if row["nnodes"]]
    if args.json:
        fields = [name for name in JSON_FIELDS if name in titles]
        print(json.dumps({"resources": [{name: row[name] for name in fields} for row in rows]}))
    else:
        _print(shown, rows, args)
    return 0


def _columns(subcommand: str) -> tuple[Mapping[str, str], str]:
    """The titles of a subcommand's fields, and its format."""
    if subcommand == "list":
        return LIST_TITLES, LIST_FORMAT
    return STATUS_TITLES, DRAIN_FORMAT if subcommand == "drain" else STATUS_FORMAT


def _states_parser(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        states: list[str] = []
        for name in text.lower().split(","):
            if name not in known:
                raise ValueError(f"state {name!r} is none of {', '.join(known)}")
            states += _ALIASES.get(name, (name,))
        return tuple(dict.fromkeys(states))

    return parse


def _print(shown: OutputFormat, rows: Sequence[Mapping[str, FieldValue]], args: Namespace) -> None:
    getters = [row.__getitem__ for row in rows]
    shown.fit(getters, with_header=not args.no_header)
    if not args.no_header:
        print(shown.header().rstrip())
    for row in getters:
        print(shown.row(row).rstrip())


def _row(
    state: str, what: Resources, ranks: IdSet, *, online: bool = True, reason: str = "", timestamp: float = 0.0
) -> dict[str, FieldValue]:
    """One line: `what` some nodes have, and which `ranks` those are."""
    return {
        "state": state if online else f"{state}*",
        "statex": state,
        "status": "online" if online else "offline",
        "up": _mark(online),
        "up.ascii": "y" if online else "n",
        "nnodes": len(ranks),
        "ncores": what.ncores,
        "ngpus": what.ngpus,
        "ranks": str(ranks),
        "nodelist": str(what.hosts),
        "reason": reason,
        "timestamp": timestamp,
    }


def _mark(yes: bool) -> str:
    mark = "✔" if yes else "✗"
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "y" if yes else "n"
    return mark


# --- the scheduler's view


def _list(session: Session, states: Sequence[str] | None) -> list[dict[str, FieldValue]]:
    answer = session.call("resource.sched-status", {}, nodeid=0, idempotent=True)
    everything, allocated, down = (_resources(answer, key) for key in ("all", "allocated", "down"))
    up = everything - down
    kinds = {"up": up, "down": down, "allocated": allocated, "free": up - allocated, "all": everything}
    return [_row(state, kinds[state], kinds[state].ranks) for state in states or LIST_STATES]


def _resources(answer: WireMap, key: str) -> Resources:
    """An R of the broker's answer; null is none. Raises ProtocolError."""
    value = answer.get(key)
    if value is None:
        return EMPTY
    if not isinstance(value, dict):
        raise ProtocolError(f"cannot use the broker's answer: its {key} is {value!r}")
    return parse_resources(value)


# --- the view of who runs the system


def _status(session: Session, states: Sequence[str] | None, *, stamped: bool) -> list[dict[str, FieldValue]]:
    """The rows; with `stamped`, nodes drained at different times are apart also where the reason is the same."""
    status = session.call("resource.status", {}, nodeid=0, idempotent=True)
    scheduled = session.call("resource.sched-status", {}, nodeid=0, idempotent=True)
    everything, busy = _resources(status, "R"), _resources(scheduled, "allocated").ranks
    offline = _ids(field(status, "offline", str))
    rows = []
    known = everything.ranks | offline | _ids(field(status, "online", str))
    for (state, reason, timestamp), ranks in _groups(status, known, busy, stamped=stamped):
        if state not in (states or STATUS_STATES):
            continue
        for some, online in ((ranks - offline, True), (ranks & offline, False)):
            if some or (states and online and not ranks):
                what = everything.only(some)
                rows.append(_row(state, what, some, online=online, reason=reason, timestamp=timestamp))
    return rows


def _groups(
    status: WireMap, everything: IdSet, busy: IdSet, *, stamped: bool
) -> list[tuple[tuple[str, str, float], IdSet]]:
    """State, reason, timestamp and ranks of each group of nodes; every state is there at least once."""
    exclude, torpid = (_ids(field(status, key, str)) for key in ("exclude", "torpid"))
    drain = field(status, "drain", dict)
    drained = IdSet()
    found: dict[tuple[str, str, float], IdSet] = {}
    for key, info in cast("Mapping[str, WireMap]", drain).items():
        ranks = _ids(key)
        drained |= ranks
        reason = str(info.get("reason") or "") if isinstance(info, dict) else ""
        since = number(info, "timestamp") if stamped else 0.0
        for state, some in (("draining", ranks & busy), ("drained", ranks - busy)):
            if some:
                found[state, reason, since] = found.get((state, reason, since), IdSet()) | some
    found["avail", "", 0.0] = everything - exclude - torpid - drained
    found["exclude", "", 0.0] = exclude
    found["torpid", "", 0.0] = torpid - drained - exclude
    for state in STATUS_STATES:
        if not any(name == state for name, _, _ in found):
            found[state, "", 0.0] = IdSet()
    return sorted(found.items(), key=lambda item: (STATUS_STATES.index(item[0][0]), item[0][2]))


def _ids(text: str) -> IdSet:
    try:
        return IdSet.parse(text)
    except ValueError as error:
        raise ProtocolError(f"cannot use the broker's answer: {error}") from error
