"""What the status endpoint says: its messages as JSON, and the bodies of the RPC `status.watch`. Pure.

    hello      the first one: who speaks
    snapshot   all documents of a subscription, at `position`
    delta      what leads from `prev` to `position`
    job        events of one of the eventlogs of a job
    ended      a subscription is over
    error      a message of the client was not understood, or asks for what cannot be

Snapshots and deltas come in parts, numbered from 0; all of them together count when `more` is false. A delta's
`position` is still at `prev` until then: whoever is interrupted drops the parts and resumes there, and nothing is lost.
A part has at most `PART` bytes (a single document that is larger has one of its own) and is made when its turn has
come, so that a slow reader holds one of them. What is the same for many readers is encoded once: the `Encoder` keeps
the latest encodings, `CACHE` bytes of them. The same parts travel as the bodies of `status.watch`; there a part of a
snapshot has a `position` only where that counts, because a client's session resumes with the last one it has seen.
`docs/status.schema.json` is the reference of them all.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import msgspec

from fluxres.base.errors import ProtocolError
from fluxres.status.view import TOPICS, Delta, Snapshot, as_documents

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue
    from fluxres.status.view import View
    from fluxres.wire.payload import WireMap

VERSION: Final = 1
"""The version of the messages: the last part of the name of the WebSocket subprotocol."""
SUBPROTOCOL: Final = f"fluxres.status.v{VERSION}"
PART: Final = 64 * 1024
"""Bytes of documents in one part of a snapshot or delta."""
EXAMINED: Final = 1024
"""Documents that are looked at for one part, those left out by a filter included."""
CACHE: Final = 4 * 1024 * 1024
"""Bytes of encoded parts that one encoder keeps."""
ENTRY: Final = 512
"""Bytes that a part counts for besides its own, for what it takes to find it again."""

Body: TypeAlias = "Snapshot | Delta"
_Documents: TypeAlias = dict[str, dict[str, dict[str, object]]]
_Position: TypeAlias = tuple[str, int]
_encode = msgspec.json.Encoder().encode


def hello(*, software: str, instance: str, rank: int, size: int, now: float) -> bytes:
    """The first message: who speaks, and what time it is there."""
    return _message(
        "hello", version=VERSION, software=software, instance=instance, rank=rank, size=size, now=_rounded(now)
    )


def job(subscription: int, path: str, events: Sequence[JsonObject], position: tuple[int, int]) -> bytes:
    """Events (RFC 18) of an eventlog of the job that is followed, and where to go on after them."""
    return _message("job", id=subscription, path=path, events=list(events), position=list(position))


def ended(subscription: int, why: str) -> bytes:
    """The subscription is over."""
    return _message("ended", id=subscription, why=why)


def error(subscription: int | None, text: str) -> bytes:
    """A message was refused; None where we do not know the number of the subscription that it is about."""
    return _message("error", id=subscription, error=text)


def _message(kind: str, **fields: JsonValue) -> bytes:
    return _encode({"type": kind, **fields})


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a body: how it goes on after its head, and which documents it takes."""

    tail: bytes
    start: int
    stop: int
    last: bool


class Encoder:
    """Turns snapshots and deltas into messages, the same for many readers only once."""

    def __init__(self, cache: int = CACHE) -> None:
        self._bound = cache
        self._size = 0
        self._parts: OrderedDict[tuple[object, ...], _Part] = OrderedDict()

    def parts(self, body: Body, subscription: int, now: float) -> Iterator[bytes]:
        """The messages that tell `body`, each made when it is asked for."""
        number, start = 0, 0
        while True:
            part = self._part(body, start)
            yield _head(body, subscription, number, part.last, now) + part.tail
            if part.last:
                return
            number, start = number + 1, part.stop

    def _part(self, body: Body, start: int) -> _Part:
        name = (*body.content, start)
        part = self._parts.get(name)
        if part is not None:
            self._parts.move_to_end(name)
            return part
        part = _cut(body, start)
        self._parts[name] = part
        self._size += len(part.tail) + ENTRY
        while self._size > self._bound:
            _, oldest = self._parts.popitem(last=False)
            self._size -= len(oldest.tail) + ENTRY
        return part


