"""Health of a broker's services (flux-core #2797): queues, ages, stalls, and the live tree of Trio tasks.

Silent services are seen from outside: the router answers `broker.health` even where a service is stuck. For each
request that has had no response for longer than `STUCK_AFTER` it tells the topic, the age, and where the task of its
handler is; a stream whose first response has come is none of them. The stall meter measures how late the event loop
comes back to a task that wants to run every `TICK` seconds.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from types import FrameType
from typing import Final

import trio

from fluxres.base.meter import QUICK, Histogram
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

TICK: Final = 0.5
RECENT: Final = 60
"""Ticks that `recent` looks back."""
MAX_TREE: Final = 60_000
"""Characters of a task tree in a response."""
STUCK_AFTER: Final = 1.0
"""Seconds without a response after which a request is told with its stack."""
MAX_STUCK: Final = 8
"""Requests of one service that are told so, the oldest."""
MAX_STACK: Final = 40
"""Lines of one stack; the innermost are kept."""


class StallMeter:
    """How long the event loop was held up, at worst ever and lately, in seconds."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.late = Histogram(QUICK)
        """How late it was at each tick."""
        self._recent: list[float] = []

    @property
    def recent(self) -> float:
        """The worst stall of the last `RECENT` ticks."""
        return max(self._recent, default=0.0)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + TICK
            await trio.sleep_until(due)
            late = trio.current_time() - due
            self.worst = max(self.worst, late)
            self.late.observe(late)
            self._recent = [*self._recent[1 - RECENT :], late]


def report(services: Iterable[Service], stalls: StallMeter, *, rank: int, tasks: bool) -> WireMap:
    """The answer to `broker.health`."""
    now = trio.current_time()
    listed: list[WireMap] = []
    for service in services:
        queue, since = service.queue()
        stuck: list[WireMap] = [_stuck(request, now) for request in late(service.waiting(), now)]
        listed.append({"name": service.name, "queue": queue, "oldest": round(now - since, 6), "stuck": [*stuck]})
    answer: WireMap = {
        "rank": rank,
        "services": [*listed],
        "stall": {"worst": round(stalls.worst, 6), "recent": round(stalls.recent, 6)},
    }
    if tasks:
        answer["tasks"] = task_tree()[:MAX_TREE]
    return answer


def late(waiting: Iterable[Request], now: float) -> list[Request]:
    """Those of the waiting requests, oldest first, that have waited too long; `MAX_STUCK` at most."""
    return [request for request in waiting if now - request.arrived > STUCK_AFTER][:MAX_STUCK]


def _stuck(request: Request, now: float) -> WireMap:
    """A request that has waited too long. Its stack is empty where no task of its own handles it."""
    lines: list[str] = []
    if request.task is not None:
        _describe(request.task, 0, lines)
    if len(lines) > MAX_STACK:
        lines = ["…", *lines[1 - MAX_STACK :]]
    return {"topic": request.message.topic, "age": round(now - request.arrived, 6), "stack": [*lines]}


def task_tree() -> str:
    """All Trio tasks of this process, each with where it waits, indented below the nursery that owns it."""
    root = trio.lowlevel.current_root_task()
    lines: list[str] = []
    if root is not None:
        _describe(root, 0, lines)
    return "\n".join(lines)


def _describe(task: trio.lowlevel.Task, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    lines.append(f"{indent}{task.name}")
    lines.extend(f"{indent}  | {where}" for where in _stack(task))
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            _describe(child, depth + 1, lines)


def _stack(task: trio.lowlevel.Task) -> list[str]:
    """Where a task is, outermost call first."""
    found: list[str] = []
    coro: object = task.coro
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None) or getattr(coro, "ag_frame", None)
        if not isinstance(frame, FrameType):
            break
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        found.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}: {line}")
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None) or getattr(coro, "ag_await", None)
    return found
