"""poll(2) with a handler for each descriptor: all the waiting that a shell does."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Final, TypeAlias

_MS: Final = 1000

Handler: TypeAlias = Callable[[int], None]
"""Called with the events of poll(2) that a descriptor is ready for."""


class Poller:
    """Descriptors that are waited for, each with what to call when it is ready."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Handler] = {}

    def watch(self, fd: int, handler: Handler, mask: int = select.POLLIN) -> None:
        """Call `handler(revents)` when `fd` is ready; again for the same fd changes what is waited for."""
        self._poll.register(fd, mask)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Wait no more for `fd`, if it was waited for. To be called before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def run_once(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds (None: without end) and call the handlers of what is ready."""
        for fd, revents in self._poll.poll(None if timeout is None else timeout * _MS):
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier handler of this round may have closed it
                handler(revents)
