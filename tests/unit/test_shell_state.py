"""The shell's state machine: its table, and each way a job can end."""

from __future__ import annotations

import itertools
import signal

import pytest

from fluxres.base.errors import IllegalTransition
from fluxres_shell import events as ev
from fluxres_shell import records
from fluxres_shell.state import _TABLE, LINGER, MAX_SWEEPS, Phase, ShellState, exit_code

OUT = (0, "stdout")
STARTED = ev.Started(taskmap={"version": 1, "map": []})
ENTERED = ev.BarrierEntered(name="start", seq=0)
BARRIER_DONE = ev.BarrierDone(name="start", seq=0)
FAILED = ev.StartFailed(status=127 << 8, note="cannot start", running=0, streams=frozenset())


def shell(tasks: int = 1, *, streams: set[tuple[int, str]] | None = None, limit: float = 0) -> ShellState:
    """A state with this many tasks."""
    return ShellState("the shell", tasks=tasks, streams=streams or set(), time_limit=limit)


def exited(task: int = 0, status: int = 0) -> ev.TaskExited:
    return ev.TaskExited(task=task, local=task, pid=100 + task, wait_status=status)


def running(tasks: int = 1, *, streams: set[tuple[int, str]] | None = None, limit: float = 0) -> ShellState:
    state = shell(tasks, streams=streams, limit=limit)
    state.apply(STARTED)
    return state


def waiting(tasks: int = 1, *, streams: set[tuple[int, str]] | None = None, limit: float = 0) -> ShellState:
    state = shell(tasks, streams=streams, limit=limit)
    assert state.apply(ENTERED) == []
    assert state.phase is Phase.WAITING
    return state


def ending(status: int = 0) -> ShellState:
    state = running()
    state.apply(exited(status=status))
    state.apply(ev.Swept(remaining=0))
    assert state.phase is Phase.ENDING
    return state


def appended(effects: ev.Effects) -> list[tuple[object, ...]]:
    return [(effect.kind, *effect.fields) for effect in effects if isinstance(effect, ev.Append)]


def exit_fields(effects: ev.Effects) -> tuple[object, object]:
    """Status and info of the exit record, which is the last effect."""
    last = effects[-1]
    assert isinstance(last, ev.Append)
    assert last.kind == records.EXIT
    status, info = last.fields
    return status, info


def test_an_undisturbed_job_detached() -> None:
    state = shell(streams={OUT}, limit=60)
    assert appended(state.apply(STARTED)) == [("event", "shell.start", {"taskmap": STARTED.taskmap})]
    assert appended(state.apply(ev.PipeData(task=0, stream="stdout", data=b"hi"))) == [("data", "stdout", 0, b"hi")]
    effects = state.apply(exited(status=3 << 8))
    ((kind, name, context),) = appended(effects)
    assert (kind, name) == ("event", "shell.task-exit")
    assert context == {
        "localid": 0,
        "rank": 0,
        "state": "Exited",
        "pid": 100,
        "wait_status": 768,
        "signaled": 0,
        "exitcode": 3,
    }
    assert effects[-1] == ev.Sweep()
    assert ev.StopTimer(ev.Timer.LIMIT) in effects
    assert [type(effect) for effect in state.apply(ev.Swept(remaining=0))] == [ev.StartTimer]
    effects = state.apply(ev.PipeEof(task=0, stream="stdout"))
    assert appended(effects)[0] == ("eof", "stdout", 0)
    assert exit_fields(effects) == (768, {})
    assert state.apply(ev.ExitStored()) == [ev.StartTimer(ev.Timer.LINGER, LINGER)]
    assert state.apply(ev.TimerFired(timer=ev.Timer.LINGER)) == [ev.Exit(sync=True)]
    assert state.phase is Phase.DONE


def test_a_broker_that_comes_while_it_lingers_is_served() -> None:
    state = ending()
    state.apply(ev.ExitStored())
    assert state.apply(ev.Attached(connection=1, from_seq=1)) == [ev.Serve(1, 1)]
    assert state.apply(ev.TimerFired(timer=ev.Timer.LINGER)) == []
    state.apply(ev.Acked(seq=state.seq))
    assert state.apply(ev.Released(connection=1)) == [ev.Exit(sync=False)]


