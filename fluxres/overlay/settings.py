"""The times of the overlay, in seconds (`[tbon]` of the configuration). Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TbonSettings:
    """How often peers say that they live, and what their silence means.

    `heartbeat` is the interval at which an idle link is used; a peer that is silent for `torpid_min` is torpid, for
    `timeout` lost. `connect_timeout` bounds connecting, the TLS handshake and the hello.
    """

    heartbeat: float = 1.0
    torpid_min: float = 5.0
    timeout: float = 20.0
    connect_timeout: float = 5.0
