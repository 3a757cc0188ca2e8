"""The files of the page, as they are in the package: read once, and served from memory under exactly their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from fluxres.status.http import HTML, STATIC, TEXT, Request, Response, text

PACKAGE: Final = "fluxres.status"
DIRECTORY: Final = "page"
INDEX: Final = "index.html"
MAX_FILES: Final = 256
TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": HTML,
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": TEXT,
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
"""What is served; a file of another kind is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of the page."""

    content_type: str
    body: bytes
    etag: str


def load() -> dict[str, File]:
    """Read the page: path -> file; `/` is its index. Blocks."""
    files: dict[str, File] = {}
    for name, entry in _walk(resources.files(PACKAGE) / DIRECTORY, ""):
        suffix = "." + name.rpartition(".")[2]
        if suffix in TYPES and len(files) < MAX_FILES:
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            path = "/" if name == INDEX else STATIC + name
            files[path] = File(content_type=TYPES[suffix], body=body, etag=etag)
    return files


def _walk(directory: Traversable, above: str) -> Iterator[tuple[str, Traversable]]:
    if not directory.is_dir():
        return
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, f"{above}{entry.name}/")
        else:
            yield above + entry.name, entry


def answer(request: Request, files: Mapping[str, File]) -> Response:
    """The file that is asked for; 304 where the browser has it already."""
    file = files.get(request.path)
    if file is None:
        return text(404, "there is no such page")
    headers = (("Cache-Control", "no-cache"), ("ETag", file.etag))  # kept, and asked for whether it is still the same
    known = {tag.removeprefix("W/") for tag in request.words("if-none-match")}
    if file.etag in known or "*" in known:
        return Response(status=304, content_type=file.content_type, headers=headers)
    return Response(content_type=file.content_type, body=file.body, headers=headers)