def test_detached_after_an_attach_it_does_not_linger() -> None:
    state = running()
    state.apply(ev.Attached(connection=1, from_seq=1))
    state.apply(ev.ConnectionLost(connection=1))
    state.apply(exited())
    state.apply(ev.Swept(remaining=0))
    assert state.apply(ev.ExitStored()) == [ev.Exit(sync=True)]


def test_attached_it_waits_for_release() -> None:
    state = ending()
    assert state.apply(ev.Attached(connection=1, from_seq=1)) == [ev.Serve(1, 1)]
    assert state.apply(ev.ExitStored()) == []
    assert state.phase is Phase.CLOSING
    (close,) = state.apply(ev.Released(connection=1))
    assert isinstance(close, ev.Close)
    assert state.apply(ev.Acked(seq=state.seq)) == [ev.Forget(state.seq)]
    assert state.apply(ev.Released(connection=1)) == [ev.Exit(sync=False)]


def test_a_reattach_from_behind_the_exit_record_may_release() -> None:
    state = ending()
    state.apply(ev.Attached(connection=1, from_seq=state.seq + 1))
    state.apply(ev.ExitStored())
    assert state.apply(ev.Released(connection=1)) == [ev.Exit(sync=False)]


def test_losing_the_broker_at_the_end_syncs_and_exits() -> None:
    state = ending()
    state.apply(ev.Attached(connection=1, from_seq=1))
    state.apply(ev.ExitStored())
    assert state.apply(ev.ConnectionLost(connection=9)) == []
    assert state.apply(ev.ConnectionLost(connection=1)) == [ev.Exit(sync=True)]


def test_an_exit_record_that_cannot_be_stored_keeps_the_shell() -> None:
    state = ending()
    state.apply(ev.Attached(connection=1, from_seq=1))
    assert state.apply(ev.ConnectionLost(connection=1)) == []
    assert state.phase is Phase.ENDING
    state.apply(ev.Attached(connection=2, from_seq=1))
    state.apply(ev.Acked(seq=state.seq))
    assert state.apply(ev.Released(connection=2)) == [ev.Exit(sync=False)]


def test_a_newer_attach_ends_the_older() -> None:
    state = running()
    state.apply(ev.Attached(connection=1, from_seq=1))
    close, serve = state.apply(ev.Attached(connection=2, from_seq=5))
    assert isinstance(close, ev.Close)
    assert close.connection == 1
    assert serve == ev.Serve(2, 5)
    assert state.apply(ev.ConnectionLost(connection=1)) == []
    assert state.connection == 2


def test_release_while_tasks_run_is_refused() -> None:
    state = running()
    state.apply(ev.Attached(connection=1, from_seq=1))
    (close,) = state.apply(ev.Released(connection=1))
    assert isinstance(close, ev.Close)
    assert "cannot release" in close.why


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((0, 256), 256), ((9, 256), 137 << 8), ((15, 9), 143 << 8), ((14, 0), 142 << 8)],
)
def test_the_highest_task_status_wins(statuses: tuple[int, ...], expected: int) -> None:
    for order in itertools.permutations(statuses):
        state = running(len(order))
        for task, status in enumerate(order):
            state.apply(exited(task, status))
        assert exit_fields(state.apply(ev.Swept(remaining=0)))[0] == expected


def test_the_time_limit_warns_then_kills() -> None:
    state = shell(limit=10)
    assert ev.StartTimer(ev.Timer.LIMIT, 10) in state.apply(STARTED)
    effects = state.apply(ev.TimerFired(timer=ev.Timer.LIMIT))
    assert appended(effects) == [("event", "shell.timeout", {"time_limit": 10})]
    assert effects[1] == ev.Signal(signal.SIGALRM)
    assert state.apply(ev.TimerFired(timer=ev.Timer.KILL)) == [ev.Signal(signal.SIGKILL)]
    state.apply(exited(status=9))
    status, info = exit_fields(state.apply(ev.Swept(remaining=0)))
    assert status == 137 << 8
    assert info == {
        "timeout": True,
        "exception": {"type": "timeout", "severity": 0, "note": "resource allocation expired"},
    }


def test_a_failed_start_ends_with_an_exception() -> None:
    state = shell(2, streams={(0, "stdout"), (1, "stdout")})
    effects = state.apply(FAILED)
    assert appended(effects) == [("eof", "stdout", 0), ("eof", "stdout", 1)]
    assert effects[-1] == ev.Sweep()
    status, info = exit_fields(state.apply(ev.Swept(remaining=0)))
    assert (status, info) == (
        127 << 8,
        {"exception": {"type": "exec", "severity": 0, "note": "cannot start"}},
    )


