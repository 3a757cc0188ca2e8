"""The terminal of `fluxres top`: lines with styles on the alternate screen, keys and signals that come from it.

It is left as it was found, whatever ends us but SIGKILL: a key, an error, Ctrl-C, SIGTERM, SIGHUP, SIGQUIT; and while
Ctrl-Z has us stopped. rich draws, and is imported by this module alone, which only `fluxres top` imports when it draws.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, Final

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from fluxres.base.errors import FluxresError
from fluxres.cli.signals import Signals
from fluxres.cli.top_keys import Controls, Keys, press
from fluxres.cli.top_view import scene, screen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from fluxres.cli.feed import Feed
    from fluxres.cli.spans import Line
    from fluxres.session import Session

TICK: Final = 1.0
"""Seconds between pictures when nothing changes but the time."""
DRAW_EVERY: Final = 0.1
"""Seconds between pictures at least, unless a key was pressed."""
DRAW_SHARE: Final = 5
"""A picture that takes long to draw is drawn so seldom that drawing takes a DRAW_SHARE-th of the time at most."""
ESCAPE_AFTER: Final = 0.05
"""Seconds after which an escape that nothing followed is the key of that name."""
REPLIES_AT_ONCE: Final = 256
"""Replies taken before keys and signals have their turn."""
READ_SIZE: Final = 1024
SIZE: Final = (80, 24)
"""The size of a terminal that does not tell."""
SIGNAL_BASE: Final = 128
ENDS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STYLES: Final = {
    "": "",
    "alarm": "bold white on red",
    "back": "bold black on green",
    "bad": "bold red",
    "dim": "dim",
    "down": "red",
    "good": "green",
    "heading": "bold",
    "mark": "bold magenta",
    "name": "",
    "section": "bold cyan",
    "selected": "reverse",
    "title": "reverse",
    "used": "yellow",
    "warn": "bold yellow",
}
"""How what a line says looks."""


def rich_text(lines: Iterable[Line]) -> Text:
    """Lines as one text for rich."""
    whole = Text(no_wrap=True, overflow="crop", end="")
    for index, each in enumerate(lines):
        if index:
            whole.append("\n")
        for text, style in each:
            whole.append(text, STYLES[style])
    return whole


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines in colors, whatever standard output is."""
    console = Console(file=sys.stdout, force_terminal=True, color_system="standard", highlight=False, width=1 << 16)
    console.print(rich_text(lines), end="\n", soft_wrap=True)


