"""fluxres overlay: the tree as it is drawn from what the brokers say, waiting for a state, and the smaller commands."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clikit import Run
from fakebroker import Answer, FakeBroker

from fluxres.base.errors import ProtocolError
from fluxres.cli.main import main
from fluxres.cli.overlay_tree import Style, draw, without_full
from fluxres.cli.ranks import Hosts
from fluxres.overlay.report import Failed, Report, assemble
from fluxres.overlay.topology import Topology
from fluxres.wire.messages import Message
from fluxres.wire.payload import WireMap

SIZE = 7
HOSTS = "n[0-6]"
"""The tree is 0 (1 (3 4) 2 (5 6))."""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*argv: str) -> tuple[int, str, str]:
        status = main(["overlay", *argv])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return runner


class Instance:
    """Seven brokers: what each says of itself, and of those of its children that are not full."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.attributes = {"size": str(SIZE), "hostlist": HOSTS, "tbon.topo": "kary:2"}
        self.topology = Topology.kary(SIZE, 2)
        self.status: dict[int, str] = {}
        self.told: dict[int, str] = {}
        self.errors: dict[int, Answer | None] = {}
        broker.handlers["attr.get"] = self._get
        broker.handlers["overlay.health"] = self._health
        broker.handlers["overlay.monitor"] = self._health

    def _get(self, _message: Message, payload: WireMap) -> Iterator[Answer]:
        yield {"value": self.attributes[str(payload["name"])], "flags": 1}

    def report(self, rank: int) -> WireMap:
        """What a rank says."""
        children: list[WireMap] = [
            {"rank": child, "status": self.told.get(child, self.status.get(child, "full")), "duration": 60.0 * child}
            for child in self.topology.children(rank)
        ]
        status = self.status.get(rank, "full")
        return {"rank": rank, "status": status, "duration": 1.5 + rank, "children": [*children]}

    def _health(self, message: Message, _payload: WireMap) -> Iterator[Answer]:
        error = self.errors.get(message.nodeid, 0)
        if error == 0:
            yield self.report(message.nodeid)
        elif error is not None:
            yield error

    def asked(self) -> list[int]:
        """The ranks whose health was asked for."""
        return [message.nodeid for message in self.broker.messages if message.topic == "overlay.health"]


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instance]:
    with FakeBroker(tmp_path / "local-0") as broker:
        monkeypatch.setenv("FLUXRES_URI", broker.uri)
        yield Instance(broker)


FULL_TREE = """\
0 n0: full
├─ 1 n1: full
│  ├─ 3 n3: full
│  └─ 4 n4: full
└─ 2 n2: full
   ├─ 5 n5: full
   └─ 6 n6: full
"""
LOST_TREE = """\
0 n0: degraded
├─ 1 n1: lost
│  ├─ 3 n3: lost
│  └─ 4 n4: lost
└─ 2 n2: partial
   ├─ 5 n5: offline
   └─ 6 n6: full
"""


def lose(instance: Instance) -> None:
    """Rank 1 is lost, 5 is offline."""
    instance.status = {0: "degraded", 1: "lost", 2: "partial", 5: "offline"}
    instance.errors = {1: (errno.EHOSTUNREACH, "rank 1 is lost")}


def test_a_full_tree(run: Run, instance: Instance) -> None:
    assert run("status") == (0, FULL_TREE, "")
    assert instance.asked() == [0, 1, 2]  # what leaves have to say, their parents know


def test_what_is_below_a_lost_rank(run: Run, instance: Instance) -> None:
    lose(instance)
    assert run("status") == (0, LOST_TREE, "")
    assert instance.asked() == [0, 2]
    flat = re.sub("[├└│─]|(?m:^ +)", "", LOST_TREE).replace("  ", "").replace(" 1", "1")
    assert run("status", "--no-pretty")[1].split() == flat.split()
    assert run("status", "--no-ghost")[1].count("lost") == 1


def test_only_a_subtree_or_what_is_down(run: Run, instance: Instance) -> None:
    lose(instance)
    assert run("status", "-r", "2")[1] == "2 n2: partial\n├─ 5 n5: offline\n└─ 6 n6: full\n"
    down = LOST_TREE.replace("   └─ 6 n6: full\n", "").replace("   ├─ 5", "   └─ 5")
    assert run("status", "--down")[1] == down
    assert run("status", "--summary")[1] == "degraded\n"
    assert run("status", "-r2", "--summary", "-v")[1] == "partial for 3.5s\n"
    instance.status, instance.errors = {}, {}
    assert run("status", "--down") == (0, "", "")


def test_since_when_and_how_fast(run: Run, instance: Instance) -> None:
    lose(instance)
    out = run("status", "-v")[1].splitlines()
    assert out[0] == "0 n0: degraded for 1.5s"
    assert out[1] == "├─ 1 n1: lost for 1m"
    assert out[2] == "│  ├─ 3 n3: lost"
    out = run("status", "-vv")[1].splitlines()
    assert re.fullmatch(r"0 n0: degraded for 1\.5s \(\d+\.\d{3} ms\)", out[0])
    assert re.fullmatch(r"   └─ 6 n6: full for 7\.5s \(\d+\.\d{3} ms\)", out[6])


