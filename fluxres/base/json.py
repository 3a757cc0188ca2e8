"""Types for what JSON can carry: the payloads of messages (RFC 3), jobspecs, R, and event contexts (RFC 18).

The aliases are strings because they are recursive; they exist for the type checker and cost nothing at run
time.
"""

from __future__ import annotations

from typing import TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
"""Any value that JSON can carry, as `json.loads` returns it."""

JsonObject: TypeAlias = "dict[str, JsonValue]"
"""A JSON object: the shape of every RPC payload."""
