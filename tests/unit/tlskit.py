"""Certificates for tests, and the wrong ones that brokers must refuse."""

from __future__ import annotations

import ssl
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fluxres.cli.keygen import generate, write
from fluxres.overlay.tls import Credentials, load_credentials


def make_cert(path: Path) -> str:
    """A new instance's certificate, at `path`."""
    write(str(path), generate(datetime.now(UTC)))
    return str(path)


def make_credentials(path: Path) -> Credentials:
    """The credentials of a new instance, its certificate being at `path`."""
    return load_credentials(make_cert(path))


def with_dialler(credentials: Credentials, *, shows: bool = True, newest: bool = True) -> Credentials:
    """These credentials with a dialling end that shows no certificate, or speaks TLS 1.2 at most."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.certificate)
    assert not shows or not newest
    if not newest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return replace(credentials, dialling=context)
