"""`fluxres kvs eventlog`: read and write RFC 18 eventlogs in the key-value store (flux-kvs(1))."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from fluxres.base.errors import FluxresError
from fluxres.base.eventlog import Event, decode, encode
from fluxres.base.fsd import parse_fsd
from fluxres.cli.common import UsageError
from fluxres.cli.eventfmt import EventFormat
from fluxres.cli.kvs_object import (
    APPEND,
    WAITCREATE,
    WATCH,
    WATCH_APPEND,
    Kvs,
    operation,
    tree_object,
    value,
    value_of,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from fluxres.base.json import JsonObject


def get(kvs: Kvs, args: Namespace) -> int:
    """Show an eventlog."""
    if args.watch or args.waitcreate:
        events = _events(kvs, args, None, once=not args.watch)
    else:
        events = iter(_decode(args.key, kvs.get(args.key)))
    for shown, event in enumerate(events, start=1):
        print(_line(event, args), flush=args.watch)
        if shown == args.count:
            break
    return 0


def append(kvs: Kvs, args: Namespace) -> int:
    """Append an event."""
    timestamp = time.time() if args.timestamp is None else args.timestamp
    try:
        line = encode(Event(timestamp, args.name, parse_context(args.context)))
    except ValueError as error:
        raise UsageError(str(error)) from error
    kvs.commit(f"append to {args.key}", [operation(args.key, value(line.encode()), APPEND)])
    return 0


def wait_event(kvs: Kvs, args: Namespace) -> int:
    """Wait for an event."""
    deadline = None
    if args.timeout is not None:
        try:
            deadline = time.monotonic() + parse_fsd(args.timeout)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for event in _events(kvs, args, deadline):
        found = event.name == args.name
        if (found and not args.quiet) or (not found and args.verbose):
            print(_line(event, args), flush=True)
        if found:
            return 0
    raise FluxresError(f"cannot wait for {args.name}: the watch of {args.key} has ended")


def _events(kvs: Kvs, args: Namespace, deadline: float | None, *, once: bool = False) -> Iterator[Event]:
    """The events of an eventlog, those there and then new ones. Raises FluxresError at the deadline."""
    flags = WATCH | WATCH_APPEND | (WAITCREATE if args.waitcreate else 0)
    request = {"key": args.key, "namespace": kvs.namespace, "flags": flags}
    matchtag = kvs.client.open("kvs-watch.lookup", request)
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        reply = kvs.client.receive_for(matchtag, left)
        if reply is None:
            raise FluxresError(f"cannot wait for {args.name}: it has not come within {args.timeout}")
        if reply.error is not None:
            raise FluxresError(f"cannot watch {args.key}: {reply.error.text}")
        yield from _decode(args.key, value_of(args.key, tree_object(reply.payload)))
        if once:
            return


def _decode(key: str, data: bytes) -> list[Event]:
    try:
        return decode(data)
    except ValueError as error:
        raise FluxresError(f"cannot read {key}: {error}") from error


def _line(event: Event, args: Namespace) -> str:
    return EventFormat(as_json=args.unformatted).line(event)


def parse_context(words: list[str]) -> JsonObject:
    """The context that is given on a command line: one JSON object, or KEY=VALUE words, each value JSON or
    text.

    Raises UsageError.
    """
    if words and words[0].lstrip().startswith("{"):
        try:
            whole = json.loads(" ".join(words))
        except ValueError as error:
            raise UsageError(f"cannot use context {' '.join(words)!r}: {error}") from error
        if isinstance(whole, dict):
            return whole
    context: JsonObject = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"cannot use context {word!r}: it must be KEY=VALUE")
        try:
            context[key] = json.loads(text)
        except ValueError:
            context[key] = text
    return context
