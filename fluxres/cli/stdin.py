"""Standard input on its way to a job: offsets and a window (`job-exec.stdin`). Pure.

Input is numbered by bytes, so that a piece can be sent again after a lost answer: the broker drops what it
has. No more than `WINDOW` bytes are out without an answer, so input is read only as fast as it is made
durable.

States: ASKING (where does the input stand? for a job that others may have written to) -> OPEN -> ENDED
(everything has been sent); from each of them CLOSED (the job takes no more).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fluxres.wire.payload import WireMap

CHUNK: Final = 64 * 1024
"""Bytes that one request carries at most."""
WINDOW: Final = 4 * CHUNK
"""Bytes that may be out without an answer."""
APPEND: Final = -1
"""The offset that stands for wherever the input ends."""


class StdinState(Enum):
    """The states of a feed."""

    ASKING = "asking"
    OPEN = "open"
    ENDED = "ended"
    CLOSED = "closed"


class StdinFeed:
    """Makes the requests that carry one job's input, each to be sent until it is answered."""

    def __init__(self, jobid: int) -> None:
        self._jobid = jobid
        self._sent = 0
        self._answered = 0
        self._rejected: list[tuple[int, WireMap]] = []
        self.state = StdinState.OPEN

    def resume(self) -> WireMap:
        """Begin with asking where the input of a job stands that had one before us."""
        self.state = StdinState.ASKING
        return self._request(b"", APPEND, eof=False)

    @property
    def room(self) -> int:
        """How many bytes may be read and sent now."""
        if self.state is not StdinState.OPEN:
            return 0
        return min(CHUNK, WINDOW - (self._sent - self._answered))

    @property
    def unanswered(self) -> int:
        """Bytes that are out without an answer."""
        return self._sent - self._answered

    def data(self, data: bytes) -> WireMap:
        """The request for what was just read; no bytes mean the end."""
        request = self._request(data, self._sent, eof=not data)
        self._sent += len(data)
        if not data:
            self.state = StdinState.ENDED
        return request

    def answered(self, offset: int) -> list[WireMap]:
        """The broker has this many bytes of the job's input. Returns requests to send once more."""
        if self.state is StdinState.ASKING:
            self._sent = self._answered = offset
            self.state = StdinState.OPEN
            return []
        self._answered = max(self._answered, min(offset, self._sent))
        again = [request for start, request in self._rejected if start <= self._answered]
        self._rejected = [entry for entry in self._rejected if entry[0] > self._answered]
        return again

    def rejected(self, request: WireMap) -> bool:
        """The broker refused a request. True where that is only because it lacks what comes before it.

        That happens when an earlier request met a restart and this one did not. It is kept until then.
        """
        start = request["offset"]
        if not isinstance(start, int) or start <= self._answered:
            return False
        self._rejected.append((start, request))
        return True

    def close(self) -> None:
        """The job takes no more input."""
        self.state = StdinState.CLOSED

    def _request(self, data: bytes, offset: int, *, eof: bool) -> WireMap:
        request: WireMap = {"id": self._jobid, "eof": eof, "offset": offset}
        try:
            request["data"] = data.decode()
        except UnicodeDecodeError:
            from binascii import b2a_base64

            request["data"] = b2a_base64(data, newline=False).decode()
            request["encoding"] = "base64"
        return request
