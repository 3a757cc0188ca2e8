"""fluxres resource: what it asks and says."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clikit import Run
from fakebroker import FakeBroker

from fluxres.base.errors import ProtocolError
from fluxres.cli.main import main
from fluxres.cli.resource_set import parse_resources
from fluxres.wire.payload import Wire, WireMap


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    with FakeBroker(tmp_path / "local-0") as made:
        monkeypatch.setenv("FLUXRES_URI", made.uri)
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()
        yield made
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


def r(*entries: tuple[str, str, str], hosts: str = "") -> WireMap:
    """An R of (ranks, cores, gpus)."""
    lite: list[Wire] = [
        {"rank": ranks, "children": {"core": cores, **({"gpu": gpus} if gpus else {})}}
        for ranks, cores, gpus in entries
    ]
    return {"version": 1, "execution": {"R_lite": lite, "nodelist": [hosts] if hosts else []}}


ALL = r(("0-2", "0-3", "0"), ("3", "0-7", ""), hosts="n[0-3]")


def test_resource_list(run: Run, broker: FakeBroker) -> None:
    broker.on(
        "resource.sched-status",
        {
            "all": ALL,
            "down": r(("2", "0-3", "0"), hosts="n2"),
            "allocated": r(("0", "0-3", "0"), ("1", "0", ""), hosts="n[0-1]"),
        },
    )
    assert run("resource", "list") == (
        0,
        "     STATE NNODES NCORES NGPUS NODELIST\n"
        "      free      2     11     1 n[1,3]\n"
        " allocated      2      5     1 n[0-1]\n"
        "      down      1      4     1 n2\n",
        "",
    )
    assert run("resource", "list", "-n", "-s", "up,all", "-o", "{state} {ncores} {ranks}") == (
        0,
        "up 16 0-1,3\nall 20 0-3\n",
        "",
    )
    assert json.loads(run("resource", "list", "--json", "-s", "down")[1]) == {
        "resources": [{"state": "down", "nnodes": 1, "ncores": 4, "ngpus": 1, "ranks": "2", "nodelist": "n2"}]
    }
    assert "there is no field 'up'" in run("resource", "list", "-o", "{up}")[2]
    assert run("resource", "list", "-s", "x")[0] == 2


def test_resource_list_of_nothing(run: Run, broker: FakeBroker) -> None:
    broker.on("resource.sched-status", {"all": None, "down": r(), "allocated": None})
    assert run("resource", "list", "-n", "-s", "free") == (0, "      free      0      0     0\n", "")


def test_resource_status(run: Run, broker: FakeBroker) -> None:
    broker.on("resource.sched-status", {"all": ALL, "allocated": r(("1", "0", ""), hosts="n1")})
    broker.on(
        "resource.status",
        {
            "R": ALL,
            "drain": {"1-2": {"timestamp": 1.0, "reason": "fan"}},
            "online": "0-2",
            "offline": "3-4",
            "exclude": "",
            "torpid": "",
        },
    )
    assert run("resource", "status", "-o", "{state:>9} {up.ascii} {nnodes} {ncores} {nodelist} {reason}") == (
        0,
        "    STATE UP NNODES NCORES NODELIST REASON\n"
        "    avail y 1 4 n0\n"
        "   avail* n 2 8 n3\n"
        " draining y 1 4 n1 fan\n"
        "  drained y 1 4 n2 fan\n",
        "",
    )
    assert run("resource", "status", "-n", "-s", "drain,torpid", "-o", "{state} {ranks}")[1] == (
        "draining 1\ndrained 2\ntorpid\n"
    )
    assert (
        run("resource", "status")[1].splitlines()[0]
        == "     STATE UP NNODES NCORES NGPUS REASON               NODELIST"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"execution": {"R_lite": [1], "nodelist": []}},
        {"execution": {"R_lite": [{"rank": "0", "children": {"core": "x"}}], "nodelist": ["a"]}},
        {"execution": {"R_lite": [{"rank": "0", "children": {"core": "0"}}], "nodelist": ["a,b"]}},
        {"execution": {"R_lite": [{"rank": "0", "children": {"core": "0"}}], "nodelist": [1]}},
    ],
)
def test_malformed_resources(wrong: WireMap) -> None:
    with pytest.raises(ProtocolError, match="cannot use the broker's answer"):
        parse_resources(wrong)


# --- drains


def status_of(drain: WireMap) -> WireMap:
    return {"R": ALL, "drain": drain, "online": "0-2", "offline": "3", "exclude": "", "torpid": ""}


def test_drain_without_targets_lists_drained_nodes(run: Run, broker: FakeBroker) -> None:
    broker.on("resource.sched-status", {"all": ALL, "allocated": r(("1", "0", ""), hosts="n1")})
    fan: WireMap = {"timestamp": 86400, "reason": "fan"}
    broker.on("resource.status", status_of({"1": fan, "2": {"timestamp": 172800, "reason": "fan"}, "3": fan}))
    assert run("resource", "drain") == (
        0,
        "TIMESTAMP    STATE    REASON                         NODELIST\n"
        "Jan02 00:00  draining fan                            n1\n"
        "Jan02 00:00  drained* fan                            n3\n"
        "Jan03 00:00  drained  fan                            n2\n",
        "",
    )
    assert run("resource", "drain", "-n", "-o", "{state} {ranks}")[1] == "draining 1\ndrained 2\ndrained* 3\n"
    rows = json.loads(run("resource", "drain", "--json")[1])["resources"]
    assert [(row["ranks"], row["timestamp"]) for row in rows] == [("1", 86400.0), ("3", 86400.0), ("2", 172800.0)]
    broker.on("resource.status", status_of({}))
    assert run("resource", "drain", "-n") == (0, "", "")


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["drain", "1-2", "bad", "fan"], ("resource.drain", {"targets": "1-2", "reason": "bad fan"})),
        (["drain", "n[1-2]"], ("resource.drain", {"targets": "n[1-2]"})),
        (["drain", "-u", "1", "x"], ("resource.drain", {"targets": "1", "mode": "update", "reason": "x"})),
        (["drain", "-f", "1"], ("resource.drain", {"targets": "1", "mode": "overwrite"})),
        (["drain", "-ff", "1", "-x"], ("resource.drain", {"targets": "1", "mode": "force-overwrite", "reason": "-x"})),
        (["undrain", "n1"], ("resource.undrain", {"targets": "n1"})),
        (["undrain", "-u", "1", "fixed"], ("resource.undrain", {"targets": "1", "mode": "update", "reason": "fixed"})),
        (["declare-lost", "n3"], ("resource.declare-lost", {"ranks": "n3"})),
        (["declare-lost", "3", "burnt", "down"], ("resource.declare-lost", {"ranks": "3", "reason": "burnt down"})),
    ],
)
def test_what_is_asked_for(run: Run, broker: FakeBroker, argv: list[str], asked: tuple[str, WireMap]) -> None:
    broker.on(asked[0], {})
    assert run("resource", *argv) == (0, "", "")
    assert broker.seen == [asked]
    assert broker.messages[0].nodeid == 0


def test_refusals(run: Run, broker: FakeBroker) -> None:
    broker.on("resource.drain", (errno.EEXIST, "rank 1 is already drained"))
    assert run("resource", "drain", "1") == (
        1,
        "",
        "fluxres-resource: cannot drain 1: rank 1 is already drained (--force replaces the reason)\n",
    )
    broker.on("resource.drain", (errno.EPERM, "resource.drain is for the instance owner"))
    assert run("resource", "drain", "1")[2].endswith("cannot drain 1: resource.drain is for the instance owner\n")
    broker.on("resource.undrain", (errno.EEXIST, "rank 1 is not drained"))
    assert run("resource", "undrain", "1")[2] == "fluxres-resource: cannot undrain 1: rank 1 is not drained\n"
    broker.on("resource.declare-lost", (errno.EBUSY, "online: rank 1"))
    assert run("resource", "declare-lost", "1")[2] == "fluxres-resource: cannot declare 1 lost: online: rank 1\n"
    assert run("resource", "drain", "-u", "-f", "1")[0] == 2
    for command in ("undrain", "declare-lost"):
        status, _out, err = run("resource", command)
        assert status == 2
        assert "the following arguments are required: TARGETS (" in err
    broker.on("resource.drain", (errno.EINVAL, "no targets are named"))
    assert run("resource", "drain", "")[2] == "fluxres-resource: cannot drain '': no targets are named\n"


def test_uri_after_the_subcommand(run: Run, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    broker.on("resource.undrain", {})
    for argv in (["--uri", broker.uri, "undrain", "1"], ["undrain", "--uri", broker.uri, "1"]):
        monkeypatch.setenv("FLUXRES_URI", "local:///nowhere")
        assert run("resource", *argv) == (0, "", "")
