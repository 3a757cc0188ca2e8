"""Standard input: from the guest namespace's `input` eventlog (RFC 24) to the shells, each from its own cursor.

The eventlog is the truth. `offset` counts bytes from its beginning; a shell says on attaching how far it has come, and
acknowledges what it consumed, which bounds what is under way. After a break the pump begins again where the shell is.
"""

from __future__ import annotations

import base64
from typing import Final

import trio

from fluxres.base.eventlog import Event, decode
from fluxres.base.jobid import JobId
from fluxres.kvs.kvs import Kvs
from fluxres.rpc.handle import Handle

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


class StdinPump:
    """Feeds the shells of one job."""

    def __init__(self, kvs: Kvs, handle: Handle, jobid: JobId, guest: str) -> None:
        self._kvs = kvs
        self._handle = handle
        self._jobid = jobid
        self._guest = guest
        self.begun = kvs.exists(guest, INPUT_KEY)
        """Whether there is any input: until then nothing has to run."""
        self._offsets: dict[int, int] = {}
        self._feeding: dict[int, trio.CancelScope] = {}
        self._moved = trio.Event()

    def attached(self, rank: int, offset: int) -> None:
        """The shell of `rank` is attached, perhaps anew, and has `offset` bytes: it is fed from there."""
        self._offsets[rank] = offset
        if (feeding := self._feeding.get(rank)) is not None:
            feeding.cancel()
        self._wake()

    def acked(self, rank: int, offset: int) -> None:
        """The shell of `rank` has taken `offset` bytes."""
        self._offsets[rank] = max(offset, self._offsets.get(rank, 0))
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def run(self, rank: int) -> None:
        """Feed `rank`, each time that it is attached from where it is, until cancelled (when its stream is lost)."""
        try:
            while True:
                while rank not in self._offsets:
                    await self._moved.wait()
                with trio.CancelScope() as self._feeding[rank]:
                    await self._feed_all(rank)
                    await trio.sleep_forever()
        finally:
            self._feeding.pop(rank, None)

    async def _feed_all(self, rank: int) -> None:
        """Feed `rank` until its input ends."""
        position = 0
        async with self._kvs.watch(self._guest, INPUT_KEY) as chunks:
            async for chunk in chunks:
                for event in decode(chunk.data):
                    data, eof = input_bytes(event)
                    await self._feed(rank, position, data)
                    position += len(data)
                    if eof:
                        self._send(rank, position, b"", eof=True)
                        return

    async def _feed(self, rank: int, position: int, data: bytes) -> None:
        skip = max(0, self._offsets[rank] - position)
        for start in range(skip, len(data), PIECE):
            piece = data[start : start + PIECE]
            while position + start + len(piece) > self._offsets[rank] + WINDOW:
                await self._moved.wait()
            self._send(rank, position + start, piece, eof=False)

    def _send(self, rank: int, offset: int, data: bytes, *, eof: bool) -> None:
        self._handle.send(
            "exec.stdin",
            {"id": int(self._jobid), "offset": offset, "data": data, "eof": eof},
            nodeid=rank,
        )

    def lost(self, rank: int) -> None:
        """The stream to `rank` is lost: what it has taken is unknown until it is attached again."""
        self._offsets.pop(rank, None)
