"""What flux-jobs(1) shows of a job: the fields of an output format, computed from a job-list entry. Pure.

An entry is the object that `job-list.list` answers with: `state` and `result` are the integers of RFC 21's
names, times are seconds since the epoch, and a key that is missing means that it has not come to that.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from fluxres.base.jobid import dothex, f58, kvs_path
from fluxres.cli.common import id_text
from fluxres.cli.exitcode import exit_code
from fluxres.cli.format import duration_text

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject, JsonValue
    from fluxres.cli.format import FieldValue

STATES: Final[Mapping[int, tuple[str, str]]] = {
    1: ("NEW", "N"),
    2: ("DEPEND", "D"),
    4: ("PRIORITY", "P"),
    8: ("SCHED", "S"),
    16: ("RUN", "R"),
    32: ("CLEANUP", "C"),
    64: ("INACTIVE", "I"),
}
"""Job states by their number: name and abbreviation."""
RESULTS: Final[Mapping[int, tuple[str, str]]] = {
    1: ("COMPLETED", "CD"),
    2: ("FAILED", "F"),
    4: ("CANCELED", "CA"),
    8: ("TIMEOUT", "TO"),
}
"""Job results by their number: name and abbreviation."""
INACTIVE: Final = 64
PENDING_STATES: Final = 2 | 4 | 8
RUNNING_STATES: Final = 16 | 32
CANCELED_RETURNCODE: Final = -128
"""The returncode of a job that was canceled before it could run."""

_EXIT_WORDS: Final = {
    126: "Command invoked cannot execute",
    127: "command not found",
    128: "Invalid argument to exit",
}
_CONTEXT_ATTRS: Final = ("state", "dependencies", "annotations", "nodelist", "priority", "urgency")
_EXCEPTION_ATTRS: Final = ("exception_occurred", "exception_severity", "exception_type", "exception_note")


class JobInfo:
    """One job as a row of fields; `now` is the time in seconds that running times count to."""

    __slots__ = ("_now", "_username", "entry")

    def __init__(self, entry: JsonObject, now: float, username: Callable[[int], str] = str) -> None:
        self.entry = entry
        self._now = now
        self._username = username

    def __call__(self, field: str) -> FieldValue:
        """The value of `field`; empty where the job has no such thing. Raises KeyError for no field."""
        if field in FIELDS:
            return FIELDS[field].compute(self)
        for prefix, root in _ANNOTATION_ROOTS.items():
            if field.startswith(prefix):
                return self._annotation(root + field.removeprefix(prefix))
        raise KeyError(field)

    def text(self, attr: str) -> str:
        """An attribute as text, empty when it is missing."""
        value = self.entry.get(attr)
        return "" if value is None else str(value)

    def number(self, attr: str) -> float:
        """An attribute as a number, 0 when it is missing."""
        value = self.entry.get(attr)
        return value if isinstance(value, (int, float)) else 0.0

    def plain(self, attr: str) -> FieldValue:
        """An attribute as it is, empty when it is missing."""
        value = self.entry.get(attr)
        return value if isinstance(value, (str, int, float)) else ""

    @property
    def id(self) -> int:
        """The jobid."""
        return int(self.number("id"))

    @property
    def state(self) -> int:
        """The state's number."""
        return int(self.number("state"))

    def state_name(self, form: int = 0) -> str:
        """The state's name, or with `form` 1 its abbreviation."""
        return STATES[self.state][form] if self.state in STATES else ""

    def result_name(self, form: int = 0) -> str:
        """The result's name, or with `form` 1 its abbreviation; empty while there is none."""
        result = int(self.number("result"))
        return RESULTS[result][form] if result in RESULTS else ""

    def status(self, form: int = 0) -> str:
        """The result of a job that is over, else its state."""
        return self.result_name(form) if self.state == INACTIVE else self.state_name(form)

    def runtime(self) -> float:
        """Seconds from the beginning of RUN to that of CLEANUP, or to now."""
        began, ended = self.number("t_run"), self.number("t_cleanup")
        return (ended if ended > 0 else self._now) - began if began > 0 else 0.0

    def remaining(self) -> float:
        """Seconds that a running job still has, 0 for one that does not run or has no limit."""
        expiration = self.number("expiration")
        return max(0.0, expiration - self._now) if self.state_name() == "RUN" and expiration else 0.0

    def returncode(self) -> FieldValue:
        """The exit code, minus the signal number, or the codes for jobs that failed without ever running."""
        status = self.entry.get("waitstatus")
        if isinstance(status, int):
            code = exit_code(status)
            return -(status & 0x7F) if status & 0x7F else code
        result = self.result_name()
        if result == "CANCELED":
            return CANCELED_RETURNCODE
        return 1 if result == "FAILED" else ""

    def dependencies(self) -> str:
        """The dependencies that are left, separated by commas."""
        value = self.entry.get("dependencies")
        return ",".join(str(item) for item in value) if isinstance(value, list) else ""

    def contextual_info(self) -> str:
        """Why a pending job waits; where any other runs or ran."""
        state = self.state_name()
        if state == "PRIORITY":
            return "priority-wait"
        if state == "DEPEND":
            return f"depends:{self.dependencies()}"
        if state != "SCHED":
            return self.text("nodelist")
        estimate = self._annotation("sched.t_estimate")
        if isinstance(estimate, float | int):
            return f"eta:{duration_text(estimate - self._now) if estimate > self._now else 'now'}"
        if self.entry.get("urgency") == 0:
            return "held"
        return "priority-hold" if self.entry.get("priority") == 0 else ""

    def contextual_time(self) -> FieldValue:
        """The running time, or the time limit of a job that has not run."""
        return self.number("duration") if self.state & PENDING_STATES else self.runtime()

    def inactive_reason(self) -> str:
        """How a job that is over came to its end."""
        if self.state != INACTIVE:
            return ""
        result, kind, note = self.result_name(), self.text("exception_type"), self.text("exception_note")
        code = self.returncode()
        if result == "CANCELED":
            return f"Canceled: {note}" if kind == "cancel" and note else "Canceled"
        if result == "TIMEOUT":
            return "Timeout"
        fatal = self.entry.get("exception_occurred") and self.number("exception_severity") == 0
        if result == "FAILED" and fatal and kind != "exec":
            return f"Exception: type={kind}" + (f" note={note}" if note else "")
        if result == "FAILED" and isinstance(code, int):
            if code in _EXIT_WORDS:
                return _EXIT_WORDS[code]
            signum = -code if code < 0 else code - 128
            if signum > 0:
                return _signal_words(signum)
        return f"Exit {code}"

    def username(self) -> str:
        """The submitter's name."""
        return self._username(int(self.number("userid")))

    def _annotation(self, path: str) -> FieldValue:
        node: JsonValue = self.entry.get("annotations")
        for key in filter(None, path.split(".")):
            node = node.get(key) if isinstance(node, dict) else None
        if node is None or node == {}:
            return ""
        if isinstance(node, (str, int, float)):
            return node
        import json

        return json.dumps(node)

    def as_json(self) -> JsonObject:
        """The job for `--json`: names for state and result, and no key for what is not (yet) so."""
        out: JsonObject = {"jobid": id_text(self.id)}
        for name in _JSON_FIELDS:
            value = self.entry.get(name) if name == "id" else self(name)
            if value == "" or (value == 0 and (name.startswith("t_") or name in ("runtime", "expiration"))):
                continue
            out[name] = value
        out["dependencies"] = self.entry.get("dependencies") or []
        out["annotations"] = self.entry.get("annotations") or {}
        occurred = self.entry.get("exception_occurred")
        exception: JsonObject = {} if occurred is None else {"occurred": bool(occurred)}
        names = ("severity", "type", "note") if occurred else ()
        out["exception"] = {**exception, **{name: self.entry.get(f"exception_{name}", "") for name in names}}
        return out