def test_a_start_that_fails_half_way_kills_the_others() -> None:
    state = shell(2, streams={(0, "stdout"), (1, "stdout")})
    some = ev.StartFailed(status=126 << 8, note="x", running=1, streams=frozenset({(0, "stdout")}))
    effects = state.apply(some)
    assert appended(effects) == [("eof", "stdout", 1)]
    assert effects[-1] == ev.Signal(signal.SIGKILL)
    state.apply(exited(0, 9))
    state.apply(ev.PipeEof(task=0, stream="stdout"))
    assert exit_fields(state.apply(ev.Swept(remaining=0)))[0] == 126 << 8


def test_processes_that_will_not_die_are_reported() -> None:
    state = running()
    state.apply(exited())
    for _ in range(MAX_SWEEPS):
        (timer,) = state.apply(ev.Swept(remaining=2))
        assert isinstance(timer, ev.StartTimer)
        assert state.apply(ev.TimerFired(timer=ev.Timer.SWEEP)) == [ev.Sweep()]
    assert exit_fields(state.apply(ev.Swept(remaining=2, usage={"cpu_usec": 5}))) == (
        0,
        {"cpu_usec": 5, "leftover": 2},
    )


def test_pipes_that_stay_open_are_closed_after_a_grace() -> None:
    state = running(streams={OUT, (0, "stderr")})
    state.apply(exited())
    state.apply(ev.Swept(remaining=0))
    effects = state.apply(ev.TimerFired(timer=ev.Timer.DRAIN))
    assert effects[0] == ev.CloseStreams()
    assert [entry[:2] for entry in appended(effects)] == [("eof", "stderr"), ("eof", "stdout"), ("exit", 0)]


def test_back_pressure() -> None:
    state = running(streams={OUT})
    assert state.apply(ev.JournalFull()) == [ev.StopReading()]
    assert state.apply(ev.JournalFull()) == []
    assert state.apply(ev.JournalRoom()) == [ev.ResumeReading()]
    assert state.apply(ev.JournalRoom()) == []


def test_a_full_journal_does_not_keep_what_is_left_in_the_pipes() -> None:
    state = running(streams={OUT})
    state.apply(ev.JournalFull())
    effects = state.apply(exited())
    assert ev.ResumeReading() in effects
    assert state.apply(ev.JournalFull()) == []


def test_kill_signals_the_tasks_while_there_are_any() -> None:
    state = running()
    assert state.apply(ev.Kill(signum=15)) == [ev.Signal(15)]
    state.apply(exited())
    assert state.apply(ev.Kill(signum=15)) == []


def test_the_tasks_start_when_the_barrier_is_done() -> None:
    state = waiting(limit=10)
    assert state.apply(ev.Attached(connection=1, from_seq=1)) == [ev.Serve(1, 1), ev.SendBarrier(1, "start", 0)]
    assert state.apply(BARRIER_DONE) == [ev.StartTasks()]
    assert appended(state.apply(STARTED)) == [("event", "shell.start", {"taskmap": STARTED.taskmap})]
    assert state.phase is Phase.RUNNING
    assert state.apply(BARRIER_DONE) == []
    assert state.apply(ev.Attached(connection=2, from_seq=1))[1:] == [ev.Serve(2, 1)]


def test_a_broker_that_is_attached_already_is_told_of_the_barrier() -> None:
    state = shell()
    state.apply(ev.Attached(connection=1, from_seq=1))
    assert state.apply(ENTERED) == [ev.SendBarrier(1, "start", 0)]


def test_a_waiting_shell_tells_every_broker_and_outlasts_them() -> None:
    state = waiting()
    for connection in (1, 2, 3):
        assert state.apply(ev.Attached(connection=connection, from_seq=1)) == [
            ev.Serve(connection, 1),
            ev.SendBarrier(connection, "start", 0),
        ]
        assert state.apply(ev.ConnectionLost(connection=connection)) == []
        assert (state.phase, state.connection) == (Phase.WAITING, None)
    state.apply(ev.Attached(connection=4, from_seq=1))
    close, *served = state.apply(ev.Attached(connection=5, from_seq=1))
    assert close == ev.Close(4, "a newer attach takes over")
    assert served == [ev.Serve(5, 1), ev.SendBarrier(5, "start", 0)]
    (refused,) = state.apply(ev.Released(connection=5))
    assert isinstance(refused, ev.Close)
    assert state.phase is Phase.WAITING


