"""`fluxres version`: the versions of the commands and, where one can be reached, of the broker."""

from __future__ import annotations

import os
import platform

from fluxres import __version__
from fluxres.base.errors import FluxresError
from fluxres.cli.common import attribute, parser

WAIT = 1.0
"""Seconds that connecting to a broker may take, just to ask it for its version."""


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser("version", "Show versions").parse_args(argv)
    print(f"commands:    {__version__}")
    print(f"python:      {platform.python_version()}")
    uri = args.uri or os.environ.get("FLUXRES_URI")
    if uri:
        print(f"broker:      {_broker_version(uri)}")
        print(f"FLUXRES_URI: {uri}")
    return 0


def _broker_version(uri: str) -> str:
    from fluxres.client import Client

    try:
        with Client.connect(uri, WAIT) as client:
            return attribute(client, "version")
    except FluxresError as error:
        return str(error)
