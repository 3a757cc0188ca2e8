"""What a reader of the feed has: snapshots and deltas applied, as a client of any kind keeps it. Pure.

Commands and tests use it. It takes messages of the WebSocket and bodies of `status.watch` alike. A reader that comes
back asks with `position` and goes on with the same picture; parts that are not whole are forgotten as soon as something
else comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxres.base.json import JsonObject


class Picture:
    """The documents of one subscription; at every moment they are those of `position`, exactly."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, JsonObject]] = {}
        """Topic -> key -> document, as of the latest whole snapshot and the whole deltas since."""
        self.position: tuple[str, int] | None = None
        """What to ask with after an interruption; None before the first whole snapshot."""
        self.why = ""
        """Why the latest snapshot was sent: first, restarted, behind."""
        self.now = 0.0
        """The broker's time when it sent the latest message."""
        self._parts: list[Mapping[str, object]] = []
        """What has come of a snapshot or delta that is not whole."""

    def topic(self, name: str) -> Mapping[str, JsonObject]:
        """The documents of a topic."""
        return self.documents.get(name, {})

    def apply(self, message: Mapping[str, object]) -> bool:
        """Take a snapshot, a delta or a part of one; returns whether the picture has changed.

        Raises ValueError for a message that does not go on from here: then ask again without a position.
        """
        kind, part = message.get("type"), message.get("part")
        if kind not in ("snapshot", "delta"):
            raise ValueError(f"cannot apply a message of type {kind!r:.40} to a picture")
        if part == 0:
            self._parts = []
        if part != len(self._parts):
            raise ValueError(f"cannot apply part {part!r:.20} of a {kind}: part {len(self._parts)} is next")
        if kind == "delta" and self.position != (_position(message)[0], message["prev"]):
            raise ValueError(f"cannot apply a delta from {message['prev']!r:.40} to {self.position}")
        self._parts.append(message)
        now = message.get("now")
        self.now = float(now) if isinstance(now, int | float) else self.now
        if message["more"]:
            return False
        parts, self._parts = self._parts, []
        self.position = _position(message)
        if kind == "delta":
            return sum(map(self._change, parts)) > 0
        self.why = str(message["why"])
        self.documents = {}
        for each in parts:
            self._put(each["docs"])
        return True

    def _change(self, delta: Mapping[str, object]) -> bool:
        """Apply one part of a delta; returns whether there is anything in it."""
        delete = cast("Mapping[str, list[str]]", delta["delete"])
        self._put(delta["set"])
        for topic, keys in delete.items():
            for key in keys:
                self.documents.get(topic, {}).pop(key, None)
        return bool(delta["set"] or delete)

    def _put(self, documents: object) -> None:
        for topic, added in cast("Mapping[str, Mapping[str, JsonObject]]", documents).items():
            self.documents.setdefault(topic, {}).update(added)


def _position(message: Mapping[str, object]) -> tuple[str, int]:
    epoch, seq = cast("tuple[str, int]", message["position"])
    return epoch, seq
