"""Types for the fields of requests that services share, checked by `Request.parse`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

AnyJobId: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
"""A jobid as it comes in a request (RFC 19). Integers of the wire have 64 bits at most: only the sign is to see."""
Signum: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=64)]
"""A signal's number, signal(7)."""
