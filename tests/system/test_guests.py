"""Other users, where they are let in: they run jobs of their own, and have no way to those of others.

Whoever asks is told by the kernel (SO_PEERCRED): here the test itself, as `nobody` for as long as it connects.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Instance, eventually, submission, wait_status

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import JobId
from fluxres.client import Client
from fluxres.wire.payload import WireMap

NOBODY: Final = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")


@pytest.fixture
def rundir() -> Iterator[Path]:
    """A directory that other users can reach, as /run/fluxres is."""
    path = Path(tempfile.mkdtemp(prefix="fluxres-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def started(make_instance: MakeInstance, rundir: Path, *, guests: bool) -> Instance:
    """An instance with its socket in `rundir`."""
    settings: dict[str, dict[str, str | int | bool]] = {
        "broker": {"rundir": str(rundir)},
        "access": {"allow-guest-user": guests},
    }
    instance = make_instance(settings=settings)
    instance.rundir = rundir
    instance.uri = f"local://{rundir}/local-0"
    instance.start()
    return instance


@contextlib.contextmanager
def guest(instance: Instance) -> Iterator[Client]:
    """A connection of another user."""
    os.seteuid(NOBODY)
    try:
        client = Client.connect(instance.uri)
    finally:
        os.seteuid(0)
    with client:
        yield client


def refused(client: Client, topic: str, payload: WireMap) -> int:
    """The errno with which a request is refused; 0 where it is not."""
    try:
        client.call(topic, payload, timeout=PATIENCE)
    except RpcError as error:
        return error.errnum
    return 0


def test_guests_stay_out_unless_they_are_let_in(make_instance: MakeInstance, rundir: Path) -> None:
    instance = started(make_instance, rundir, guests=False)
    with pytest.raises(FluxresError, match="cannot connect"), guest(instance):
        pass
    assert instance.rpc("attr.get", {"name": "rank"})["value"] == "0"


def test_guests_cannot_reach_what_is_not_theirs(make_instance: MakeInstance, rundir: Path) -> None:
    instance = started(make_instance, rundir, guests=True)
    jobid = int(instance.submit(instance.job("time.sleep(600)")))
    instance.wait_marked(JobId(jobid))
    owners: list[tuple[str, WireMap]] = [
        ("exec.start", {"id": jobid, "nonce": "", "statedir": "", "cursor": 0, "start": True, "spec": b"{}"}),
        ("exec.reattach", {"id": jobid, "nonce": "", "statedir": "", "cursor": 0}),
        ("exec.kill", {"id": jobid, "signum": 9, "force": True}),
        ("exec.void", {"id": jobid + 1, "nonce": "", "statedir": "", "note": ""}),
        ("exec.forget", {"ids": [jobid]}),
        ("job-exec.kill", {"id": jobid, "signum": 9}),
        ("job-exec.end", {"id": jobid}),
        ("job-exec.released", {"id": jobid}),
        ("job-exec.stdin", {"id": jobid, "data": "x"}),
        ("job-exec.inventory", {"rank": 0, "ids": []}),
        ("job-manager.raise", {"id": jobid, "type": "cancel", "severity": 0, "note": ""}),
        ("job-manager.kill", {"id": jobid, "signum": 9}),
        ("job-manager.urgency", {"id": jobid, "urgency": 1}),
        (
            "job-manager.raiseall",
            {"userid": 0, "states": 62, "type": "cancel", "severity": 0, "note": "", "dry_run": False},
        ),
        ("job-info.lookup", {"id": jobid, "keys": ["jobspec"], "flags": 0}),
        ("kvs.commit", {"ops": [{"key": "a", "flags": 0, "dirent": None}], "namespace": "primary", "flags": 0}),
        ("kvs.lookup", {"key": "job", "namespace": "primary", "flags": 0}),
        ("attr.set", {"name": "x", "value": "y"}),
        ("broker.shutdown", {}),
    ]
    with guest(instance) as client:
        for topic, payload in owners:
            assert refused(client, topic, payload) == errno.EPERM, topic
        urgent = submission(instance.job(), urgency=31)
        assert refused(client, "job-ingest.submit", urgent) == errno.EPERM
        assert "time.sleep" not in str(client.call("job-list.list-id", {"id": jobid, "attrs": ["all"]}))
    assert instance.events(JobId(jobid))[-1] == "start", "the job was not touched"


def test_a_guests_job_runs_as_the_guest(make_instance: MakeInstance, rundir: Path) -> None:
    instance = started(make_instance, rundir, guests=True)
    spec = instance.jobspec("sh", "-c", "id -u; exit 5", cwd="/")
    with guest(instance) as client:
        answer = client.call("job-ingest.submit", submission(spec, key="one"), timeout=PATIENCE)
        owners = instance.submit(instance.jobspec("true"), key="one")
        jobid = answer["id"]
        assert isinstance(jobid, int)
        assert owners != jobid, "keys are each user's own"
        eventually(lambda: "clean" in instance.events(JobId(jobid)), what="its end")
        looked = client.call("job-info.lookup", {"id": jobid, "keys": ["guest.output"], "flags": 0}, timeout=PATIENCE)
        assert looked["id"] == jobid
    assert instance.status(JobId(jobid)) == wait_status(5), instance.eventlog(JobId(jobid))
    assert instance.output(JobId(jobid)) == b"%d\n" % NOBODY
