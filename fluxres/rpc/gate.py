"""A gate: open, or shut with those behind it who wait until it opens. How endpoints say whether they have room."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Gate:
    """One gate; open at first. Tasks `wait` at it, and what is no task leaves a callback with `on_open`."""

    __slots__ = ("_callbacks", "_event")

    def __init__(self) -> None:
        self._event: trio.Event | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_open(self) -> bool:
        """Whether nobody would have to wait."""
        return self._event is None

    def shut(self) -> None:
        """Let nobody pass from now on."""
        if self._event is None:
            self._event = trio.Event()

    def open(self) -> None:
        """Let everybody pass, those first who wait."""
        if self._event is not None:
            self._event.set()
            self._event = None
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    async def wait(self) -> None:
        """Return as soon as the gate has been opened; a checkpoint in any case."""
        if self._event is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._event.wait()

    def on_open(self, callback: Callable[[], None]) -> None:
        """Call `callback` once: now where the gate is open, else when it opens."""
        if self._event is None:
            callback()
        else:
            self._callbacks.append(callback)
