"""Where a view hangs for many readers: they wait here for news of it.

    async with boards.open() as board:
        cursor = Cursor(board.view, topics, select, position)
        while True:
            while (body := cursor.next()) is not None:
                ...  # send it, then wait for this reader's turn
            await board.news(cursor.seen)

Waiting costs a reader one entry in a parking lot: a change wakes those who wait, once, and a reader that is sending or
waiting for its turn is not woken at all. What a reader has missed is merged when it looks the next time.

`Boards` is where a board comes from: the feed at rank 0, a mirror at any other rank. Both collect only while somebody
has a board open, and `LINGER` longer; an `Audience` counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import trio

if TYPE_CHECKING:
    from fluxres.status.view import Documents, Keys, Position, View

LINGER: Final = 30.0
"""Seconds for which a view is kept up to date after its last reader has left: a page that is reloaded resumes."""


class Board:
    """One view and those who wait for it to change."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._lot = trio.lowlevel.ParkingLot()

    async def news(self, seen: Position | None = None) -> None:
        """Return as soon as the view is at another position than `seen`; None: at the next change. A checkpoint."""
        if seen is not None and seen != self.view.position:
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()

    async def begun(self) -> None:
        """Return as soon as there is something to see."""
        while not self.view.begun:
            await self.news()

    def change(self, put: Documents, delete: Keys | None = None, *, seq: int | None = None) -> bool:
        """`View.change`, and tell the readers."""
        changed = self.view.change(put, delete, seq=seq)
        if changed:
            self._lot.unpark_all()
        return changed

    def begin(self, epoch: str, documents: Documents | None = None, seq: int = 0) -> None:
        """`View.begin`, and tell the readers."""
        self.view.begin(epoch, documents, seq)
        self._lot.unpark_all()


class Boards(Protocol):
    """Where readers get a board: it is kept up to date while they have it open."""

    def open(self) -> AbstractAsyncContextManager[Board]:
        """Have the board kept up to date inside the block. It may not have begun yet (`Board.begun`)."""


class Audience:
    """Counts those who want something, for the one who does the work for all of them."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Be one of them inside the block."""
        self._enter(1)
        try:
            yield
        finally:
            self._enter(-1)

    def _enter(self, number: int) -> None:
        self._count += number
        self._changed.unpark_all()

    async def wanted(self) -> None:
        """Return as soon as somebody is there; a checkpoint in any case."""
        await trio.lowlevel.checkpoint()
        while not self._count:
            await self._changed.park()

    async def gone(self, linger: float = LINGER) -> None:
        """Return when nobody has been there for `linger` seconds without a break."""
        while True:
            while self._count:
                await self._changed.park()
            with trio.move_on_after(linger) as waiting:
                await self.wanted()
            if waiting.cancelled_caught and not self._count:
                return
