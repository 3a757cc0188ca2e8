"""Following one job as flux-job(1) attach does: which eventlogs to watch, what to print, when it is over.
Pure.

Events go in, effects come out; whoever carries them out (`fluxres.cli.job_attach`) does all I/O.

| what comes in | what comes of it |
|---|---|
| eventlog `submit` | with `show_exec`: the execution eventlog is watched |
| eventlog `start` | output is watched, standard input is read |
| eventlog `exception` | one line on stderr; a fatal one closes standard input |
| eventlog `finish` | the exit code, said after all output if it is not 0; standard input is closed |
| eventlog `clean`, no output seen yet | output is asked for once more, without waiting for it to be made |
| output `data`, `redirect`, `log` | writes |
| end of the eventlog | whatever was not seen will not come |

It is over when the event to wait for (`finish` unless told otherwise) and the end of the output have been
seen. Nothing of the eventlog is printed after the event to wait for, so that all runs print the same.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from fluxres.base.errors import FluxresError
from fluxres.cli.common import id_text, printable
from fluxres.cli.exitcode import exit_code, status_text
from fluxres.cli.output import STDERR, Output

if TYPE_CHECKING:
    from fluxres.base.errors import RpcError
    from fluxres.base.eventlog import Event

EVENTLOG: Final = "eventlog"
EXEC: Final = "guest.exec.eventlog"
OUTPUT: Final = "guest.output"


class Write(NamedTuple):
    """Write bytes to a descriptor."""

    descriptor: int
    data: bytes


class Watch(NamedTuple):
    """Watch an eventlog of the job, anew where it is watched; with `wait`, wait for it to be made."""

    path: str
    wait: bool = False


class OpenStdin(NamedTuple):
    """Begin to read standard input: there is a job to take it."""


class CloseStdin(NamedTuple):
    """Stop reading standard input: nobody will take it."""


Effect: TypeAlias = Write | Watch | OpenStdin | CloseStdin


class FollowOptions(NamedTuple):
    """What a follower prints and waits for; `prog` is the program's name in its own messages."""

    prog: str = "fluxres-job"
    label: bool = False
    quiet: bool = False
    show_events: bool = False
    show_exec: bool = False
    wait_event: str = "finish"


class Follow:
    """One job being followed."""

    def __init__(self, jobid: int, options: FollowOptions) -> None:
        self._id = jobid
        self._options = options
        self._output = Output(label=options.label, quiet=options.quiet)
        self._zero = 0.0
        self._closed = False
        self._over = False
        self._watching: set[str] = set()
        self._output_ended = False
        self._status: int | None = None
        self._fatal: Event | None = None
        self._started = False
        self._exec_seen = False

    def begin(self) -> list[Effect]:
        """What to do first."""
        return [self._watch(EVENTLOG)]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to wait for."""
        ran = self._status is not None and self._closed
        return (ran or self._over) and self._output_ended and EXEC not in self._watching

    @property
    def finished(self) -> bool:
        """Whether the tasks have ended."""
        return self._status is not None or self._over

    @property
    def exit_code(self) -> int:
        """The job's exit code: that of its tasks, or 1 for a job that an exception kept from having one."""
        if self._status is None:
            return 1
        return exit_code(self._status) or (1 if self._fatal is not None else 0)

    def event(self, path: str, event: Event) -> list[Effect]:
        """Take the next event of an eventlog."""
        if path == OUTPUT:
            return [Write(*write) for write in self._output.take(event, self._zero)]
        if path == EXEC:
            self._exec_seen = True
            return [self._show("exec", event)]
        self._zero = self._zero or event.timestamp
        effects: list[Effect] = []
        if event.name == "exception":
            effects += self._exception(event)
        elif self._options.show_events and not self._closed:
            effects.append(self._show("job", event))
        if event.name == "submit" and self._options.show_exec:
            effects.append(self._watch(EXEC, wait=True))
        elif event.name == "start" and not self._started:
            self._started = True
            effects += [self._watch(OUTPUT, wait=True), OpenStdin()]
        elif event.name == "finish":
            effects += self._finish(event)
        elif event.name == "clean":
            effects += self._clean()
        if event.name == self._options.wait_event:
            self._closed = True
        return effects

    def ended(self, path: str, error: RpcError) -> list[Effect]:
        """An eventlog has ended. Raises FluxresError where that is not its normal end."""
        self._watching.discard(path)
        missing = error.errnum == errno.ENOENT
        if error.errnum != errno.ENODATA and not (missing and path != EVENTLOG):
            why = "no such job" if missing else error.text
            raise FluxresError(f"cannot attach to {id_text(self._id)}: {why}") from error
        if path == OUTPUT:
            self._output_ended = True
            return [*(Write(*write) for write in self._output.finish()), *self._last_words()]
        if path == EVENTLOG:
            self._over = True
            if OUTPUT not in self._watching:
                self._output_ended = True
            if not self._exec_seen:
                self._watching.discard(EXEC)
            return [CloseStdin()]
        return []

    def _watch(self, path: str, *, wait: bool = False) -> Watch:
        self._watching.add(path)
        return Watch(path, wait)

    def _exception(self, event: Event) -> list[Effect]:
        context = event.context
        fatal = context.get("severity") == 0
        if self._closed:
            return []
        text = (
            f"{event.timestamp - self._zero:.3f}s: job.exception {id_text(self._id)} type={context.get('type')}"
            f" severity={context.get('severity')} {context.get('note', '')}".rstrip()
        )
        effects: list[Effect] = [_said(text)]
        if fatal:
            self._fatal = self._fatal or event
            effects.append(CloseStdin())
        return effects

    def _finish(self, event: Event) -> list[Effect]:
        status = event.context.get("status")
        if not isinstance(status, int):
            raise FluxresError(f"cannot tell how {id_text(self._id)} ended: its finish event has no status")
        self._status = status
        effects: list[Effect] = [CloseStdin()]
        if self._output_ended:
            effects += self._last_words()
        if not self._started:
            self._started = True
            effects.append(self._watch(OUTPUT))
        return effects

    def _last_words(self) -> list[Write]:
        """What to say of the status, after all output."""
        if not self._status:
            return []
        return [Write(STDERR, f"{self._options.prog}: {status_text(self._status)}\n".encode())]

    def _clean(self) -> list[Effect]:
        effects: list[Effect] = []
        if not self._output_ended and not self._output.started:
            effects.append(self._watch(OUTPUT))
        if self._status is None and self._fatal is not None:
            context = self._fatal.context
            note = f" {context['note']}" if context.get("note") else ""
            text = f"{self._options.prog}: job {id_text(self._id)} exception type={context.get('type')}{note}"
            effects.append(_said(text))
        return effects

    def _show(self, prefix: str, event: Event) -> Write:
        context = json.dumps(dict(event.context), separators=(",", ":")) if event.context else ""
        return _said(f"{event.timestamp - self._zero:.3f}s: {prefix}.{event.name} {context}".rstrip())


def _said(text: str) -> Write:
    """A line of ours, which may have names and notes of others in it."""
    return Write(STDERR, f"{printable(text)}\n".encode())
