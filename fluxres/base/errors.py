"""The exceptions that fluxres raises on purpose; everything else that escapes is a bug.

- `FluxresError`: its text is meant for people, in the form `cannot X: why`.
- `Refusal`: one that trying again would not mend: a damaged store, a socket that is taken.
- `RpcError`: the error that ends an RPC: a POSIX errnum and a short text (RFC 6).
- `ProtocolError`: a peer sent bytes that break the protocol; the connection ends, nothing else does.
- `IllegalTransition`: a pure state machine was given an event that its state does not allow.

Values of the wrong form (an idset, a duration, a jobid) are a plain `ValueError` with the value in its text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

MAX_SHOWN_HISTORY = 16
"""How many of the latest events the text of an `IllegalTransition` shows."""


class FluxresError(Exception):
    """An error whose text can be shown to a user as it is."""


class Refusal(FluxresError):
    """Something is as it must not be, and trying again would not mend it: a person has to."""


class RpcError(FluxresError):
    """The error response to a request.

    `errnum` is a POSIX error number, such as `errno.EHOSTUNREACH` for a lost peer; `text` says why, and is
    the system's own message for `errnum` when none is given.
    """

    def __init__(self, errnum: int, text: str = "") -> None:
        self.errnum = errnum
        self.text = text or os.strerror(errnum)
        super().__init__(self.text)

    def __repr__(self) -> str:
        return f"RpcError({self.errnum}, {self.text!r})"

    def __reduce__(self) -> tuple[type[RpcError], tuple[int, str]]:
        """Copy and pickle from both fields: by default only the text would reach `__init__`."""
        return type(self), (self.errnum, self.text)


class ProtocolError(FluxresError):
    """Bytes or messages from a peer that the protocol does not allow."""


class IllegalTransition(FluxresError):
    """An event that is not allowed in the current state.

    `what` names the machine and the thing it is about (`job ƒ2x`), `state` where it was, `event` what came,
    and `history` the events that had led there, oldest first.
    """

    def __init__(self, what: str, state: str, event: str, history: Sequence[str]) -> None:
        self.what = what
        self.state = state
        self.event = event
        self.history = tuple(history)
        shown = ", ".join(self.history[-MAX_SHOWN_HISTORY:]) or "none"
        if len(self.history) > MAX_SHOWN_HISTORY:
            shown = f"…, {shown}"
        super().__init__(f"cannot apply {event} to {what}: not allowed in state {state} (events so far: {shown})")

    def __reduce__(self) -> tuple[type[IllegalTransition], tuple[str, str, str, tuple[str, ...]]]:
        """Copy and pickle from the four fields: by default only the text would reach `__init__`."""
        return type(self), (self.what, self.state, self.event, self.history)
