"""Where a broker serves its status, and to whom: the `[status]` table, read strictly.

What is reachable from other machines needs a token and TLS; a table that forgets one of the two is refused, and so is a
token or a key that others can read. The files are looked at only where they are used: `read_token` and `read_context`
say what is wrong with them, naming the key.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fluxres.base.errors import FluxresError
from fluxres.base.idset import IdSet
from fluxres.overlay.address import ANY, host_port, is_loopback

if TYPE_CHECKING:
    import ssl

OFF: Final = "off"
DEFAULT_BIND: Final = "127.0.0.1:0"
DEFAULT_RANKS: Final = "0"
MIN_TOKEN: Final = 16
"""Characters that a token has at least."""
MAX_TOKEN: Final = 1024
MAX_ORIGINS: Final = 64
MAX_PORT: Final = 65_535
_BIND: Final = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s/:\[\]]+)):(?P<port>[0-9]{1,5})")
_TOKEN: Final = re.compile(rb"[!-~]+")
_ORIGIN: Final = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::[0-9]{1,5})?")
_RANK_0: Final = IdSet([0])
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


class StatusFileError(FluxresError):
    """A file of the `[status]` table that cannot be used; the text names the key and the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSettings:
    """Where status is served. `host` is a number, or `*` for all addresses, and empty where nothing is served.

    `port` 0 is any free one, which is kept. `origins` are those of pages on other hosts that may ask, or of this one
    under the names that a proxy gives it, as browsers write them: `https://flux.example.org`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    ranks: IdSet = _RANK_0
    token_file: str | None = None
    cert: str | None = None
    origins: frozenset[str] = frozenset()

    def serves(self, rank: int) -> bool:
        """Whether the broker of `rank` is to listen."""
        return bool(self.host) and rank in self.ranks

    @property
    def address(self) -> str:
        """Where it listens, for people."""
        return host_port(self.host, self.port)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def make_settings(
    *,
    bind: str = DEFAULT_BIND,
    ranks: str = DEFAULT_RANKS,
    token_file: str | None = None,
    cert: str | None = None,
    origins: Sequence[str] = (),
) -> StatusSettings:
    """The settings of a `[status]` table. Raises ValueError naming the key."""
    host, port = _parse_bind(bind)
    try:
        served = IdSet.parse(ranks)
    except ValueError as error:
        raise ValueError(f"status.ranks: {error}") from error
    if host and not is_loopback(host):
        for key, value in (("token-file", token_file), ("cert", cert)):
            if not value:
                raise ValueError(
                    f"status.{key}: it must be set where status.bind, {bind}, is not a loopback address: "
                    "who asks from elsewhere needs a token, and nobody between may read it"
                )
    if len(origins) > MAX_ORIGINS:
        raise ValueError(f"status.origins: there are {len(origins)}, {MAX_ORIGINS} are allowed")
    return StatusSettings(
        host=host,
        port=port,
        ranks=served,
        token_file=token_file,
        cert=cert,
        origins=frozenset(map(_parse_origin, origins)),
    )


def _parse_bind(text: str) -> tuple[str, int]:
    """The address and port of `bind`; ("", 0) for "off"."""
    if text == OFF:
        return "", 0
    match = _BIND.fullmatch(text)
    if match is None:
        raise ValueError(
            f'status.bind: {text!r} is no address: write "HOST:PORT", an IPv6 number in square brackets, or "{OFF}"'
        )
    host, port = match["v6"] or match["host"], int(match["port"])
    if port > MAX_PORT:
        raise ValueError(f"status.bind: {text!r} is no address: a port is at most {MAX_PORT}")
    if host == "localhost":
        return "127.0.0.1", port
    if host != ANY:
        try:
            host = str(ipaddress.ip_address(host))
        except ValueError as error:
            raise ValueError(f"status.bind: {host!r} is neither a number, nor {ANY}, nor localhost") from error
    return host, port


def _parse_origin(text: str) -> str:
    """An origin as browsers write it: in lower case, without the scheme's own port."""
    origin = text.lower()
    if _ORIGIN.fullmatch(origin) is None:
        raise ValueError(f"status.origins: {text!r} is no origin: write SCHEME://HOST or SCHEME://HOST:PORT, no path")
    return origin.removesuffix(_DEFAULT_PORTS[origin.partition(":")[0]])


def url_of(host: str, port: int, *, tls: bool) -> str:
    """The address for browsers."""
    return f"http{'s' if tls else ''}://{host_port(host, port)}/"


def check_files(settings: StatusSettings) -> None:
    """Look at the files as a broker would that serves. Raises StatusFileError."""
    if settings.token_file is not None:
        read_token(settings.token_file)
    if settings.cert is not None:
        read_context(settings.cert)


def read_token(path: str) -> bytes:
    """The token in the file at `path`: its one line. Raises StatusFileError."""
    text = _read_private("status.token-file", path).strip()
    if not MIN_TOKEN <= len(text) <= MAX_TOKEN or _TOKEN.fullmatch(text) is None:
        raise StatusFileError(
            f"status.token-file: cannot use {path}: a token is {MIN_TOKEN} to {MAX_TOKEN} characters of ASCII "
            "without spaces (openssl rand -hex 32 makes one)"
        )
    return text


def read_context(path: str) -> ssl.SSLContext:
    """What a server's end of TLS needs, of a PEM file: its certificate chain and key. Raises StatusFileError."""
    import ssl  # late: only where there is a certificate

    _read_private("status.cert", path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(path, password="")  # an encrypted key is refused, and nobody is asked for a password
    except (ssl.SSLError, ValueError, OSError) as error:
        raise StatusFileError(
            f"status.cert: cannot use {path}: it holds no certificate (PEM) with its private key"
        ) from error
    return context


def _read_private(key: str, path: str) -> bytes:
    """What is in a file that nobody else can read."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        raise StatusFileError(f"{key}: cannot read {path}: {error.strerror}") from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StatusFileError(
            f"{key}: cannot use {path}: others can read it, mode {stat.S_IMODE(status.st_mode):04o} "
            "(chmod 600, and make a new one if that was so for long)"
        )
    return data
