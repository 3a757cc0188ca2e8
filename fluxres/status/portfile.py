"""The port that was free once, kept: a broker that starts again is where its readers look for it."""

from __future__ import annotations

import os
from pathlib import Path

from fluxres.status.settings import MAX_PORT


def kept_port(path: Path) -> int:
    """The port in the file; 0 where there is none, or nothing that makes sense."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if text.isdecimal() and len(text) <= len(str(MAX_PORT)) and int(text) <= MAX_PORT else 0


def keep_port(path: Path, port: int) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(f"{port}\n", encoding="ascii")
    os.replace(new, path)
