"""fluxres getattr, setattr, lsattr, ping, health, dmesg, uptime, version, shutdown, config: what they ask and say."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clikit import Run
from fakebroker import Answer, FakeBroker

from fluxres import __version__
from fluxres.cli.main import main
from fluxres.cli.uptime import short
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    with FakeBroker(tmp_path / "local-0") as made:
        monkeypatch.setenv("FLUXRES_URI", made.uri)
        yield made


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


def attributes(broker: FakeBroker, **values: str) -> None:
    """Give the broker attributes; `_` stands for a dot or dash."""

    def get(_message: Message, payload: WireMap) -> Iterator[Answer]:
        name = str(payload["name"])
        value = values.get(re.sub("[.-]", "_", name))
        yield (errno.ENOENT, f"no attribute {name!r}") if value is None else {"value": value, "flags": 1}

    broker.handlers["attr.get"] = get


def test_attributes(run: Run, broker: FakeBroker) -> None:
    attributes(broker, size="4")
    broker.on("attr.set", (errno.EPERM, "it is immutable"))
    broker.on("attr.list", {"attrs": [{"name": n, "value": v, "flags": 1} for n, v in (("size", "4"), ("rank", "0"))]})
    assert run("getattr", "-r", "2", "size") == (0, "4\n", "")
    assert broker.messages[-1].nodeid == 2
    assert run("getattr", "x") == (1, "", "fluxres-getattr: cannot get attribute x: no attribute 'x'\n")
    assert run("setattr", "size", "5") == (1, "", "fluxres-setattr: cannot set attribute size: it is immutable\n")
    assert run("lsattr") == (0, "rank\nsize\n", "")
    assert run("lsattr", "-v") == (0, f"{'rank':<40}0\n{'size':<40}4\n", "")


def pong(message: Message, payload: WireMap) -> Iterator[Answer]:
    yield {**payload, "route": "u!v", "userid": 7, "rolemask": 5, "rank": message.nodeid}


@pytest.mark.parametrize(
    ("argv", "nodeid", "line"),
    [
        (["-r", "3"], 3, r"3!broker\.ping pad=0 seq=0 time=\d+\.\d{3} ms \(u!v\)"),
        (["3"], 3, r"3!broker\.ping pad=0 seq=0 time=\S+ ms \(u!v\)"),
        (["2!broker"], 2, r"2!broker\.ping .*"),
        (["-p", "10", "broker"], 0xFFFFFFFF, r"broker\.ping pad=10 .*"),
        (["-u", "upstream"], 0xFFFFFFFE, r"upstream!broker\.ping pad=0 userid=7 rolemask=0x5 seq=0 .*"),
    ],
)
def test_ping(argv: list[str], nodeid: int, line: str, run: Run, broker: FakeBroker) -> None:
    broker.handlers["broker.ping"] = pong
    status, out, err = run("ping", "-c1", *argv)
    assert (status, err) == (0, "")
    assert re.fullmatch(line + "\n", out)
    assert broker.messages[0].nodeid == nodeid


def test_ping_goes_on_after_a_failure(run: Run, broker: FakeBroker) -> None:
    answers: list[Answer] = [(errno.EHOSTUNREACH, "rank 3 is lost"), {}]
    broker.handlers["kvs.ping"] = lambda _message, _payload: [answers.pop(0)]
    status, out, err = run("ping", "-c2", "-i0", "-r3", "kvs")
    assert status == 1
    assert err == "fluxres-ping: cannot ping 3!kvs.ping: rank 3 is lost\n"
    assert re.fullmatch(r"3!kvs\.ping pad=0 seq=1 time=\S+ ms\n", out)
    assert run("ping", "-r", "x")[0] == 2
    assert run("ping", "-r", "4294967295")[0] == 2
    assert run("getattr", "-r", "4294967294", "size")[0] == 2


def test_health(run: Run, broker: FakeBroker) -> None:
    attributes(broker, size="3")

    def health(message: Message, payload: WireMap) -> Iterator[Answer]:
        if message.nodeid == 1:
            yield (errno.EHOSTUNREACH, "rank 1 is lost")
        elif message.nodeid != 2:
            yield {
                "rank": 0,
                "services": [
                    {"name": "kvs", "queue": 3, "oldest": 2.54, "stuck": []},
                    {"name": "attr", "queue": 0, "oldest": 0, "stuck": []},
                ],
                "stall": {"worst": 0.01234, "recent": 0.0},
                **({"tasks": "main\n  child\n"} if payload["tasks"] else {}),
            }

    broker.handlers["broker.health"] = health
    text = (
        "rank 0: event loop stalled for 12.3ms at worst, 0s recently\n"
        "SERVICE  QUEUE  OLDEST\n"
        "kvs          3    2.5s\n"
        "attr         0       -\n"
    )
    assert run("health") == (0, text, "")
    assert run("health", "-r", "0", "--tasks") == (0, text + "\nmain\n  child\n", "")
    lost = "fluxres-health: cannot show the health of rank 1: rank 1 is lost\n"
    late = "fluxres-health: cannot show the health of rank 2: no answer within 0.1s\n"
    assert run("health", "-r", "1") == (1, "", lost)
    assert run("health", "--all", "--timeout", "0.1s") == (1, text, lost + late)
    assert run("health", "--timeout", "inf") == (0, text, "")


def test_health_of_a_broker_that_takes_no_connection(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "stopped"))
        listener.listen(1)
        uri = f"local://{tmp_path}/stopped"
        why = f"fluxres-health: cannot connect to {uri}: no answer within 0.05s\n"
        assert run("health", "--uri", uri, "--timeout", "50ms") == (1, "", why)


def test_dmesg(run: Run, broker: FakeBroker) -> None:
    broker.on("log.dmesg", {"line": "a\n"}, {"line": "b"}, errno.ENODATA)
    assert run("dmesg", "-f", "-n") == (0, "a\nb\n", "")
    assert broker.seen == [("log.dmesg", {"follow": True, "nobacklog": True})]
    broker.on("log.dmesg", (errno.EPERM, "log.dmesg is for the instance owner"))
    assert run("dmesg")[2] == "fluxres-dmesg: cannot read the log: log.dmesg is for the instance owner\n"


def test_uptime(run: Run, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 10_000.0)
    attributes(broker, size="4", broker_starttime="2440.0", security_owner=str(os.getuid()))
    broker.on("state-machine.get", {"state": "run", "duration": 5.0})
    broker.on("resource.status", {"drain": {"0-1": {}, "3": {}}})
    broker.on("groups.get", {"members": "0-2"})
    broker.on("job-manager.queue-status", {"enable": False, "start": True})
    status, out, _err = run("uptime")
    assert status == 0
    assert re.fullmatch(
        r" \d\d:\d\d:\d\d run 2\.1h,  owner \S+,  depth 0,  size 4,  3 drained,  1 offline\n  submit disabled\n", out
    )
    for topic in ("resource.status", "groups.get", "job-manager.queue-status"):
        del broker.handlers[topic]
    assert run("uptime")[1].endswith("size 4\n")
    broker.on("state-machine.get", {"state": "init", "duration": 5.0})
    assert " init 5s, " in run("uptime")[1]


def test_uptime_tells_who_is_lost(run: Run, broker: FakeBroker) -> None:
    """Of seven ranks 0 (1 (3 4) 2 (5 6)): rank 1 is lost, and 3 and 4 are behind it; 5 has not come."""
    attributes(broker, size="7", broker_starttime="0.0", security_owner="0", tbon_topo="kary:2")
    broker.on("state-machine.get", {"state": "run", "duration": 5.0})
    broker.on("groups.get", {"members": "0,2,6"})

    def health(message: Message, _payload: WireMap) -> Iterator[Answer]:
        status = {0: "degraded", 1: "lost", 2: "partial", 5: "offline", 6: "full"}
        children: list[WireMap] = [
            {"rank": rank, "status": status[rank], "duration": 1.0}
            for rank in (2 * message.nodeid + 1, 2 * message.nodeid + 2)
        ]
        yield {"rank": message.nodeid, "status": status[message.nodeid], "duration": 1.0, "children": [*children]}

    broker.handlers["overlay.health"] = health
    assert run("uptime")[1].endswith("size 7,  4 offline (3 lost)\n")
    del broker.handlers["overlay.health"]
    assert run("uptime")[1].endswith("size 7,  4 offline\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (5.04, "5s"), (5.26, "5.3s"), (59.9, "60s"), (90, "1.5m"), (7560, "2.1h"), (86400 * 120, "120d")],
)
def test_short(seconds: float, text: str) -> None:
    assert short(seconds) == text


def test_version(run: Run, broker: FakeBroker) -> None:
    attributes(broker, version="9.9")
    out = run("version")[1]
    assert f"commands:    {__version__}\n" in out
    assert "broker:      9.9\n" in out
    broker.stop()
    assert "broker:      cannot connect to " in run("version")[1]


def test_shutdown_waits_for_the_supervisor(run: Run, broker: FakeBroker) -> None:
    lock = os.open(broker.path.parent / "start.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.close(lock)

    def shut_down(_message: Message, _payload: WireMap) -> Iterator[Answer]:
        yield {}
        broker.cut()
        threading.Timer(0.05, end).start()

    broker.handlers["broker.shutdown"] = shut_down
    assert run("shutdown") == (0, "", "")
    assert ended.is_set()
    assert broker.messages[0].nodeid == 0


def test_shutdown_gives_up(run: Run, broker: FakeBroker) -> None:
    broker.on("broker.shutdown", {})
    text = "fluxres-shutdown: cannot finish the shutdown within 10ms: it goes on\n"
    assert run("shutdown", "--timeout", "10ms") == (1, "", text)
    broker.on("broker.shutdown")
    assert run("shutdown", "--timeout", "10ms") == (1, "", text)
    broker.on("broker.shutdown", (errno.EPERM, "not you"))
    assert run("shutdown") == (1, "", "fluxres-shutdown: cannot shut down: not you\n")


def test_config_check(run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[bootstrap]\nsize = 2\n")
    bad.write_text("[bootstrap]\nsise = 2\n")
    assert run("config", "check", str(good)) == (0, f"{good}: no errors\n", "")
    status, _out, err = run("config", "check", str(bad))
    assert status == 1
    assert "sise" in err