class Field(NamedTuple):
    """A field of the format language: its column title, the job-list attributes it needs, its computation."""

    title: str
    attrs: tuple[str, ...]
    compute: Callable[[JobInfo], FieldValue]


def _attr(title: str, attr: str, *more: str) -> Field:
    return Field(title, (attr, *more), lambda job: job.plain(attr))


def _time(title: str, attr: str) -> Field:
    return Field(title, (attr,), lambda job: job.number(attr))


FIELDS: Final[Mapping[str, Field]] = {
    "id": Field("JOBID", (), lambda job: id_text(job.id)),
    "id.f58": Field("JOBID", (), lambda job: id_text(job.id)),
    "id.f58plain": Field("JOBID", (), lambda job: f58(job.id, ascii=True)),
    "id.dec": Field("JOBID", (), lambda job: job.id),
    "id.hex": Field("JOBID", (), lambda job: f"{job.id:#x}"),
    "id.dothex": Field("JOBID", (), lambda job: dothex(job.id)),
    "id.kvs": Field("JOBID", (), lambda job: kvs_path(job.id)),
    "userid": _attr("UID", "userid"),
    "username": Field("USER", ("userid",), lambda job: job.username()),
    "urgency": _attr("URG", "urgency"),
    "priority": _attr("PRI", "priority"),
    "state": Field("STATE", ("state",), lambda job: job.state_name()),
    "state_single": Field("S", ("state",), lambda job: job.state_name(1)),
    "name": _attr("NAME", "name"),
    "cwd": _attr("CWD", "cwd"),
    "queue": _attr("QUEUE", "queue"),
    "project": _attr("PROJECT", "project"),
    "bank": _attr("BANK", "bank"),
    "ntasks": _attr("NTASKS", "ntasks"),
    "ncores": _attr("NCORES", "ncores"),
    "nnodes": _attr("NNODES", "nnodes"),
    "ranks": _attr("RANKS", "ranks"),
    "nodelist": _attr("NODELIST", "nodelist"),
    "success": _attr("SUCCESS", "success"),
    "waitstatus": _attr("WSTATUS", "waitstatus"),
    "duration": _time("DURATION", "duration"),
    "expiration": _time("EXPIRATION", "expiration"),
    "result": Field("RESULT", ("result",), lambda job: job.result_name()),
    "result_abbrev": Field("RS", ("result",), lambda job: job.result_name(1)),
    "status": Field("STATUS", ("state", "result"), lambda job: job.status()),
    "status_abbrev": Field("ST", ("state", "result"), lambda job: job.status(1)),
    "returncode": Field("RC", ("waitstatus", "result"), lambda job: job.returncode()),
    "runtime": Field("RUNTIME", ("t_run", "t_cleanup"), lambda job: job.runtime()),
    "t_remaining": Field("T_REMAINING", ("expiration", "state"), lambda job: job.remaining()),
    "t_submit": _time("T_SUBMIT", "t_submit"),
    "t_depend": _time("T_DEPEND", "t_depend"),
    "t_priority": _time("T_PRIORITY", "t_priority"),
    "t_sched": _time("T_SCHED", "t_sched"),
    "t_run": _time("T_RUN", "t_run"),
    "t_cleanup": _time("T_CLEANUP", "t_cleanup"),
    "t_inactive": _time("T_INACTIVE", "t_inactive"),
    "dependencies": Field("DEPENDENCIES", ("dependencies",), lambda job: job.dependencies()),
    "exception.occurred": _attr("EXCEPTION-OCCURRED", "exception_occurred"),
    "exception.severity": _attr("EXCEPTION-SEVERITY", "exception_severity"),
    "exception.type": _attr("EXCEPTION-TYPE", "exception_type"),
    "exception.note": _attr("EXCEPTION-NOTE", "exception_note"),
    "contextual_info": Field("INFO", _CONTEXT_ATTRS, lambda job: job.contextual_info()),
    "contextual_time": Field("TIME", ("state", "t_run", "t_cleanup", "duration"), lambda job: job.contextual_time()),
    "inactive_reason": Field(
        "INACTIVE-REASON",
        ("state", "result", "waitstatus", *_EXCEPTION_ATTRS),
        lambda job: job.inactive_reason(),
    ),
}
_ANNOTATION_ROOTS: Final = {"annotations": "", "sched": "sched", "user": "user"}
_ANNOTATION_TITLES: Final = {
    "sched.t_estimate": "T_ESTIMATE",
    "sched.reason_pending": "REASON",
    "sched.resource_summary": "RESOURCES",
}
_JSON_FIELDS: Final = (
    *(
        "id",
        "userid",
        "username",
        "urgency",
        "priority",
        "state",
        "result",
        "status",
        "returncode",
        "success",
    ),
    *(
        "waitstatus",
        "name",
        "cwd",
        "queue",
        "project",
        "bank",
        "ntasks",
        "ncores",
        "nnodes",
        "ranks",
        "nodelist",
    ),
    *("duration", "expiration", "runtime", "t_remaining", "t_submit", "t_depend", "t_priority", "t_sched"),
    *("t_run", "t_cleanup", "t_inactive"),
)


def title(field: str) -> str | None:
    """A field's column title; None when there is no such field."""
    if field in FIELDS:
        return FIELDS[field].title
    root, _, rest = field.partition(".")
    if root not in _ANNOTATION_ROOTS:
        return None
    return (
        _ANNOTATION_TITLES.get(field.removeprefix("annotations."))
        or (rest if root == "annotations" else field or root).upper()
        or root.upper()
    )


def attrs_of(fields: Iterable[str]) -> list[str]:
    """The job-list attributes that `fields` are computed from, sorted."""
    wanted: set[str] = set()
    for field in fields:
        wanted.update(FIELDS[field].attrs if field in FIELDS else ("annotations",))
    return sorted(wanted)


def _signal_words(signum: int) -> str:
    try:
        return signal.strsignal(signum) or f"Signaled {signum}"
    except ValueError:  # above the kernel's last signal
        return f"Signaled {signum}"
