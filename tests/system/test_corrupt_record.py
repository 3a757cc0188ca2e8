"""A record in the store that makes no sense: that job is put into quarantine, with the reason; the rest go on."""

from __future__ import annotations

import contextlib
import sqlite3
from contextlib import closing

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Expect, Instance, birth, check_invariants, check_job, wait_status

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58, kvs_path
from fluxres.kvs.ops import PRIMARY
from fluxres.wire.payload import WireMap

UNTIL = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('undisturbed'); sys.exit(6)"


def spoil(instance: Instance, jobid: JobId, key: str, data: bytes) -> None:
    """Overwrite a value of a job in the store with `data`, while no broker runs."""
    assert instance.broker is None
    parent, _, name = kvs_path(jobid, key).rpartition(".")
    with closing(sqlite3.connect(instance.statedir / "kvs.sqlite")) as db, db:
        (entry,) = db.execute(
            "SELECT entry.id FROM entry JOIN namespace ON namespace.id = entry.ns "
            "WHERE namespace.name = ? AND parent = ? AND entry.name = ?",
            (PRIMARY, parent, name),
        ).fetchone()
        db.execute("UPDATE chunk SET data = ? WHERE entry = ?", (data, entry))


RECORDS = {
    "eventlog is garbage": ("eventlog", b"\x00\xff garbage\n"),
    "eventlog is empty": ("eventlog", b""),
    "eventlog is illegal": ("eventlog", b'{"timestamp":1.5,"name":"clean"}\n'),
    "eventlog has a bad context": (
        "eventlog",
        b'{"timestamp":1.5,"name":"submit","context":{"userid":"x","urgency":[],"flags":0,"version":1}}\n',
    ),
    "jobspec is garbage": ("jobspec", b"}{"),
    "jobspec is another thing": ("jobspec", b"[1,2,3]"),
}


@pytest.mark.parametrize("record", RECORDS)
def test_one_bad_record(record: str, make_instance: MakeInstance) -> None:
    instance = make_instance(cores=2)
    instance.start()
    end = instance.path / "end"
    done = instance.submit(instance.job("print('done')"))
    instance.wait_inactive(done)
    running = instance.submit(instance.job(UNTIL, str(end)))
    instance.wait_marked(running)
    shell = birth(instance.shell_pid(running))
    blocker = instance.submit(instance.job(UNTIL, str(end)))
    instance.wait_marked(blocker)
    pending = [instance.submit(instance.job("print('pending')")) for _ in range(3)]
    bad = pending[1]
    instance.kill()
    spoil(instance, bad, *RECORDS[record])
    instance.start()
    assert "quarantin" in instance.log
    assert f58(bad) in instance.log
    assert birth(shell[0]) == shell
    end.touch()
    good = [pending[0], pending[2]]
    instance.wait_inactive(running, *good)
    ended = Expect(status=wait_status(6), output=b"undisturbed\n")
    expected = {running: ended, blocker: ended, done: Expect(output=b"done\n")}
    check_invariants(instance, expected | dict.fromkeys(good, Expect(output=b"pending\n")), exact=False)
    assert not instance.marked(bad)
    ask_about(instance, bad)
    # Once more: it stays where it was put, its id is not given again, and listing and submitting work.
    instance.restart()
    ask_about(instance, bad)
    later = instance.submit(instance.job("print('later')"))
    assert later > max(pending)
    instance.wait_inactive(later)
    check_job(instance, later, Expect(output=b"later\n"))
    listing = instance.fluxres("jobs", "-a", "-n", "-o", "{id} {state}").stdout.decode()
    assert str(int(later)) in listing or f58(later) in listing


def ask_about(instance: Instance, bad: JobId) -> None:
    """Whatever is asked about the job is answered, with an error or not, and the broker does not mind."""
    broker = instance.pid
    calls: list[tuple[str, WireMap]] = [
        ("job-list.list-id", {"id": int(bad), "attrs": ["all"]}),
        ("job-manager.raise", {"id": int(bad), "type": "cancel", "severity": 0, "note": ""}),
        ("job-manager.urgency", {"id": int(bad), "urgency": 3}),
        ("job-manager.kill", {"id": int(bad), "signum": 15}),
        ("job-info.lookup", {"id": int(bad), "keys": ["eventlog", "jobspec"], "flags": 0}),
        ("job-list.job-stats", {}),
    ]
    for topic, payload in calls:
        with contextlib.suppress(RpcError):
            instance.rpc(topic, payload)
    for command in (("job", "attach"), ("job", "status"), ("job", "info"), ("job", "eventlog"), ("cancel",)):
        words = (*command, f58(bad), *(["jobspec"] if command[-1] == "info" else []))
        done = instance.popen(*words)
        _, errors = done.communicate(timeout=PATIENCE)
        assert b"Traceback" not in errors, words
    assert instance.pid == broker
    assert instance.broker is not None
    assert instance.broker.poll() is None
    assert "panic" not in instance.log, instance.log


def test_a_running_job_whose_record_is_bad(instance: Instance) -> None:
    """Its shell is left alone: a person may put the record right, and nothing of the job is thrown away."""
    end = instance.path / "end"
    jobid = instance.submit(instance.job(UNTIL, str(end)))
    instance.wait_marked(jobid)
    shell = birth(instance.shell_pid(jobid))
    instance.kill()
    spoil(instance, jobid, "eventlog", b"garbage\n")
    instance.start()
    other = instance.submit(instance.job())
    instance.wait_inactive(other)
    assert birth(shell[0]) == shell
    assert instance.jobdir(jobid).exists()
    end.touch()


def test_a_store_that_is_damaged(instance: Instance) -> None:
    """It is refused, with what to do about it; put back, everything is there."""
    jobid = instance.submit(instance.job("print('kept')"))
    instance.wait_inactive(jobid)
    assert instance.stop() == 0
    store = instance.statedir / "kvs.sqlite"
    good = store.read_bytes()
    store.write_bytes(b"not a database at all" * 1000)
    instance.tolerated.append("panic:")
    instance.start(wait=False)
    assert instance.died() == 1
    assert "kvs.sqlite" in instance.log
    assert "Traceback" not in instance.log
    store.write_bytes(good)
    instance.start()
    check_invariants(instance, {jobid: Expect(output=b"kept\n")})
