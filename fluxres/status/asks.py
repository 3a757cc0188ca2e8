"""What may be asked of the status endpoint: the messages of a WebSocket client, and the request `status.watch`. Pure.

    subscribe    {id, topics, jobs?, position?}: a snapshot, or from `position` on, and then deltas
    follow       {id, job, position?}: a job's eventlogs and output, each from its own position on
    unsubscribe  {id}

`id` is the client's own number for the subscription. Everything is checked here, unknown keys included; what is wrong
is said in words, with the number of the subscription where the message tells one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, cast

import msgspec

from fluxres.base.errors import FluxresError
from fluxres.base.jobid import JobId, parse_jobid
from fluxres.status.select import Filter
from fluxres.status.view import Position, check_topics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fluxres.base.json import JsonObject

MAX_MESSAGE: Final = 16 * 1024
"""Bytes of a message of a client."""
FOLLOWED: Final = ("eventlog", "guest.exec.eventlog", "guest.output")
"""The eventlogs of a job that are followed."""

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""A number that JavaScript can hold."""
_Epoch: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Topics: TypeAlias = Annotated[tuple[str, ...], msgspec.Meta(max_length=64)]
_Place: TypeAlias = tuple[_Number, _Number]


class BadMessage(FluxresError):
    """A message of a client that cannot be done; `subscription` is the number that it is about, where it told one."""

    def __init__(self, text: str, subscription: int | None = None) -> None:
        super().__init__(text)
        self.subscription = subscription


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a reader wants to see: arguments for a `Cursor`."""

    topics: tuple[str, ...]
    select: Filter | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Watch documents from now on, under this number."""

    id: int
    watch: Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """Follow a job from now on, under this number; `position`: where to go on, for each eventlog that has been read."""

    id: int
    job: JobId
    position: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    """End what has this number."""

    id: int


Ask: TypeAlias = "Subscribe | Follow | Unsubscribe"


class _Subscribe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="subscribe"):
    id: _Number
    topics: _Topics
    jobs: dict[str, object] | None = None
    position: tuple[_Epoch, _Number] | None = None


class _Follow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="follow"):
    id: _Number
    job: Annotated[str, msgspec.Meta(max_length=64)]
    position: dict[str, _Place] | None = None


class _Unsubscribe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="unsubscribe"):
    id: _Number


class WatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The payload of `status.watch`, for `Request.parse`."""

    topics: _Topics
    jobs: dict[str, object] | None = None
    position: tuple[_Epoch, _Number] | None = None

    def read(self) -> Watch:
        """What is asked for. Raises ValueError with what is wrong."""
        return _watch(self.topics, self.jobs, self.position)


class _AnyId(msgspec.Struct):
    """Any message, for the number in it."""

    id: _Number | None = None


_decoder: Final = msgspec.json.Decoder(_Subscribe | _Follow | _Unsubscribe)
_id_decoder: Final = msgspec.json.Decoder(_AnyId)


def parse(data: bytes | str) -> Ask:
    """Read a message of a client. Raises BadMessage."""
    if len(data) > MAX_MESSAGE:
        raise BadMessage(f"cannot take this message: it is longer than {MAX_MESSAGE} bytes")
    try:
        message = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadMessage(f"cannot take this message: {error}", _id_of(data)) from error
    try:
        return _read(message)
    except ValueError as error:
        raise BadMessage(str(error), message.id) from error


def _read(message: _Subscribe | _Follow | _Unsubscribe) -> Ask:
    if isinstance(message, _Subscribe):
        return Subscribe(id=message.id, watch=_watch(message.topics, message.jobs, message.position))
    if isinstance(message, _Unsubscribe):
        return Unsubscribe(id=message.id)
    position = message.position or {}
    for path in position:
        if path not in FOLLOWED:
            raise ValueError(f"cannot follow {path!r:.80} of a job: there are {', '.join(FOLLOWED)}")
    return Follow(id=message.id, job=parse_jobid(message.job), position=position)


def _watch(topics: Sequence[str], jobs: dict[str, object] | None, position: tuple[str, int] | None) -> Watch:
    return Watch(
        topics=check_topics(topics),
        select=Filter.parse(cast("JsonObject", jobs or {})),
        position=None if position is None else Position(*position),
    )


def _id_of(data: bytes | str) -> int | None:
    """The number in a message that is wrong otherwise, None where there is none to be found."""
    try:
        return _id_decoder.decode(data).id
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
