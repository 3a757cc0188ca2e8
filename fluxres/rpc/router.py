"""The router of one broker: takes each message to a local service or to the next hop.

Requests (RFC 3): a `nodeid` names a rank; with "any" the message climbs from the sender towards rank 0 and the
first broker that has the service answers; with the upstream flag the sending rank's own services are passed
over. Responses retrace the route stack. Everything that leaves over a hop is tracked (`rpc.tracker`).

    a request for                      goes to
    this rank                          its service; ENOSYS where there is none
    a rank below                       the child that leads there; EHOSTUNREACH where that is not connected
    any other rank of the instance     the parent; EHOSTUNREACH where there is none now
    a rank that the instance has not   EHOSTUNREACH
    any                                the service here, else the parent; ENOSYS at rank 0
    any, upstream                      the parent, for which it is a request for any

A hop that is gone answers nothing and a hop never gets back what it sent: both are EHOSTUNREACH. A `disconnect` request
does not travel: the broker that would pass it on cancels the sender's requests instead, so that each of them still ends
at every hop. Events come from the parent only, and go to `rpc.events`.

Nothing here waits: `deliver` of an endpoint never blocks, and whoever produces streams waits on the endpoint's
`drained` (see `rpc.server`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, Protocol

from fluxres.base.errors import RpcError
from fluxres.rpc.tracker import Tracker, error_response
from fluxres.wire.codec import MAX_ROUTE
from fluxres.wire.framing import MAX_FRAME
from fluxres.wire.messages import NODEID_ANY, NODEID_UPSTREAM, Message, MessageFlag, MessageType, Role

log = logging.getLogger("fluxres.router")

MAX_PAYLOAD: Final = MAX_FRAME - 64 * 1024
"""Bytes of a payload that is sent on: a frame also holds its header, with a route that grows at each hop."""
MAX_TRACKED: Final = 1 << 20
"""Requests that may be under way over all hops of a broker; the next one gets EAGAIN."""


class Endpoint(Protocol):
    """One end that messages can be handed to: a client, a handle of this process, or a peer broker."""

    @property
    def id(self) -> str:
        """The name under which the endpoint stands in route stacks; unique in the instance."""

    @property
    def hop(self) -> Hop | None:
        """The endpoint itself where it is a peer broker; None for what belongs to this one."""

    def deliver(self, message: Message) -> None:
        """Take `message` for sending, at once. An endpoint that is overrun closes itself, with a logged reason."""

    async def drained(self, asked: Message) -> None:
        """Return as soon as there is room for another response to `asked`; producers of streams wait here.

        `asked` is the request as it is at this broker: the last of its route is this endpoint.
        """

    def on_room(self, asked: Message, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as `drained` would not wait; now, where it would not wait now."""


class Hop(Endpoint, Protocol):
    """A peer broker."""

    def received_response(self, response: Message, onward: Endpoint | None) -> None:
        """`response` came from here and was handed to `onward`; None where nobody wanted it any more."""


class Servant(Protocol):
    """What the router knows of a service."""

    def dispatch(self, message: Message) -> None:
        """Take a request. Everything that becomes of it goes through `Router.response`."""

    def disconnected(self, route: tuple[str, ...]) -> None:
        """Whoever sends with `route` is gone: cancel its requests."""


class EventSink(Protocol):
    """Who takes the events that come from the parent."""

    def receive(self, message: Message) -> None:
        """Take an event."""