@pytest.mark.parametrize(("name", "seq"), [("start", 1), ("pmi", 0), ("", 0)])
def test_another_barriers_end_is_ignored(name: str, seq: int) -> None:
    state = waiting()
    assert state.apply(ev.BarrierDone(name=name, seq=seq)) == []
    assert state.phase is Phase.WAITING


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL, signal.SIGALRM, signal.SIGRTMAX])
def test_a_signal_while_it_waits_is_its_end(signum: int) -> None:
    state = waiting(2, streams={(0, "stdout"), (1, "stdout")})
    effects = state.apply(ev.Kill(signum=signum))
    assert effects[0] == ev.DropTasks()
    assert effects[-1] == ev.Sweep()
    assert appended(effects) == [("eof", "stdout", 0), ("eof", "stdout", 1)]
    assert state.apply(BARRIER_DONE) == []
    assert state.apply(ev.Attached(connection=1, from_seq=1)) == [ev.Serve(1, 1)]
    assert state.apply(ev.Kill(signum=signum)) == []
    assert exit_fields(state.apply(ev.Swept(remaining=0))) == ((128 + signum) << 8, {})


@pytest.mark.parametrize("signum", [signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGSTOP])
def test_a_signal_that_ends_nothing_leaves_it_waiting(signum: int) -> None:
    state = waiting()
    assert state.apply(ev.Kill(signum=signum)) == []
    assert state.apply(BARRIER_DONE) == [ev.StartTasks()]


def test_a_start_that_fails_after_the_barrier() -> None:
    state = waiting(streams={OUT})
    state.apply(BARRIER_DONE)
    assert appended(state.apply(FAILED)) == [("eof", "stdout", 0)]
    assert exit_fields(state.apply(ev.Swept(remaining=0)))[0] == 127 << 8


EVERY_EVENT: tuple[ev.Event, ...] = (
    STARTED, ENTERED, BARRIER_DONE, FAILED, exited(), ev.PipeData(task=0, stream="stdout", data=b""),
    ev.PipeEof(task=0, stream="stdout"), ev.Swept(remaining=0), ev.TimerFired(timer=ev.Timer.LIMIT),
    ev.JournalFull(), ev.JournalRoom(), ev.ExitStored(), ev.Attached(connection=1, from_seq=1),
    ev.ConnectionLost(connection=1), ev.Acked(seq=1), ev.Kill(signum=9), ev.Released(connection=1),
)  # fmt: skip
ALLOWED = {
    Phase.SETUP: {"Started", "StartFailed", "BarrierEntered"},
    Phase.WAITING: set(),
    Phase.RUNNING: {"TaskExited", "PipeData", "PipeEof", "TimerFired"},
    Phase.DRAINING: {"PipeData", "PipeEof", "Swept", "TimerFired"},
    Phase.ENDING: {"ExitStored"},
    Phase.CLOSING: {"TimerFired"},
}
ALWAYS = {"JournalFull", "JournalRoom", "Attached", "ConnectionLost", "Acked", "Kill", "Released", "BarrierDone"}


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
def test_the_table(phase: Phase, event: ev.Event) -> None:
    """Each phase allows what it says, and nothing else."""
    name = type(event).__name__
    allowed = phase is not Phase.DONE and (name in ALWAYS or name in ALLOWED[phase])
    assert ((phase, type(event)) in _TABLE) == allowed
    if not allowed:
        state = shell()
        state.phase = phase
        with pytest.raises(IllegalTransition, match=f"cannot apply {name} to the shell"):
            state.apply(event)


@pytest.mark.parametrize(
    ("phase", "timer"),
    [(Phase.RUNNING, ev.Timer.SWEEP), (Phase.RUNNING, ev.Timer.DRAIN), (Phase.DRAINING, ev.Timer.LIMIT)],
)
def test_a_timer_of_another_phase_is_illegal(phase: Phase, timer: ev.Timer) -> None:
    state = shell()
    state.phase = phase
    with pytest.raises(IllegalTransition, match="TimerFired"):
        state.apply(ev.TimerFired(timer=timer))


@pytest.mark.parametrize(("status", "code"), [(0, 0), (256, 1), (9, 137), (15, 143), (127 << 8, 127), (139, 139)])
def test_exit_codes(status: int, code: int) -> None:
    assert exit_code(status) == code
