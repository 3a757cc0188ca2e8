"""`fluxres resource drain`, `undrain` and `declare-lost`: taking nodes out of use (flux-resource(1)).

Targets are an idset of ranks or a hostlist; a host means all the ranks on it. A drained node gets no new jobs, and what
runs there runs on. A node that is declared lost is offline and will not be waited for any longer: its parts of jobs end
with an exception, and it stays drained until it is back and has dealt with what ran there.
"""

from __future__ import annotations

import errno
from argparse import REMAINDER
from typing import TYPE_CHECKING

from fluxres.base.errors import FluxresError, RpcError
from fluxres.cli.common import Explain, Parser, UsageError, take_uri
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction
    from collections.abc import Callable

    from fluxres.wire.payload import WireMap

_TARGETS = "ranks (an idset) or hosts (a hostlist)"


def add_drain(sub: _SubParsersAction[Parser], show: Callable[[Namespace], int]) -> Parser:
    """Add `drain`, which without targets is `show`; returns its parser."""
    made = _add(sub, "drain", "give nodes no new jobs; without targets, show which are drained", None)
    _add_modes(made, "are drained already", "overwrite the reason; twice, the time as well")
    made.add_argument("targets", metavar="TARGETS", nargs="?", help=_TARGETS)
    _add_reason(made)

    def run(args: Namespace) -> int:
        return show(args) if args.targets is None else _drain(args)

    made.set_defaults(run=run)
    return made


def add_others(sub: _SubParsersAction[Parser]) -> None:
    """Add `undrain` and `declare-lost`."""
    undrain = _add(sub, "undrain", "give nodes jobs again", _undrain)
    _add_modes(undrain, "are not drained", "the same, for scripts written for flux")
    lost = _add(sub, "declare-lost", "wait no longer for offline nodes: end their parts of jobs", _declare_lost)
    for each in (undrain, lost):
        each.add_argument("targets", metavar="TARGETS", help=_TARGETS)
        _add_reason(each)


def _add(sub: _SubParsersAction[Parser], name: str, what: str, run: Callable[[Namespace], int] | None) -> Parser:
    made = sub.add_parser(name, help=what, description=what.capitalize(), allow_abbrev=False)
    made.set_defaults(run=run)
    take_uri(made)
    return made


def _add_modes(to: Parser, already: str, force: str) -> None:
    to.add_argument("-u", "--update", action="store_true", help=f"leave targets alone that {already}; do not fail")
    to.add_argument("-f", "--force", action="count", default=0, help=f"do not fail where targets {already}: {force}")


def _add_reason(to: Parser) -> None:
    reason = to.add_argument("reason", metavar="REASON", nargs=REMAINDER, help="why: it is shown and logged")
    reason.required = False  # else it is listed among what is missing, where TARGETS is


def _drain(args: Namespace) -> int:
    with Session(args.uri) as session:
        try:
            _call(session, "resource.drain", _payload(args))
        except RpcError as error:
            hint = " (--force replaces the reason)" if error.errnum == errno.EEXIST else ""
            raise FluxresError(f"cannot drain {_named(args)}: {error}{hint}") from error
    return 0


def _undrain(args: Namespace) -> int:
    with Session(args.uri) as session, Explain(f"undrain {_named(args)}"):
        _call(session, "resource.undrain", _payload(args))
    return 0


def _declare_lost(args: Namespace) -> int:
    reason: WireMap = {"reason": " ".join(args.reason)} if args.reason else {}
    with Session(args.uri) as session, Explain(f"declare {_named(args)} lost"):
        _call(session, "resource.declare-lost", {"ranks": args.targets, **reason})
    return 0


def _named(args: Namespace) -> str:
    targets: str = args.targets
    return targets or "''"


def _call(session: Session, topic: str, payload: WireMap) -> None:
    session.call(topic, payload, nodeid=0)


def _payload(args: Namespace) -> WireMap:
    """The request of drain and undrain. Raises UsageError."""
    if args.update and args.force:
        raise UsageError(f"cannot {args.subcommand} with both --update and --force: give one")
    payload: WireMap = {"targets": args.targets}
    if args.update or args.force:
        payload["mode"] = "update" if args.update else "overwrite" if args.force == 1 else "force-overwrite"
    if args.reason:
        payload["reason"] = " ".join(args.reason)
    return payload
