"""The services with which a broker speaks of itself: `broker` (ping, health, shutdown), `state-machine`, `log`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

import msgspec
import trio

from fluxres.broker.health import StallMeter, report
from fluxres.broker.logbuffer import LogBuffer
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

log = logging.getLogger("fluxres.broker")


class _Dmesg(msgspec.Struct, frozen=True, kw_only=True):
    follow: bool = False
    nobacklog: bool = False


class _Append(msgspec.Struct, frozen=True, kw_only=True):
    text: Annotated[str, msgspec.Meta(max_length=2048)]
    severity: Annotated[int, msgspec.Meta(ge=0, le=7)] = 6
    facility: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,32}$")] = "user"


class _Health(msgspec.Struct, frozen=True, kw_only=True):
    tasks: bool = False


class SelfService:
    """Serves them for one incarnation. `state` is the broker's own; `shutdown` ends it, and all below."""

    def __init__(
        self,
        *,
        router: Router,
        rank: int,
        uuid: str,
        services: list[Service],
        stalls: StallMeter,
        logbuffer: LogBuffer,
        shutdown: Callable[[], None],
    ) -> None:
        self._rank = rank
        self._uuid = uuid
        self._services = services
        self._stalls = stalls
        self._log = logbuffer
        self._shutdown = shutdown
        self._state = "join"
        self._since = trio.current_time()
        broker = Service("broker", router)
        broker.method("ping", self._ping)
        broker.method("health", self._health)
        broker.method("shutdown", self._shut_down)
        machine = Service("state-machine", router)
        machine.method("get", self._get_state)
        logs = Service("log", router)
        logs.task("dmesg", self._dmesg)
        logs.method("append", self._append)
        self.all = (broker, machine, logs)

    @property
    def state(self) -> str:
        """The broker's state (flux-core state-machine.get)."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self._since = trio.current_time()

    def _ping(self, request: Request) -> WireMap:
        route = "!".join((*request.message.route, self._uuid))
        return {
            **request.payload,
            "route": route,
            "userid": request.userid,
            "rolemask": request.message.rolemask,
            "rank": self._rank,
        }

    def _health(self, request: Request) -> WireMap:
        ask = request.parse(_Health)
        return report(self._services, self._stalls, rank=self._rank, tasks=ask.tasks)

    def _shut_down(self, request: Request) -> None:
        request.require_owner()
        log.info("shutting down: asked by uid %d", request.userid)
        self._shutdown()

    def _get_state(self, request: Request) -> WireMap:
        return {"state": self._state, "duration": trio.current_time() - self._since}

    def _append(self, request: Request) -> None:
        ask = request.parse(_Append)
        level = logging.ERROR if ask.severity <= 3 else logging.WARNING if ask.severity == 4 else logging.INFO
        logging.getLogger(f"fluxres.{ask.facility}").log(level, "%s", ask.text)

    async def _dmesg(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Dmesg)
        entries, last = self._log.after(self._log.last if ask.nobacklog else 0)
        while True:
            for entry in entries:
                await request.stream({"line": entry})
            if not ask.follow:
                return
            while self._log.last == last:
                await self._log.more()
            entries, last = self._log.after(last)
