"""Death at every step: each failpoint kills the process that passes it, and no job may notice more than it must.

A failpoint of the broker costs nothing at all. One of the launcher costs nothing either: another is started. One of the
shell costs that shell's job, with an exception that says so, but never after its exit record is written.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

import pytest
from conftest import MakeInstance
from kit import BROKER_PLACES, PATIENCE, Expect, Instance, check_invariants, eventually, submission, wait_status

from fluxres.base.failpoint import FAILPOINTS, VARIABLE
from fluxres.base.jobid import JobId
from fluxres.base.json import JsonObject
from fluxres.session import Session

LINES: Final = 400
"""Lines of output of the job that writes some."""
TALK: Final = f"for i in range({LINES}): print('line', i, flush=i % 50 == 0)\nsys.exit(7)"
TALKED: Final = b"".join(b"line %d\n" % i for i in range(LINES))
WAIT_LONG: Final = "time.sleep(600)"
SUICIDE: Final = f"os.kill(os.getpid(), {int(signal.SIGUSR1)})"
KILLED: Final = wait_status(128 + signal.SIGUSR1)
"""What rank 0 says of a task that a signal ended: the exit code that flux shows for it."""

SECOND: Final = "@2"
"""The first pass of a place is when the first job goes through it: the second has others around it."""


def place_of(failpoint: str) -> str:
    """The place of `place.side`."""
    return failpoint.partition(".")[0]


class Load:
    """A few jobs of every kind, submitted and cancelled by a client that outlives brokers."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.specs: dict[str, JsonObject] = {
            "short": instance.job(),
            "talks": instance.job(TALK),
            "killed": instance.job(SUICIDE),
            "cancelled": instance.job(WAIT_LONG),
            "short too": instance.job(),
        }
        self.ids: dict[str, JobId] = {}
        self.deaths: list[int] = []
        self.is_over = False

    def run(self) -> None:
        """Submit everything, cancel what is to be cancelled; revive the broker, disarmed, when it dies."""
        with Session(self.instance.uri) as session:
            handles = {
                session.begin("job-ingest.submit", submission(spec, key=name)): name
                for name, spec in self.specs.items()
            }
            for handle, payload in self._answers(session, len(handles)):
                identity = payload["id"]
                assert isinstance(identity, int)
                self.ids[handles.pop(handle)] = JobId(identity)
            assert not handles, "I5: a request was answered twice, another not at all"
            self._until(self._cancellable)
            if not self.is_over:
                cancelled = int(self.ids["cancelled"])
                session.begin("job-manager.raise", {"id": cancelled, "type": "cancel", "severity": 0, "note": ""})
                list(self._answers(session, 1))
        self._until(self._all_inactive)

    def revive(self) -> None:
        """Start the broker again where a failpoint has killed it."""
        broker = self.instance.broker
        if broker is not None and broker.poll() is not None:
            self.deaths.append(self.instance.died())
            self.instance.start()

    def _answers(self, session: Session, count: int) -> Iterator[tuple[int, dict[str, object]]]:
        for _ in range(count):
            reply = None
            while reply is None:
                self.revive()
                reply = session.receive(0.02)
            assert reply.error is None, reply.error
            assert reply.last
            yield reply.matchtag, dict(reply.payload)

    def _until(self, check: object) -> None:
        assert callable(check)

        def looked() -> object:
            self.revive()
            return check()

        eventually(looked, timeout=PATIENCE)

    def _cancellable(self) -> bool:
        """The job to be cancelled runs, or is over already, because its shell had to die."""
        jobid = self.ids["cancelled"]
        self.is_over = "clean" in self.instance.events(jobid)
        return self.is_over or bool(self.instance.marked(jobid))

    def _all_inactive(self) -> bool:
        return all("clean" in self.instance.events(jobid) for jobid in self.ids.values())


def undisturbed() -> dict[str, Expect]:
    """What becomes of the jobs when all goes well."""
    return {
        "short": Expect(output=b""),
        "short too": Expect(output=b""),
        "talks": Expect(status=wait_status(7), output=TALKED),
        "killed": Expect(status=KILLED),
        "cancelled": Expect(status=None, exception="cancel"),
    }


def shells_die(place: str) -> dict[str, Expect]:
    """What becomes of them when every shell dies at `place`."""
    ran = 1 if place == "exit-record" else 0
    lost = {name: Expect(status=None, exception="exec", tasks=ran) for name in undisturbed()}
    return lost | ({"cancelled": undisturbed()["cancelled"]} if ran else {})


def expected(failpoint: str) -> dict[str, Expect]:
    """What becomes of the jobs with `failpoint` armed."""
    if place_of(failpoint) in (*BROKER_PLACES, "fork") or failpoint == "exit-record.after":
        return undisturbed()
    return shells_die(place_of(failpoint))


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_death_at(failpoint: str, make_instance: MakeInstance) -> None:
    instance = make_instance()
    in_broker = place_of(failpoint) in BROKER_PLACES
    at = SECOND if in_broker or place_of(failpoint) == "fork" else ""
    instance.start(env={VARIABLE: failpoint + at})
    load = Load(instance)
    load.run()
    if in_broker:
        assert load.deaths == [-signal.SIGKILL]
    check_invariants(instance, {load.ids[name]: expect for name, expect in expected(failpoint).items()})
    if place_of(failpoint) == "fork":
        assert "the launcher is gone" in instance.log
    # I7: what was answered is durable. The same keys give the same ids, and nothing runs again.
    instance.restart()
    for name, spec in load.specs.items():
        assert instance.submit(spec, key=name) == load.ids[name]
    after = instance.submit(instance.job())
    instance.wait_inactive(after)
    check_invariants(
        instance,
        {load.ids[name]: expect for name, expect in expected(failpoint).items()} | {after: Expect(output=b"")},
    )
