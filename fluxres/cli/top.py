"""`fluxres top`: an instance at a glance, as it changes (flux-top(1)): who is there, what is used, which jobs run.

It shows the status feed (`fluxres.cli.feed`) on the whole terminal until `q`; the death of the broker is said, leaves
the last picture, and is over when the broker is back. `--once` prints one picture, for a file or a pipe as well.
Keys: `fluxres.cli.top_keys`. What is shown: `fluxres.cli.top_view`. The terminal: `fluxres.cli.top_screen`.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import UsageError, parser
from fluxres.cli.feed import Feed
from fluxres.cli.spans import plain
from fluxres.cli.top_keys import Controls
from fluxres.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.cli.common import Parser

TOPICS: Final = ("instance", "overlay", "resources", "jobs", "events")
COLOR: Final = ("always", "never", "auto")


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _options().parse_args(argv)
    if args.target is not None and args.uri is not None:
        raise UsageError("give either TARGET or --uri")
    if not args.once and not (os.isatty(0) and os.isatty(1)):
        raise FluxresError("cannot top: standard input and output are no terminal (--once prints one picture)")
    with Session(args.uri or args.target) as session:
        return _once(session, args) if args.once else _live(session, args)


def _options() -> Parser:
    made = parser("top", "Show an instance and its jobs as they change. Keys: h shows them, q quits.")
    add = made.add_argument
    add("--once", action="store_true", help="print one picture, with all jobs, and exit")
    add("-q", "--queue", metavar="NAME", default="", help="only jobs in this queue")
    add("-L", "--color", nargs="?", choices=COLOR, const="always", default="auto", metavar="WHEN", help="colors")
    add("target", metavar="TARGET", nargs="?", help="the URI of the instance")
    return made


def _once(session: Session, args: Namespace) -> int:
    from fluxres.cli.top_view import page, scene

    feed = Feed(session, TOPICS)
    while not feed.first:
        feed.tick()
        reply = session.receive(feed.poll_timeout())
        if reply is not None:
            feed.take(reply)
    shown = scene(feed.docs, feed.link(), Controls(queue=args.queue), feed.now(), username)
    lines = page(shown, shutil.get_terminal_size().columns)
    if args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ):
        from fluxres.cli.top_screen import print_lines

        print_lines(lines)
    else:
        print("\n".join(plain(line).rstrip() for line in lines))
    return 0


def _live(session: Session, args: Namespace) -> int:
    from fluxres.cli.top_screen import Top

    color = {"always": True, "never": False}.get(args.color)
    return Top(session, Feed(session, TOPICS), Controls(queue=args.queue), username, color).run()


@cache
def username(userid: int) -> str:
    """The name of a user, the number where there is none."""
    from pwd import getpwuid

    try:
        return getpwuid(userid).pw_name
    except KeyError:
        return str(userid)
