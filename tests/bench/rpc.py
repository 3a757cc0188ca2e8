"""RPC round trips and durable commits through the Unix socket, and the fsync that commits stand on."""

from __future__ import annotations

import base64
import os
import statistics
import time
from pathlib import Path
from typing import Final

from fluxres.client import Client
from fluxres.wire.payload import WireMap
from tests.bench.measure import Measurement, instance, seconds

CALLS: Final = 2000
IN_FLIGHT: Final = 64


def fsync(path: Path) -> float:
    """The median time of an fsync after a small write, in milliseconds."""
    times = []
    with (path / "file").open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(b"x" * 4096)
            begun = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3


def round_trip(path: Path) -> float:
    """The median time of one ping after the other, in microseconds."""
    with instance(path) as made, made.client() as client:
        times = [seconds(lambda: client.call("broker.ping", {"seq": 1})) for _ in range(CALLS)]
    return statistics.median(times) * 1e6


def pings_in_flight(path: Path) -> float:
    """Pings a second with `IN_FLIGHT` of them under way."""
    with instance(path) as made, made.client() as client:
        return CALLS * 5 / seconds(lambda: pipelined(client, "broker.ping", [{"seq": n} for n in range(CALLS * 5)]))


def commits(path: Path) -> float:
    """Durable commits a second, one after the other."""
    with instance(path) as made, made.client() as client:
        payloads = [_put(n) for n in range(CALLS)]
        return CALLS / seconds(lambda: [client.call("kvs.commit", payload) for payload in payloads])


def commits_in_flight(path: Path) -> float:
    """Durable commits a second with `IN_FLIGHT` of them under way."""
    with instance(path) as made, made.client() as client:
        return CALLS * 2 / seconds(lambda: pipelined(client, "kvs.commit", [_put(n) for n in range(CALLS * 2)]))


def pipelined(client: Client, topic: str, payloads: list[WireMap]) -> list[WireMap]:
    """Call `topic` once for each payload, `IN_FLIGHT` at a time; the answers as they come."""
    waiting = iter(payloads)
    answers: list[WireMap] = []
    for payload in (next(waiting) for _ in range(min(IN_FLIGHT, len(payloads)))):
        client.open(topic, payload, streaming=False)
    while len(answers) < len(payloads):
        reply = client.receive(60)
        assert reply is not None, "no answer"
        if reply.error is not None:
            raise reply.error
        answers.append(reply.payload)
        following = next(waiting, None)
        if following is not None:
            client.open(topic, following, streaming=False)
    return answers


def _put(number: int) -> WireMap:
    data = base64.b64encode(b"value %d" % number).decode()
    dirent: WireMap = {"ver": 1, "type": "val", "data": data}
    return {"namespace": "primary", "flags": 0, "ops": [{"key": f"bench.{number}", "flags": 0, "dirent": dirent}]}


MEASURED: Final = {
    "fsync": Measurement(what="one fsync of this disk", run=fsync, unit="ms", goal="", digits=2),
    "rtt": Measurement(
        what="RPC round trip, median", run=round_trip, unit="µs", goal="< 200", peers="flux 170–200", digits=0
    ),
    "rpc64": Measurement(
        what="RPC, 64 in flight", run=pings_in_flight, unit="/s", goal="10,000", peers="flux 19,000–25,000", digits=0
    ),
    "commits": Measurement(
        what="durable KVS commits, one by one", run=commits, unit="/s", goal="1,500", peers="flux 400–600", digits=0
    ),
    "commits64": Measurement(
        what="durable KVS commits, 64 in flight",
        run=commits_in_flight,
        unit="/s",
        goal="5,000",
        peers="flux 2,500",
        digits=0,
    ),
}
