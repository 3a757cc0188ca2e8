"""How a job ended, folded from its eventlog (RFC 21). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fluxres.cli.common import printable
from fluxres.cli.exitcode import exit_code, status_text

if TYPE_CHECKING:
    from fluxres.base.errors import RpcError
    from fluxres.base.eventlog import Event
    from fluxres.base.json import JsonObject

FAILED: Final = 1


class Outcome:
    """What became of a job; take its events in order."""

    __slots__ = ("error", "exception", "seen", "status", "t_run")

    def __init__(self) -> None:
        self.status: int | None = None
        self.exception: Event | None = None
        self.error: RpcError | None = None
        self.seen: set[str] = set()
        self.t_run = 0.0

    def take(self, event: Event) -> None:
        """Take the next event."""
        self.seen.add(event.name)
        status = event.context.get("status")
        if event.name == "finish" and isinstance(status, int):
            self.status = status
        elif event.name == "exception" and event.context.get("severity") == 0:
            self.exception = self.exception or event

    @property
    def success(self) -> bool:
        """Whether it ran to its end without a task failing or a fatal exception."""
        return self.status == 0 and self.exception is None and self.error is None

    def exit_code(self, exception_code: int = FAILED) -> int:
        """The highest task exit code, at least `exception_code` after a fatal exception, 1 if unknown."""
        code = exit_code(self.status) if self.status is not None else 0
        if self.exception is not None:
            return max(code, exception_code)
        return code if self.status is not None else FAILED

    def words(self) -> str:
        """How it ended, for people."""
        if self.error is not None:
            return printable(self.error.text)
        if self.exception is not None:
            note = self.exception.context.get("note")
            return printable(
                f"fatal exception type={self.exception.context.get('type')}" + (f" {note}" if note else "")
            )
        if self.status is None:
            return "it ended without a status"
        return status_text(self.status) if self.status else "job completed successfully"

    def as_json(self, jobid: int) -> JsonObject:
        """The result for `job status --json`, with flux-core's names."""
        out: JsonObject = {"id": jobid, "success": self.success}
        if self.status is not None:
            out["waitstatus"] = self.status
        out["exception_occurred"] = self.exception is not None
        if self.exception is not None:
            for name in ("type", "note", "severity"):
                out[f"exception_{name}"] = self.exception.context.get(name, "")
        return out
