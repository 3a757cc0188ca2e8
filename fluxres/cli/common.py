"""What the commands share: the argument parser, argument types, and output.

Kept small: every command imports it.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Final, TypeVar

from fluxres.base.errors import FluxresError, ProtocolError, RpcError
from fluxres.base.jobid import f58
from fluxres.wire.messages import NODEID_ANY

if TYPE_CHECKING:
    from argparse import _SubParsersAction
    from collections.abc import Callable
    from typing import NoReturn

    from fluxres.client import Client
    from fluxres.wire.payload import WireMap

T = TypeVar("T")

FORCE_ASCII: Final = "FLUX_F58_FORCE_ASCII"
"""The environment variable that makes jobids begin with `f` (flux-environment(7)); being set is enough."""
URI_HELP: Final = "the broker's socket, local:///path (default: FLUXRES_URI)"
UNPRINTABLE: Final = "?"
"""What stands for a control character of a name or note: no job may drive the terminal that shows it."""


class UsageError(FluxresError):
    """Options or arguments that make no sense: exit status 2, as for what the parser itself refuses."""


class Parser(ArgumentParser):
    """An argument parser whose wrong usage is one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser(command: str, description: str, *, usage: str | None = None, connects: bool = True) -> Parser:
    """The parser of `fluxres COMMAND`, with --uri (where the command connects) and -v.

    `usage` is what follows the program's name in the usage line, where argparse's own is not good enough.
    Programs are named `fluxres-COMMAND` in errors.
    """
    made = Parser(
        prog=f"fluxres-{command}",
        usage=None if usage is None else f"fluxres {command} {usage}",
        description=description,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    if connects:
        made.add_argument("--uri", metavar="URI", help=URI_HELP)
    made.add_argument("-v", "--verbose", action="count", default=0, help="say more, tracebacks included")
    return made


def subcommands(of: Parser) -> _SubParsersAction[Parser]:
    """Give a parser subcommands, one of which is then required; the one chosen is in `args.subcommand`."""
    return of.add_subparsers(dest="subcommand", metavar="COMMAND", required=True, parser_class=Parser)


def take_uri(to: Parser) -> None:
    """Let a subcommand take --uri as well: it is that of the whole command."""
    to.add_argument("--uri", metavar="URI", default=SUPPRESS, help=URI_HELP)


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make an argparse type of a function that raises ValueError or FluxresError with a text for people."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except (ValueError, FluxresError) as error:
            raise ArgumentTypeError(str(error)) from error

    return checked


def whole_number(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    number = whole_number(text)
    if not number:
        raise ArgumentTypeError(f"{text!r} is not above 0")
    return number


class Explain:
    """A context manager that turns an error response into `cannot WHAT: why`."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RpcError):
            why = error.text
            raise FluxresError(why if why.startswith("cannot ") else f"cannot {self._what}: {why}") from error


def printable(text: str) -> str:
    """`text` with a `?` for each character that is none to be seen, line ends included."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else UNPRINTABLE for char in text)


def id_text(jobid: int) -> str:
    """A jobid as commands print it: in base 58, behind `f` where FLUX_F58_FORCE_ASCII is set, else behind `ƒ`."""
    return f58(jobid, ascii=FORCE_ASCII in os.environ)


def write_bytes(data: bytes, descriptor: int = 1) -> None:
    """Write all of `data` to stdout (2: stderr) as it is, after what was printed before.

    Raises FluxresError; BrokenPipeError ends the command quietly.
    """
    stream = sys.stdout if descriptor == 1 else sys.stderr
    stream.flush()
    view = memoryview(data)
    while view:
        view = view[write_some(descriptor, view) :]


def write_some(descriptor: int, data: memoryview) -> int:
    """Write what a descriptor takes of `data`; returns how many bytes. Raises as `write_bytes` does."""
    try:
        return os.write(descriptor, data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FluxresError(f"cannot write output: {error.strerror}") from error


def field(payload: WireMap, key: str, kind: type[T]) -> T:
    """`payload[key]`, which must be a `kind`. Raises ProtocolError."""
    value = payload.get(key)
    if isinstance(value, kind):
        return value
    raise ProtocolError(f"cannot use the broker's answer: its {key} is {value!r}")


def number(payload: WireMap, key: str) -> float:
    """`payload[key]`, which must be a number. Raises ProtocolError."""
    value = payload.get(key)
    if isinstance(value, int | float):
        return float(value)
    raise ProtocolError(f"cannot use the broker's answer: its {key} is {value!r}")


def attribute(client: Client, name: str, nodeid: int = NODEID_ANY, *, timeout: float | None = None) -> str:
    """The value of a broker attribute. Raises FluxresError: `cannot get attribute …`."""
    with Explain(f"get attribute {name}"):
        return field(client.call("attr.get", {"name": name}, nodeid=nodeid, timeout=timeout), "value", str)
