"""SIGKILL at random instants, for a minute, under load: of the broker most of all, but also of launchers and shells.

The seed is printed, and `FLUXRES_KILL_SEED` gives it again; `FLUXRES_KILL_SECONDS` says for how long (60). In the end
every job that was submitted is looked at: what has to be true of it depends only on whether its shell was killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from conftest import MakeInstance
from kit import PATIENCE, Expect, Instance, check_invariants, check_job, eventually, submission, wait_status

from fluxres.base.errors import FluxresError, RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject
from fluxres.session import Session
from fluxres.wire.payload import WireMap
from fluxres_shell.claim import ClaimCorrupt

SECONDS: Final = float(os.environ.get("FLUXRES_KILL_SECONDS", "60"))
SEED: Final = int(os.environ.get("FLUXRES_KILL_SEED", "0")) or time.time_ns() % 1_000_000
MOST_ACTIVE: Final = 24
"""Jobs that may be on their way at a time."""
LONGEST_PAUSE: Final = 0.6
"""Seconds between two kills, at most."""
BODY: Final = """
lines, code, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
for i in range(lines):
    os.write(1, b"line %d\\n" % i)
    if pause: time.sleep(pause)
mark("end")
sys.exit(code)
"""


@dataclass(slots=True)
class Sent:
    """A job that was submitted."""

    spec: JsonObject
    lines: int
    code: int
    handle: int
    jobid: JobId | None = None
    cancelled: bool = False
    shell_killed: bool = False

    @property
    def output(self) -> bytes:
        """What it writes."""
        return b"".join(b"line %d\n" % i for i in range(self.lines))


class Storm:
    """The load, and whoever kills."""

    def __init__(self, instance: Instance, rng: random.Random) -> None:
        self.instance = instance
        self.rng = rng
        self.sent: dict[str, Sent] = {}
        self.kills = dict.fromkeys(("broker", "launcher", "shell"), 0)
        self._ended: set[JobId] = set()
        self._asked: dict[int, Sent] = {}

    def rage(self, seconds: float) -> None:
        """Submit, cancel and kill for so long; then wait for every answer."""
        until = time.monotonic() + seconds
        with Session(self.instance.uri) as session:
            while time.monotonic() < until:
                self._submit_some(session)
                self._cancel_one(session)
                self._take(session, self.rng.uniform(0, LONGEST_PAUSE))
                self._kill_one()
                self._count_ended()
            eventually(lambda: self._take(session, 0.05) or not self._asked, what="every answer")
            assert all(sent.jobid is not None for sent in self.sent.values()), "I5: a submission was never answered"

    def _submit_some(self, session: Session) -> None:
        active = len(self.sent) - len(self._ended)
        for _ in range(min(self.rng.randrange(6), MOST_ACTIVE - active)):
            lines, code = self.rng.choice((0, 3, 50, 2000)), self.rng.randrange(8)
            pause = self.rng.choice((0, 0, 0.0005, 0.005)) if lines <= 50 else 0
            spec = self.instance.job(BODY, str(lines), str(code), str(pause))
            key = f"job {len(self.sent)}"
            handle = session.begin("job-ingest.submit", submission(spec, key=key))
            self.sent[key] = self._asked[handle] = Sent(spec, lines, code, handle)

    def _cancel_one(self, session: Session) -> None:
        known = [sent for sent in self.sent.values() if sent.jobid is not None and sent.jobid not in self._ended]
        if known and self.rng.random() < 0.2:
            sent = self.rng.choice(known)
            sent.cancelled = True
            payload: WireMap = {"id": int(sent.jobid or 0), "type": "cancel", "severity": 0, "note": ""}
            session.begin("job-manager.raise", payload)

    def _take(self, session: Session, seconds: float) -> bool:
        """Take answers for so long; False, so that one can wait for something else."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            reply = session.receive(left)
            if reply is None:
                return False
            sent = self._asked.pop(reply.matchtag, None)
            if sent is not None:
                assert reply.error is None, reply.error
                identity = reply.payload["id"]
                assert isinstance(identity, int)
                sent.jobid = JobId(identity)
        return False

    def _kill_one(self) -> None:
        victim = self.rng.choice(("broker",) * 6 + ("launcher", "shell"))
        if victim == "broker":
            self.instance.kill()
            self.instance.start(wait=self.rng.random() < 0.8)
        elif victim == "launcher":
            for pid in launchers(self.instance):
                os.kill(pid, signal.SIGKILL)
        elif not self._kill_shell():
            return
        self.kills[victim] += 1

    def _kill_shell(self) -> bool:
        active = [s for s in self.sent.values() if s.jobid is not None and s.jobid not in self._ended]
        self.rng.shuffle(active)
        for sent in active:
            assert sent.jobid is not None
            with contextlib.suppress(ClaimCorrupt), shell_pidfd(self.instance, sent.jobid) as pidfd:
                if pidfd is not None:
                    sent.shell_killed = True
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    return True
        return False

    def _count_ended(self) -> None:
        """Note which jobs have ended, as far as the broker says now; it may be away."""
        with contextlib.suppress(RpcError, FluxresError):
            self._ended |= {jobid for jobid, job in self.instance.jobs().items() if job["state"] == 64}


