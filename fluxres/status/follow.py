"""Follows one job for a reader: its eventlogs and its output, as `job-info.eventlog-watch` streams them.

Each of the three goes at its own pace, from its own position on, and ends when nothing can be added to it. What comes
fast is put together, so that a message has up to `BATCH` bytes of events. A reader that is slow makes the stream wait
(`Handle` holds `STREAM_BUFFER` events of it), and that makes `job-info` wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from fluxres.base.json import JsonObject
from fluxres.status import messages
from fluxres.status.asks import FOLLOWED, Follow

if TYPE_CHECKING:
    from fluxres.rpc.handle import Handle
    from fluxres.wire.payload import WireMap

WATCH: Final = "job-info.eventlog-watch"
WAITCREATE: Final = 1
"""Watch flag: an eventlog that does not exist (yet) is waited for; all but that which makes a job one."""
EVENTLOG: Final = "eventlog"
BATCH: Final = 64 * 1024
"""Bytes of events in one message; an event that is larger has one of its own."""
PAUSE: Final = 0.1
"""Seconds between two messages of one eventlog; meanwhile events are put together."""

_event = msgspec.json.Decoder(dict[str, object]).decode


class _Update(msgspec.Struct, frozen=True):
    """One response: an event as its line (RFC 18), and where to go on after it."""

    event: str
    position: tuple[int, int]


async def follow(handle: Handle, ask: Follow, say: Callable[[bytes], Awaitable[None]]) -> None:
    """Say what is in the eventlogs of a job, until nothing can be added to them. Raises groups of RpcError."""
    async with trio.open_nursery() as nursery:
        for path in FOLLOWED:
            nursery.start_soon(_follow_one, handle, ask, path, say)


async def _follow_one(handle: Handle, ask: Follow, path: str, say: Callable[[bytes], Awaitable[None]]) -> None:
    begin = ask.position.get(path, (0, 0))
    flags = 0 if path == EVENTLOG else WAITCREATE
    payload: WireMap = {"id": int(ask.job), "path": path, "flags": flags, "position": list(begin)}
    async with handle.stream(WATCH, payload) as replies:
        async for first in replies:
            for batch in _batches(_updates((first, *replies.ready()))):
                events = [_as_event(update.event) for update in batch]
                await say(messages.job(ask.id, path, events, batch[-1].position))
                await trio.sleep(PAUSE)


def _batches(updates: Iterable[_Update]) -> Iterator[list[_Update]]:
    """The same as lists of at most `BATCH` bytes of lines, or of one line."""
    batch: list[_Update] = []
    size = 0
    for update in updates:
        if batch and size + len(update.event) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(update)
        size += len(update.event)
    yield batch


def _updates(payloads: Iterable[WireMap]) -> Iterable[_Update]:
    return (msgspec.convert(payload, _Update) for payload in payloads)


def _as_event(line: str) -> JsonObject:
    """The event of a line; it was checked when it was written."""
    event: JsonObject = _event(line)  # type: ignore[assignment]
    return event
