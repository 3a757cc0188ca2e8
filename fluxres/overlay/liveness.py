"""Who has been silent for too long (`tbon.torpid_min` and `tbon.timeout` of flux-broker-attributes(7)). Pure.

    state     event                              next      told
    lively    silent for torpid_min at a tick    torpid    TORPID
    lively    silent for timeout at a tick       (gone)    LOST
    torpid    heard before a tick                lively    LIVELY
    torpid    silent for timeout at a tick       (gone)    LOST

A lost peer is watched no longer, so each change is told once. A peer heard again between two ticks was never torpid.

No peer is judged by our own absence (this process was stopped, its machine slept or had too much to do). Silence is
counted in time that we were present to hear: of the time between two ticks at most `step`. And a tick that comes later
than that judges nobody, as what the peers sent meanwhile is still to be read, unless the tick before was late as well:
a broker that is always late goes on judging, only more slowly.
"""

from __future__ import annotations

from enum import Enum


class Change(Enum):
    """What a tick tells of a peer."""

    TORPID = "torpid"
    LIVELY = "lively"
    LOST = "lost"


class _Peer:
    """When a peer was heard last, in counted time, and whether it has been told as torpid."""

    __slots__ = ("heard", "torpid")

    def __init__(self, heard: float) -> None:
        self.heard = heard
        self.torpid = False


class Liveness:
    """Judges peers by their silence. All times are seconds; `now` is one monotonic clock's.

    `tick` is to be called every `interval` while there are peers. Raises ValueError for times that make no sense.
    """

    def __init__(self, torpid_min: float, timeout: float) -> None:
        if not 0 < torpid_min <= timeout:
            raise ValueError(
                f"cannot judge silence: torpid_min ({torpid_min:g}s) must be above 0, timeout ({timeout:g}s) no less"
            )
        self.interval = torpid_min / 4
        self.step = torpid_min / 2
        self._torpid_min = torpid_min
        self._timeout = timeout
        self._peers: dict[str, _Peer] = {}
        self._counted = 0.0
        self._ticked: float | None = None
        self._late = False

    @property
    def torpid(self) -> int:
        """How many peers are torpid."""
        return sum(peer.torpid for peer in self._peers.values())

    def watch(self, peer: str, now: float) -> None:
        """Watch `peer` from now on, as one just heard."""
        self._peers[peer] = _Peer(self._count(now))

    def forget(self, peer: str) -> None:
        """Watch `peer` no longer. One that is not watched is no error: its loss may have been told meanwhile."""
        self._peers.pop(peer, None)

    def heard(self, peer: str, now: float) -> None:
        """Something has come from `peer`. What comes from one not watched (any more) means nothing."""
        state = self._peers.get(peer)
        if state is not None:
            state.heard = self._count(now)

    def tick(self, now: float) -> list[tuple[str, Change]]:
        """Judge all peers; returns what has changed, in the order in which they came under watch."""
        late = self._ticked is not None and now - self._ticked > self.step
        excused = late and not self._late
        self._counted, self._ticked, self._late = self._count(now), now, late
        if excused:
            return []
        changes = [(peer, change) for peer, state in self._peers.items() if (change := self._judge(state)) is not None]
        for peer, change in changes:
            if change is Change.LOST:
                del self._peers[peer]
            else:
                self._peers[peer].torpid = change is Change.TORPID
        return changes

    def _count(self, now: float) -> float:
        """`now` in counted time."""
        if self._ticked is None:
            self._ticked = now
        return self._counted + min(now - self._ticked, self.step)

    def _judge(self, peer: _Peer) -> Change | None:
        silent = self._counted - peer.heard
        if silent >= self._timeout:
            return Change.LOST
        torpid = silent >= self._torpid_min
        if torpid is peer.torpid:
            return None
        return Change.TORPID if torpid else Change.LIVELY
