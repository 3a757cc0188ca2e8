"""`fluxres kvs`: read and write the key-value store (flux-kvs(1)).

The subcommands that list directories are in `fluxres.cli.kvs_list`, those for eventlogs in
`fluxres.cli.kvs_eventlog`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError, RpcError
from fluxres.cli.common import (
    Explain,
    Parser,
    UsageError,
    argument,
    field,
    parser,
    subcommands,
    whole_number,
    write_bytes,
)
from fluxres.cli.kvs_object import (
    APPEND,
    READLINK,
    TREEOBJ,
    WAITCREATE,
    WATCH_APPEND,
    WATCH_FULL,
    WATCH_UNIQ,
    Kvs,
    empty_directory,
    link_of,
    operation,
    show_link,
    symlink,
    value,
    value_of,
)
from fluxres.client import Client

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction
    from collections.abc import Callable

    from fluxres.wire.payload import WireMap

MAX_INPUT: Final = 8 * 1024 * 1024
"""Bytes that a value may have that is read from standard input: no frame holds more."""


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("kvs", "Read and write the key-value store")
    sub = subcommands(made)
    _add_values(sub)
    _add_changes(sub)
    _add_versions(sub)
    _add_listings(sub)
    _add_eventlog(sub)
    _add_namespace(sub)
    args = made.parse_args(argv)
    with Client.connect(args.uri) as client:
        run: Callable[[Kvs, Namespace], int] = args.run
        return run(Kvs(client, getattr(args, "namespace", None)), args)


def _add(sub: _SubParsersAction[Parser], name: str, what: str, run: Callable[[Kvs, Namespace], int]) -> Parser:
    made = sub.add_parser(name, help=what, description=what, allow_abbrev=False)
    made.add_argument("-N", "--namespace", metavar="NS", help="the namespace (default: FLUX_KVS_NAMESPACE, primary)")
    made.set_defaults(run=run)
    return made


def _add_values(sub: _SubParsersAction[Parser]) -> None:
    get = _add(sub, "get", "Show values", _get)
    watch = _add(sub, "watch", "Show values each time that they change", _watch)
    for each in (get, watch):
        each.add_argument("-r", "--raw", action="store_true", help="show the bytes, without a newline")
        each.add_argument("-t", "--treeobj", action="store_true", help="show the RFC 11 object")
        each.add_argument("-l", "--label", action="store_true", help="begin with KEY=")
        each.add_argument("-W", "--waitcreate", action="store_true", help="wait for the key to exist")
        each.add_argument("-u", "--uniq", action="store_true", help="watching: only where the value differs")
        each.add_argument("-A", "--append", action="store_true", help="watching: only what is appended")
        each.add_argument("-f", "--full", action="store_true", help="watching: see replaced directories too")
        each.add_argument("-c", "--count", type=whole_number, default=0, metavar="N", help="stop after N values")
        each.add_argument("keys", nargs="+", metavar="KEY")
    get.add_argument("-w", "--watch", action="store_true", help="go on each time that the value changes")


def _add_changes(sub: _SubParsersAction[Parser]) -> None:
    put = _add(sub, "put", "Store values", _put)
    put.add_argument("-A", "--append", action="store_true", help="append to what is there")
    append = _add(sub, "append", "Append to values", _put)
    append.set_defaults(append=True)
    for each in (put, append):
        each.add_argument("-r", "--raw", action="store_true", help="KEY=- reads the value from standard input")
        each.add_argument("settings", nargs="+", metavar="KEY=VALUE", type=argument(_setting))
    unlink = _add(sub, "unlink", "Remove keys", _unlink)
    unlink.add_argument("-R", "--recursive", action="store_true", help="remove directories with all in them")
    unlink.add_argument("-f", "--force", action="store_true", help="a key that does not exist is no error")
    unlink.add_argument("keys", nargs="+", metavar="KEY")
    mkdir = _add(sub, "mkdir", "Make empty directories", _mkdir)
    mkdir.add_argument("keys", nargs="+", metavar="KEY")
    link = _add(sub, "link", "Make a symbolic link", _link)
    link.add_argument("-T", "--target-namespace", metavar="NS", help="the namespace of TARGET")
    link.add_argument("target", metavar="TARGET")
    link.add_argument("name", metavar="LINKNAME")
    readlink = _add(sub, "readlink", "Show where symbolic links lead", _readlink)
    readlink.add_argument("-o", "--namespace-only", action="store_true", help="show only the namespace")
    readlink.add_argument("-k", "--key-only", action="store_true", help="show only the key")
    readlink.add_argument("keys", nargs="+", metavar="KEY")
    for each in (put, append, unlink, mkdir, link):
        each.add_argument("-s", "--sequence", action="store_true", help="show the new version")


def _add_versions(sub: _SubParsersAction[Parser]) -> None:
    _add(sub, "version", "Show the namespace's version", _version)
    wait = _add(sub, "wait", "Wait until the namespace's version is VERSION or greater", _wait)
    wait.add_argument("version", type=whole_number, metavar="VERSION")
    getroot = _add(sub, "getroot", "Show the namespace's root", _getroot)
    getroot.add_argument("-o", "--owner", action="store_true", help="show the owner")
    getroot.add_argument("-s", "--sequence", action="store_true", help="show the version")


def _add_listings(sub: _SubParsersAction[Parser]) -> None:
    from fluxres.cli import kvs_list

    ls = _add(sub, "ls", "List keys", kvs_list.ls)
    ls.add_argument("-R", "--recursive", action="store_true", help="list directories below too")
    ls.add_argument("-d", "--directory", action="store_true", help="list directories, not what is in them")
    ls.add_argument("-F", "--classify", action="store_true", help="mark directories (.) and links (@)")
    ls.add_argument("-w", "--width", type=whole_number, metavar="COLS", help="the width of the terminal")
    ls.add_argument("-1", "--one", action="store_const", const=1, dest="width", help="one key a line")
    ls.add_argument("keys", nargs="*", default=["."], metavar="KEY")
    listing = _add(sub, "dir", "Show the keys and values of a directory", kvs_list.dir_)
    listing.add_argument("-R", "--recursive", action="store_true", help="show directories below too")
    listing.add_argument("-d", "--directory", action="store_true", help="show no values")
    listing.add_argument("-w", "--width", type=whole_number, metavar="COLS", help="cut lines to COLS (0: do not)")
    listing.add_argument("key", nargs="?", default=".", metavar="KEY")


def _add_eventlog(sub: _SubParsersAction[Parser]) -> None:
    from fluxres.cli import kvs_eventlog

    inner = subcommands(sub.add_parser("eventlog", help="Read and write RFC 18 eventlogs"))
    get = _add(inner, "get", "Show an eventlog", kvs_eventlog.get)
    get.add_argument("-w", "--watch", action="store_true", help="go on with new events as they come")
    get.add_argument("-c", "--count", type=whole_number, default=0, metavar="N", help="stop after N events")
    append = _add(inner, "append", "Append an event", kvs_eventlog.append)
    append.add_argument("-t", "--timestamp", type=float, metavar="SECONDS", help="its time (default: now)")
    wait = _add(inner, "wait-event", "Wait for an event", kvs_eventlog.wait_event)
    wait.add_argument("-t", "--timeout", metavar="FSD", help="wait at most this long")
    wait.add_argument("-q", "--quiet", action="store_true", help="do not show the event")
    wait.add_argument("-v", "--verbose", action="store_true", help="show the events before it too")
    for each in (get, wait):
        each.add_argument("-u", "--unformatted", action="store_true", help="show events as they are stored")
        each.add_argument("-W", "--waitcreate", action="store_true", help="wait for the eventlog to exist")
    for each in (get, append, wait):
        each.add_argument("key", metavar="KEY")
    for each in (append, wait):
        each.add_argument("name", metavar="EVENT")
    append.add_argument("context", nargs="*", metavar="KEY=VALUE", help="its context; or one JSON object")


def _add_namespace(sub: _SubParsersAction[Parser]) -> None:
    inner = subcommands(sub.add_parser("namespace", help="Create, remove and list namespaces"))
    create = inner.add_parser("create", help="Create namespaces")
    create.add_argument("-o", "--owner", type=whole_number, metavar="USERID", help="their owner")
    create.add_argument("names", nargs="+", metavar="NAME")
    create.set_defaults(run=_namespace_create)
    remove = inner.add_parser("remove", help="Remove namespaces")
    remove.add_argument("names", nargs="+", metavar="NAME")
    remove.set_defaults(run=_namespace_remove)
    inner.add_parser("list", help="List namespaces").set_defaults(run=_namespace_list)


# --- values


def _get(kvs: Kvs, args: Namespace) -> int:
    if args.watch or args.waitcreate:
        return _watch(kvs, args, 0 if args.watch else 1)
    for key in args.keys:
        _show(key, kvs.lookup(key, TREEOBJ if args.treeobj else 0), args)
    return 0


def _watch(kvs: Kvs, args: Namespace, count: int = 0) -> int:
    """Show the values of one key, up to a count; several keys one after the other."""
    if len(args.keys) > 1 and not (count or args.count):
        raise UsageError("cannot watch several keys without --count: the first would never end")
    flags = 0
    for wanted, flag in (
        (args.treeobj, TREEOBJ),
        (args.waitcreate, WAITCREATE),
        (args.uniq, WATCH_UNIQ),
        (args.append, WATCH_APPEND),
        (args.full, WATCH_FULL),
    ):
        flags |= flag if wanted else 0
    for key in args.keys:
        for shown, found in enumerate(kvs.watch(key, flags), start=1):
            _show(key, found, args)
            if shown == (count or args.count):
                break
    return 0


def _show(key: str, found: WireMap, args: Namespace) -> None:
    label = f"{key}=".encode() if args.label else b""
    if args.treeobj:
        import json

        write_bytes(label + json.dumps(found, separators=(",", ":")).encode() + b"\n")
        return
    data = value_of(key, found)
    write_bytes(label + data + (b"\n" if data and not args.raw else b""))


# --- changes


def _put(kvs: Kvs, args: Namespace) -> int:
    operations = []
    for key, text in args.settings:
        data = _standard_input() if args.raw and text == "-" else os.fsencode(text)
        operations.append(operation(key, value(data), APPEND if args.append else 0))
    return _commit(kvs, args, f"put {', '.join(field(each, 'key', str) for each in operations)}", operations)


def _setting(text: str) -> tuple[str, str]:
    key, equals, rest = text.partition("=")
    if not equals:
        raise ValueError(f"cannot put {text!r}: it must be KEY=VALUE")
    return key, rest


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read(MAX_INPUT + 1)
    if len(data) > MAX_INPUT:
        raise FluxresError(f"cannot put standard input: it is longer than {MAX_INPUT} bytes")
    return data


def _unlink(kvs: Kvs, args: Namespace) -> int:
    operations = []
    for key in args.keys:
        if _may_unlink(kvs, key, recursive=args.recursive, force=args.force):
            operations.append(operation(key, None))
    return _commit(kvs, args, f"unlink {', '.join(args.keys)}", operations) if operations else 0


def _may_unlink(kvs: Kvs, key: str, *, recursive: bool, force: bool) -> bool:
    """Whether `key` is there to be removed. Raises FluxresError where it must not be, or is missing."""
    import errno

    try:
        found = kvs.lookup(key, TREEOBJ)
        if found.get("type") in ("dir", "dirref") and not recursive and kvs.directory(key):
            raise FluxresError(f"cannot unlink {key}: {os.strerror(errno.ENOTEMPTY)} (-R removes it all)")
    except FluxresError as error:
        cause = error.__cause__
        if not isinstance(cause, RpcError):
            raise
        if force and cause.errnum == errno.ENOENT:
            return False
        raise FluxresError(f"cannot unlink {key}: {cause.text}") from error
    return True


def _mkdir(kvs: Kvs, args: Namespace) -> int:
    operations = [operation(key, empty_directory()) for key in args.keys]
    return _commit(kvs, args, f"make {', '.join(args.keys)}", operations)


def _link(kvs: Kvs, args: Namespace) -> int:
    link = symlink(args.target, args.target_namespace)
    return _commit(kvs, args, f"link {args.name}", [operation(args.name, link)])


def _readlink(kvs: Kvs, args: Namespace) -> int:
    for key in args.keys:
        found = kvs.lookup(key, READLINK)
        namespace, target = link_of(found)
        if args.namespace_only and namespace is not None:
            print(namespace)
        else:
            print(target if args.key_only else show_link(found))
    return 0


def _commit(kvs: Kvs, args: Namespace, what: str, operations: list[WireMap]) -> int:
    version = kvs.commit(what, operations)
    if args.sequence:
        print(version)
    return 0


# --- versions and namespaces


def _version(kvs: Kvs, _args: Namespace) -> int:
    print(field(kvs.root(), "rootseq", int))
    return 0


def _wait(kvs: Kvs, args: Namespace) -> int:
    with Explain(f"wait for version {args.version}"):
        kvs.client.call("kvs.wait-version", {"namespace": kvs.namespace, "rootseq": args.version})
    return 0


def _getroot(kvs: Kvs, args: Namespace) -> int:
    root = kvs.root()
    key, kind = ("owner", int) if args.owner else ("rootseq", int) if args.sequence else ("rootref", str)
    print(field(root, key, kind))
    return 0


def _namespace_create(kvs: Kvs, args: Namespace) -> int:
    owner = os.getuid() if args.owner is None else args.owner
    for name in args.names:
        with Explain(f"create namespace {name}"):
            kvs.client.call("kvs.namespace-create", {"namespace": name, "owner": owner, "flags": 0})
    return 0


def _namespace_remove(kvs: Kvs, args: Namespace) -> int:
    for name in args.names:
        with Explain(f"remove namespace {name}"):
            kvs.client.call("kvs.namespace-remove", {"namespace": name})
    return 0


def _namespace_list(kvs: Kvs, _args: Namespace) -> int:
    with Explain("list namespaces"):
        namespaces = field(kvs.client.call("kvs.namespace-list", {}), "namespaces", list)
    print(f"{'NAMESPACE':<36} {'OWNER':>10} {'FLAGS':<10}".rstrip())
    for each in namespaces:
        name, owner, flags = (
            field(each, "namespace", str),
            field(each, "owner", int),
            field(each, "flags", int),
        )
        print(f"{name:<36} {owner:>10} 0x{flags:08X}")
    return 0
