"""RPC tracking (flux-core issue 3800): what went out over a hop and has not ended.

Pure. A broker keeps one tracker for all next hops, in both directions. Each entry is one request,
known by its route stack and matchtag, which together are unique in an instance. When a hop is lost,
every entry of it is answered once with EHOSTUNREACH, to whoever asked; a response whose request has
already ended is dropped. That is invariant I5 for requests that leave a broker.

An entry is made by `sent`, and ended by the first of: a terminal response (`answered`), the loss of the
hop (`lost`), the disconnect of whoever asked (`disconnected`).

Entries are found by their key, by their hop, and by the neighbour that they came from: what a lost hop or a
disconnect costs depends on what it ends, not on all that is under way.
"""

from __future__ import annotations

import errno
from typing import Final, Generic, NamedTuple, TypeVar

from fluxres.wire.messages import Message, MessageFlag, request, response_to
from fluxres.wire.payload import pack

T = TypeVar("T")
Key = tuple[tuple[str, ...], int]
"""The route stack, as it is here, and the matchtag of a request."""

MAX_TEXT: Final = 4096
"""Characters of an error's text that are sent."""


def is_terminal(response: Message) -> bool:
    """Whether `response` ends its RPC: any error does, and any response that is not streaming (RFC 6)."""
    return response.aux != 0 or not response.flags & MessageFlag.STREAMING


def error_response(asked: Message, errnum: int, text: str) -> Message:
    """The error response to `asked`; its payload is the text for people, as UTF-8."""
    return response_to(asked, errnum=errnum, payload=text[:MAX_TEXT].encode(errors="replace"))


def came_through(route: tuple[str, ...], via: tuple[str, ...]) -> bool:
    """Whether a request with `route` was sent by whoever sends with `via`, or went through it (a lost child)."""
    return route[-len(via) :] == via


class ByRequest(Generic[T]):
    """A value for each of some requests, by key, that also finds those that came from one neighbour."""

    __slots__ = ("_from", "_values")

    def __init__(self) -> None:
        self._values: dict[Key, T] = {}
        self._from: dict[str, dict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: Key) -> T | None:
        """The value for `key`, None where there is none."""
        return self._values.get(key)

    def values(self) -> list[T]:
        """All values, in the order in which they were added."""
        return list(self._values.values())

    def add(self, key: Key, value: T) -> None:
        """Keep `value` for a request that is not in here yet."""
        self._values[key] = value
        self._from.setdefault(key[0][-1], {})[key] = None

    def pop(self, key: Key) -> T | None:
        """Remove and return the value for `key`, None where there is none."""
        value = self._values.pop(key, None)
        if value is not None:
            sender = key[0][-1]
            siblings = self._from[sender]
            del siblings[key]
            if not siblings:
                del self._from[sender]
        return value

    def through(self, route: tuple[str, ...]) -> list[Key]:
        """The requests that were sent with `route`, or went through whoever sends with it, oldest first."""
        keys = self._from.get(route[-1], ())
        return list(keys) if len(route) == 1 else [key for key in keys if came_through(key[0], route)]

    def clear(self) -> None:
        """Remove everything."""
        self._values.clear()
        self._from.clear()


class _Entry(NamedTuple):
    hop: str
    asked: Message
    """The request, without its payload."""


class Tracker:
    """The requests that are under way over each hop. `len()` is how many there are."""

    def __init__(self) -> None:
        self._entries: ByRequest[_Entry] = ByRequest()
        self._over: dict[str, dict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def over(self, hop: str) -> int:
        """How many requests are under way over one hop."""
        return len(self._over.get(hop, ()))

    def sent(self, hop: str, asked: Message) -> bool:
        """Note that the request `asked` goes out over `hop`. One that wants no response is not kept.

        Returns False where a request with its route and matchtag is under way: it must not be sent.
        """
        if not asked.wants_response:
            return True
        key = (asked.route, asked.matchtag)
        if key in self._entries:
            return False
        self._entries.add(key, _Entry(hop, asked if asked.payload is None else asked._replace(payload=None)))
        self._over.setdefault(hop, {})[key] = None
        return True

    def answered(self, hop: str, response: Message) -> bool:
        """Note a response that came over `hop`, its route as the request had it when it was sent.

        Returns False where its request has ended already: the response is late, and must be dropped.
        """
        key = (response.route, response.matchtag)
        entry = self._entries.get(key)
        if entry is None or entry.hop != hop:
            return False
        if is_terminal(response):
            self._forget(key, hop)
        return True

    def lost(self, hop: str, why: str) -> list[Message]:
        """End everything that is under way over `hop`; returns one EHOSTUNREACH response for each."""
        ended = [self._entries.pop(key) for key in self._over.pop(hop, ())]
        return [error_response(entry.asked, errno.EHOSTUNREACH, why) for entry in ended if entry is not None]

    def disconnected(self, route: tuple[str, ...], service: str | None = None) -> list[tuple[str, Message]]:
        """Whoever sends with `route` is gone, and all that sent through it: end their requests, or those to `service`.

        Returns, by hop, the cancel requests that tell the services.
        """
        cancels = []
        for key in self._entries.through(route):
            entry = self._entries.get(key)
            if entry is not None and service in (None, entry.asked.service):
                self._forget(key, entry.hop)
                cancels.append((entry.hop, cancel_request(entry.asked)))
        return cancels

    def _forget(self, key: Key, hop: str) -> None:
        self._entries.pop(key)
        over = self._over[hop]
        del over[key]
        if not over:
            del self._over[hop]


def cancel_request(asked: Message) -> Message:
    """The `<service>.cancel` request that asks for the end of `asked` (no response of its own)."""
    cancel = request(
        f"{asked.service}.cancel",
        pack({"matchtag": asked.matchtag}),
        nodeid=asked.nodeid,
        flags=asked.flags & MessageFlag.UPSTREAM,
        userid=asked.userid,
        rolemask=asked.rolemask,
    )
    return cancel._replace(route=asked.route)