class Router:
    """Routes messages for one incarnation of one broker."""

    def __init__(self, *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.tracker = Tracker()
        self._services: dict[str, Servant] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._parent: Endpoint | None = None
        self._next_hop: Callable[[int], Endpoint | None] = lambda _rank: None
        self._events: EventSink | None = None

    def use_overlay(self, parent: Endpoint | None, next_hop: Callable[[int], Endpoint | None]) -> None:
        """Set how other ranks are reached: the parent's endpoint, and the next hop to any rank below.

        `next_hop` returns None for a rank that is not below this one, and raises RpcError (EHOSTUNREACH, "rank N is not
        reachable: why") for one that is, behind a child that is not connected.
        """
        self._parent = parent
        self._next_hop = next_hop

    def use_events(self, events: EventSink) -> None:
        """Set who takes events."""
        self._events = events

    # --- who is here

    @property
    def services(self) -> list[str]:
        """The names of the services of this broker."""
        return sorted(self._services)

    def add_service(self, name: str, service: Servant) -> None:
        """Register `service`; a name is registered once."""
        if name in self._services:
            raise ValueError(f"cannot register service {name!r}: it is registered already")
        self._services[name] = service

    def remove_service(self, name: str) -> None:
        """Withdraw a service; later requests get ENOSYS."""
        del self._services[name]

    def add_endpoint(self, endpoint: Endpoint) -> None:
        """Make `endpoint` known, so that responses find it; an id is known once."""
        if endpoint.id in self._endpoints:
            raise ValueError(f"cannot add endpoint {endpoint.id!r}: there is one of that name")
        self._endpoints[endpoint.id] = endpoint

    def is_endpoint(self, name: str) -> bool:
        """Whether an endpoint of that id is known."""
        return name in self._endpoints

    def remove_endpoint(self, endpoint: Endpoint, why: str) -> None:
        """`endpoint` is gone: what was under way over it is answered, what it asked for is cancelled."""
        if self._endpoints.get(endpoint.id) is not endpoint:
            return
        del self._endpoints[endpoint.id]
        route = (endpoint.id,)
        for service in list(self._services.values()):
            service.disconnected(route)
        self._cancel_over_hops(route)
        for failed in self.tracker.lost(endpoint.id, why):
            self.response(failed)

    def endpoint_of(self, message: Message) -> Endpoint | None:
        """The endpoint that a response to the request `message` goes to next; None when it is gone."""
        return self._endpoints.get(message.route[-1]) if message.route else None

    # --- messages

    def receive(self, source: Endpoint, message: Message) -> None:
        """Take `message` as it came from `source`, a client or a peer."""
        if message.type is MessageType.REQUEST:
            # Whoever sent it is local to another broker, and it may be on another host.
            roles = message.rolemask if source.hop is None else message.rolemask & ~Role.LOCAL
            message = message._replace(route=(*message.route, source.id), rolemask=roles)
            if len(message.route) > MAX_ROUTE:
                log.warning("refusing %s: its route has %d hops", message.topic, len(message.route))
                self._refuse(message, errno.EPROTO, f"the route of {message.topic!r} is too long")
            else:
                self.request(message)
        elif message.type is MessageType.RESPONSE:
            onward = self.response(message) if self.tracker.answered(source.id, message) else None
            hop = source.hop
            if hop is not None:
                hop.received_response(message, onward)
        elif message.type is MessageType.EVENT and source is self._parent and self._events is not None:
            self._events.receive(message)
        else:
            log.warning("dropping a %s message from %s", message.type.name.lower(), source.id)

    def request(self, message: Message) -> None:
        """Take a request, its route complete, to its service or its next hop."""
        nodeid = message.nodeid
        if nodeid == NODEID_ANY:
            self._request_any(message)
        elif nodeid == NODEID_UPSTREAM:
            self._request_any(message._replace(aux=NODEID_ANY, flags=message.flags | MessageFlag.UPSTREAM))
        elif message.flags & MessageFlag.UPSTREAM:  # RFC 3: the nodeid is the sender's, and elsewhere it means any
            flags = message.flags if nodeid == self.rank else message.flags & ~MessageFlag.UPSTREAM
            self._request_any(message._replace(aux=NODEID_ANY, flags=flags))
        elif nodeid == self.rank:
            self._serve(message)
        else:
            self._request_rank(message)

    def response(self, message: Message) -> Endpoint | None:
        """Take a response one step back along its route; returns where to, None where whoever asked is gone."""
        route = message.route
        endpoint = self._endpoints.get(route[-1]) if route else None
        if endpoint is not None:
            endpoint.deliver(message._replace(route=route[:-1]))
        return endpoint

    def _request_any(self, message: Message) -> None:
        if not message.flags & MessageFlag.UPSTREAM and message.service in self._services:
            self._serve(message)
        elif self.rank == 0:
            self._refuse(message, errno.ENOSYS, f"no service matches {message.topic!r}")
        else:
            onward = message._replace(flags=message.flags & ~MessageFlag.UPSTREAM)
            self._forward(self._parent, onward, f"{message.topic} is not reachable")

    def _request_rank(self, message: Message) -> None:
        unreachable = f"rank {message.nodeid} is not reachable"
        if message.nodeid >= self.size:
            self._refuse(message, errno.EHOSTUNREACH, f"{unreachable}: the instance has {self.size} ranks")
            return
        try:
            hop = self._next_hop(message.nodeid)
        except RpcError as error:
            self._refuse(message, error.errnum, error.text)
        else:
            self._forward(hop or self._parent, message, unreachable)

    def _serve(self, message: Message) -> None:
        service = self._services.get(message.service)
        if service is None:
            self._refuse(message, errno.ENOSYS, f"no service matches {message.topic!r}")
        else:
            service.dispatch(message)

    def _forward(self, hop: Endpoint | None, message: Message, unreachable: str) -> None:
        """Send a request over `hop`, or say why not; `unreachable` begins that sentence."""
        if hop is None or self._endpoints.get(hop.id) is not hop:
            text = f"{unreachable}: rank {self.rank} has no connection to the next broker"
            self._refuse(message, errno.EHOSTUNREACH, text)
        elif message.route[-1:] == (hop.id,):
            self._refuse(message, errno.EHOSTUNREACH, f"{unreachable}: it would go back to where it came from")
        elif message.payload is not None and len(message.payload) > MAX_PAYLOAD:
            text = f"cannot send {message.topic}: {len(message.payload)} bytes, the bound is {MAX_PAYLOAD}"
            self._refuse(message, errno.EMSGSIZE, text)
        elif message.topic.endswith(".disconnect"):
            self._cancel_over_hops(message.route, message.service)
            self._refuse(message, errno.EPROTO, "disconnect has no response")
        elif len(self.tracker) >= MAX_TRACKED and message.wants_response:
            text = f"cannot send {message.topic}: {MAX_TRACKED} requests are under way to other brokers"
            self._refuse(message, errno.EAGAIN, text)
        elif self.tracker.sent(hop.id, message):
            hop.deliver(message)
        else:
            self._refuse(message, errno.EAGAIN, f"cannot send {message.topic}: its matchtag is in use")

    def _cancel_over_hops(self, route: tuple[str, ...], service: str | None = None) -> None:
        """Whoever sends with `route` is gone, or has said so to `service`: cancel what it asked for elsewhere."""
        for hop, cancel in self.tracker.disconnected(route, service):
            endpoint = self._endpoints.get(hop)
            if endpoint is not None:
                endpoint.deliver(cancel)

    def _refuse(self, message: Message, errnum: int, text: str) -> None:
        if message.wants_response:
            self.response(error_response(message, errnum, text))
