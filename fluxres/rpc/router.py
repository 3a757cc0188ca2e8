"""The router of one broker: takes each message to a local service or to the next hop.

Requests (RFC 3): a `nodeid` names a rank; with "any" the message climbs from the sender towards rank 0 and the
first broker that has the service answers; with the upstream flag the sending rank's own services are passed
over. Responses retrace the route stack. Everything that leaves over a hop is tracked (`rpc.tracker`).

Nothing here waits: `deliver` of an endpoint never blocks, and whoever produces streams waits on the endpoint's
`drained` (see `rpc.server`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Protocol

from fluxres.rpc.tracker import Tracker, error_response
from fluxres.wire.codec import MAX_ROUTE
from fluxres.wire.messages import NODEID_ANY, NODEID_UPSTREAM, Message, MessageFlag, MessageType

log = logging.getLogger("fluxres.router")


class Endpoint(Protocol):
    """One end that messages can be handed to: a client, a handle of this process, or a peer broker."""

    @property
    def id(self) -> str:
        """The name under which the endpoint stands in route stacks; unique in the instance."""

    def deliver(self, message: Message) -> None:
        """Take `message` for sending, at once. An endpoint that is overrun closes itself, with a logged reason."""

    async def drained(self, matchtag: int) -> None:
        """Return as soon as there is room for another response to `matchtag`; producers of streams wait here."""


class Servant(Protocol):
    """What the router knows of a service."""

    def dispatch(self, message: Message) -> None:
        """Take a request. Everything that becomes of it goes through `Router.response`."""

    def disconnected(self, route: tuple[str, ...]) -> None:
        """Whoever sends with `route` is gone: cancel its requests."""


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

    def use_overlay(self, parent: Endpoint | None, next_hop: Callable[[int], Endpoint | None]) -> None:
        """Set how other ranks are reached: the parent's endpoint, and the next hop to any rank below."""
        self._parent = parent
        self._next_hop = next_hop

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
        """Make `endpoint` known, so that responses find it."""
        self._endpoints[endpoint.id] = endpoint

    def remove_endpoint(self, endpoint: Endpoint, why: str) -> None:
        """`endpoint` is gone: what was under way over it is answered, what it asked for is cancelled."""
        if self._endpoints.pop(endpoint.id, None) is None:
            return
        route = (endpoint.id,)
        for service in list(self._services.values()):
            service.disconnected(route)
        for hop, cancel in self.tracker.disconnected(route):
            if hop in self._endpoints:
                self._endpoints[hop].deliver(cancel)
        for failed in self.tracker.lost(endpoint.id, why):
            self.response(failed)

    def endpoint_of(self, message: Message) -> Endpoint | None:
        """The endpoint that a response to the request `message` goes to next; None when it is gone."""
        return self._endpoints.get(message.route[-1]) if message.route else None

    # --- messages

    def receive(self, source: Endpoint, message: Message) -> None:
        """Take `message` as it came from `source`, a client or a peer."""
        if message.type is MessageType.REQUEST:
            long = len(message.route) >= MAX_ROUTE
            message = message._replace(route=(*message.route, source.id))
            if long:
                log.warning("refusing %s: its route has %d hops", message.topic, len(message.route))
                self._refuse(message, errno.EPROTO, f"the route of {message.topic!r} is too long")
            else:
                self.request(message)
        elif message.type is MessageType.RESPONSE:
            if self.tracker.answered(source.id, message):
                self.response(message)
        else:
            log.warning("dropping a %s message from %s", message.type.name.lower(), source.id)

    def request(self, message: Message) -> None:
        """Take a request, its route complete, to its service or its next hop."""
        nodeid = message.nodeid
        if nodeid == NODEID_UPSTREAM:
            message = message._replace(aux=NODEID_ANY, flags=message.flags | MessageFlag.UPSTREAM)
            nodeid = NODEID_ANY
        if nodeid == NODEID_ANY:
            self._request_any(message)
        elif nodeid == self.rank:
            self._serve(message)
        elif nodeid >= self.size:
            self._refuse(message, errno.EHOSTUNREACH, f"rank {nodeid} is not in the instance")
        else:
            self._forward(self._next_hop(nodeid) or self._parent, message, f"rank {nodeid} is not reachable")

    def response(self, message: Message) -> None:
        """Take a response one step back along its route; dropped where whoever asked is gone."""
        if not message.route:
            return
        endpoint = self._endpoints.get(message.route[-1])
        if endpoint is not None:
            endpoint.deliver(message._replace(route=message.route[:-1]))

    def _request_any(self, message: Message) -> None:
        upstream = message.flags & MessageFlag.UPSTREAM
        if not upstream and message.service in self._services:
            self._serve(message)
        elif self._parent is not None:
            self._forward(
                self._parent,
                message._replace(flags=message.flags & ~MessageFlag.UPSTREAM),
                "the parent is lost",
            )
        else:
            self._refuse(message, errno.ENOSYS, f"no service matches {message.topic!r}")

    def _serve(self, message: Message) -> None:
        service = self._services.get(message.service)
        if service is None:
            self._refuse(message, errno.ENOSYS, f"no service matches {message.topic!r}")
        else:
            service.dispatch(message)

    def _forward(self, hop: Endpoint | None, message: Message, unreachable: str) -> None:
        if hop is None or message.route[-1:] == (hop.id,):  # never back to where it came from
            self._refuse(message, errno.EHOSTUNREACH, unreachable)
        else:
            self.tracker.sent(hop.id, message)
            hop.deliver(message)

    def _refuse(self, message: Message, errnum: int, text: str) -> None:
        if message.wants_response:
            self.response(error_response(message, errnum, text))
