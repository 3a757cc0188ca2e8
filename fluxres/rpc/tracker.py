"""RPC tracking (flux-core issue 3800): what went out over a hop and has not ended.

Pure. A broker keeps one tracker for all next hops, in both directions. Each entry is one request,
known by its route stack and matchtag, which together are unique in an instance. When a hop is lost,
every entry of it is answered once with EHOSTUNREACH, to whoever asked; a response whose request has
already ended is dropped. That is invariant I5 for requests that leave a broker.

An entry is made by `sent`, and ended by the first of: a terminal response (`answered`), the loss of the
hop (`lost`), the disconnect of whoever asked (`disconnected`).
"""

from __future__ import annotations

import errno

from fluxres.wire.messages import Message, MessageFlag, MessageType, request, response_to
from fluxres.wire.payload import pack

Key = tuple[tuple[str, ...], int]


def is_terminal(response: Message) -> bool:
    """Whether `response` ends its RPC: any error does, and any response that is not streaming (RFC 6)."""
    return response.errnum != 0 or not response.is_streaming


def error_response(asked: Message, errnum: int, text: str) -> Message:
    """The error response to `asked`; its payload is the text for people, as UTF-8."""
    return response_to(asked, errnum=errnum, payload=text.encode(errors="replace"))


def came_through(route: tuple[str, ...], via: tuple[str, ...]) -> bool:
    """Whether a request with `route` was sent by whoever sends with `via`, or went through it (a lost child)."""
    return route[-len(via) :] == via


class Tracker:
    """The requests that are under way over each hop."""

    def __init__(self) -> None:
        self._hops: dict[str, dict[Key, Message]] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._hops.values())

    def sent(self, hop: str, asked: Message) -> None:
        """Note that the request `asked` goes out over `hop`. One that wants no response is not kept."""
        if asked.wants_response:
            self._hops.setdefault(hop, {})[asked.route, asked.matchtag] = asked._replace(payload=None)

    def answered(self, hop: str, response: Message) -> bool:
        """Note a response that came over `hop`, its route as the request had it when it was sent.

        Returns False where its request has ended already: the response is late, and must be dropped.
        """
        entries = self._hops.get(hop, {})
        key = (response.route, response.matchtag)
        if key not in entries:
            return False
        if is_terminal(response):
            self._forget(hop, key)
        return True

    def lost(self, hop: str, why: str) -> list[Message]:
        """End everything that is under way over `hop`; returns one EHOSTUNREACH response for each."""
        entries = self._hops.pop(hop, {})
        return [error_response(asked, errno.EHOSTUNREACH, why) for asked in entries.values()]

    def disconnected(self, route: tuple[str, ...]) -> list[tuple[str, Message]]:
        """Whoever sends with `route` is gone, and all that sent through it: end their requests.

        Returns, by hop, the cancel requests that tell the services.
        """
        cancels = []
        for hop, entries in list(self._hops.items()):
            for key in [key for key in entries if came_through(key[0], route)]:
                asked = entries[key]
                cancels.append((hop, cancel_request(asked)))
                self._forget(hop, key)
        return cancels

    def _forget(self, hop: str, key: Key) -> None:
        entries = self._hops[hop]
        del entries[key]
        if not entries:
            del self._hops[hop]


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
    assert cancel.type is MessageType.REQUEST
    return cancel._replace(route=asked.route)
