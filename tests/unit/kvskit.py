"""What the tests of the KVS share: a running Kvs, and commits collected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fluxres.base.errors import RpcError
from fluxres.kvs.kvs import Kvs
from fluxres.kvs.ops import CommitResult, Op

OWNER = 1000


@asynccontextmanager
async def running_kvs(path: Path, *, threaded: bool = True) -> AsyncIterator[Kvs]:
    """A Kvs that runs in the block."""
    async with Kvs.open(path, owner=OWNER, threaded=threaded) as kvs, trio.open_nursery() as nursery:
        await nursery.start(kvs.run)
        yield kvs
        nursery.cancel_scope.cancel()


class Results:
    """Collects the results of submitted commits, under the name given to each, in the order they come."""

    def __init__(self, kvs: Kvs) -> None:
        self._kvs = kvs
        self._event = trio.Event()
        self.order: list[str] = []
        self.errors: dict[str, RpcError | None] = {}

    def submit(self, name: str, *ops: Op, hold: bool = False) -> None:
        """Submit a commit."""

        def done(result: CommitResult) -> None:
            assert name not in self.errors, "answered twice"
            self.order.append(name)
            self.errors[name] = result.error
            self._event.set()

        self._kvs.submit(ops, done, hold=hold)

    async def wait(self, *names: str) -> None:
        """Wait until all of these have been answered, at most 100 s."""
        with trio.fail_after(100):
            while not set(names) <= self.errors.keys():
                self._event = trio.Event()
                await self._event.wait()

    def errnum(self, name: str) -> int | None:
        """The errnum of an answered commit, None for a success."""
        error = self.errors[name]
        return error.errnum if error is not None else None