def test_a_rank_of_whose_loss_its_parent_does_not_know_yet(run: Run, instance: Instance) -> None:
    instance.errors = {1: (errno.EHOSTUNREACH, "the connection is lost"), 2: None}
    status, out, _err = run("status", "--timeout", "1s")
    assert status == 0
    assert "├─ 1 n1: lost (the connection is lost)\n│  ├─ 3 n3: lost\n" in out
    assert "└─ 2 n2: full (no answer within 1s)\n   ├─ 5 n5: full\n" in out


def test_a_root_that_does_not_answer_is_looked_up_at_its_parent(run: Run, instance: Instance) -> None:
    lose(instance)
    assert run("status", "-r", "1") == (0, "1 n1: lost\n├─ 3 n3: lost\n└─ 4 n4: lost\n", "")
    assert run("status", "-r", "1", "--summary") == (0, "lost\n", "")
    instance.errors[0] = (errno.EHOSTUNREACH, "rank 0 is lost")
    text = "fluxres-overlay: cannot show the status of rank {}: rank {} is lost\n"
    assert run("status", "-r", "1") == (1, "", text.format(1, 1))
    assert run("status") == (1, "", text.format(0, 0))


def test_ranks_and_options_that_are_not_there(run: Run, instance: Instance) -> None:
    text = "fluxres-overlay: cannot show the status of rank 7: there is no rank 7, the instance has ranks 0 to 6\n"
    assert run("status", "-r", "7") == (1, "", text)
    assert run("status", "-r", "4294967295")[0] == 2
    assert run("status", "--color=foo")[0] == 2
    assert run("status", "--wait=foo")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("status", "-H", "n9")[2].startswith("fluxres-overlay: cannot find 'n9' in the tree: host 'n9' is")
    assert run("status", "-H", "3-9")[2].startswith("fluxres-overlay: cannot find '3-9' in the tree: there is no rank")


def test_colors_and_highlights(run: Run, instance: Instance) -> None:
    lose(instance)
    assert "<<0 n0>>: degraded\n├─ 1 n1: lost\n" in run("status", "-H", "6", "-Lnever")[1]
    out = run("status", "--highlight=n6", "-L")[1]
    for text in (
        "\x1b[01;34m6 n6\x1b[0m: full",
        "\x1b[31mlost\x1b[0m",
        "\x1b[33moffline\x1b[0m",
        "\x1b[90mlost\x1b[0m",
    ):
        assert text in out


def test_json(run: Run, instance: Instance) -> None:
    lose(instance)
    tree = json.loads(run("status", "--json")[1])
    assert tree["status"] == "degraded"
    lost, partial = tree["children"]
    assert lost == {
        "rank": 1,
        "hostname": "n1",
        "status": "lost",
        "duration": 60.0,
        "children": [
            {"rank": r, "hostname": f"n{r}", "status": "lost", "duration": None, "ghost": True, "children": []}
            for r in (3, 4)
        ],
    }
    assert [each["rank"] for each in partial["children"]] == [5, 6]
    assert json.loads(run("status", "--json", "--summary")[1]) == {"rank": 0, "status": "degraded", "duration": 1.5}
    instance.status, instance.errors, instance.attributes["hostlist"] = {}, {}, "one"
    assert json.loads(run("status", "--json", "--down")[1]) == {}
    assert run("status", "-r", "3") == (0, "3: full\n", "")


def test_a_tree_of_another_shape(run: Run, instance: Instance) -> None:
    instance.attributes["tbon.topo"] = "custom"
    instance.topology = Topology.custom([-1, 0, 1, 2, 3, 4, 0])

    def nested(rank: int) -> WireMap:
        children = [nested(child) for child in instance.topology.children(rank)]
        return {"rank": rank, "size": 1, "children": [*children]}

    instance.broker.on("overlay.topology", nested(0))
    assert run("parentof", "5") == (0, "4\n", "")
    assert run("status")[1].splitlines()[-2:] == ["│           └─ 5 n5: full", "└─ 6 n6: full"]
    instance.broker.on("overlay.topology", {"rank": 0, "size": 1, "children": [{"rank": 9, "children": []}]})
    assert run("parentof", "5")[2].startswith("fluxres-overlay: cannot use the broker's answer")
    instance.broker.on("overlay.topology", (errno.EHOSTUNREACH, "the parent is lost"))
    assert run("parentof", "5")[2] == "fluxres-overlay: cannot get the topology: the parent is lost\n"


# -- waiting


def monitor(instance: Instance, *lives: tuple[str, ...]) -> None:
    """Let each connection see these states, and then be cut, but for the last."""
    left = list(lives)

    def answer(message: Message, _payload: WireMap) -> Iterator[Answer]:
        for status in left.pop(0):
            instance.status[instance.broker.messages[-1].nodeid] = status
            yield instance.report(message.nodeid)
        if left:
            instance.broker.cut()

    instance.broker.handlers["overlay.monitor"] = answer


