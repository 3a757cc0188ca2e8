"""Jobs of the status feed, which has states and results by name, as entries of job-list, which has numbers. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fluxres.cli.jobinfo import RESULTS, STATES

if TYPE_CHECKING:
    from fluxres.base.json import JsonObject

_STATE_NUMBERS: Final = {name: number for number, (name, _) in STATES.items()}
_RESULT_NUMBERS: Final = {name: number for number, (name, _) in RESULTS.items()}


def as_entry(document: JsonObject) -> JsonObject:
    """A job of the feed as an entry of job-list, which has numbers for ids, states and results."""
    decimal = str(document.get("dec", ""))
    entry = {**document, "id": int(decimal) if decimal.isascii() and decimal.isdigit() else 0}
    entry["state"] = _STATE_NUMBERS.get(str(document.get("state")), 0)
    if "result" in document:
        entry["result"] = _RESULT_NUMBERS.get(str(document["result"]), 0)
    return entry
