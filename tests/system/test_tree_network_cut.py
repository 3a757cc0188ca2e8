"""The network between two hosts is cut, and heals: nothing fails, nothing runs twice, whoever noticed first.

Each broker has a network namespace of its own, on a switch in one more; a firewall drops what goes between two of them,
both ways and without a word, so that silence is all that either end has. The links are TLS, as between real hosts. It
takes root, iproute2, nftables and util-linux; without them the tests are skipped. In memory the same is tested
everywhere.

The parent, rank 0, and the child, rank 1, give each other up after different times. A cut that heals before the second
of them has noticed leaves one end that believes in a link that the other has given up:

- the child was first: its next incarnation comes while the old one still counts as online, and supersedes it;
- the parent was first: the child hears of it as soon as it hears anything, and panics.

The last cases make sure of the one and the other: the firewall has forgotten the old connection when it lets new ones
through, as stateful ones do, so that no end of it ever reaches the other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from kit import eventually
from netkit import Network, wait_log
from treework import Work

from fluxres.base.idset import IdSet
from fluxres.job.value import JobState

SIZE: Final = 4
PARENT, CHILD, BELOW, BESIDE = 0, 1, 3, 2
SOON, LATE = "2s", "8s"
TIMES: Final = {"heartbeat": "0.2s", "torpid_min": "1s", "timeout": SOON, "connect_timeout": "1s"}
SILENT: Final = "it has been silent for"
SUPERSEDED: Final = "another incarnation of it has come"
NEEDED: Final = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
TABLE: Final = """
table inet cut {{
  chain in {{ type filter hook input priority 0; {incoming} drop; }}
  chain out {{ type filter hook output priority 0; {outgoing} drop; }}
}}
"""
DELETE: Final = "delete table inet cut\n"


def run(*command: str, data: str = "") -> None:
    """Run a command to its end. Raises CalledProcessError."""
    subprocess.run(command, input=data.encode(), capture_output=True, check=True)


class Hosts(Network):
    """A tree with each broker on a host of its own: a network namespace."""

    def __init__(self, path: Path, *, late: int | None) -> None:
        """The rank `late` is slow to give up its neighbours."""
        super().__init__(
            path, size=SIZE, hosts=f"10.77.0.[1-{SIZE}]", cert=path.parent / "instance.cert", settings={"tbon": TIMES}
        )
        self._names = [f"fluxres-{self.mark[:8]}-{rank}" for rank in range(SIZE)]
        self._late = self.variant("late", (f'timeout = "{SOON}"', f'timeout = "{LATE}"')) if late is not None else None
        self._late_rank = late

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Make the namespaces, a switch, and a cable from each to it. Raises CalledProcessError."""
        switch = f"fluxres-{self.mark[:8]}-switch"
        with contextlib.ExitStack() as stack:
            for name in (switch, *self._names):
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "del", name)
            run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", switch, "link", "set", "bridge", "up")
            for rank, name in enumerate(self._names):
                port = f"port{rank}"
                run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
                run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
                run("ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
                run("ip", "-n", name, "link", "set", "eth0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
            self._nft(CHILD, "list ruleset")
            try:
                yield
            finally:
                self.clean_up()  # before its network goes

    def cut(self) -> None:
        """Drop all packets between parent and child."""
        parent = f"10.77.0.{PARENT + 1}"
        self._nft(CHILD, TABLE.format(incoming=f"ip saddr {parent}", outgoing=f"ip daddr {parent}"))

    def heal(self, *, but: int = 0) -> None:
        """Let packets through again, those of the child's connection from port `but` excepted."""
        rest = TABLE.format(incoming=f"tcp dport {but}", outgoing=f"tcp sport {but}") if but else ""
        self._nft(CHILD, DELETE + rest)

    def port(self) -> int:
        """The port from which the child has dialled its parent, the last time."""
        return int(re.findall(rf"rank {CHILD} has joined \([\d.]+:(\d+)\)", self.log_of(PARENT))[-1])

    def _nft(self, rank: int, rules: str) -> None:
        run("nsenter", f"--net=/run/netns/{self._names[rank]}", "nft", "-f", "-", data=rules)

    def _popen(
        self, rank: int, command: Sequence[str], *, stdin: int, env: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        """A broker in its namespace, with its own times."""
        own = list(command)
        if rank == self._late_rank:
            own[own.index("--config") + 1] = str(self._late)
        return super()._popen(rank, ["nsenter", f"--net=/run/netns/{self._names[rank]}", *own], stdin=stdin, env=env)


@pytest.fixture
def hosts(tmp_path: Path, late: int | None) -> Iterator[Hosts]:
    """Brokers on four hosts, all online."""
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        pytest.skip(f"this takes {', '.join(missing)} (Debian: apt-get install {' '.join(missing)})")
    made = Hosts(tmp_path / "hosts", late=late)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made.network())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces, or no firewall, here: {error.cmd}: {error.stderr.decode()}")
        made.start_all()
        yield made
    made.check_log()


@pytest.mark.parametrize(
    ("late", "forgets"),
    [(None, False), (PARENT, False), (CHILD, False), (PARENT, True), (CHILD, True)],
    ids=["both notice", "child first", "parent first", "child first, forgotten", "parent first, forgotten"],
)
def test_a_cut_that_heals_fails_no_job(hosts: Hosts, late: int | None, forgets: bool) -> None:
    work = Work(hosts)
    running = [work.begin(*ranks) for ranks in ((CHILD,), (BELOW,), (PARENT, BELOW), (CHILD, BESIDE), (BESIDE,))]
    pending = [work.queue(rank, cores=4) for rank in (CHILD, BELOW)]
    work.wait_running()
    before = hosts.uuids()

    hosts.cut()
    gone = f"rank {CHILD} is lost: "
    panic = f"panic: the parent, rank {PARENT}, is lost: "
    if late != PARENT:
        wait_log(hosts, PARENT, gone + SILENT)
        hosts.wait_online([PARENT, BESIDE])
    if late != CHILD:
        wait_log(hosts, CHILD, panic + SILENT)
    assert (gone in hosts.log_of(PARENT), panic in hosts.log_of(CHILD)) == (late != PARENT, late != CHILD)
    work.wait_progress()
    work.check_same()
    states = work.states()
    assert all(states[jobid] is JobState.RUN for jobid in running)
    assert all(states[jobid] is JobState.SCHED for jobid in pending)

    hosts.heal(but=hosts.port() if forgets else 0)
    hosts.wait_renewed(before, hosts.subtree(CHILD))
    if late == PARENT:
        assert gone + SUPERSEDED in hosts.log_of(PARENT) or not forgets
    if late == CHILD:
        assert (panic + SILENT in hosts.log_of(CHILD)) is forgets
    work.wait_progress()
    work.finish()


@pytest.mark.parametrize("late", [None])
def test_a_short_cut_is_no_loss(hosts: Hosts) -> None:
    work = Work(hosts)
    work.begin(CHILD, BELOW)
    work.wait_running()
    before = hosts.uuids()
    hosts.cut()
    torpid = str(IdSet(hosts.subtree(CHILD)))
    eventually(lambda: hosts.rpc("resource.status")["torpid"] == torpid, what="torpid ranks")
    hosts.heal()
    eventually(lambda: hosts.rpc("resource.status")["torpid"] == "", what="a lively rank")
    assert hosts.uuids() == before
    work.finish()
