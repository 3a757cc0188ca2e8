"""A service: named methods, and the table of requests that it has not yet answered.

Each request gets exactly one terminal response (invariant I5): a second one raises IllegalTransition. A handler says
no by raising RpcError. Any other exception in a handler is a bug: the request is answered with ENOTRECOVERABLE, so
that its sender does not send it for ever and knows this from a refusal, and the exception leaves the service's
nursery, which ends the incarnation.

Three kinds of handler:

- `method`: a plain function; what it returns is the response. The cheapest, and the usual one.
- `deferred`: a plain function that keeps the request and answers later (from a commit's callback, say).
- `task`: an async function in the service's nursery, with a scope of its own that `<service>.cancel` and the
  requester's disconnect cancel. What it returns is the response, None for a stream, which then ends with ENODATA.

A request that is flagged streaming ends with an error in any case (RFC 6): where its handler sends a single response,
ENODATA follows that. A response that no frame can hold is answered with EMSGSIZE instead.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from itertools import count
from typing import Final, TypeVar

import msgspec
import trio

from fluxres.base.errors import IllegalTransition, ProtocolError, RpcError
from fluxres.rpc.router import MAX_PAYLOAD, Router
from fluxres.rpc.tracker import ByRequest, Key, error_response, is_terminal
from fluxres.wire.messages import NODEID_UPSTREAM, Message, Role, response_to
from fluxres.wire.payload import WireMap, pack, unpack_map

log = logging.getLogger("fluxres.service")
T = TypeVar("T")

MAX_OPEN: Final = 70_000
"""Requests that one service may have open; the next one gets EAGAIN. (An instance may have 65,536 ranks, and each of
them has a stream open at rank 0 as long as it is there.)"""
MAX_SILENT: Final = 1000
"""Tasks that one service may run for requests that want no response; the next such request is dropped."""


class Ended(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    DISCONNECTED = "disconnected"


class Request:
    """One request as a handler sees it."""

    __slots__ = ("_payload", "_service", "arrived", "begun", "ended", "message", "on_cancel", "scope", "task")

    def __init__(self, service: Service, message: Message, arrived: float) -> None:
        self._service = service
        self._payload: WireMap | None = None
        self.message = message
        self.arrived = arrived
        self.begun = False
        """Whether it has had a response, be it the first of many."""
        self.ended: Ended | None = None
        self.task: trio.lowlevel.Task | None = None
        """The task that runs its handler, once that has started."""
        self.scope: trio.CancelScope | None = None
        self.on_cancel: Callable[[], None] | None = None
        """For a deferred request: called once when its sender cancels or is gone; it may still answer."""

    @property
    def userid(self) -> int:
        """The user on whose behalf the request was sent, as the connector stamped it."""
        return self.message.userid

    @property
    def is_owner(self) -> bool:
        """Whether the sender is the instance owner (RFC 12)."""
        return bool(self.message.rolemask & Role.OWNER)

    @property
    def payload(self) -> WireMap:
        """The payload, decoded once. Raises RpcError EPROTO where it is no map."""
        if self._payload is None:
            try:
                self._payload = unpack_map(self.message.payload)
            except ProtocolError as error:
                raise RpcError(errno.EPROTO, str(error)) from error
        return self._payload

    def parse(self, shape: type[T]) -> T:
        """The payload as `shape` (a msgspec.Struct). Raises RpcError EPROTO that names the key and the value."""
        try:
            return msgspec.convert(self.payload, shape)
        except msgspec.ValidationError as error:
            raise RpcError(errno.EPROTO, f"cannot take this {self.message.topic} request: {error}") from error

    def require_owner(self) -> None:
        """Raise RpcError EPERM unless the instance owner sent this."""
        if not self.is_owner:
            raise RpcError(errno.EPERM, f"{self.message.topic} is for the instance owner")

    def respond(self, payload: WireMap | None = None) -> None:
        """Send the response, or from a task the next one of a streaming request.

        Raises RpcError EMSGSIZE for one of a stream that is too large.
        """
        body = None if payload is None else pack(payload)
        streams = self.message.is_streaming and self.scope is not None
        if body is not None and len(body) > MAX_PAYLOAD:
            text = f"cannot answer {self.message.topic}: {len(body)} bytes, the bound is {MAX_PAYLOAD}"
            if streams:
                raise RpcError(errno.EMSGSIZE, text)
            self.fail(errno.EMSGSIZE, text)
            return
        self._service.send(self, response_to(self.message, payload=body))
        if self.message.is_streaming and not streams:
            self.fail(errno.ENODATA)

    async def stream(self, payload: WireMap) -> None:
        """Send the next response of a streaming request, then wait until its path has room for another.

        Raises RpcError EPROTO where the request is not flagged streaming, or wants no response at all.
        """
        if not self.message.is_streaming or not self.message.wants_response:
            raise RpcError(errno.EPROTO, f"{self.message.topic} wants a streaming request")
        self.respond(payload)
        endpoint = self._service.router.endpoint_of(self.message)
        if endpoint is None:
            await trio.lowlevel.checkpoint()
        else:
            await endpoint.drained(self.message)

    def fail(self, errnum: int, text: str = "") -> None:
        """Send the error that ends the request."""
        self._service.send(self, error_response(self.message, errnum, text))


Method = Callable[[Request], WireMap | None]
Deferred = Callable[[Request], None]
TaskMethod = Callable[[Request], Awaitable[WireMap | None]]


class Service:
    """One service of a broker. Tasks run only inside `run`. `owner_only`: nobody but the instance owner may use it."""

    def __init__(self, name: str, router: Router, *, owner_only: bool = False) -> None:
        self.name = name
        self._owner_only = owner_only
        self.router = router
        self._methods: dict[str, Method] = {}
        self._deferred: dict[str, Deferred] = {}
        self._tasks: dict[str, TaskMethod] = {}
        self._upstream: set[str] = set()
        self._open: ByRequest[Request] = ByRequest()
        """Requests that want a response and whose handler does not answer at once."""
        self._silent: ByRequest[Request] = ByRequest()
        """Requests in a task that want no response; they have numbers for matchtags."""
        self.taken = 0
        """Requests that have come, whatever became of them."""
        self._numbers = count()
        self._nursery: trio.Nursery | None = None
        self.method("ping", lambda request: request.payload)

    def method(self, name: str, handler: Method) -> None:
        """Answer `<service>.<name>` with what `handler` returns."""
        self._methods[_allowed(name)] = handler

    def deferred(self, name: str, handler: Deferred) -> None:
        """Hand `<service>.<name>` to `handler`, which answers when it can."""
        self._deferred[_allowed(name)] = handler

    def task(self, name: str, handler: TaskMethod) -> None:
        """Run `handler` in a task for each `<service>.<name>`."""
        self._tasks[_allowed(name)] = handler

    def upstream(self, name: str) -> None:
        """Let the service of this name at the next broker towards rank 0 answer `<service>.<name>`."""
        self._upstream.add(_allowed(name))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Register with the router and serve until cancelled.

        A service ends with its incarnation, and so do the connections to it: whoever waits for an answer learns
        from that, and asks again. An error here would be taken for the answer.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.router.add_service(self.name, self)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                self.router.remove_service(self.name)
                for request in self._open.values():
                    request.ended = Ended.DISCONNECTED
                self._open.clear()

    # --- health

    @property
    def under_way(self) -> int:
        """How many requests want a response, and have not had their last."""
        return len(self._open)

    def waiting(self) -> list[Request]:
        """The requests that have had no response at all yet, oldest first."""
        return [request for request in self._open.values() if not request.begun]

    def queue(self) -> tuple[int, float]:
        """How many requests are `waiting`, and since when the oldest of them (Trio's clock)."""
        waiting = self.waiting()
        return len(waiting), waiting[0].arrived if waiting else trio.current_time()

    # --- what the router calls

    def dispatch(self, message: Message) -> None:
        """Take a request from the router."""
        name = message.method
        self.taken += 1
        if _is_reserved(name):
            if name == "disconnect":
                self.disconnected(message.route)
            else:
                self._cancel(message)
            if message.wants_response:
                self.router.response(error_response(message, errno.EPROTO, f"{name} has no response"))
            return
        if name in self._upstream and self.router.rank != 0:
            self.router.request(message._replace(aux=NODEID_UPSTREAM))
            return
        method = self._methods.get(name)
        request = Request(self, message, trio.current_time())
        if message.wants_response:
            key = (message.route, message.matchtag)
            if key in self._open:
                self._refuse(message, "its matchtag is in use")
                return
            if method is None:
                if len(self._open) >= MAX_OPEN:
                    self._refuse(message, f"{MAX_OPEN} requests are waiting")
                    return
                self._open.add(key, request)
        if self._owner_only and not request.is_owner:
            request.fail(errno.EPERM, f"service {self.name} is for the instance owner")
        elif method is not None:
            self._answer_at_once(method, request)
        else:
            self._start(name, request)

    def disconnected(self, route: tuple[str, ...]) -> None:
        """Whoever sends with `route`, or through it, is gone: cancel its requests, answer none of them."""
        for key in self._open.through(route):
            request = self._open.pop(key)
            if request is not None:  # else the cancelling of another one has ended it
                request.ended = Ended.DISCONNECTED
                _cancel(request)
        for key in self._silent.through(route):
            silent = self._silent.get(key)
            if silent is not None:
                _cancel(silent)

    def send(self, request: Request, response: Message) -> None:
        """Send a response to `request` (handlers use the request's own methods)."""
        if request.ended is Ended.DISCONNECTED or not request.message.wants_response:
            return
        if request.ended is not None:
            raise IllegalTransition(
                f"request {request.message.topic}", request.ended.value, f"respond {response.errnum}", []
            )
        request.begun = True
        if is_terminal(response):
            request.ended = Ended.FAILED if response.errnum else Ended.ANSWERED
            self._open.pop((request.message.route, request.message.matchtag))
        self.router.response(response)

    # --- handlers

    def _refuse(self, message: Message, why: str) -> None:
        self.router.response(error_response(message, errno.EAGAIN, f"cannot take {message.topic}: {why}"))

    def _answer_at_once(self, method: Method, request: Request) -> None:
        try:
            request.respond(method(request))
        except RpcError as error:
            request.fail(error.errnum, error.text)
        except Exception as error:
            self._broken(request, error)

    def _start(self, name: str, request: Request) -> None:
        """Begin what answers later, by a deferred handler or a task."""
        if (deferred := self._deferred.get(name)) is not None:
            try:
                deferred(request)
            except RpcError as error:
                request.fail(error.errnum, error.text)
            except Exception as error:
                self._broken(request, error)
        elif (task := self._tasks.get(name)) is not None and self._nursery is not None:
            self._start_task(self._nursery, task, request)
        else:
            request.fail(errno.ENOSYS, f"service {self.name} has no method {name!r}")

    def _start_task(self, nursery: trio.Nursery, handler: TaskMethod, request: Request) -> None:
        topic = request.message.topic
        request.scope = trio.CancelScope()  # here, so that a cancel right behind the request finds it
        if request.message.wants_response:
            nursery.start_soon(self._answer, handler, request, name=topic)
        elif len(self._silent) >= MAX_SILENT:
            log.warning("dropping a %s request: %d that want no response are running", topic, MAX_SILENT)
        else:
            key = (request.message.route, next(self._numbers))
            self._silent.add(key, request)
            nursery.start_soon(self._run_silent, handler, request, key, name=topic)

    async def _run_silent(self, handler: TaskMethod, request: Request, key: Key) -> None:
        try:
            await self._answer(handler, request)
        finally:
            self._silent.pop(key)

    async def _answer(self, handler: TaskMethod, request: Request) -> None:
        if request.ended is not None or request.scope is None:
            return
        request.task = trio.lowlevel.current_task()
        with request.scope:
            try:
                payload = await handler(request)
                if payload is not None or not request.message.is_streaming:
                    request.respond(payload)
                if request.message.is_streaming:
                    request.fail(errno.ENODATA)
            except Exception as error:
                refusal = _refusal_in(error)
                if refusal is None:
                    self._broken(request, error)
                    raise
                request.fail(refusal.errnum, refusal.text)
            return
        if request.ended is None:
            # A stream that is cancelled ends as one that is read to its end: what Flux's own watchers expect.
            text = f"{request.message.topic} was cancelled"
            request.fail(errno.ENODATA if request.message.is_streaming else errno.ECANCELED, text)

    def _broken(self, request: Request, error: Exception) -> None:
        """A handler has a bug: answer its request, and end the incarnation through the nursery."""
        log.error("service %s: %s failed", self.name, request.message.topic, exc_info=error)
        if request.ended is None:
            request.fail(errno.ENOTRECOVERABLE, f"{request.message.topic} failed inside the broker: {error!r}")
        if self._nursery is not None and request.scope is None:
            self._nursery.start_soon(_raise, error, name=f"{self.name}.broken")

    def _cancel(self, message: Message) -> None:
        try:
            matchtag = unpack_map(message.payload).get("matchtag")
        except ProtocolError:
            matchtag = None
        request = self._open.get((message.route, matchtag)) if isinstance(matchtag, int) else None
        if request is not None:
            _cancel(request)
        elif self._upstream and self.router.rank != 0:
            self.router.request(message._replace(aux=NODEID_UPSTREAM))


def _is_reserved(name: str) -> bool:
    """Whether a method name belongs to RPC itself: cancel, `<method>-cancel`, disconnect."""
    return name in ("cancel", "disconnect") or name.endswith("-cancel")


def _allowed(name: str) -> str:
    if _is_reserved(name):
        raise ValueError(f"cannot serve a method named {name!r}: RPC itself uses that name")
    return name


def _cancel(request: Request) -> None:
    if request.scope is not None:
        request.scope.cancel()
    elif request.on_cancel is not None:
        on_cancel, request.on_cancel = request.on_cancel, None
        on_cancel()


def _refusal_in(error: BaseException) -> RpcError | None:
    """The RpcError that an exception group is made of, when it is made of nothing else."""
    if isinstance(error, RpcError):
        return error
    if isinstance(error, BaseExceptionGroup):
        refusals = [_refusal_in(part) for part in error.exceptions]
        return None if None in refusals else refusals[0]
    return None


async def _raise(error: Exception) -> None:
    raise error
