"""What goes wrong between brokers.

- `ConnectError`: a connection to or from another broker could not be made; it may be tried again.
- `HostUnreachable`: a rank cannot be reached because a broker on the way to it is lost (EHOSTUNREACH, flux-core 3800).
- `ParentLost`: the commonest reason for that.
- `SubtreePanic`: this incarnation is over; the process begins the next one, and the subtree below does the same.
"""

from __future__ import annotations

import errno

from fluxres.base.errors import FluxresError, RpcError


class ConnectError(FluxresError):
    """A connection between brokers that could not be made, or did not come to its hello."""


class HostUnreachable(RpcError):
    """The rank that something waits on is behind a lost broker."""

    def __init__(self, text: str = "") -> None:
        super().__init__(errno.EHOSTUNREACH, text)

    def __reduce__(self) -> tuple[type[HostUnreachable], tuple[str]]:  # type: ignore[override]
        """Copy and pickle from the text: the errnum is given."""
        return type(self), (self.text,)


class SubtreePanic(FluxresError):
    """The incarnation cannot go on: its parent is lost, or a service of its own has crashed. The text says why."""


class ParentLost(SubtreePanic):
    """The parent is lost, or has cut us off: why everything else here ends too."""