def test_waiting(run: Run, instance: Instance) -> None:
    monitor(instance, ("partial", "degraded", "full"))
    assert run("status", "--wait", "full", "--summary") == (0, "full\n", "")
    assert [m.nodeid for m in instance.broker.messages if m.topic == "overlay.monitor"] == [0]


def test_waiting_through_a_restart(run: Run, instance: Instance) -> None:
    monitor(instance, ("partial",), ("degraded", "partial", "full"))
    assert run("status", "--wait=full", "--summary", "-r2", "--timeout=60s") == (0, "full\n", "")
    assert [m.nodeid for m in instance.broker.messages if m.topic == "overlay.monitor"] == [2, 2]


def test_waiting_for_a_loss(run: Run, instance: Instance) -> None:
    lose(instance)
    assert run("status", "--wait=lost", "-r1", "--summary", "--timeout=0") == (0, "lost\n", "")
    assert [m.nodeid for m in instance.broker.messages if m.topic == "overlay.monitor"] == [0]
    status, _out, err = run("status", "--wait=lost")
    assert status == 2
    assert err.startswith("fluxres-overlay: cannot wait for rank 0 to be lost: it is the root, and has no parent ")


def test_waiting_in_vain(run: Run, instance: Instance) -> None:
    monitor(instance, ("partial",))
    status, out, err = run("status", "--wait=full", "--timeout=1s")
    assert (status, out) == (1, "")
    assert err == "fluxres-overlay: cannot wait for rank 0 to be full: after 1s it is partial\n"
    instance.broker.on("overlay.monitor", errno.ENODATA)
    assert run("status", "--wait=full")[2].startswith("fluxres-overlay: cannot wait for rank 0 to be full: ")
    assert run("status", "--wait=full", "-r9")[2].endswith("there is no rank 9, the instance has ranks 0 to 6\n")


# -- the others


def test_lookup(run: Run, instance: Instance) -> None:
    assert run("lookup", "2") == (0, "n2\n", "")
    assert run("lookup", "0-2,6") == (0, "n[0-2,6]\n", "")
    assert run("lookup", "n[3-4]") == (0, "3-4\n", "")
    for target in ("7", "2-1", "x", "n[", "n0,x"):
        assert run("lookup", target)[0] == 1
    assert run("lookup")[0] == 2
    instance.attributes["hostlist"] = "h,h,h,h,i,i,i"
    assert run("lookup", "i") == (0, "4-6\n", "")
    instance.attributes["hostlist"] = "h"
    assert run("lookup", "h")[2].endswith("the instance does not name a host for each rank\n")


def test_parentof(run: Run, instance: Instance) -> None:
    assert run("parentof", "6") == (0, "2\n", "")
    assert run("parentof", "0")[2] == (
        "fluxres-overlay: cannot tell the parent of rank 0: it is the root, and has no parent\n"
    )
    assert run("parentof", "7")[2].endswith("there is no rank 7, the instance has ranks 0 to 6\n")
    assert run("parentof", "x")[0] == 2


def test_disconnect(run: Run, instance: Instance) -> None:
    instance.broker.on("overlay.disconnect-subtree", {})
    said = "fluxres-overlay: rank 1 n1 is asked to disconnect rank 4 n4\n"
    for target in ("4", "n4"):
        assert run("disconnect", target) == (0, "", said)
        assert instance.broker.seen[-1] == ("overlay.disconnect-subtree", {"rank": 4})
        assert instance.broker.messages[-1].nodeid == 1
    assert run("disconnect", "-r0", "4")[0] == 0
    assert instance.broker.messages[-1].nodeid == 0
    instance.broker.on("overlay.disconnect-subtree", (errno.ENOTCONN, "it is not connected"))
    assert run("disconnect", "4") == (1, "", f"{said}fluxres-overlay: cannot disconnect rank 4: it is not connected\n")
    for target in ("0", "3-4", "x", "7"):
        assert run("disconnect", target)[0] == 1


# -- the pure part


def test_what_nobody_has_told() -> None:
    with pytest.raises(ProtocolError):
        assemble(1, Topology.kary(3, 2), {1: Failed("no")})


@pytest.mark.parametrize("make", [lambda: Topology.kary(5000, 1), lambda: Topology.kary(5000, 32)])
def test_deep_and_wide_trees(make: Callable[[], Topology]) -> None:
    topology = make()
    seen = assemble(
        0, topology, {0: Report("degraded", 1.0, {1: ("lost", 1.0), **dict.fromkeys(range(2, 33), ("full", 0.0))})}
    )
    assert len(list(draw(0, topology, seen, Style(Hosts(()), pretty=False)))) == 5000
    lost = len(list(topology.subtree(1)))
    assert len(without_full(0, topology, seen)) == lost + 1
