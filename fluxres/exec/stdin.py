"""Standard input: from the guest namespace's `input` eventlog (RFC 24) to the shells, each from its own cursor.

The eventlog is the truth. `offset` counts bytes from its beginning; a shell says on attaching how far it has come, and
acknowledges what it consumed, which bounds what is under way. After a break the pump begins again where the shell is.
"""

from __future__ import annotations

import base64
import logging
from typing import Final

import trio

from fluxres.base.errors import RpcError
from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import JobId, f58
from fluxres.kvs.kvs import Kvs
from fluxres.rpc.handle import Handle

log = logging.getLogger("fluxres.exec")

INPUT_KEY: Final = "input"
WINDOW: Final = 64 * 1024
"""Bytes that may be under way to one shell, unacknowledged."""
PIECE: Final = 16 * 1024
"""Bytes sent in one message."""


def input_bytes(event: Event) -> tuple[bytes, bool]:
    """The bytes of one `data` event, and whether the stream ends with it. Raises ValueError."""
    if event.name != "data":
        return b"", False
    data = event.context.get("data", "")
    if not isinstance(data, str):
        raise ValueError("cannot read standard input: data is no text")
    raw = base64.b64decode(data, validate=True) if event.context.get("encoding") == "base64" else data.encode()
    return raw, event.context.get("eof") is True


class StoredInput:
    """A job's standard input as it is stored: how many bytes, and whether it has ended. Raises ValueError.

    Counted from the eventlog once; after that whoever submits more adds to the count, since commits are done in their
    order, whether or not anybody still waits for them.
    """

    def __init__(self, kvs: Kvs, guest: str) -> None:
        self.size = 0
        self.ended = False
        after = 0
        while kvs.exists(guest, INPUT_KEY) and (chunks := kvs.chunks(guest, INPUT_KEY, after=after)):
            for event in decode(b"".join(chunk.data for chunk in chunks)):
                data, eof = input_bytes(event)
                self.added(data, eof=eof)
            after = chunks[-1].seq

    def added(self, data: bytes, *, eof: bool) -> None:
        """These bytes are stored, or will be before anything that is submitted from now on; with `eof` the end."""
        self.size += len(data)
        self.ended = self.ended or eof


class _Shell:
    """One shell that is attached: the bytes that it has, and the task that feeds it."""

    __slots__ = ("_moved", "feeding", "offset", "rank")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.offset: int | None = None
        """None until the shell has told it."""
        self.feeding = trio.CancelScope()
        self._moved = trio.Event()

    def move(self, offset: int) -> None:
        """It has taken `offset` bytes."""
        self.offset = offset
        self._moved.set()

    async def room(self, end: int) -> None:
        """Return as soon as bytes up to `end` may be under way."""
        while self.offset is None or end > self.offset + WINDOW:
            self._moved = trio.Event()
            await self._moved.wait()


class StdinPump:
    """Feeds the shells of one job, those of several ranks alike: each gets all of it, at its own pace."""

    def __init__(self, kvs: Kvs, handle: Handle, jobid: JobId, guest: str) -> None:
        self._kvs = kvs
        self._handle = handle
        self._jobid = jobid
        self._guest = guest
        self._begun = kvs.exists(guest, INPUT_KEY)
        """Whether there is any input: until then nothing has to run."""
        self._shells: dict[int, _Shell] = {}
        self._nursery: trio.Nursery | None = None

    def run_in(self, nursery: trio.Nursery) -> None:
        """Feed in tasks of `nursery` from now on."""
        self._nursery = nursery

    def begin(self) -> None:
        """There is input."""
        if not self._begun:
            self._begun = True
            for shell in self._shells.values():
                self._feed_anew(shell)

    def opened(self, rank: int) -> None:
        """The stream to `rank` stands."""
        self._shells[rank] = _Shell(rank)

    def attached(self, rank: int, offset: int) -> None:
        """The shell of `rank` is attached, perhaps anew, and has `offset` bytes: it is fed from there."""
        shell = self._shells[rank]
        shell.feeding.cancel()
        shell.move(offset)
        self._feed_anew(shell)

    def acked(self, rank: int, offset: int) -> None:
        """The shell of `rank` has taken `offset` bytes."""
        shell = self._shells[rank]
        shell.move(max(offset, shell.offset or 0))

    def closed(self, rank: int) -> None:
        """The stream to `rank` is lost: what it has taken is unknown until it is attached again."""
        self._shells.pop(rank).feeding.cancel()

    def _feed_anew(self, shell: _Shell) -> None:
        if self._begun and shell.offset is not None and self._nursery is not None:
            shell.feeding = trio.CancelScope()
            self._nursery.start_soon(self._feed_all, shell, shell.feeding, shell.offset)

    async def _feed_all(self, shell: _Shell, scope: trio.CancelScope, begin: int) -> None:
        """Feed one shell, from the byte `begin` on, until its input ends."""
        with scope:
            try:
                position = 0
                async with self._kvs.watch(self._guest, INPUT_KEY) as chunks:
                    async for chunk in chunks:
                        for event in decode(chunk.data):
                            data, eof = input_bytes(event)
                            await self._feed(shell, position, data, skip=max(0, begin - position))
                            position += len(data)
                            if eof:
                                self._send(shell.rank, position, b"", eof=True)
                                return
            except (RpcError, ValueError) as error:  # whoever owns the job may write to its namespace
                log.error("job %s: cannot read its standard input: %s", f58(self._jobid), error)

    async def _feed(self, shell: _Shell, position: int, data: bytes, *, skip: int) -> None:
        """Send `data`, which begins at `position` of the input, without its first `skip` bytes."""
        for start in range(skip, len(data), PIECE):
            piece = data[start : start + PIECE]
            await shell.room(position + start + len(piece))
            self._send(shell.rank, position + start, piece, eof=False)

    def _send(self, rank: int, offset: int, data: bytes, *, eof: bool) -> None:
        self._handle.send(
            "exec.stdin",
            {"id": int(self._jobid), "offset": offset, "data": data, "eof": eof},
            nodeid=rank,
        )
