"""The forker: one process that has imported a broker's program, and forks a broker for each rank of a local instance.

Importing takes a broker longer than everything else that it does to come up, and is the same for all of them. So
`fluxres start -s N` starts one process for the first bring-up, which forks N times. It has one thread and opens
nothing, so that a fork of it is a clean start. A broker that is started later is no fork.

    fluxres start --posix_spawn--> forker --fork--> broker 0, 1, …
          ^------- `RANK PID`, by each broker -------'

Each broker reports itself, before it does anything else. So no broker is at work that was not reported, and the end of
the pipe, when the forker has exited, says that no report is to come: whoever is missing was not forked, or died before
it had done anything. A broker that cannot report ends, because nobody supervises it. The supervisor is a child
subreaper (prctl(2)), which becomes the brokers' parent when the forker exits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from random import Random
from types import ModuleType
from typing import Final

from fluxres.base.errors import FluxresError

ARG_START, ARG_END = 45, 46
"""Where the command line is in memory: fields of /proc/self/stat (proc(5): 48 and 49) after the process's name."""
LOG_MODE: Final = 0o600
NOT_SUPERVISED: Final = 1
"""Exit status of a broker that could not report itself."""


def fork_each(ranks: Iterable[int], report: int, logs: str | None) -> int | None:
    """Fork a broker for each of `ranks`; like fork(2), this returns in all processes.

    Returns None in the forker, which then has to end without any clean-up, and its rank in each broker. That has
    reported itself to the descriptor `report`, leads a session, and writes to its log in the directory `logs`, unless
    there is none. Raises FluxresError: in the forker where it cannot fork, in a broker where it cannot open its log.
    """
    chance = _chance()
    gc.freeze()  # what was imported lives on: no collection need look at it, and its pages stay shared
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in ranks:
        try:
            pid = os.fork()
        except OSError as error:
            raise FluxresError(f"cannot fork the broker of rank {rank}: {error.strerror}") from error
        if pid == 0:
            _report(rank, report)
            os.setsid()
            if logs is not None:
                _write_to(log_path(logs, rank))
            for each in chance:
                each.seed()
            return rank
    return None


def log_path(logs: str, rank: int) -> str:
    """The path of a rank's log in the directory `logs`."""
    return f"{logs}/broker-{rank}.log"


def show_arguments(arguments: Sequence[str]) -> None:
    """Let ps(1) show these arguments of our program instead of those that it was started with, where they fit."""
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    with contextlib.suppress(OSError):  # it is for people, and not every kernel allows it
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[ARG_START]), int(fields[ARG_END])
        line = command_line([*program, *arguments], end - start)
        if line is not None:
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                memory.seek(start)
                memory.write(line)


def command_line(arguments: Sequence[str], room: int) -> bytes | None:
    """A command line as it is in memory, which fills `room` bytes; None where it does not fit."""
    line = b"".join(os.fsencode(each) + b"\0" for each in arguments)
    return line.ljust(room, b"\0") if len(line) <= room else None


def _report(rank: int, report: int) -> None:
    try:
        os.write(report, b"%d %d\n" % (rank, os.getpid()))  # short, so it is written whole
    except BrokenPipeError:
        os._exit(NOT_SUPERVISED)
    os.close(report)


def _write_to(path: str) -> None:
    """Have standard output and standard error appended to a file."""
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, LOG_MODE)
    except OSError as error:
        raise FluxresError(f"cannot open log {path}: {error.strerror}") from error
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)


def _chance() -> list[Random]:
    """The random generators of the modules that are imported, Trio's scheduler's for one: no two brokers share any."""
    modules = [each for each in sys.modules.values() if isinstance(each, ModuleType)]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Random)]
