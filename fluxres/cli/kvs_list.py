"""`fluxres kvs ls` and `fluxres kvs dir`: what is in a directory of the key-value store (flux-kvs(1))."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from fluxres.cli.kvs_object import TREEOBJ, Kvs, show_link, value_of

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.wire.payload import WireMap

GAP: Final = 4
"""Blanks between the columns of `ls`."""
DEFAULT_WIDTH: Final = 80
ELLIPSIS: Final = "..."
ROOT: Final = "."


def ls(kvs: Kvs, args: Namespace) -> int:
    """List keys: those that are no directories first, then what is in each directory."""
    width = terminal_width(args.width)
    singles: list[str] = []
    directories: list[str] = []
    for key in args.keys:
        kind = str(kvs.lookup(key, TREEOBJ).get("type"))
        if kind in ("dir", "dirref") and not args.directory:
            directories.append(key)
        else:
            singles.append(key + _mark(kind, args.classify))
    _print_columns(sorted(singles), width)
    labelled = args.recursive or len(args.keys) > 1
    printed = bool(singles)
    for key in directories:
        printed = _ls_directory(kvs, key, args, width, labelled=labelled, gap=printed)
    return 0


def _ls_directory(kvs: Kvs, key: str, args: Namespace, width: int, *, labelled: bool, gap: bool) -> bool:
    entries = kvs.directory(key)
    if labelled:
        print(f"\n{key}:" if gap else f"{key}:")
    names = [name + _mark(str(entry["type"]), args.classify) for name, entry in entries.items()]
    _print_columns(names, width)
    if args.recursive:
        for name, entry in entries.items():
            if entry["type"] in ("dir", "dirref"):
                _ls_directory(kvs, join(key, name), args, width, labelled=labelled, gap=True)
    return True


def dir_(kvs: Kvs, args: Namespace) -> int:
    """Show the keys and values of a directory."""
    for line in _dir_lines(kvs, args.key, args, terminal_width(args.width)):
        print(line)
    return 0


def _dir_lines(kvs: Kvs, key: str, args: Namespace, width: int) -> list[str]:
    lines = []
    for name, entry in kvs.directory(key).items():
        inner = join(key, name)
        if entry["type"] == "symlink":
            lines.append(f"{inner} -> {show_link(entry)}")
        elif entry["type"] in ("dir", "dirref"):
            below = _dir_lines(kvs, inner, args, width) if args.recursive else []
            lines += below or [f"{inner}."]
        elif args.directory:
            lines.append(inner)
        else:
            lines.append(fit(f"{inner} = {_text(kvs, inner, entry)}", width))
    return lines


def _text(kvs: Kvs, key: str, entry: WireMap) -> str:
    data = value_of(key, entry) if entry["type"] == "val" else kvs.get(key)
    return data.decode(errors="replace")


def join(directory: str, name: str) -> str:
    """The key of an entry of a directory."""
    directory = directory.rstrip(".")
    return f"{directory}.{name}" if directory else name


def fit(line: str, width: int) -> str:
    """Cut a line to `width` columns (0: do not), and at the first character that cannot be printed in one."""
    if width <= len(ELLIPSIS):
        return line
    cut = line[: width - len(ELLIPSIS)]
    end = next((place for place, char in enumerate(cut) if not char.isprintable()), len(cut))
    shortened = cut[:end]
    return shortened if line in (shortened, f"{shortened}\n") else shortened + ELLIPSIS


def columns(names: list[str], width: int) -> list[str]:
    """Arrange names in columns of equal width, as many as fit in `width` (0: all in one line)."""
    if not names:
        return []
    column = max(map(len, names)) + GAP
    each = len(names) if width == 0 else max(1, width // column)
    return [
        "".join(f"{name:<{column}}" for name in names[start : start + each]).rstrip()
        for start in range(0, len(names), each)
    ]


def terminal_width(asked: int | None) -> int:
    """Columns of output: as asked, else the terminal's, else COLUMNS, else 80."""
    if asked is not None:
        return asked
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        text = os.environ.get("COLUMNS", "")
        return int(text) if text.isascii() and text.isdigit() else DEFAULT_WIDTH


def _mark(kind: str, classify: bool) -> str:
    if not classify:
        return ""
    return "." if kind in ("dir", "dirref") else "@" if kind == "symlink" else ""


def _print_columns(names: list[str], width: int) -> None:
    for line in columns(names, width):
        print(line)
