"""`fluxres top` on a terminal: keys, sizes, signals, the broker's death, and that the terminal is left as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from feedkit import FeedBroker, job, jobs

from fluxres.testing.terminal import ENTER_SCREEN, HIDE_CURSOR, LEAVE_SCREEN, SHOW_CURSOR, OnTerminal


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FeedBroker]:
    """A broker with a feed."""
    with FeedBroker(tmp_path / "socket") as made:
        yield made


def top(broker: FeedBroker, *args: str, columns: int = 90, lines: int = 30) -> OnTerminal:
    """`fluxres top` on a terminal of its own."""
    return OnTerminal("top", *args, env={**os.environ, "FLUXRES_URI": broker.uri}, columns=columns, lines=lines)


def is_restored(terminal: OnTerminal) -> bool:
    """Whether the terminal is as it was before."""
    assert terminal.raw.count(ENTER_SCREEN) == terminal.raw.count(LEAVE_SCREEN)
    assert terminal.raw.rfind(SHOW_CURSOR) > terminal.raw.rfind(HIDE_CURSOR)
    return terminal.attributes == terminal.before


def test_keys_and_news(broker: FeedBroker) -> None:
    with top(broker) as terminal:
        terminal.expect("job11")
        assert ENTER_SCREEN in terminal.raw
        assert terminal.attributes != terminal.before
        broker.push({"jobs": jobs(job(13, name="newcomer"))})
        terminal.expect("newcomer")
        terminal.press(b"jd")
        terminal.expect("(13)")
        terminal.press(b"\x1b[B")
        terminal.expect("(11)")
        terminal.press(b"?")
        terminal.expect("Keys of fluxres top")
        terminal.press(b"x/12\r")
        terminal.expect("filter '12'")
        terminal.press(b"\x1b")
        terminal.expect("newcomer")
        terminal.press(b"\t")
        terminal.expect("only running")
        terminal.press(b"\x0c")
        terminal.expect("newcomer")
        terminal.press(b"q")
        assert terminal.wait() == 0
        assert is_restored(terminal)


def test_another_size(broker: FeedBroker) -> None:
    with top(broker, columns=90) as terminal:
        terminal.expect("LIMIT/INFO")
        terminal.press(b"")
        terminal.resize(40, 12)
        terminal.expect("JOBID ST    TIME NAME")
        terminal.press(b"")
        terminal.resize(140, 40)
        terminal.expect("LIMIT/INFO")
        terminal.press(b"q")
        assert terminal.wait() == 0
        assert is_restored(terminal)


@pytest.mark.parametrize("key", [b"\x03", b"\x1c"])
def test_interrupt_and_quit_keys(broker: FeedBroker, key: bytes) -> None:
    with top(broker) as terminal:
        terminal.expect("job11")
        terminal.press(key)
        assert terminal.wait() == (130 if key == b"\x03" else 128 + signal.SIGQUIT)
        assert is_restored(terminal)
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_signals(broker: FeedBroker, signum: signal.Signals) -> None:
    with top(broker) as terminal:
        terminal.expect("job11")
        terminal.signal(signum)
        assert terminal.wait() == 128 + signum
        assert is_restored(terminal)


def test_stopping_it(broker: FeedBroker) -> None:
    """Ctrl-Z in a shell with job control, which then has the terminal; `fg` gives it back."""
    shell = ("bash", "-c", 'set -m; "$@"; echo "status $?"; read -r; fg >/dev/null; exit $?', "bash")
    with OnTerminal("top", env={**os.environ, "FLUXRES_URI": broker.uri}, runner=shell) as terminal:
        terminal.expect("job11")
        terminal.press(b"\x1a")
        terminal.expect(f"status {128 + signal.SIGTSTP}")
        assert is_restored(terminal)
        terminal.press(b"\n")
        terminal.expect("job11")
        terminal.press(b"q")
        assert terminal.wait() == 0
        assert is_restored(terminal)


def test_the_brokers_death(broker: FeedBroker) -> None:
    with top(broker) as terminal:
        terminal.expect("job11")
        terminal.press(b"")
        broker.stop()
        terminal.expect("The broker is away since")
        terminal.expect("job11")
        terminal.press(b"jd")
        terminal.expect("(11)")
        broker.docs["jobs"] = jobs(job(99))
        broker.seq += 7
        broker.start()
        terminal.expect("The broker is back after")
        terminal.expect("job99")
        terminal.press(b"q")
        assert terminal.wait() == 0
        assert is_restored(terminal)


def test_an_instance_that_ends(broker: FeedBroker, tmp_path: Path) -> None:
    with top(broker) as terminal:
        terminal.expect("job11")
        broker.stop()
        broker.path.unlink()
        tmp_path.rename(tmp_path.with_name("elsewhere"))
        assert terminal.wait() == 1
        assert is_restored(terminal)
        assert "cannot reconnect" in terminal.text
        tmp_path.with_name("elsewhere").rename(tmp_path)


def test_a_terminal_that_cannot_be_drawn_on(broker: FeedBroker) -> None:
    with OnTerminal("top", env={**os.environ, "FLUXRES_URI": broker.uri}, term="dumb") as terminal:
        assert terminal.wait() == 1
        assert "TERM=dumb" in terminal.text
        assert terminal.attributes == terminal.before
        assert ENTER_SCREEN not in terminal.raw


def test_once_on_a_terminal(broker: FeedBroker) -> None:
    with top(broker, "--once") as terminal:
        assert terminal.wait() == 0
        assert "job11" in terminal.text
        assert ENTER_SCREEN not in terminal.raw
    with top(broker, "--once", "--color=never") as terminal:
        assert terminal.wait() == 0
        assert b"\x1b" not in terminal.raw
