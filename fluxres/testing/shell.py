"""A simulated job shell: the real state machine of the shell, with a journal, tasks and connections in memory.

`fluxres_shell.state` decides all; this carries out its effects, as `fluxres_shell.loop` does in a real process, with
the real records and the real protocol on the connections. A shell is no Trio task: it acts when one of its tasks, a
timer or a broker gives it something, in one step. It lives for as long as its process would: what happens to brokers is
nothing to it but the end of a connection.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Mapping
from typing import Final, cast

import trio

from fluxres.base.errors import ProtocolError
from fluxres.base.jobid import JobId, f58
from fluxres.rpc.gate import Gate
from fluxres.testing.journal import Journal
from fluxres.testing.link import MemoryLink
from fluxres.testing.programs import Program
from fluxres.testing.task import SimulatedTask
from fluxres.testing.world import TaskId, World
from fluxres.wire.payload import Wire
from fluxres_shell import events, protocol, records
from fluxres_shell.protocol import RECORDS_BYTES, START_BARRIER, Request
from fluxres_shell.spec import ShellSpec
from fluxres_shell.state import Phase, ShellState
from fluxres_shell.stdin import STDIN_BUFFER, StdinStream

COMMAND_NOT_FOUND: Final = 127 << 8
"""The wait status of a task whose program does not exist."""


class SimulatedShell:
    """The process that holds the claim of one (job, rank)."""

    def __init__(
        self, world: World, spec: ShellSpec, journal: Journal, *, pid: int, programs: Mapping[str, Program]
    ) -> None:
        self.pid = pid
        self.alive = True
        self.answers = True
        """Whether it accepts connections."""
        self.ended = trio.Event()
        self.killed = False
        """Whether it was killed, and did not end by itself."""
        self.reading = Gate()
        self._world = world
        self._spec = spec
        self._journal = journal
        self._programs = programs
        self._tasks: list[SimulatedTask] = []
        self._links: dict[int, MemoryLink] = {}
        self._idents = itertools.count(1)
        self._attached: MemoryLink | None = None
        self._input = StdinStream(task.rank for task in spec.tasks)
        self._input_acked = 0
        self._timers: dict[events.Timer, int] = {}
        self._timer_numbers = itertools.count()
        paths = (spec.stdio.stdout_path, spec.stdio.stderr_path)
        self._piped = [stream for stream, path in zip(records.STREAMS, paths, strict=True) if path is None]
        self._state = ShellState(
            f"the shell of {f58(spec.id)} on rank {spec.rank}",
            tasks=len(spec.tasks),
            streams={(task.rank, stream) for task in spec.tasks for stream in self._piped},
            time_limit=spec.time_limit,
        )

    # --- its life

    def begin(self) -> None:
        """The claim is won: write the first record, and start the tasks, or wait for the other shells to be as far."""
        service = f"{self._spec.userid}-shell-{f58(self._spec.id, ascii=True)}"
        context: dict[str, Wire] = {
            "service": service,
            "leader-rank": self._spec.ranks[0],
            "size": self._spec.nnodes,
        }
        self._carry_out(self._state.event_record("shell.init", context))
        if self._spec.nnodes > 1:
            self._journal.sync()
            self._take(events.BarrierEntered(name=START_BARRIER, seq=0))
        else:
            self._start_tasks()
            self._settle()

    def kill(self) -> None:
        """SIGKILL to the process: its tasks die with it."""
        if self.alive:
            self.killed = True
            self._die()

    def _die(self) -> None:
        self.alive = False
        for task in self._tasks:
            task.vanish()
        links, self._links, self._attached = self._links, {}, None
        for link in links.values():
            link.end()
        self.ended.set()

    def tasks(self) -> list[TaskId]:
        """The tasks that live."""
        return [task.id for task in self._tasks if task.alive]

    # --- events and effects

    def _take(self, event: events.Event) -> None:
        """Something has happened: carry out what follows, and send what there is to send."""
        if self.alive:
            self._apply(event)
            self._settle()

    def _apply(self, event: events.Event) -> None:
        for effect in self._state.apply(event):
            self._carry_out(effect)

    def _settle(self) -> None:
        if self._state.phase is Phase.ENDING:
            self._apply(events.ExitStored())
        if not self.alive:
            return
        if self._state.reading and self._journal.full:
            self._apply(events.JournalFull())
        elif not self._state.reading and not self._journal.full:
            self._apply(events.JournalRoom())
        self._pump()

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.Append(kind, fields):
                self._journal.add(records.encode(self._journal.last + 1, self._world.now(), kind, *fields))
            case events.StartTasks():
                self._start_tasks()
            case events.DropTasks() | events.CloseStreams():
                pass  # there is nothing to close here
            case events.Signal(signum):
                self._signal(signum)
            case events.Sweep():
                self._apply(events.Swept(remaining=0))  # tasks leave nothing behind here
            case events.StopReading():
                self.reading.shut()
            case events.ResumeReading():
                self.reading.open()
            case events.StartTimer(timer, seconds):
                number = self._timers[timer] = next(self._timer_numbers)
                self._world.timeline.after(seconds, lambda: self._fire(timer, number))
            case events.StopTimer(timer):
                self._timers.pop(timer, None)
            case events.Forget(seq):
                self._journal.ack(seq)
            case events.Exit(sync):
                if sync:
                    self._journal.sync()
                self._die()
            case _:
                self._carry_out_on_link(effect)

    def _carry_out_on_link(self, effect: events.Effect) -> None:
        match effect:
            case events.Serve(connection, from_seq):
                self._serve(self._links[connection], from_seq)
            case events.SendBarrier(connection, name, seq):
                if (link := self._links.get(connection)) is not None:
                    link.barrier = (self._journal.last, protocol.barrier(name, seq))
            case events.Close(connection, why):
                if (link := self._links.get(connection)) is not None:
                    self._refuse(link, errno.ECANCELED, why)

    def _fire(self, timer: events.Timer, number: int) -> None:
        if self._timers.get(timer) == number:
            del self._timers[timer]
            self._take(events.TimerFired(timer=timer))

    # --- tasks

    def _start_tasks(self) -> None:
        program = self._programs.get(self._spec.command[0])
        if program is None:
            note = f"cannot start {self._spec.command[0]!r}: command not found"
            self._apply(events.StartFailed(status=COMMAND_NOT_FOUND, note=note, running=0, streams=frozenset()))
            return
        for spec in self._spec.tasks:
            task = SimulatedTask(
                self,
                TaskId(JobId(self._spec.id), self._spec.rank, spec.rank),
                spec,
                pid=self._world.pid(),
                command=self._spec.command,
                env=self._spec.env,
            )
            self._tasks.append(task)
            self._world.deeds.started(task.id, task.pid)
            self._world.nursery.start_soon(task.run, program, name=f"task {task.spec.rank} of {f58(self._spec.id)}")
        given = self._spec.taskmap
        taskmap = {"version": 1, "map": given} if isinstance(given, list) else given
        self._apply(events.Started(taskmap=cast("Wire", taskmap)))
        for task in self._tasks:
            self._write_input(task)

    def _signal(self, signum: int) -> None:
        for task in self._tasks:
            if task.alive:
                self._world.deeds.signals.setdefault(task.id, []).append(signum)
                task.signal(signum)

    def wrote(self, task: SimulatedTask, stream: str, data: bytes) -> None:
        """A task has written."""
        if stream in self._piped:
            self._world.deeds.wrote(task.id, stream, data)
            self._take(events.PipeData(task=task.spec.rank, stream=stream, data=data))

    def exited(self, task: SimulatedTask, wait_status: int) -> None:
        """A task has ended: so have its streams."""
        self._world.deeds.statuses[task.id] = wait_status
        self._input.close(task.spec.rank)
        self._take(events.TaskExited(task=task.spec.rank, local=task.spec.local, pid=task.pid, wait_status=wait_status))
        for stream in self._piped:
            self._take(events.PipeEof(task=task.spec.rank, stream=stream))

    def wants_input(self, task: SimulatedTask) -> None:
        """A task has read some of its input."""
        self._write_input(task)
        self._pump()

    def _write_input(self, task: SimulatedTask) -> None:
        while (piece := self._input.next_piece(task.spec.rank)) is not None:
            taken = task.feed(piece)
            if not piece:
                self._input.close(task.spec.rank)
                return
            if not taken:
                return
            self._input.written(task.spec.rank, taken)

    # --- connections

    def accept(self) -> MemoryLink | None:
        """A broker dials; None where nobody answers."""
        if not self.alive or not self.answers:
            return None
        link = MemoryLink(self, next(self._idents))
        self._links[link.ident] = link
        return link

    def received(self, link: MemoryLink, requests: list[Request]) -> None:
        """A broker has sent these. Raises ProtocolError."""
        for request in requests:
            if link.ident not in self._links:
                return
            self._handle(link, request)
        if self.alive:
            self._settle()

    def refused(self, link: MemoryLink, error: ProtocolError) -> None:
        """A broker breaks the protocol."""
        self._refuse(link, errno.EPROTO, str(error))

    def lost(self, link: MemoryLink) -> None:
        """A broker is gone."""
        if self._links.pop(link.ident, None) is not None and link is self._attached:
            self._attached = None
            self._take(events.ConnectionLost(connection=link.ident))

    def _handle(self, link: MemoryLink, request: Request) -> None:
        if isinstance(request, protocol.Attach):
            self._attach(link, request)
            return
        if link is not self._attached:
            raise ProtocolError("cannot take a message before `attach`")
        match request:
            case protocol.Ack(seq=seq):
                link.ack(seq)
                self._apply(events.Acked(seq=seq))
            case protocol.Kill(signum=signum):
                self._apply(events.Kill(signum=signum))
            case protocol.Stdin(task=task, offset=offset, data=data, eof=eof):
                ranks = self._input.feed(task, offset, data, eof)
                for each in self._tasks:
                    if each.spec.rank in ranks:
                        self._write_input(each)
            case protocol.Release():
                self._apply(events.Released(connection=link.ident))
            case protocol.BarrierDone(name=name, seq=seq):
                self._apply(events.BarrierDone(name=name, seq=seq))

    def _attach(self, link: MemoryLink, request: protocol.Attach) -> None:
        if request.nonce != self._spec.nonce:
            self._refuse(link, errno.EPERM, "cannot attach: this shell is another job's (the nonce differs)")
        elif link is self._attached:
            raise ProtocolError("cannot attach twice on one connection")
        elif request.from_seq > self._journal.last + 1:
            text = f"cannot attach from record {request.from_seq}: the last one is {self._journal.last}"
            self._refuse(link, errno.EINVAL, text)
        else:
            self._apply(events.Attached(connection=link.ident, from_seq=request.from_seq))

    def _serve(self, link: MemoryLink, from_seq: int) -> None:
        self._attached = link
        link.serve_from(max(from_seq, self._journal.first))
        self._input_acked = self._input.consumed
        stdin: dict[str, Wire] = {"offset": self._input.received, "eof": self._input.eof, "window": STDIN_BUFFER}
        link.put(protocol.attached(first=self._journal.first, last=self._journal.last, pid=self.pid, stdin=stdin))

    def _refuse(self, link: MemoryLink, errnum: int, why: str) -> None:
        """Say why, and close."""
        if self._links.pop(link.ident, None) is None:
            return
        link.put(protocol.error(errnum, why))
        link.end()
        if link is self._attached:
            self._attached = None
            self._apply(events.ConnectionLost(connection=link.ident))

    def _pump(self) -> None:
        """Send the attached broker what there is, as far as the window goes."""
        link = self._attached
        if link is None:
            return
        while link.room and (batch := self._journal.read(link.sent + 1, min(link.room, RECORDS_BYTES))):
            link.put_records(batch)
        if link.barrier is not None and link.sent >= link.barrier[0]:
            framed, link.barrier = link.barrier[1], None
            link.put(framed)
        consumed = self._input.consumed
        if consumed > self._input_acked:
            self._input_acked = consumed
            link.put(protocol.stdin_ack(consumed))
