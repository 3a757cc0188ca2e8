"""`fluxres-broker`: one broker in the foreground, as a loop of incarnations.

A panic ends an incarnation and the loop begins the next, in this process; with `--on-panic=exit` it ends the process
instead, for sites that want systemd to do the loop. SIGTERM and SIGINT shut down cleanly: exit status 0, jobs run on.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import socket
import sys
from typing import Final

import trio

from fluxres.base.errors import FluxresError, Refusal
from fluxres.base.stdio import hold_standard_descriptors
from fluxres.broker import logbuffer
from fluxres.broker.config import Config, load
from fluxres.broker.incarnation import Incarnation
from fluxres.broker.statedir import Statedir

log = logging.getLogger("fluxres.broker")

BACKOFF_MIN: Final = 0.05
BACKOFF_MAX: Final = 10.0
"""Seconds before the next incarnation, doubled at each panic in a row, with full jitter."""
STEADY: Final = 30.0
"""Seconds after which an incarnation counts as a success, and the back-off begins anew."""


def main() -> int:
    """The entry point. Exit status 0 after a clean shutdown, 1 for errors, 2 for usage."""
    hold_standard_descriptors()
    args = _arguments()
    buffer = logbuffer.install(args.rank)
    try:
        config = load(args.config)
        if not 0 <= args.rank < config.bootstrap.size:
            raise FluxresError(f"cannot be rank {args.rank}: the instance has {config.bootstrap.size} ranks")
        if config.bootstrap.size > 1:
            raise FluxresError(
                f"cannot start an instance of {config.bootstrap.size} brokers: this version has no overlay; "
                "set bootstrap.size to 1"
            )
        statedir = Statedir(os.path.join(config.broker.statedir, str(args.rank)))
    except FluxresError as error:
        print(f"fluxres-broker: {error}", file=sys.stderr)
        return 1
    try:
        return trio.run(_run, config, args.rank, statedir, buffer, args.on_panic == "exit")
    finally:
        statedir.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fluxres-broker", description="Run one broker of a fluxres instance.")
    parser.add_argument("--config", required=True, metavar="PATH", help="a TOML file, or a directory of them")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="which broker of the instance this is")
    parser.add_argument("--on-panic", choices=("restart", "exit"), default="restart", help="what a panic does")
    return parser.parse_args()


async def _run(config: Config, rank: int, statedir: Statedir, buffer: logbuffer.LogBuffer, exits: bool) -> int:
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, shutdown)
        status = await _live(config, rank, statedir, buffer, shutdown, exits)
        nursery.cancel_scope.cancel()
    return status


async def _live(
    config: Config,
    rank: int,
    statedir: Statedir,
    buffer: logbuffer.LogBuffer,
    shutdown: trio.Event,
    exits: bool,
) -> int:
    """The loop of incarnations, until a clean shutdown."""
    backoff = BACKOFF_MIN
    was_online = False

    def online() -> None:
        nonlocal was_online
        was_online = True
        _notify("READY=1")

    while True:
        begun = trio.current_time()
        try:
            incarnation = Incarnation(
                config=config,
                rank=rank,
                statedir=statedir,
                identity=statedir.begin_incarnation(),
                logbuffer=buffer,
                shutdown=shutdown,
                online=online,
            )
            await incarnation.run()
        except Exception as error:
            _log_panic(error)
            if not was_online and _is_refusal(error):
                print(f"fluxres-broker: {'; '.join(map(str, _leaves(error)))}", file=sys.stderr)
                return 1  # it will be so the next time too
        else:
            _notify("STOPPING=1")
            return 0
        if exits or shutdown.is_set():
            return 1
        if trio.current_time() - begun > STEADY:
            backoff = BACKOFF_MIN
        with trio.move_on_after(random.uniform(0, backoff)):
            await shutdown.wait()
        backoff = min(2 * backoff, BACKOFF_MAX)


def _log_panic(error: Exception) -> None:
    """Say why an incarnation ended: in a line where that is all there is to say, else with the traceback."""
    causes = _leaves(error)
    if all(isinstance(cause, FluxresError) for cause in causes):
        log.error("panic: %s", "; ".join(str(cause) for cause in causes))
    else:
        log.error("panic: %s", "; ".join(repr(cause) for cause in causes), exc_info=error)


def _is_refusal(error: Exception) -> bool:
    """Whether a person has to mend what went wrong: a store that is refused, a socket that is taken."""
    return all(isinstance(cause, Refusal) for cause in _leaves(error))


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


async def _watch_signals(shutdown: trio.Event, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for signum in signals:
            log.info("shutting down: %s", signal.Signals(signum).name)
            shutdown.set()


def _notify(state: str) -> None:
    """Tell the supervisor, systemd or `fluxres start`, as sd_notify(3) does."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(f"{state}\nMAINPID={os.getpid()}\n".encode(), address)
    except OSError as error:
        log.warning("cannot notify %s: %s", path, error.strerror)


if __name__ == "__main__":
    sys.exit(main())
