"""What the status endpoint answers over plain HTTP: health, readiness, metrics, all documents, and who may ask."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio

from fluxres.status.http import JSON, Request, Response, json, text
from fluxres.status.messages import whole
from fluxres.status.view import TOPICS

if TYPE_CHECKING:
    from fluxres.status.access import Refused
    from fluxres.status.endpoint import Attached, Endpoint

BEGIN_TIMEOUT: Final = 20.0
"""Seconds that `/api/status` waits for the documents: another rank asks rank 0 for them first."""
EXPOSITION: Final = "fluxres.status.exposition"
"""The module that makes the metrics, imported at the first scrape."""
RETRY: Final = ("Retry-After", "1")
_NOBODY: Final = "the broker is between two incarnations, or has not begun the first"


def not_ready(it: Attached | None) -> str:
    """Why the broker is not ready, "" where it is."""
    if it is None:
        return _NOBODY
    state = it.state()
    return "" if state == "run" else f"the broker is in state {state}"


def not_showing(it: Attached | None) -> str:
    """Why nothing can be shown, "" where it can: also while the broker shuts down."""
    why = not_ready(it)
    return "" if it is not None and it.state() == "shutdown" else why


def healthz() -> Response:
    """The process lives, and its event loop turns."""
    return text(200, "ok")


def readyz(it: Attached | None) -> Response:
    """Whether the broker takes requests."""
    why = not_ready(it)
    return text(503, why, RETRY) if why else text(200, "ok")


def access(refused: Refused | None) -> Response:
    """Whether who asks may read, and what it lacks: what the page asks first."""
    if refused is None:
        return json(200, {"access": "ok"})
    return json(refused.status, {"why": refused.why, **({"needs": "token"} if refused.status == 401 else {})})


async def metrics(endpoint: Endpoint, request: Request) -> Response:
    """The metrics, in the format that the client prefers."""
    if EXPOSITION not in sys.modules:  # in a thread, since the loop may not stand still for so long
        await trio.to_thread.run_sync(importlib.import_module, EXPOSITION)
    body, content_type = endpoint.scrape(request.headers.get("accept", ""))
    return Response(content_type=content_type, body=body)


async def status(it: Attached) -> Response:
    """All documents at one position."""
    async with it.boards.open() as board:
        with trio.move_on_after(BEGIN_TIMEOUT) as patience:
            await board.begun()
        if patience.cancelled_caught:
            return json(503, {"error": "cannot show the instance: rank 0 does not answer"})
        pieces: Iterator[bytes] = whole(board.view, TOPICS, time.time())
        first = next(pieces)  # takes the copy that all the others come from
    return Response(content_type=JSON, body=first, pieces=pieces)
