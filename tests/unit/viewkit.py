"""Parts for tests of what is watched: small documents, filters, and the schema that messages are held against."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import jsonschema

from fluxres.base.jobid import f58
from fluxres.base.json import JsonObject
from fluxres.status.messages import Body, Encoder
from fluxres.status.view import TOPICS, Cursor, Documents

SCHEMA: Final = Path(__file__).parents[2] / "docs" / "status.schema.json"
NOW: Final = 1_700_000_000.25


def validator(definition: str) -> jsonschema.Draft202012Validator:
    """What checks a value against one definition of the schema."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]})


def job(number: int, state: str = "RUN", userid: int = 1, **more: object) -> JsonObject:
    """The document of a job."""
    document = {"id": f58(number), "dec": str(number), "state": state, "userid": userid, **more}
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


def messages_of(body: Body, encoder: Encoder | None = None, *, subscription: int = 7) -> Iterator[JsonObject]:
    """What a client gets of it."""
    for data in (encoder or Encoder()).parts(body, subscription, NOW):
        yield json.loads(data)


def told(cursor: Cursor, *, idle: bool = False) -> list[JsonObject]:
    """The messages for what the cursor has to say now."""
    body = cursor.next(idle=idle)
    return [] if body is None else list(messages_of(body))


def without_empty(documents: Documents) -> dict[str, dict[str, JsonObject]]:
    """The same without topics that have no documents."""
    return {topic: dict(documents[topic]) for topic in TOPICS if documents.get(topic)}


def selected(documents: Documents, topics: tuple[str, ...], wanted: Mapping[str, frozenset[str]]) -> Documents:
    """Documents of these topics; of jobs only those in the states that are `wanted` ("jobs" -> states)."""
    states = wanted.get("jobs")
    return without_empty(
        {
            topic: {
                key: document
                for key, document in documents.get(topic, {}).items()
                if topic != "jobs" or states is None or document["state"] in states
            }
            for topic in topics
        }
    )
