"""`fluxres start`: a local instance of one or more brokers, for as long as a command runs.

    fluxres start [-s SIZE] [--fanout K] [--statedir DIR] [--rundir DIR] [--no-restart] [--conf KEY=VALUE]…
                  [--background] [COMMAND …]

Exit status: COMMAND's, 128+N where signal N ended it, 127 or 126 where it could not be run; 1 where the
instance did not start. SIGTERM and SIGHUP end COMMAND and then the instance; Ctrl-C is COMMAND's.

With --background the supervisor is forked off before any broker starts: it leads a session of its own, and
tells us over a pipe that the instance is online, or why not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import parser, positive
from fluxres.cli.instancedir import START_LOG, InstanceDir, parse_settings
from fluxres.cli.supervise import Supervision
from fluxres.cli.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxres.cli.common import Parser

MAX_SIZE: Final = 4096
"""Brokers of one local instance."""
ONLINE: Final = b"online"
"""What the supervisor of --background says when its instance is online; anything else is an error."""


def main(argv: list[str]) -> int:
    """Run the command."""
    made = _parser()
    args = made.parse_args(argv)
    if args.size > MAX_SIZE:
        raise FluxresError(f"cannot start {args.size} brokers here: the bound is {MAX_SIZE}")
    for option in ("statedir", "rundir"):
        if getattr(args, option) == "":
            made.error(f"argument --{option}: it is empty")
    settings = parse_settings(args.conf)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.background and command:
        made.error("--background takes no COMMAND")
    if not args.background and not command:
        command = [os.environ.get("SHELL") or "/bin/sh"]
    where = InstanceDir(args.statedir, args.rundir)
    try:
        where.write_config(args.size, args.fanout, settings)
    except BaseException:
        where.abandon()
        raise

    def supervise(announce: Callable[[], None]) -> int:
        where.sign_locks()  # here, because --background has forked in between
        now = time.monotonic()
        restart = not args.no_restart
        supervisor = Supervisor(args.size, restart=restart, temporary=where.temporary, now=now)
        broker = broker_program()
        try:
            return Supervision(
                supervisor,
                where,
                broker,
                command=command or None,
                verbose=bool(args.verbose),
                announce=announce,
            ).run()
        finally:
            if where.temporary:
                where.remove()

    if args.background:
        return _background(where, supervise)
    return supervise(lambda: None)


def _parser() -> Parser:
    made = parser("start", "Start a local instance and run COMMAND in it (default: your shell).", connects=False)
    made.usage = "fluxres start [OPTIONS] [COMMAND …]"
    made.add_argument("-s", "--size", type=positive, default=1, metavar="N", help="number of brokers (default 1)")
    made.add_argument("--fanout", type=positive, metavar="K", help="children of each broker in the tree")
    made.add_argument("--statedir", metavar="DIR", help="keep the instance's state here: it outlives the brokers")
    made.add_argument("--rundir", metavar="DIR", help="where sockets, logs and the configuration go")
    made.add_argument("--no-restart", action="store_true", help="do not restart brokers that die")
    made.add_argument(
        "--conf", action="append", default=[], metavar="KEY=VALUE", help="set a configuration key (table.key)"
    )
    made.add_argument(
        "--background",
        action="store_true",
        help="return once online, and print the URI (end: fluxres shutdown)",
    )
    made.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run")
    return made


def broker_program() -> list[str]:
    """The broker's program and first arguments: `fluxres-broker` of this installation."""
    program = os.path.join(os.path.dirname(sys.executable), "fluxres-broker")
    if os.access(program, os.X_OK):
        return [program]
    return [sys.executable, "-P", "-m", "fluxres.broker.main"]


def _background(where: InstanceDir, supervise: Callable[[Callable[[], None]], int]) -> int:
    """Supervise in a process of its own; print the URI once the instance is online."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        os.close(reading)
        _exit_with(_detached(where, supervise, writing))
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    if said != ONLINE:
        text = said.removeprefix(ONLINE).decode(errors="replace")
        raise FluxresError(text or f"cannot start the instance: its supervisor is gone (see {where.rundir})")
    print(where.uri)
    return 0


def _detached(where: InstanceDir, supervise: Callable[[Callable[[], None]], int], writing: int) -> int:
    """The supervisor's side of --background: nobody sees its terminal, its log is `start.log`."""
    os.setsid()
    log = os.open(f"{where.rundir}/{START_LOG}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nowhere), (1, log), (2, log)):
        os.dup2(source, descriptor)
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor > 2 and descriptor not in (writing, *where.locks):
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
                os.close(descriptor)
    told = False

    def announce() -> None:
        nonlocal told
        told = True
        os.write(writing, ONLINE)
        os.close(writing)

    try:
        return supervise(announce)
    except (FluxresError, OSError) as error:
        os.write(2 if told else writing, f"{error}".encode())
        return 1


def _exit_with(status: int) -> None:
    """End a forked process without the clean-up that is its parent's."""
    os._exit(status)
