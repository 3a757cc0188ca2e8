"""Listening for status: the socket, the port that is kept, the token and the certificate it is served with."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from fluxres.overlay.address import ANY
from fluxres.status.portfile import keep_port, kept_port
from fluxres.status.settings import StatusSettings, read_context, read_token, url_of

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("fluxres.status")

BACKLOG: Final = 1024
"""Connections that wait to be accepted: all readers come again at once when a broker has begun anew."""
KEPT_TRIES: Final = 10
KEPT_PAUSE: Final = 0.1
"""The kept port is tried so often, so many seconds apart, before another is taken: who had it may be about to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """A listening socket, non-blocking, and what is asked of those who come: a token, or TLS."""

    sock: socket.socket
    host: str
    port: int
    token: bytes | None = None
    tls: ssl.SSLContext | None = None

    @property
    def uri(self) -> str:
        """The address for browsers."""
        everywhere = self.host == ANY or ipaddress.ip_address(self.host).is_unspecified
        host = socket.gethostname() if everywhere else self.host
        return url_of(host, self.port, tls=self.tls is not None)


async def listen(settings: StatusSettings, port_file: Path) -> Listening:
    """Listen where `settings` say; any port that is taken is kept in `port_file`. Raises OSError, StatusFileError."""
    token = read_token(settings.token_file) if settings.token_file is not None else None
    tls = read_context(settings.cert) if settings.cert is not None else None
    if settings.port:
        sock = _bind(settings.host, settings.port)
    else:
        sock = await _bind_kept(settings.host, port_file)
    _address, port, *_ = sock.getsockname()
    return Listening(sock=sock, host=settings.host, port=port, token=token, tls=tls)


async def _bind_kept(host: str, port_file: Path) -> socket.socket:
    """Listen on the port that is kept; where there is none, or another program has it, on any, and keep that."""
    kept = kept_port(port_file)
    for _ in range(KEPT_TRIES if kept else 0):
        try:
            return _bind(host, kept)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        await trio.sleep(KEPT_PAUSE)
    sock = _bind(host, 0)
    _address, port, *_ = sock.getsockname()
    if kept:
        log.warning("status was served on port %d, which another program has now: taking port %d", kept, port)
    try:
        keep_port(port_file, port)
    except OSError as error:  # a full disk: the page is all the same
        log.warning("cannot keep port %d of the status endpoint in %s: %s", port, port_file, error.strerror)
    return sock


def _bind(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    with _closed_on_error(sock):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # who asks over IPv4 has an address of IPv4
        sock.bind(("" if host == ANY else host, port))
        sock.listen(BACKLOG)
    return sock


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise
