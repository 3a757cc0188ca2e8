"""`fluxres-broker`: one broker in the foreground, as a loop of incarnations.

A panic ends an incarnation and the loop begins the next, in this process; with `--on-panic=exit` it ends the process
instead, for sites that want systemd to do the loop. SIGTERM and SIGINT shut down cleanly: exit status 0, jobs run on.

With `--fork-ranks` it is no broker, but forks some: see `fluxres.broker.forker`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import trio

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.base.stdio import hold_standard_descriptors
from fluxres.broker import forker, logbuffer
from fluxres.broker.config import find_rank, load
from fluxres.broker.loop import BrokerLoop
from fluxres.broker.platform import LocalPlatform
from fluxres.broker.statedir import Statedir

if TYPE_CHECKING:
    from typing import NoReturn

log = logging.getLogger("fluxres.broker")


def main() -> int:
    """The entry point. Exit status 0 after a clean shutdown, 1 for errors, 2 for usage."""
    hold_standard_descriptors()
    args = _arguments()
    try:
        if args.fork_ranks is not None:
            args.rank = _fork(args)
        return _broker(args)
    except FluxresError as error:
        print(f"fluxres-broker: {error}", file=sys.stderr)
        return 1


def _broker(args: argparse.Namespace) -> int:
    """Be the broker of one rank; its exit status. Raises FluxresError."""
    config = load(args.config)
    rank = find_rank(config, socket.gethostname()) if args.rank is None else args.rank
    if not 0 <= rank < config.size:
        raise FluxresError(f"cannot be rank {rank}: the instance has {config.size} ranks")
    buffer = logbuffer.install(rank)
    with contextlib.closing(Statedir(os.path.join(config.broker.statedir, str(rank)))) as statedir:
        loop = BrokerLoop(
            config=config,
            rank=rank,
            topology=config.topology(),
            statedir=statedir,
            platform=LocalPlatform(config, rank, statedir),
            logbuffer=buffer,
            notify=_notify,
            exits=args.on_panic == "exit",
        )
        return trio.run(_run, loop)


def _fork(args: argparse.Namespace) -> int:
    """Be the forker; returns in its forks only, which are brokers: their ranks. Raises FluxresError."""
    import encodings.ascii  # noqa: F401 (what every broker imports only when it needs it)
    import tomllib  # noqa: F401

    rank = forker.fork_each(args.fork_ranks, args.report, args.logs)
    if rank is None:
        os._exit(0)
    forker.show_arguments(["--config", args.config, "--rank", str(rank)])
    return rank


class _Parser(argparse.ArgumentParser):
    """A parser whose wrong usage is one line and exit status 2, as that of `fluxres`."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="fluxres-broker", description="Run one broker of a fluxres instance.")
    parser.add_argument("--config", required=True, metavar="PATH", help="a TOML file, or a directory of them")
    parser.add_argument("--rank", type=int, metavar="N", help="which broker this is (default: by host name)")
    parser.add_argument("--on-panic", choices=("restart", "exit"), default="restart", help="what a panic does")
    forking = parser.add_argument_group("for fluxres start")
    forking.add_argument(
        "--fork-ranks", type=IdSet.parse, metavar="IDSET", help="fork a broker for each of these ranks"
    )
    forking.add_argument("--report", type=int, metavar="FD", help="where each of them writes its rank and pid")
    forking.add_argument("--logs", metavar="DIR", help="where their logs are (default: they have none)")
    args = parser.parse_args()
    if (args.fork_ranks is None) != (args.report is None) or (args.fork_ranks and args.rank is not None):
        parser.error("--fork-ranks needs --report, and replaces --rank")
    return args


async def _run(loop: BrokerLoop) -> int:
    """Run the broker until a clean shutdown, or a refusal."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, loop.shutdown)
        status = await loop.run()
        nursery.cancel_scope.cancel()
    if loop.refusal:
        print(f"fluxres-broker: {loop.refusal}", file=sys.stderr)
    return status


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
