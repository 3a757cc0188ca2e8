"""The status feed of an instance (`status.watch` on rank 0) over a session: a picture that is kept up to date.

States: WAITING for the first picture -> LIVE -> (the connection is lost, or rank 0 cannot be reached: AWAY) -> LIVE.
In AWAY the last picture stays. The feed is asked again as soon as the connection is back, or each `RETRY_EVERY` seconds
while there is one, with the position of what was last taken as a whole; so the answer is what happened in between, or
a new snapshot. The session's own way of resending is not used: it says nothing of a rank 0 that is away while the
broker at hand is there.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from fluxres.base.errors import FluxresError
from fluxres.session import NOT_NOW, RECONNECT_FOR, RETRY_EVERY
from fluxres.status.picture import Picture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fluxres.base.errors import RpcError
    from fluxres.base.json import JsonObject
    from fluxres.rpc.calls import Reply
    from fluxres.session import Session
    from fluxres.wire.payload import WireMap

WATCH: Final = "status.watch"
GONE: Final = "the connection to it was lost"
_AGAIN: Final = {**NOT_NOW, errno.ECONNRESET: RECONNECT_FOR, errno.ENODATA: RECONNECT_FOR}
"""Errors after which the feed is asked again, and for how many seconds."""


class Link(NamedTuple):
    """The connection to the broker: `away_for` seconds without it (None: it is there), lost because of `why`.

    `lost_at` is when it was lost for the last time, `back_for` how long it has been back since, `gap` how long it was
    away then; `first` is false until there is a picture at all.
    """

    first: bool = True
    away_for: float | None = None
    lost_at: float = 0.0
    why: str = ""
    back_for: float | None = None
    gap: float = 0.0


class Feed:
    """Topics of one instance's feed. Give it all replies of the session; it takes those that are its own."""

    def __init__(self, session: Session, topics: Sequence[str]) -> None:
        self.picture = Picture()
        self.why = ""
        self._session = session
        self._topics = list(topics)
        self._skew = 0.0
        self._fresh = False
        """Whether what is there is of no use for going on."""
        self._lost: float | None = None
        self._lost_at = 0.0
        self._back: float | None = None
        self._gap = 0.0
        self._retry_at: float | None = None
        self._handle = 0
        self._begin()

    @property
    def docs(self) -> Mapping[str, Mapping[str, JsonObject]]:
        """Topic, key, document: the last whole picture."""
        return self.picture.documents

    @property
    def first(self) -> bool:
        """Whether there has been a picture."""
        return self.picture.position is not None

    @property
    def away(self) -> bool:
        """Whether the picture is an old one."""
        return self._lost is not None

    def now(self) -> float:
        """The time, by the clock of the instance."""
        return time.time() + self._skew

    def link(self) -> Link:
        """How the connection is, for people."""
        now = time.monotonic()
        return Link(
            first=self.first,
            away_for=None if self._lost is None else now - self._lost,
            lost_at=self._lost_at,
            why=self.why,
            back_for=None if self._back is None else now - self._back,
            gap=self._gap,
        )

    def poll_timeout(self) -> float | None:
        """Seconds until `tick` has something to do; None: nothing."""
        return None if self._retry_at is None else max(0.0, self._retry_at - time.monotonic())

    def tick(self) -> None:
        """Ask again where it is time to."""
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._begin()

    def take(self, reply: Reply) -> bool:
        """Take a reply; whether what is to be shown has changed. Raises FluxresError for a feed that is refused."""
        if reply.matchtag != self._handle:
            return False
        if reply.error is not None:
            self._lose(reply.error)
            return True
        body = cast("JsonObject", reply.payload)
        try:
            changed = self.picture.apply(body)
        except ValueError:  # it does not go on from here: a new snapshot does
            self._fresh = True
            self._session.end(self._handle)
            self._begin()
            return False
        self._skew = self.picture.now - time.time()
        if body.get("more") is not True:
            self._fresh = False
            changed = self._come() or changed
        return changed

    def _begin(self) -> None:
        payload: WireMap = {"topics": self._topics}
        if self.picture.position is not None and not self._fresh:
            payload["position"] = [*self.picture.position]
        self._retry_at = None
        self._handle = self._session.begin(WATCH, payload, nodeid=0, streaming=True, resend=False)

    def _come(self) -> bool:
        """The picture is up to date; whether it was not so before."""
        if self._lost is None:
            return False
        self._back = time.monotonic()
        self._gap = self._back - self._lost
        self._lost = None
        return True

    def _lose(self, error: RpcError) -> None:
        """The stream has ended. Raises FluxresError where there is no use in asking again."""
        now = time.monotonic()
        if self._lost is None:
            self._lost, self._lost_at = now, time.time()
            self.why = GONE if error.errnum == errno.ECONNRESET else error.text
        if now - self._lost >= _AGAIN.get(error.errnum, 0.0):
            raise FluxresError(f"cannot watch the instance: {error.text}") from error
        self._retry_at = now if error.errnum == errno.ECONNRESET else now + RETRY_EVERY
