"""Events (RFC 3): published by rank 0, numbered there, and passed down the tree to every broker's subscribers.

    publish at rank 0 --numbered--> subscribers here, and every child
    receive from the parent ------> subscribers here, and every child

| topic           | payload                  | answers                                                                |
|-----------------|--------------------------|------------------------------------------------------------------------|
| event.publish   | topic, payload?, flags?  | seq: the event's number. Answered by rank 0; for the instance owner    |
| event.subscribe | topic: a prefix          | streaming: {seq} of the last event before it, then topic, seq, payload |

Numbers rise by one for each event of an incarnation of rank 0. A broker sees those from its joining on; a subscriber
those from its subscription on, each once and in order. A subscriber that does not keep up is ended with ENOBUFS. An
event that is flagged private reaches only subscriptions of the instance owner and of the user who published it.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import trio

from fluxres.base.errors import RpcError
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.codec import MAX_TOPIC
from fluxres.wire.messages import Message, MessageFlag, event
from fluxres.wire.payload import WireMap, pack, unpack_map

log = logging.getLogger("fluxres.events")

MAX_QUEUED: Final = 1000
"""Events that may wait for one subscriber; one more ends its subscription."""
MAX_EVENT: Final = 1024 * 1024
"""Bytes of an event's payload: it goes to every broker."""


class _Publish(msgspec.Struct, frozen=True, kw_only=True):
    topic: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TOPIC)]
    flags: int = MessageFlag.NONE


class _Subscribe(msgspec.Struct, frozen=True, kw_only=True):
    topic: Annotated[str, msgspec.Meta(max_length=MAX_TOPIC)] = ""


Subscriber = Callable[[Message], None]


class Events:
    """The events of one broker. `forward` sends one to every child."""

    def __init__(self, router: Router, forward: Subscriber) -> None:
        self._rank = router.rank
        self._forward = forward
        self._last = 0
        self._subscribers: dict[int, tuple[str, Subscriber]] = {}
        self._next = 0
        self.service = Service("event", router)
        self.service.method("publish", self._publish)
        self.service.upstream("publish")
        self.service.task("subscribe", self._subscribe)
        router.use_events(self)

    @property
    def last(self) -> int:
        """The number of the last event that was seen here, 0 for none."""
        return self._last

    def publish(self, topic: str, payload: WireMap, *, userid: int, rolemask: int, private: bool = False) -> int:
        """Publish an event on behalf of a user, at rank 0; returns its number. Raises RpcError EMSGSIZE."""
        if self._rank != 0:
            raise ValueError(f"cannot publish {topic} at rank {self._rank}: rank 0 numbers the events")
        body = pack(payload)
        if len(body) > MAX_EVENT:
            raise RpcError(errno.EMSGSIZE, f"cannot publish {topic}: {len(body)} bytes, the bound is {MAX_EVENT}")
        message = event(topic, body, sequence=self._last + 1, userid=userid, rolemask=rolemask)
        if private:
            message = message._replace(flags=MessageFlag.PRIVATE)
        self._distribute(message)
        return message.sequence

    def receive(self, message: Message) -> None:
        """Take an event from the parent (the router calls this)."""
        if message.sequence <= self._last:
            log.warning("dropping event %d (%s): %d was the last", message.sequence, message.topic, self._last)
        else:
            self._distribute(message)

    def subscribe(self, prefix: str, callback: Subscriber) -> Callable[[], None]:
        """Call `callback` with each event whose topic begins with `prefix`; returns what ends that."""
        number = self._next
        self._next += 1
        self._subscribers[number] = (prefix, callback)

        def unsubscribe() -> None:
            self._subscribers.pop(number, None)

        return unsubscribe

    def _distribute(self, message: Message) -> None:
        self._last = message.sequence
        self._forward(message)
        for prefix, callback in list(self._subscribers.values()):
            if message.topic.startswith(prefix):
                callback(message)

    # --- the service

    def _publish(self, request: Request) -> WireMap:
        request.require_owner()
        asked = request.parse(_Publish)
        payload = request.payload.get("payload") or {}
        if not isinstance(payload, dict):
            raise RpcError(errno.EPROTO, f"cannot publish {asked.topic}: its payload is no map")
        if asked.flags & ~MessageFlag.PRIVATE:
            raise RpcError(errno.EPROTO, f"cannot publish {asked.topic}: no event has flags {asked.flags:#x}")
        private = bool(asked.flags & MessageFlag.PRIVATE)
        rolemask = request.message.rolemask
        seq = self.publish(asked.topic, payload, userid=request.userid, rolemask=rolemask, private=private)
        return {"seq": seq}

    async def _subscribe(self, request: Request) -> None:
        prefix = request.parse(_Subscribe).topic
        queue = _Queue(request)
        unsubscribe = self.subscribe(prefix, queue.put)
        try:
            await request.stream({"seq": self._last})
            while True:
                message = await queue.get()
                payload = unpack_map(message.payload)
                await request.stream({"topic": message.topic, "seq": message.sequence, "payload": payload})
        finally:
            unsubscribe()


class _Queue:
    """The events that wait for one subscription: those that its user may see."""

    def __init__(self, request: Request) -> None:
        self._sees_all = request.is_owner
        self._userid = request.userid
        self._events: deque[Message] = deque()
        self._overrun = False
        self._more = trio.Event()

    def put(self, message: Message) -> None:
        if message.flags & MessageFlag.PRIVATE and not self._sees_all and message.userid != self._userid:
            return
        if len(self._events) < MAX_QUEUED:
            self._events.append(message)
        else:
            self._overrun = True
        self._more.set()

    async def get(self) -> Message:
        while not self._events:
            self._more = trio.Event()
            await self._more.wait()
        if self._overrun:
            raise RpcError(errno.ENOBUFS, f"cannot go on: more than {MAX_QUEUED} events wait for this subscriber")
        return self._events.popleft()
