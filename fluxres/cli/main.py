"""`fluxres COMMAND …`: find the command's module, import it alone, run it, and turn what goes wrong into
words.

Exit status: the command's own; 1 for an error (one line on stderr, `fluxres-COMMAND: cannot X: why`), 2 for
wrong usage, 130 after Ctrl-C, 141 when whoever read our output has gone. A traceback is shown only with -v or
FLUXRES_DEBUG.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141

NO_URI: Final = "--uri needs a URI"
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that, where they name no file, are those of writing to stdout, buffered or not."""
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""What a byte of an argument that is not UTF-8 has become."""

COMMANDS: Final = {
    "cancel": ("fluxres.cli.cancel:main", "cancel jobs"),
    "config": ("fluxres.cli.config:main", "check configuration files"),
    "dmesg": ("fluxres.cli.dmesg:main", "show the broker's log"),
    "exec": ("fluxres.cli.exec:main", "run a command on brokers' nodes"),
    "getattr": ("fluxres.cli.attr:getattr_main", "show a broker attribute"),
    "health": ("fluxres.cli.health:main", "show whether each service of a broker keeps up"),
    "job": ("fluxres.cli.job:main", "attach to, wait for, inspect and change jobs"),
    "jobs": ("fluxres.cli.jobs:main", "list jobs"),
    "keygen": ("fluxres.cli.keygen:main", "make the key that brokers know each other by"),
    "kvs": ("fluxres.cli.kvs:main", "read and write the key-value store"),
    "lsattr": ("fluxres.cli.attr:lsattr_main", "list broker attributes"),
    "overlay": ("fluxres.cli.overlay:main", "show and control the tree of brokers"),
    "ping": ("fluxres.cli.ping:main", "measure the time to a service and back"),
    "queue": ("fluxres.cli.queue:main", "show and control the job queue"),
    "resource": ("fluxres.cli.resource:main", "show resources"),
    "run": ("fluxres.cli.run:main", "run a job and wait for it"),
    "setattr": ("fluxres.cli.attr:setattr_main", "set a broker attribute"),
    "shutdown": ("fluxres.cli.shutdown:main", "end the instance"),
    "start": ("fluxres.cli.start:main", "start a local instance"),
    "submit": ("fluxres.cli.submit:main", "submit jobs"),
    "top": ("fluxres.cli.top:main", "show an instance and its jobs as they change"),
    "uptime": ("fluxres.cli.uptime:main", "show how long the instance has been running"),
    "version": ("fluxres.cli.version:main", "show versions"),
    "watch": ("fluxres.cli.watch_jobs:main", "show the output and state of jobs until they end"),
}
"""Command name -> `module:function`, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Run `fluxres` with the arguments of this process, or with `argv`; returns the exit status."""
    name = "fluxres"
    argv = sys.argv[1:] if argv is None else argv
    verbose = "-v" in argv or "--verbose" in argv
    _prepare_streams()
    try:
        name, argv = _split(argv)
        status = _run(name, argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence()
        return EXIT_BROKEN_PIPE
    except UsageError as error:
        _report(name, f"{error} (see fluxres-{name} --help)")
        return EXIT_USAGE
    except FluxresError as error:
        return _report(name, str(error))
    except OSError as error:
        unwritten = _flush()
        ours = error.errno in _NO_ROOM or (unwritten is not None and error.errno == unwritten.errno)
        if ours and error.filename is None:
            return _report(name, f"cannot write output: {error.strerror}")
        return _report(name, _words(name, error))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except UnicodeEncodeError as error:
        if not _LONE_SURROGATE.search(error.object):
            return _report(name, f"internal error: {type(error).__name__}: {error}", trace=verbose)
        return _report(name, f"{error.object!r} is not valid UTF-8")
    except Exception as error:
        return _report(name, f"internal error: {type(error).__name__}: {error}", trace=verbose)
    return status


def _prepare_streams() -> None:
    """Have all three standard streams, and let no character stop what we print.

    A descriptor that was closed becomes /dev/null: else a socket of ours would get its number, and what a job is to
    read, or what we print, would be taken from it or go there. Writing to a stdout that was closed fails, as ever.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)  # gets the lowest number: this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            opened = open(descriptor, "w" if descriptor else "r", closefd=False)  # noqa: SIM115 - for life
            setattr(sys, name, opened)
    codecs.register_error("fluxres", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="fluxres")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Where the terminal knows no ƒ, a jobid begins with f (RFC 19); other characters it lacks become `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join("f" if char == "ƒ" else "?" for char in wrong), error.end


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Take the options before the command; returns the command and its arguments."""
    position = 0
    while position < len(argv) and argv[position].startswith("-"):
        option, _, value = argv[position].partition("=")
        position += 1
        if option in ("-h", "--help"):
            return "help", []
        if option in ("-V", "--version"):
            return "version", []
        if option in ("-v", "--verbose"):
            continue
        if option == "--uri":
            if not value and position == len(argv):
                return "", [NO_URI]
            if not value:
                value = argv[position]
                position += 1
            os.environ["FLUXRES_URI"] = value
        else:
            return "", [option]
    rest = argv[position:]
    return (rest[0], rest[1:]) if rest else ("", [])


def _run(name: str, argv: list[str]) -> int:
    if name == "help":
        print(_usage())
        return 0
    if name not in COMMANDS:
        option = NO_URI if argv == [NO_URI] else f"{argv[0]!r} is no option" if argv else "no command"
        wrong = f"{name!r} is no command" if name else option
        print(f"fluxres: {wrong} (fluxres --help lists the commands)", file=sys.stderr)
        return EXIT_USAGE
    return find(name)(argv)


def find(name: str) -> Callable[[list[str]], int]:
    """Import the module of a command and return its function."""
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[list[str]], int] = getattr(__import__(module, fromlist=[function]), function)
    return command


def _usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (_where, what) in COMMANDS.items()]
    return "\n".join(["usage: fluxres [--uri URI] [-v] COMMAND …", "", *lines])


def _words(name: str, error: OSError) -> str:
    what = f" {error.filename!r}" if error.filename is not None else ""
    return f"cannot {name}{what}: {error.strerror or error}"


def _report(name: str, text: str, *, trace: bool = False) -> int:
    """Say what went wrong, in one line; with `trace` or FLUXRES_DEBUG after the traceback."""
    if not text.startswith(("cannot ", "internal error")):
        text = f"cannot {name}: {text}"
    try:
        if trace or os.environ.get("FLUXRES_DEBUG"):
            import traceback

            traceback.print_exc()
        print(f"fluxres-{name}: {' '.join(text.split())}" if name != "fluxres" else text, file=sys.stderr)
    except OSError:
        _silence()  # nobody is left to tell
    return EXIT_ERROR


def _flush() -> OSError | None:
    """Write what is still buffered; returns what keeps it from being written, and then drops it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _silence()  # else the same error comes again at exit
        return error
    return None


def _silence() -> None:
    """Send what is still buffered nowhere, so that flushing it at exit does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