@contextlib.contextmanager
def shell_pidfd(instance: Instance, jobid: JobId) -> Iterator[int | None]:
    """The pidfd of a job's shell, None where it has none now: never that of another process."""
    record = instance.claim(jobid)
    pidfd = None
    if record is not None and not record.void:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(record.pid)
    try:
        # Still that shell? Its claim is there, and the process has our mark.
        yield pidfd if pidfd is not None and record is not None and record.pid in instance.processes() else None
    finally:
        if pidfd is not None:
            os.close(pidfd)


def launchers(instance: Instance) -> list[int]:
    """The pids of the instance's launchers; shells are forks of one, with a name of their own."""
    found = []
    for pid in instance.processes():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
            if b"--launcher" in arguments and name != "fluxres-shell":
                found.append(pid)
    return found


def check(instance: Instance, sent: Sent) -> None:
    """What has to be true of one job."""
    jobid = sent.jobid
    assert jobid is not None
    exception = (instance.exception(jobid) or {}).get("type")
    names = instance.events(jobid)
    if not sent.cancelled and not sent.shell_killed:
        check_job(instance, jobid, Expect(status=wait_status(sent.code), output=sent.output))
        return
    allowed = {None} | ({"cancel"} if sent.cancelled else set()) | ({"exec"} if sent.shell_killed else set())
    assert exception in allowed, f"{f58(jobid)}: {exception}, {names}"
    tasks = len(instance.marked(jobid))
    check_job(instance, jobid, Expect(status=None, exception=str(exception) if exception else None, tasks=tasks))
    if exception is None and "finish" in names:
        assert instance.status(jobid) == wait_status(sent.code)
    if tasks and "start" in names:
        output = instance.output(jobid)
        assert sent.output.startswith(output), f"I3: {f58(jobid)} has what it did not write"
        assert exception is not None or output == sent.output, f"I3: {f58(jobid)} lost output and does not say so"


@pytest.mark.timeout(SECONDS + 4 * PATIENCE)
def test_random_kills(make_instance: MakeInstance) -> None:
    print(f"FLUXRES_KILL_SEED={SEED} FLUXRES_KILL_SECONDS={SECONDS:g}")
    instance = make_instance(cores=4)
    instance.start()
    storm = Storm(instance, random.Random(SEED))
    storm.rage(SECONDS)
    print(f"{len(storm.sent)} jobs, killed: {storm.kills}")
    ids = [sent.jobid for sent in storm.sent.values() if sent.jobid is not None]
    assert len(set(ids)) == len(storm.sent), "a jobid was given twice"
    instance.wait_inactive(*ids)
    for sent in storm.sent.values():
        check(instance, sent)
    instance.restart()
    for key, sent in storm.sent.items():
        assert instance.submit(sent.spec, key=key) == sent.jobid, "I7: an answered submission is not what it was"
    after = instance.submit(instance.job())
    check_invariants(instance, {after: Expect(output=b"")}, exact=False)
    assert len(instance.jobs()) == len(ids) + 1, "I1: jobs have vanished, or came from nowhere"
