"""A fake broker with a status feed, for tests of commands that watch one; and documents as the feed has them."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path
from typing import Self, cast

from fakebroker import FakeBroker

from fluxres.base.jobid import f58
from fluxres.base.json import JsonObject
from fluxres.cli.feed import WATCH
from fluxres.wire.codec import encode
from fluxres.wire.framing import frame
from fluxres.wire.messages import Message, response_to
from fluxres.wire.payload import WireMap, pack, unpack_map

PATIENCE = 30.0
EPOCH = "5e1f"
NOW = 1_700_000_000.0
Docs = dict[str, dict[str, JsonObject]]


def job(number: int, state: str = "RUN", **more: object) -> JsonObject:
    """A job's document."""
    base: dict[str, object] = {
        "id": f58(number), "dec": str(number), "state": state, "name": f"job{number}", "userid": 0, "urgency": 16,
        "ntasks": 1, "nnodes": 1, "priority": 16, "t_submit": NOW - 100,
    }  # fmt: skip
    if state in ("RUN", "CLEANUP", "INACTIVE"):
        base.update(t_run=NOW - 60, nodelist="n0", ranks="0")
    if state == "INACTIVE":
        base.update(t_cleanup=NOW - 10, t_inactive=NOW - 10, result="COMPLETED", success=True, waitstatus=0)
    return cast("JsonObject", {**base, **more})


def jobs(*documents: JsonObject) -> dict[str, JsonObject]:
    """The topic of these jobs."""
    return {str(each["dec"]): each for each in documents}


def picture() -> Docs:
    """A small instance: four ranks, one lost, one drained, three jobs."""
    ranks: dict[str, JsonObject] = {
        str(rank): {"rank": rank, "host": f"n{rank}", "cores": 4, "cores_used": 0, "online": True, "torpid": False}
        for rank in range(4)
    }
    ranks["0"]["cores_used"] = 3
    ranks["2"].update(online=False, lost="its host died")
    ranks["3"].update(drained="")
    return {
        "instance": {
            "about": {"instance": "toy", "size": 4, "version": "1.2", "host": "n0", "started": NOW - 7200,
                      "incarnations": 1},
            "jobs": {"sched": 1, "run": 1, "inactive": 5, "completed": 3, "failed": 1, "canceled": 1, "timeout": 0},
            "resources": {"nodes": 4, "online": 3, "torpid": 0, "drained": 1, "lost": 1, "cores": 16, "cores_used": 3,
                          "cores_down": 8, "gpus": 0, "gpus_used": 0},
            "queue": {"enabled": True, "started": True},
        },
        "resources": ranks,
        "jobs": jobs(
            job(11, expiration=NOW + 60),
            job(12, "SCHED"),
            job(10, "INACTIVE", result="FAILED", waitstatus=256),
        ),
        "events": {"5.0": {"t": NOW - 30, "name": "drain", "context": {"idset": "3", "reason": "why not"}}},
    }  # fmt: skip


def snapshot(docs: Docs, seq: int = 1, epoch: str = EPOCH, why: str = "first") -> WireMap:
    """A whole snapshot."""
    return cast(
        "WireMap",
        {"type": "snapshot", "part": 0, "more": False, "position": [epoch, seq], "why": why, "docs": docs, "now": NOW},
    )


def delta(prev: int, seq: int, put: Docs | None = None, delete: dict[str, list[str]] | None = None) -> WireMap:
    """A delta."""
    body = {"type": "delta", "prev": prev, "position": [EPOCH, seq], "set": put or {}, "delete": delete or {}}
    return cast("WireMap", {**body, "part": 0, "more": False, "now": NOW})


class FeedBroker(FakeBroker):
    """Answers requests for the feed with `docs`, one that is up to date with an empty delta; `push` sends more."""

    def __init__(self, path: Path, docs: Docs | None = None) -> None:
        self.docs = docs if docs is not None else picture()
        self.seq = 1
        self.asked = threading.Semaphore(0)
        self._watchers: list[tuple[socket.socket, Message]] = []
        super().__init__(path)
        self.handlers[WATCH] = lambda _message, payload: [self._first(payload)]

    def __enter__(self) -> Self:
        return self

    def _first(self, payload: WireMap) -> WireMap:
        if payload.get("position") == [EPOCH, self.seq]:
            return delta(self.seq, self.seq)
        return snapshot(self.docs, self.seq)

    def wait_asked(self) -> None:
        """Wait until the feed has been asked for once more than the last time."""
        assert self.asked.acquire(timeout=PATIENCE)

    def push(self, put: Docs | None = None, delete: dict[str, list[str]] | None = None) -> None:
        """Send a delta to all who watch."""
        for topic, documents in (put or {}).items():
            self.docs.setdefault(topic, {}).update(documents)
        for topic, keys in (delete or {}).items():
            for key in keys:
                self.docs.get(topic, {}).pop(key, None)
        self.seq += 1
        self.send(delta(self.seq - 1, self.seq, put, delete))

    def send(self, body: WireMap) -> None:
        """Send anything to all who watch."""
        for connection, message in self._watchers:
            with contextlib.suppress(OSError):  # one that has gone
                connection.sendall(frame(encode(response_to(message, payload=pack(body)))))

    def fail(self, errnum: int = errno.EHOSTUNREACH) -> None:
        """End the feed of all who watch with an error."""
        watchers, self._watchers = self._watchers, []
        for connection, message in watchers:
            connection.sendall(frame(encode(response_to(message, payload=b"", errnum=errnum))))

    def _answer(self, connection: socket.socket, message: Message) -> None:
        if message.topic == WATCH:
            assert message.nodeid == 0
            assert "topics" in unpack_map(message.payload)
            self._watchers.append((connection, message))
        super()._answer(connection, message)
        if message.topic == WATCH:
            self.asked.release()
