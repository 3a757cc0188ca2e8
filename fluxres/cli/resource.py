"""`fluxres resource list` and `resource status`: what there is, and what of it can be used (flux-resource(1)).

`list` is the scheduler's view: what is free, allocated and down. `status` is the view of who runs the system: which
nodes are available, drained, excluded, and whether they are online (an asterisk marks a state's offline nodes).
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final, cast

from fluxres.base.errors import ProtocolError
from fluxres.base.idset import IdSet
from fluxres.cli.common import Explain, argument, field, parser, subcommands
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
}
"""Fields, with flux-resource(1)'s names."""
JSON_FIELDS: Final = (*LIST_TITLES, "status", "reason")
"""The fields of which the others are other ways to write them."""
LIST_FORMAT: Final = "{state:>10} {nnodes:>6} {ncores:>6} {ngpus:>5} {nodelist}"
STATUS_FORMAT: Final = "{state:>10} {up:>2} {nnodes:>6} {ncores:>6} {ngpus:>5} ?:{reason:<20.20+} {nodelist}"
LIST_STATES: Final = ("free", "allocated", "down")
"""What `list` shows by default; `up` and `all` overlap with these."""
STATUS_STATES: Final = ("avail", "exclude", "draining", "drained", "torpid")
_ALIASES: Final = {"drain": ("draining", "drained")}


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("resource", "Show resources")
    sub = subcommands(made)
    for name, what, states in (
        ("list", "the scheduler's view: free, allocated, down", (*LIST_STATES, "up", "all")),
        ("status", "which nodes are available, drained, online", (*STATUS_STATES, *_ALIASES)),
    ):
        titles, shape = _columns(name)
        each: Parser = sub.add_parser(name, help=what, description=what.capitalize(), allow_abbrev=False)
        each.add_argument(
            "-s",
            "--states",
            metavar="STATES",
            type=argument(_states_parser(states)),
            help=f"only these, separated by commas: {', '.join(states)}",
        )
        each.add_argument("-o", "--format", metavar="FORMAT", default=shape, help=f"fields: {', '.join(titles)}")
        each.add_argument("-n", "--no-header", action="store_true", help="no titles")
        each.add_argument("--json", action="store_true", help="print JSON")
    args = made.parse_args(argv)
    titles, _ = _columns(args.subcommand)
    shown = OutputFormat(args.format, titles.get)
    with Session(args.uri) as session, Explain(f"{'list' if args.subcommand == 'list' else 'show'} resources"):
        rows = (_list if args.subcommand == "list" else _status)(session, args.states)
    if args.json:
        fields = [name for name in JSON_FIELDS if name in titles]
        print(json.dumps({"resources": [{name: row[name] for name in fields} for row in rows]}))
    else:
        _print(shown, rows, args)
    return 0


def _columns(subcommand: str) -> tuple[Mapping[str, str], str]:
    """The titles of a subcommand's fields, and its format."""
    return (LIST_TITLES, LIST_FORMAT) if subcommand == "list" else (STATUS_TITLES, STATUS_FORMAT)


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


def _row(state: str, what: Resources, ranks: IdSet, *, online: bool = True, reason: str = "") -> dict[str, FieldValue]:
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


def _status(session: Session, states: Sequence[str] | None) -> list[dict[str, FieldValue]]:
    status = session.call("resource.status", {}, nodeid=0, idempotent=True)
    scheduled = session.call("resource.sched-status", {}, nodeid=0, idempotent=True)
    everything, busy = _resources(status, "R"), _resources(scheduled, "allocated").ranks
    offline = _ids(field(status, "offline", str))
    rows = []
    for state, reason, ranks in _groups(status, everything.ranks | offline | _ids(field(status, "online", str)), busy):
        if state not in (states or STATUS_STATES):
            continue
        for some, online in ((ranks - offline, True), (ranks & offline, False)):
            if some or (states and online and not ranks):
                rows.append(_row(state, everything.only(some), some, online=online, reason=reason))
    return rows


def _groups(status: WireMap, everything: IdSet, busy: IdSet) -> list[tuple[str, str, IdSet]]:
    """State, reason and ranks of each group of nodes; every state is there at least once."""
    exclude, torpid = (_ids(field(status, key, str)) for key in ("exclude", "torpid"))
    drain = field(status, "drain", dict)
    drained = IdSet()
    found: dict[tuple[str, str], IdSet] = {}
    for key, info in cast("Mapping[str, WireMap]", drain).items():
        ranks = _ids(key)
        drained |= ranks
        reason = str(info.get("reason") or "") if isinstance(info, dict) else ""
        for state, some in (("draining", ranks & busy), ("drained", ranks - busy)):
            if some:
                found[state, reason] = found.get((state, reason), IdSet()) | some
    found["avail", ""] = everything - exclude - torpid - drained
    found["exclude", ""] = exclude
    found["torpid", ""] = torpid - drained - exclude
    for state in STATUS_STATES:
        if not any(name == state for name, _ in found):
            found[state, ""] = IdSet()
    order = sorted(found, key=lambda key: STATUS_STATES.index(key[0]))
    return [(state, reason, found[state, reason]) for state, reason in order]


def _ids(text: str) -> IdSet:
    try:
        return IdSet.parse(text)
    except ValueError as error:
        raise ProtocolError(f"cannot use the broker's answer: {error}") from error