class Screen:
    """The terminal while it is ours: a context manager. Raises FluxresError where it cannot be drawn on."""

    def __init__(self, color: bool | None) -> None:
        self._console = Console(
            file=sys.stdout,
            force_terminal=True,
            force_interactive=True,
            no_color=None if color is None else not color,
            highlight=False,
        )
        if self._console.is_dumb_terminal:
            raise FluxresError(
                f"cannot show a picture on a terminal with TERM={os.environ.get('TERM', '')} (--once prints one)"
            )
        self._live: Live | None = None
        self._before = termios.tcgetattr(0)

    def __enter__(self) -> Screen:
        self.resize()
        try:
            tty.setcbreak(0)
            self._live = Live(
                console=self._console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the terminal back as it was; where it is gone, there is nothing to give back."""
        live, self._live = self._live, None
        with contextlib.suppress(OSError):
            if live is not None:
                live.stop()
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, self._before)

    def resize(self) -> None:
        """Take the size that the terminal has now."""
        self.width, self.height = terminal_size()
        self._console.size = ConsoleDimensions(self.width, self.height)

    def clear(self) -> None:
        """Wipe what others may have written there."""
        self._console.clear()

    def draw(self, lines: Iterable[Line]) -> None:
        """Show these lines."""
        if self._live is not None:
            self._live.update(rich_text(lines), refresh=True)


def terminal_size() -> tuple[int, int]:
    """The size of the terminal that is standard output."""
    try:
        size = os.get_terminal_size(1)
    except OSError:
        return SIZE
    return size.columns or SIZE[0], size.lines or SIZE[1]


class Top:
    """A feed on a screen, with somebody at the keys."""

    def __init__(
        self,
        session: Session,
        feed: Feed,
        controls: Controls,
        username: Callable[[int], str],
        color: bool | None,
    ) -> None:
        self._session = session
        self._feed = feed
        self._controls = controls
        self._username = username
        self._screen = Screen(color)
        self._signals = Signals((signal.SIGINT, *ENDS, signal.SIGWINCH, signal.SIGTSTP))
        self._keys = Keys()
        self._status: int | None = None
        self._draw_at = 0.0
        self._drawing = 0.0
        self._changed = True

    def run(self) -> int:
        """Show it until somebody wants no more; returns the exit status. Raises FluxresError, KeyboardInterrupt."""
        with self._signals, self._screen:
            while self._status is None:
                busy = self._take_replies()
                self._draw()
                self._poll(0.0 if busy else self._wait())
        return self._status

    def _take_replies(self) -> bool:
        """Take the replies that are there; True where there may be more."""
        self._feed.tick()
        for _ in range(REPLIES_AT_ONCE):
            reply = self._session.receive(0)
            if reply is None:
                return False
            if self._feed.take(reply):
                self._changed = True
        return True

    def _draw(self, *, now: bool = False) -> None:
        """Draw, where there is something new and the last time is long enough ago."""
        began = time.monotonic()
        since = began - self._draw_at
        due = self._changed and since >= max(DRAW_EVERY, self._drawing * DRAW_SHARE)
        if not now and not due and since < max(TICK, self._drawing * DRAW_SHARE):
            return
        shown = scene(self._feed.docs, self._feed.link(), self._controls, self._feed.now(), self._username)
        self._screen.draw(screen(shown, self._screen.width, self._screen.height))
        self._changed = False
        self._draw_at = time.monotonic()
        self._drawing = self._draw_at - began

    def _wait(self) -> float:
        """Seconds to wait for keys, signals and replies at most."""
        pause = max(DRAW_EVERY, self._drawing * DRAW_SHARE) if self._changed else TICK
        waits = [max(0.0, self._draw_at + pause - time.monotonic())]
        waits += [ESCAPE_AFTER] if self._keys.waiting else []
        return min(
            [*waits, *(wait for wait in (self._session.poll_timeout(), self._feed.poll_timeout()) if wait is not None)]
        )

    def _poll(self, timeout: float) -> None:
        poller = select.poll()
        poller.register(0, select.POLLIN)
        poller.register(self._signals.fileno(), select.POLLIN)
        if self._session.fileno() >= 0:
            poller.register(self._session.fileno(), select.POLLIN)
        ready = dict(poller.poll(timeout * 1000))
        if self._signals.fileno() in ready:
            self._take_signals()
        if 0 in ready:
            self._read_keys()
        elif self._keys.waiting:
            self._press(self._keys.flush())

    def _read_keys(self) -> None:
        try:
            data = os.read(0, READ_SIZE)
        except OSError:  # the terminal is gone
            data = b""
        if not data:
            self._status = SIGNAL_BASE + signal.SIGHUP
            return
        self._press(self._keys.feed(data))

    def _press(self, keys: Iterable[str]) -> None:
        rows: list[str] | None = None
        before = self._controls
        for key in keys:
            if key == "redraw":
                self._screen.clear()
            if rows is None or self._controls.section != before.section:
                rows = scene(self._feed.docs, self._feed.link(), self._controls, 0.0, self._username).rows
            self._controls = press(self._controls, key, rows)
        if self._controls.quit:
            self._status = 0
        else:
            self._draw(now=True)

    # --- signals

    def _take_signals(self) -> None:
        for signum in self._signals.take():
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            if signum in ENDS:
                self._status = SIGNAL_BASE + signum
            elif signum == signal.SIGTSTP:
                self._stop()
            elif signum == signal.SIGWINCH:
                self._screen.resize()
                self._screen.clear()
                self._draw(now=True)

    def _stop(self) -> None:
        """Stop as Ctrl-Z has it, with the terminal as it was; come back to it when we are continued."""
        self._screen.leave()
        self._signals.release(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGTSTP)
        self._signals.catch(signal.SIGTSTP)
        self._screen.__enter__()
        self._draw(now=True)
