"""The job state machine: every pair of event and state, what each event changes, and what is owed next."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxres.base.errors import IllegalTransition
from fluxres.base.eventlog import Event, decode, encode
from fluxres.base.idset import IdSet
from fluxres.base.json import JsonValue
from fluxres.job.changes import EventError
from fluxres.job.result import JobResult, exit_status, result, returncode, status_abbrev, status_text
from fluxres.job.state import (
    FATAL_EXCEPTION,
    MAX_HISTORY,
    TRANSITIONS,
    Action,
    apply,
    fold,
    is_held,
    next_action,
    priority_for,
)
from fluxres.job.value import ACTIVE, PENDING, PRIORITY_MAX, RUNNING, Job, JobException, JobFlag, JobState

SUBMIT: dict[str, JsonValue] = {"userid": 5588, "urgency": 16, "flags": 0, "version": 1}
CANCEL: dict[str, JsonValue] = {"type": "cancel", "severity": 0, "note": "enough"}
WARNING: dict[str, JsonValue] = {"type": "slow", "severity": 5, "note": ""}
FINAL: dict[str, JsonValue] = {"ranks": "all", "final": True}

DEFAULTS: dict[str, dict[str, JsonValue]] = {
    "submit": SUBMIT,
    "dependency-add": {"description": "after=1"},
    "dependency-remove": {"description": "after=1"},
    "priority": {"priority": 16},
    "urgency": {"urgency": 20, "userid": 5588},
    "jobspec-update": {"attributes.system.duration": 60},
    "resource-update": {"expiration": 99.0},
    "set-flags": {"flags": ["debug"]},
    "prolog-start": {"description": "p"},
    "prolog-finish": {"description": "p", "status": 0},
    "epilog-start": {"description": "e"},
    "epilog-finish": {"description": "e", "status": 0},
    "finish": {"status": 0},
    "release": {"ranks": "0", "final": False},
    "memo": {"key": "value"},
    "exception": WARNING,
    FATAL_EXCEPTION: CANCEL,
}

RUN_PATH = ("submit", "validate", "depend", "priority", "alloc", "start")
WHOLE_LIFE = (*RUN_PATH, "finish", ("release", FINAL), "free", "clean")

Step = str | tuple[str, dict[str, JsonValue]]


def events(steps: Iterable[Step]) -> list[Event]:
    """Events a second apart, from t = 1, with a fitting context where none is given."""
    made = []
    for at, step in enumerate(steps, 1):
        name, context = step if isinstance(step, tuple) else (step, DEFAULTS.get(step, {}))
        made.append(Event(float(at), name.partition("(")[0], context))
    return made


def job_after(*steps: Step) -> Job:
    return fold(77, events(steps))


AT: dict[JobState, tuple[Step, ...]] = {
    JobState.NEW: RUN_PATH[:1],
    JobState.DEPEND: RUN_PATH[:2],
    JobState.PRIORITY: RUN_PATH[:3],
    JobState.SCHED: RUN_PATH[:4],
    JobState.RUN: RUN_PATH[:5],
    JobState.CLEANUP: (*RUN_PATH[:5], FATAL_EXCEPTION),
    JobState.INACTIVE: (*RUN_PATH[:2], FATAL_EXCEPTION, "clean"),
}
"""A short way into every state."""

N, D, P, S, R, C, I = JobState  # noqa: E741 (the letters of flux-jobs)
SAME = {state: state for state in JobState}

EXPECTED: dict[str, dict[JobState, JobState]] = {
    "submit": {},
    "validate": {N: D},
    "invalidate": {N: N},
    "dependency-add": {N: N, D: D, C: C},
    "dependency-remove": {N: N, D: D, C: C},
    "depend": {D: P, C: C},
    "priority": {P: S, S: S, C: C},
    "urgency": {N: N, D: D, P: P, S: P, R: R, C: C},
    "jobspec-update": {N: N, D: D, P: P, S: P, R: R, C: C},
    "flux-restart": {N: N, D: D, P: P, S: P, R: R, C: C},
    "set-flags": {N: N, D: D, P: P, S: S, R: R, C: C},
    "alloc": {S: R},
    "resource-update": {R: R, C: C},
    "prolog-start": {D: D, P: P, S: S, R: R, C: C},
    "prolog-finish": {D: D, P: P, S: S, R: R, C: C},
    "start": {R: R, C: C},
    "finish": {R: C, C: C},
    "epilog-start": {C: C},
    "epilog-finish": {C: C},
    "release": {R: R, C: C},
    "free": {},
    "clean": {},
    "memo": SAME,
    "exception": SAME,
    FATAL_EXCEPTION: {D: C, P: C, S: C, R: C, C: C, I: I},
    "debug.free-request": SAME,
    "an-event-of-tomorrow": SAME,
}
"""Where each event leads from each state as `AT` reaches it; what is missing is illegal there."""


def test_the_table_here_knows_every_event() -> None:
    assert EXPECTED.keys() - TRANSITIONS.keys() == {"debug.free-request", "an-event-of-tomorrow"}
    assert TRANSITIONS.keys() <= EXPECTED.keys()


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("name", EXPECTED)
def test_transition(name: str, state: JobState) -> None:
    job = job_after(*AT[state])
    assert job.state is state
    [event] = events([name])
    after = EXPECTED[name].get(state)
    if after is None:
        with pytest.raises(IllegalTransition, match="cannot apply") as caught:
            apply(job, event)
        assert caught.value.history == job.history
    else:
        assert apply(job, event).state is after


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        ((), "validate"),
        ((), "debug.x"),
        (("submit", "invalidate"), "validate"),
        ((*RUN_PATH, FATAL_EXCEPTION), "alloc"),
        (RUN_PATH, "start"),
        (RUN_PATH, ("release", FINAL)),
        ((*RUN_PATH, "finish"), "finish"),
        ((*RUN_PATH, "finish"), "free"),
        ((*RUN_PATH, "finish"), "clean"),
        ((*RUN_PATH, "finish", ("release", FINAL)), ("release", FINAL)),
        ((*RUN_PATH, "finish", ("release", FINAL)), "clean"),
        ((*RUN_PATH, "finish", ("release", FINAL), "free"), "free"),
        (("submit", "validate", FATAL_EXCEPTION), "start"),
        (("submit", "validate", FATAL_EXCEPTION), "finish"),
        (("submit", "validate", FATAL_EXCEPTION), "release"),
        (("submit", "validate", FATAL_EXCEPTION), "free"),
    ],
)
def test_refused_by_what_happened_before(steps: tuple[Step, ...], refused: Step) -> None:
    job = job_after(*steps)
    [event] = events([refused])
    with pytest.raises(IllegalTransition):
        apply(job, event)


def test_a_whole_life() -> None:
    job = job_after(*WHOLE_LIFE)
    assert job == Job(
        id=77,
        state=JobState.INACTIVE,
        userid=5588,
        priority=16,
        t_submit=1.0,
        t_depend=2.0,
        t_priority=3.0,
        t_sched=4.0,
        t_run=5.0,
        t_cleanup=7.0,
        t_inactive=10.0,
        started=True,
        status=0,
        success=True,
        final_release=True,
        end_event=Event(7.0, "finish", {"status": 0}),
        history=tuple(step if isinstance(step, str) else step[0] for step in WHOLE_LIFE),
    )
    assert result(job) is JobResult.COMPLETED


def test_masks_are_those_of_flux() -> None:
    assert (PENDING, RUNNING, ACTIVE) == (14, 48, 62)


def test_dependencies_come_and_go_by_description() -> None:
    add, remove = DEFAULTS["dependency-add"], DEFAULTS["dependency-remove"]
    other: dict[str, JsonValue] = {"description": "begin-time=9"}
    job = job_after("submit", ("dependency-add", add), ("dependency-add", add), ("dependency-add", other))
    assert job.dependencies == ("after=1", "begin-time=9")
    job = apply(job, Event(9.0, "dependency-remove", remove))
    assert job.dependencies == ("begin-time=9",)
    assert apply(job, Event(9.0, "dependency-remove", remove)).dependencies == ("begin-time=9",)


def test_urgency_and_restart_send_a_scheduled_job_back_for_its_priority() -> None:
    job = job_after(*RUN_PATH[:4], ("urgency", {"urgency": 31, "userid": 1}), ("priority", {"priority": PRIORITY_MAX}))
    assert (job.state, job.urgency, job.priority, job.t_priority, job.t_sched) == (
        S,
        31,
        PRIORITY_MAX,
        3.0,
        4.0,
    )
    job = apply(job, Event(9.0, "flux-restart"))
    assert (job.state, job.restarts) == (P, 1)


def test_updates_are_merged_and_the_latest_value_wins() -> None:
    job = job_after(
        *RUN_PATH,
        ("jobspec-update", {"attributes.system.queue": "a", "attributes.system.duration": 1}),
        ("jobspec-update", {"attributes.system.queue": "b"}),
        ("resource-update", {"expiration": 500}),
    )
    assert job.updates == {"attributes.system.queue": "b", "attributes.system.duration": 1}
    assert job.expiration == 500.0


def test_memos_and_annotations() -> None:
    job = job_after(
        *RUN_PATH[:4],
        ("memo", {"a": 1, "b": 2}),
        ("memo", {"a": None, "c": 3}),
        ("alloc", {"annotations": {"sched": {"resource_summary": "rank0/core0"}}}),
    )
    assert job.annotations == {"user": {"b": 2, "c": 3}, "sched": {"resource_summary": "rank0/core0"}}
    assert job_after("submit", ("memo", {"a": 1}), ("memo", {"a": None})).annotations is None


def test_flags() -> None:
    job = job_after(("submit", {**SUBMIT, "flags": 4}), ("set-flags", {"flags": ["debug", "novalidate"]}))
    assert job.flags == JobFlag.WAITABLE | JobFlag.DEBUG | JobFlag.NOVALIDATE


def test_the_first_of_the_most_severe_exceptions_is_remembered() -> None:
    job = job_after(*RUN_PATH, "exception", ("exception", {"type": "a", "severity": 2, "note": ""}))
    assert job.exception == JobException(2, "a", "")
    assert (job.state, job.fatal, job.end_event) == (R, False, None)
    job = apply(job, Event(20.0, "exception", CANCEL))
    job = apply(job, Event(21.0, "exception", {"type": "later", "severity": 0, "note": ""}))
    job = apply(job, Event(22.0, "finish", {"status": 0}))
    assert job.exception == JobException(0, "cancel", "enough")
    assert job.end_event == Event(20.0, "exception", CANCEL)
    assert (job.status, job.success) == (0, False)


def test_a_fatal_exception_after_the_finish_does_not_undo_success() -> None:
    job = job_after(*RUN_PATH, "finish", FATAL_EXCEPTION, ("release", FINAL), "free", "clean")
    assert job.success
    assert job.end_event is not None
    assert job.end_event.name == "finish"
    assert result(job) is JobResult.COMPLETED


def test_an_inactive_job_does_not_change() -> None:
    job = job_after(*WHOLE_LIFE)
    for event in events(["memo", FATAL_EXCEPTION, "exception", "debug.x"]):
        after = apply(job, event)
        assert after.exception is None
        assert after.annotations is None


def test_releases_add_up() -> None:
    job = job_after(
        *RUN_PATH,
        ("release", {"ranks": "1-2", "final": False}),
        "finish",
        ("release", {"ranks": "0", "final": False}),
    )
    assert job.released == IdSet.parse("0-2")
    assert job.needs_exec
    assert not apply(job, Event(30.0, "release", FINAL)).needs_exec


@pytest.mark.parametrize(
    ("steps", "event", "why"),
    [
        (
            (),
            ("submit", {**SUBMIT, "urgency": 32}),
            "submit to job .*: context key urgency: expected an integer from 0 to 31",
        ),
        ((), ("submit", {**SUBMIT, "urgency": True}), "urgency"),
        ((), ("submit", {**SUBMIT, "version": 2}), "version: expected 1, got 2"),
        ((), ("submit", {}), "userid: expected an integer"),
        (RUN_PATH[:3], ("priority", {"priority": -1}), "priority"),
        (RUN_PATH, ("finish", {}), "status: expected an integer"),
        (RUN_PATH, ("exception", {"severity": 8}), "severity: expected an integer from 0 to 7"),
        (RUN_PATH, ("exception", {"severity": 1, "type": 4}), "type: expected a string, got 4"),
        (RUN_PATH, ("exception", {"severity": 1, "type": "x"}), "note: expected a string, got None"),
        (RUN_PATH, ("release", {"ranks": "all", "final": False}), "ranks: expected an idset"),
        (RUN_PATH, ("resource-update", {"expiration": -1}), "expiration: expected a number"),
        (RUN_PATH[:1], ("set-flags", {"flags": ["nonsense"]}), "flags: expected a list of debug"),
        (RUN_PATH[:1], ("set-flags", {}), "flags: expected a list of debug"),
        (RUN_PATH[:1], ("dependency-add", {}), "description: expected a string"),
    ],
)
def test_malformed_context(steps: tuple[Step, ...], event: Step, why: str) -> None:
    job = job_after(*steps)
    with pytest.raises(EventError, match=why):
        apply(job, events([event])[0])


def test_the_history_is_bounded_and_the_error_shows_it() -> None:
    job = job_after("submit", *["memo"] * 100)
    assert len(job.history) == MAX_HISTORY
    with pytest.raises(
        IllegalTransition, match=r"cannot apply submit to job ƒ2L: not allowed in state NEW .*memo, memo"
    ):
        apply(job, Event(1.0, "submit", SUBMIT))


PROLOG: tuple[Step, ...] = (*RUN_PATH[:5], "prolog-start")
KILLED: tuple[Step, ...] = (*RUN_PATH, FATAL_EXCEPTION)


@pytest.mark.parametrize(
    ("steps", "action"),
    [
        (("submit",), Action.LOG_VALIDATE),
        (("submit", "invalidate"), Action.REMOVE),
        (RUN_PATH[:2], Action.LOG_DEPEND),
        (("submit", "dependency-add", "validate"), Action.NONE),
        (("submit", "dependency-add", "validate", "dependency-remove"), Action.LOG_DEPEND),
        (RUN_PATH[:3], Action.LOG_PRIORITY),
        (RUN_PATH[:4], Action.REQUEST_ALLOC),
        ((*RUN_PATH[:3], ("priority", {"priority": 0})), Action.NONE),
        ((*RUN_PATH[:4], ("urgency", {"urgency": 0}), ("priority", {"priority": 0})), Action.NONE),
        ((*RUN_PATH[:4], "flux-restart"), Action.LOG_PRIORITY),
        ((*RUN_PATH[:4], "flux-restart", "priority"), Action.REQUEST_ALLOC),
        (RUN_PATH[:5], Action.START),
        (PROLOG, Action.NONE),
        ((*PROLOG, "prolog-finish"), Action.START),
        ((*RUN_PATH[:5], "flux-restart"), Action.START),
        (RUN_PATH, Action.NONE),
        ((*RUN_PATH, "exception"), Action.NONE),
        ((*RUN_PATH, "flux-restart"), Action.NONE),
        (KILLED, Action.KILL),
        ((*RUN_PATH[:5], FATAL_EXCEPTION), Action.KILL),
        ((*PROLOG, FATAL_EXCEPTION), Action.KILL),
        ((*KILLED, "flux-restart"), Action.KILL),
        ((*KILLED, "finish"), Action.NONE),
        ((*KILLED, ("release", FINAL)), Action.FREE),
        ((*KILLED, "finish", ("release", FINAL)), Action.FREE),
        ((*RUN_PATH, "finish"), Action.NONE),
        ((*RUN_PATH, "finish", FATAL_EXCEPTION), Action.NONE),
        ((*RUN_PATH, "finish", "release"), Action.NONE),
        ((*RUN_PATH, "finish", ("release", FINAL)), Action.FREE),
        ((*RUN_PATH, "finish", "epilog-start", ("release", FINAL)), Action.NONE),
        ((*RUN_PATH, "finish", "epilog-start", ("release", FINAL), "epilog-finish"), Action.FREE),
        ((*RUN_PATH, "finish", ("release", FINAL), "free"), Action.LOG_CLEAN),
        (WHOLE_LIFE, Action.NONE),
        ((*RUN_PATH[:2], FATAL_EXCEPTION), Action.LOG_CLEAN),
        ((*RUN_PATH[:3], FATAL_EXCEPTION), Action.LOG_CLEAN),
        ((*RUN_PATH[:4], FATAL_EXCEPTION), Action.LOG_CLEAN),
        ((*RUN_PATH[:4], FATAL_EXCEPTION, "alloc"), Action.FREE),
        ((*RUN_PATH[:4], FATAL_EXCEPTION, "alloc", "free"), Action.LOG_CLEAN),
    ],
)
def test_next_action(steps: tuple[Step, ...], action: Action) -> None:
    assert next_action(job_after(*steps)) is action


@pytest.mark.parametrize(
    ("steps", "needed"),
    [
        (RUN_PATH[:4], False),
        (RUN_PATH[:5], True),
        (RUN_PATH, True),
        ((*RUN_PATH, "finish"), True),
        (KILLED, True),
        ((*RUN_PATH, "finish", ("release", FINAL)), False),
        ((*RUN_PATH[:4], FATAL_EXCEPTION, "alloc"), False),
    ],
)
def test_which_jobs_a_restart_takes_up(steps: tuple[Step, ...], needed: bool) -> None:
    assert job_after(*steps).needs_exec is needed


@pytest.mark.parametrize(
    ("urgency", "priority", "held"), [(0, 0, True), (1, 1, False), (16, 16, False), (31, PRIORITY_MAX, False)]
)
def test_priority_of_an_urgency(urgency: int, priority: int, held: bool) -> None:
    assert priority_for(urgency) == priority
    job = job_after(
        ("submit", {**SUBMIT, "urgency": urgency}), "validate", "depend", ("priority", {"priority": priority})
    )
    assert is_held(job) is held


def ended(*steps: Step) -> Job:
    return job_after(*steps, "clean")


def raised(kind: str, severity: int = 0) -> Step:
    return "exception", {"type": kind, "severity": severity, "note": ""}


DONE: tuple[Step, ...] = (("release", FINAL), "free")


@pytest.mark.parametrize(
    ("job", "outcome", "code", "status", "abbrev", "exit_code"),
    [
        (job_after(*RUN_PATH), None, None, "RUN", "R", 1),
        (job_after("submit", "validate"), None, None, "DEPEND", "D", 1),
        (job_after(*WHOLE_LIFE), JobResult.COMPLETED, 0, "COMPLETED", "CD", 0),
        (ended(*RUN_PATH, ("finish", {"status": 256 * 3}), *DONE), JobResult.FAILED, 3, "FAILED", "F", 3),
        (ended(*RUN_PATH, ("finish", {"status": 9}), *DONE), JobResult.FAILED, -9, "FAILED", "F", 137),
        (ended(*RUN_PATH[:2], raised("cancel")), JobResult.CANCELED, -128, "CANCELED", "CA", 1),
        (ended(*RUN_PATH[:2], raised("depend")), JobResult.FAILED, 1, "FAILED", "F", 1),
        (
            ended(*RUN_PATH, raised("timeout"), ("finish", {"status": 143 << 8}), *DONE),
            JobResult.TIMEOUT,
            143,
            "TIMEOUT",
            "TO",
            143,
        ),
        (ended(*RUN_PATH, raised("timelimit"), *DONE), JobResult.TIMEOUT, None, "TIMEOUT", "TO", 1),
        (
            ended(*RUN_PATH, raised("cancel", 3), "finish", *DONE),
            JobResult.COMPLETED,
            0,
            "COMPLETED",
            "CD",
            0,
        ),
    ],
)
def test_results(
    job: Job, outcome: JobResult | None, code: int | None, status: str, abbrev: str, exit_code: int
) -> None:
    assert result(job) is outcome
    assert returncode(outcome, job.status) == code
    assert status_text(job.state, outcome) == status
    assert status_abbrev(job.state, outcome) == abbrev
    assert exit_status(outcome, job.status) == exit_code


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*DEFAULTS, "validate", "depend", "alloc", "start", "free", "clean", "final"]),
        max_size=40,
    )
)
def test_replay_through_the_eventlog_gives_the_same_job(names: list[str]) -> None:
    """Any log that was legal when written reads back to the same job, wherever it is cut."""
    job = Job(id=77)
    log = ""
    for name in ("submit", "validate", *names):
        step: Step = ("release", FINAL) if name == "final" else name
        [event] = events([step])
        try:
            after = apply(job, event)
        except IllegalTransition:
            continue
        assert after.state >= job.state or (job.state, after.state) == (S, P)
        job = after
        log += encode(event)
        assert fold(77, decode(log)) == job
        assert job.state is not JobState.INACTIVE or not job.allocated
        if job.needs_exec:
            assert next_action(job) in (Action.START, Action.KILL, Action.NONE)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_doing_what_is_owed_ends_every_job(data: st.DataObject) -> None:
    """From any legal point, paying each debt, with the exec system answering, leads to INACTIVE."""
    job = job_after("submit")
    for name in data.draw(st.lists(st.sampled_from([*DEFAULTS, "validate", "depend", "alloc", "start"]), max_size=20)):
        try:
            job = apply(job, events([name])[0])
        except IllegalTransition:
            continue
    pays: dict[Action, Step] = {
        Action.LOG_VALIDATE: "validate",
        Action.LOG_DEPEND: "depend",
        Action.LOG_PRIORITY: "priority",
        Action.REQUEST_ALLOC: "alloc",
        Action.START: "start",
        Action.KILL: "finish",
        Action.FREE: "free",
        Action.LOG_CLEAN: "clean",
    }
    for _ in range(20):
        if job.state is JobState.INACTIVE or job.invalid:
            break
        action = next_action(job)
        if action is not Action.NONE:
            step: Step = pays[action]
        elif job.dependencies and job.state is JobState.DEPEND:
            step = ("dependency-remove", {"description": job.dependencies[0]})
        elif job.perilogs and not (job.state is JobState.CLEANUP and job.needs_exec):
            step = ("prolog-finish", {"description": job.perilogs[0]})
        elif job.state is JobState.SCHED:
            step = "urgency"
        else:
            step = "finish" if job.status is None and job.state is JobState.RUN else ("release", FINAL)
        job = apply(job, events([step])[0])
    assert job.state is JobState.INACTIVE or job.invalid


def test_a_pending_job_is_small() -> None:
    """Ten thousand of them are held in memory: below 1.5 kB each, whatever they share counted in full."""
    job = fold(77 << 40, decode("".join(encode(event) for event in events(RUN_PATH[:4]))))
    size = sys.getsizeof(job) + sum(sys.getsizeof(part) for part in job if part is not None)
    assert size < 1500
