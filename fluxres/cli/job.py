"""`fluxres job SUBCOMMAND`: find the subcommand's module and import it alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

SUBCOMMANDS: Final = {
    "attach": ("fluxres.cli.job_attach:main", "show a job's output and exit with its status"),
    "cancel": ("fluxres.cli.cancel:main", "cancel jobs"),
    "eventlog": ("fluxres.cli.job_events:eventlog_main", "show a job's eventlog"),
    "id": ("fluxres.cli.job_info:id_main", "convert jobids"),
    "info": ("fluxres.cli.job_info:info_main", "show a job's jobspec, R or eventlog as it is stored"),
    "kill": ("fluxres.cli.job_control:kill_main", "send a signal to running jobs"),
    "last": ("fluxres.cli.job_info:last_main", "show the latest jobids"),
    "raise": ("fluxres.cli.job_control:raise_main", "raise an exception on jobs"),
    "status": ("fluxres.cli.job_wait:status_main", "wait for jobs and exit with their status"),
    "urgency": ("fluxres.cli.job_control:urgency_main", "change a job's urgency"),
    "wait": ("fluxres.cli.job_wait:wait_main", "wait for jobs to end"),
    "wait-event": ("fluxres.cli.job_events:wait_event_main", "wait for an event of a job"),
}
"""Subcommand -> `module:function`, and what it does."""
EXIT_USAGE: Final = 2


def main(argv: list[str]) -> int:
    """`fluxres job`."""
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not argv or argv[0] not in SUBCOMMANDS:
        wrong = f"{argv[0]!r} is no subcommand" if argv else "a subcommand is missing"
        print(f"fluxres-job: {wrong} (fluxres job --help lists them)", file=sys.stderr)
        return EXIT_USAGE
    module, _, function = SUBCOMMANDS[argv[0]][0].partition(":")
    command: Callable[[list[str]], int] = getattr(__import__(module, fromlist=[function]), function)
    return command(argv[1:])


def _usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (_where, what) in SUBCOMMANDS.items()]
    return "\n".join(["usage: fluxres job SUBCOMMAND …", "", *lines])
