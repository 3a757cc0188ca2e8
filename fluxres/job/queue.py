"""The queue: whether submissions are taken (enabled), and whether resources are given out (started).

Both are durable before they are answered, so that a stopped queue stays stopped over a restart. Served as methods of
`job-manager`, as in flux-core: queue-status, queue-list, queue-enable, queue-start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from fluxres.base.json import JsonObject
from fluxres.job.ingest import Ingest
from fluxres.job.manager import Manager
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import PRIMARY, CommitResult, Put
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

KEY: Final = "job-manager.queue"
"""Where the state of the queue lies."""


class _State(msgspec.Struct, frozen=True, kw_only=True):
    enable: bool = True
    start: bool = True
    disable_reason: str = ""
    stop_reason: str = ""


class _Enable(msgspec.Struct, frozen=True, kw_only=True):
    enable: bool
    reason: str = ""


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    start: bool
    reason: str = ""


class Queue:
    """The state of the one queue, and its methods on `service`."""

    def __init__(self, *, kvs: Kvs, service: Service, manager: Manager, ingest: Ingest) -> None:
        self._kvs = kvs
        self._manager = manager
        self._ingest = ingest
        stored = kvs.get(PRIMARY, KEY)
        self._state = _State() if stored is None else msgspec.json.decode(stored, type=_State)
        self._apply()
        service.method("queue-status", self._status)
        service.method("queue-list", lambda _: {"queues": []})
        service.deferred("queue-enable", self._enable)
        service.deferred("queue-start", self._start)

    def document(self) -> JsonObject:
        """As the status feed shows it: enabled, started, and the reason where it is not both."""
        state = self._state
        reasons = [each for each in (state.disable_reason, state.stop_reason) if each]
        document: JsonObject = {"enabled": state.enable, "started": state.start}
        return {**document, "reason": "; ".join(reasons)} if reasons else document

    def _status(self, request: Request) -> WireMap:
        status: WireMap = {"enable": self._state.enable, "start": self._state.start}
        if self._state.disable_reason:
            status["disable_reason"] = self._state.disable_reason
        if self._state.stop_reason:
            status["stop_reason"] = self._state.stop_reason
        return status

    def _enable(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Enable)
        reason = "" if ask.enable else ask.reason
        self._change(request, lambda old: msgspec.structs.replace(old, enable=ask.enable, disable_reason=reason))

    def _start(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Start)
        reason = "" if ask.start else ask.reason
        self._change(request, lambda old: msgspec.structs.replace(old, start=ask.start, stop_reason=reason))

    def _change(self, request: Request, change: Callable[[_State], _State]) -> None:
        new = change(self._state)

        def durable(result: CommitResult) -> None:
            if result.error is not None:
                request.fail(result.error.errnum, f"cannot change the queue: {result.error.text}")
                return
            self._state = new
            self._apply()
            request.respond()

        self._kvs.submit([Put(PRIMARY, KEY, msgspec.json.encode(new))], durable)

    def _apply(self) -> None:
        self._ingest.enabled = self._state.enable
        self._ingest.disabled_reason = self._state.disable_reason
        if self._state.start:
            self._manager.scheduler.start()
        else:
            self._manager.scheduler.stop()
