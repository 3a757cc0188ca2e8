"""Instances of several real brokers for the system tests: each rank is started, killed and restarted by the test."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, cast

from kit import PATIENCE, Instance, eventually

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.base.jobid import JobId, dothex
from fluxres.client import Client
from fluxres.wire.payload import WireMap

QUICK: Final = {"heartbeat": "0.2s", "torpid_min": "1s", "timeout": "3s"}
"""Times of the overlay with which silence is noticed soon."""
LOST_PARENT: Final = r"panic: (the parent, rank \d+,|cannot (join|stay in) the instance: .* is lost)"
"""What a broker logs when its parent is lost: expected, in these tests."""
_UUID: Final[WireMap] = {"name": "uuid"}
_WARM: Final = "import sys, fluxres.broker.main as broker; sys.stdin.read(1) or sys.exit(0); sys.exit(broker.main())"
"""A broker that begins when it is told to: what takes longest has been done then."""


class Tree(Instance):
    """`size` brokers in a tree of `fanout`, each with `cores`. Rank 0's socket is the instance's."""

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        fanout: int = 2,
        cores: int = 4,
        settings: Mapping[str, Mapping[str, str | int | bool]] | None = None,
    ) -> None:
        tables: dict[str, Mapping[str, str | int | bool]] = {
            "bootstrap": {"size": size, "fanout": fanout},
            "tbon": QUICK,
        }
        for name, table in (settings or {}).items():
            tables[name] = {**tables.get(name, {}), **table}
        super().__init__(path, cores=cores, settings=tables)
        self.size = size
        self.fanout = fanout
        self.brokers: dict[int, subprocess.Popen[bytes]] = {}
        self.tolerated.append(LOST_PARENT)

    # --- brokers

    def spawn(self, *ranks: int, env: Mapping[str, str] | None = None) -> None:
        """Start the brokers of these ranks; see `wait_online`."""
        for rank in ranks:
            assert rank not in self.brokers, f"rank {rank} is running already"
            self.brokers[rank] = self._popen(rank, self.command(), stdin=subprocess.DEVNULL, env=env)

    def warm(self, rank: int) -> Callable[[], None]:
        """Prepare a process that, when the result is called, is the broker of `rank` at once."""
        module = [sys.executable, "-m", "fluxres.broker.main"]
        command = self.command()
        assert command[:3] == module
        process = self._popen(rank, [sys.executable, "-c", _WARM, *command[3:]], stdin=subprocess.PIPE, env=None)
        self._others.append(process)

        def begin() -> None:
            assert rank not in self.brokers, f"rank {rank} is running already"
            assert process.stdin is not None
            self._others.remove(process)
            self.brokers[rank] = process
            process.stdin.write(b"!")
            process.stdin.close()

        return begin

    def _popen(
        self, rank: int, command: Sequence[str], *, stdin: int, env: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        with self.log_path(rank).open("ab") as log:
            return subprocess.Popen(
                [*command, "--rank", str(rank)],
                env={**self.environ, **(env or {})},
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def start_all(self, order: Sequence[int] | None = None) -> None:
        """Start every broker, in `order` or that of their ranks, and wait until all are online."""
        self.spawn(*(range(self.size) if order is None else order))
        self.wait_online()

    def kill_rank(self, *ranks: int) -> None:
        """SIGKILL these brokers, all before any is reaped."""
        for rank in ranks:
            self.brokers[rank].kill()
        for rank in ranks:
            self.brokers.pop(rank).wait(PATIENCE)

    def stop_rank(self, rank: int) -> int:
        """Shut a broker down cleanly with SIGTERM; its exit status."""
        broker = self.brokers.pop(rank)
        broker.terminate()
        return broker.wait(PATIENCE)

    def died_rank(self, rank: int) -> int:
        """Wait for a broker's own end; its return code, -9 for SIGKILL."""
        return self.brokers.pop(rank).wait(PATIENCE)

    def log_path(self, rank: int) -> Path:
        """Where a broker, and its launcher, write."""
        return self.path / f"broker-{rank}.log"

    @property
    def log(self) -> str:
        """What all of them wrote so far."""
        return "".join(self.log_of(rank) for rank in range(self.size))

    def log_of(self, rank: int) -> str:
        """What the broker of one rank wrote so far."""
        path = self.log_path(rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def resize(self, size: int) -> int:
        """Have `size` brokers in the configuration from the next start on; returns how many there were."""
        was, line = self.size, "size = {}\n".format
        text = self._config.read_text(encoding="utf-8")
        assert line(was) in text
        self._config.write_text(text.replace(line(was), line(size)), encoding="utf-8")
        self.size = size
        return was

    # --- asking them

    def uri_of(self, rank: int) -> str:
        """The socket of one rank."""
        return f"local://{self.rundir}/local-{rank}"

    def ask(self, rank: int, topic: str, payload: WireMap | None = None) -> WireMap:
        """One call over the rank's own socket. Raises RpcError, FluxresError."""
        with Client.connect(self.uri_of(rank)) as client:
            return client.call(topic, payload or {}, nodeid=rank, timeout=PATIENCE)

    def attribute(self, rank: int, name: str) -> str:
        """An attribute of one broker, from its own socket."""
        return cast("str", self.ask(rank, "attr.get", {"name": name})["value"])

    def uuids(self, ranks: Iterable[int] | None = None) -> dict[int, str]:
        """The incarnations of these brokers, or of all, each from its own socket."""

        def uuid(rank: int) -> str:
            return eventually(lambda: self.attribute(rank, "uuid"), what=f"the uuid of rank {rank}")

        return {rank: uuid(rank) for rank in (range(self.size) if ranks is None else ranks)}

    def reachable(self) -> dict[int, str]:
        """The incarnations that can be reached from rank 0, each asked through the tree."""
        with self.client() as client:
            asked = {rank: client.open("attr.get", _UUID, nodeid=rank, streaming=False) for rank in range(self.size)}
            replies = {rank: client.receive_for(tag, PATIENCE) for rank, tag in asked.items()}
        there = {rank: reply for rank, reply in replies.items() if reply is not None and reply.error is None}
        return {rank: cast("str", reply.payload["value"]) for rank, reply in there.items()}

    def wait_renewed(self, before: Mapping[int, str], ranks: Collection[int] | None = None) -> None:
        """Wait until all are online after a panic at the root of the subtree `ranks`, or at rank 0, and check I6.

        Call it when the loss has come about: from then on no incarnation of the subtree that is in `before` is
        reachable. All other brokers are what they were before.
        """
        subtree = set(range(self.size) if ranks is None else ranks)

        def renewed() -> bool:
            try:
                found = self.reachable()
            except FluxresError:  # rank 0 is not there yet
                return False
            stale = [rank for rank in found if rank in subtree and found[rank] == before[rank]]
            assert not stale, f"I6: ranks {stale} are what they were before the panic"
            return len(found) == self.size

        eventually(renewed, what=f"new incarnations of {sorted(subtree)}")
        self.wait_online()
        after = self.uuids()
        changed = {rank for rank in before if after[rank] != before[rank]}
        assert changed == subtree, f"ranks {sorted(changed ^ subtree)} should (not) have restarted"

    def online(self) -> IdSet:
        """The ranks that rank 0 counts as online."""
        return IdSet.parse(cast("str", self.rpc("resource.status")["online"]))

    def wait_online(self, ranks: Iterable[int] | None = None) -> None:
        """Wait until these ranks, or all, are online, and no others."""
        wanted = IdSet(range(self.size) if ranks is None else ranks)
        eventually(lambda: self.online() == wanted, what=f"ranks {wanted} online")
        if ranks is None:
            eventually(lambda: self.health()["status"] == "full", what="full health")

    def health(self, rank: int = 0) -> WireMap:
        """What a broker tells of its subtree."""
        return self.ask(rank, "overlay.health")

    def child_status(self, rank: int) -> str:
        """What a rank's parent says of it: full, partial, degraded, lost or offline."""
        for child in cast("list[WireMap]", self.health(self.parent(rank))["children"]):
            if child["rank"] == rank:
                return cast("str", child["status"])
        raise AssertionError(f"rank {self.parent(rank)} does not list its child {rank}")

    def parent(self, rank: int) -> int:
        """A rank's parent."""
        return (rank - 1) // self.fanout

    def subtree(self, rank: int) -> list[int]:
        """A rank and all below it."""
        below = [child for child in range(1, self.size) if self.parent(child) == rank]
        return [rank, *(each for child in below for each in self.subtree(child))]

    def shuffled(self, seed: int) -> list[int]:
        """All ranks in an order that the seed gives."""
        ranks = list(range(self.size))
        random.Random(seed).shuffle(ranks)
        return ranks

    def tracked(self, rank: int) -> int:
        """How many requests a broker tracks."""
        return int(self.attribute(rank, "rpc.tracked"))

    # --- files

    def incarnations(self, rank: int) -> int:
        """How many incarnations have begun on the statedir of a rank."""
        return cast("int", json.loads((self.rank_statedir(rank) / "identity.json").read_bytes())["incarnations"])

    def rank_statedir(self, rank: int) -> Path:
        """The statedir of one rank."""
        return self.base / str(rank)

    def directories(self, jobid: JobId) -> list[Path]:
        """The directories that there are of the job's shells, on all ranks."""
        paths = (self.rank_statedir(rank) / "jobs" / dothex(jobid) / str(rank) for rank in range(self.size))
        return [path for path in paths if path.exists()]

    # --- the end

    def clean_up(self) -> None:
        """Kill whatever is left of the instance."""
        for broker in self.brokers.values():
            broker.send_signal(signal.SIGCONT)
        self.kill_rank(*list(self.brokers))
        super().clean_up()