def bodies(body: Body, now: float) -> Iterator[WireMap]:
    """The payloads that tell `body` as responses of `status.watch`."""
    number, start = 0, 0
    while True:
        part = _cut(body, start)
        put, delete = as_documents(touched for _, touched in body.items(part.start, part.stop))
        payload: dict[str, object] = {**_fields(body, number, part.last, now)}
        if isinstance(body, Delta):
            payload |= {"set": put, "delete": delete}
        else:
            payload["docs"] = put
            if not part.last:
                del payload["position"]
        yield cast("WireMap", payload)
        if part.last:
            return
        number, start = number + 1, part.stop


class SnapshotPart(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """The payload of a response of `status.watch`: one part of a snapshot."""

    docs: _Documents
    more: bool
    part: int
    why: str
    position: _Position = ("", 0)


class DeltaPart(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """The payload of a response of `status.watch`: one part of a delta."""

    prev: int
    more: bool
    part: int
    position: _Position
    set: _Documents
    delete: dict[str, list[str]]


def parse_body(payload: WireMap) -> SnapshotPart | DeltaPart:
    """Read a response of `status.watch`. Raises ProtocolError."""
    try:
        return msgspec.convert(payload, SnapshotPart | DeltaPart)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"cannot take this response of status.watch: {error}") from error


def whole(view: View, topics: Sequence[str], now: float) -> Iterator[bytes]:
    """All documents of the topics as they are now, as one JSON object, in pieces of about `PART` bytes."""
    copy = view.copy(fresh=True)
    yield _encode({"version": VERSION, "position": list(copy.position), "now": _rounded(now)})[:-1] + b',"docs":{'
    for number, topic in enumerate(name for name in TOPICS if name in topics):
        piece = [b"," if number else b"", _encode(topic), b":{"]
        size = 0
        for index, (key, document) in enumerate(copy.documents.get(topic, ())):
            piece += [b"," if index else b"", _encode(key), b":", _encode(document)]
            size += len(piece[-1])
            if size >= PART:
                yield b"".join(piece)
                piece, size = [], 0
        yield b"".join([*piece, b"}"])
    yield b"}}\n"


def _fields(body: Body, number: int, last: bool, now: float) -> dict[str, JsonValue]:
    """What a message says of itself beside its documents."""
    epoch, seq = body.position
    common: dict[str, JsonValue] = {"part": number, "more": not last, "now": _rounded(now)}
    if isinstance(body, Snapshot):
        return {"type": "snapshot", "position": [epoch, seq], "why": body.why.value, **common}
    return {"type": "delta", "prev": body.prev, "position": [epoch, seq if last else body.prev], **common}


def _head(body: Body, subscription: int, number: int, last: bool, now: float) -> bytes:
    return _encode({"id": subscription, **_fields(body, number, last, now)})[:-1] + b","


def _cut(body: Body, start: int) -> _Part:
    """The part of `body` that begins with number `start`: encoded, and how far it reaches."""
    put: dict[str, list[bytes]] = {}
    delete: dict[str, list[bytes]] = {}
    size, stop = 0, min(body.size, start + EXAMINED)
    for number, (topic, key, document) in body.items(start, stop):
        encoded = _encode(key) if document is None else b"%b:%b" % (_encode(key), _encode(document))
        if size and size + len(encoded) > PART:
            stop = number  # it is the first of the next part
            break
        (delete if document is None else put).setdefault(topic, []).append(encoded)
        size += len(encoded) + 1
    last = stop >= body.size
    if isinstance(body, Snapshot):
        tail = b'"docs":%b}' % _nested(put, b"{}")
    else:
        tail = b'"set":%b,"delete":%b}' % (_nested(put, b"{}"), _nested(delete, b"[]"))
    return _Part(tail, start, stop, last)


def _nested(topics: Mapping[str, list[bytes]], brackets: bytes) -> bytes:
    """An object of topics, each with what stands between the brackets."""
    return b"{%b}" % b",".join(
        b"%b:%b%b%b" % (_encode(topic), brackets[:1], b",".join(parts), brackets[1:]) for topic, parts in topics.items()
    )


def _rounded(now: float) -> float:
    """Times are told to the millisecond."""
    return math.floor(now * 1000) / 1000
