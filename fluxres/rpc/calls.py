"""The requester's side of RPC (RFC 6): which matchtags are out, and what each response means. Pure.

A call is OPEN from its request to its terminal response. A caller that stops waiting makes it ABANDONED:
the matchtag stays reserved, so that a late response can never be taken for another call's, until the
terminal response comes or the connection is lost.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final, NamedTuple

from fluxres.base.errors import ProtocolError, RpcError
from fluxres.rpc.tracker import cancel_request, is_terminal
from fluxres.wire.messages import NODEID_ANY, Message, MessageFlag, MessageType, request
from fluxres.wire.payload import WireMap, pack, unpack_map

MAX_CALLS: Final = 65_536
"""Calls that one requester may have out at a time, abandoned ones included."""
MATCHTAG_BOUND: Final = 0xFFFFFFFF


class CallState(Enum):
    """The states of a call that has not ended."""

    OPEN = "open"
    ABANDONED = "abandoned"


class Reply(NamedTuple):
    """What a response says to the caller of `matchtag`: a payload or an error, and whether it is the last."""

    matchtag: int
    payload: WireMap
    error: RpcError | None
    last: bool


class Calls:
    """The calls of one requester over one connection."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[CallState, Message]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._calls)

    def open(
        self,
        topic: str,
        payload: WireMap | None = None,
        *,
        nodeid: int = NODEID_ANY,
        streaming: bool = False,
        upstream: bool = False,
    ) -> Message:
        """Begin a call and return its request. Raises RpcError EAGAIN when `MAX_CALLS` are out."""
        if len(self._calls) >= MAX_CALLS:
            raise RpcError(errno.EAGAIN, f"cannot call {topic}: {MAX_CALLS} calls are out already")
        while self._next in self._calls:
            self._next = self._next % MATCHTAG_BOUND + 1
        flags = MessageFlag.STREAMING if streaming else MessageFlag.NONE
        if upstream:
            flags |= MessageFlag.UPSTREAM
        asked = request(
            topic,
            None if payload is None else pack(payload),
            matchtag=self._next,
            nodeid=nodeid,
            flags=flags,
        )
        self._calls[self._next] = (CallState.OPEN, asked._replace(payload=None))
        self._next = self._next % MATCHTAG_BOUND + 1
        return asked

    def abandon(self, matchtag: int) -> Message | None:
        """The caller of `matchtag` stops waiting; returns the cancel request to send, None if it has ended."""
        state, asked = self._calls.get(matchtag, (None, None))
        if state is not CallState.OPEN or asked is None:
            return None
        self._calls[matchtag] = (CallState.ABANDONED, asked)
        return cancel_request(asked)

    def receive(self, response: Message) -> Reply | None:
        """Take a response; None where nobody waits for it. Raises ProtocolError for what is no response.

        A payload that cannot be decoded is an error of its call (EPROTO) and of no other.
        """
        if response.type is not MessageType.RESPONSE:
            raise ProtocolError(f"cannot take a {response.type.name.lower()} message for a response")
        matchtag = response.matchtag
        state, _asked = self._calls.get(matchtag, (None, None))
        if state is None:
            return None
        last = is_terminal(response)
        if last:
            del self._calls[matchtag]
        if state is CallState.ABANDONED:
            return None
        if response.errnum:
            text = (response.payload or b"").decode(errors="replace")
            return Reply(matchtag, {}, RpcError(response.errnum, text), last)
        try:
            return Reply(matchtag, unpack_map(response.payload), None, last)
        except ProtocolError as error:
            return Reply(matchtag, {}, RpcError(errno.EPROTO, str(error)), last)

    def lost(self, error: RpcError) -> list[Reply]:
        """The connection is gone: end every call; returns the replies for those still waited for."""
        calls, self._calls = self._calls, {}
        return [Reply(tag, {}, error, last=True) for tag, (state, _) in calls.items() if state is CallState.OPEN]
