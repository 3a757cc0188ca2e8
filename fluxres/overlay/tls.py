"""TLS between brokers: the instance's one certificate, and a connection's TLS without I/O.

`fluxres keygen` makes one key with a certificate of its own, which all brokers of an instance hold, as Flux's do their
CURVE certificate. Both ends show it and both accept nothing else: it is the only root that they trust, and what the
peer shows is compared to it byte by byte. Host names are not looked at: holding the key is being a broker of the
instance. TLS 1.3 only, no session tickets.

A file is refused that others can read, that holds no key, or that has expired. What goes wrong in a handshake becomes
words for whoever reads the log.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from dataclasses import dataclass
from typing import Final

from fluxres.base.errors import FluxresError, ProtocolError

READ_SIZE: Final = 64 * 1024
_MAKE_ONE: Final = "fluxres keygen makes one"
_EXPIRED: Final = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""
_OTHER: Final = "it shows a certificate that is not this instance's: bootstrap.cert is not the same file at both ends"
_WORDS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate, and was shown none",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not take our certificate: bootstrap.cert is not the same file at both ends",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate has expired",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: bootstrap.cert is set here and not there, or it is no broker",
    "HTTP_REQUEST": "it does not speak TLS: it is no broker",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
}
"""OpenSSL's reason -> what that says about the peer."""


class CertError(FluxresError):
    """A certificate file that cannot be used; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The instance's certificate (DER), and a TLS context for each end of a connection."""

    certificate: bytes
    accepting: ssl.SSLContext
    dialling: ssl.SSLContext


def load_credentials(path: str) -> Credentials:
    """Read the certificate and key at `path`. Raises CertError."""
    try:
        with open(path, encoding="ascii") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except OSError as error:
        raise CertError(f"cannot read certificate {path}: {error.strerror} ({_MAKE_ONE})") from error
    except UnicodeDecodeError as error:
        raise CertError(f"cannot use certificate {path}: it is no PEM file ({_MAKE_ONE})") from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CertError(
            f"cannot use certificate {path}: others can read it, mode {stat.S_IMODE(status.st_mode):04o} "
            "(chmod 600, and make a new one if that was so for long)"
        )
    try:
        certificate = _der(text)
        accepting = _context(ssl.PROTOCOL_TLS_SERVER, path, certificate)
        accepting.num_tickets = 0
        dialling = _context(ssl.PROTOCOL_TLS_CLIENT, path, certificate)
    except (ssl.SSLError, ValueError) as error:
        raise CertError(
            f"cannot use certificate {path}: it holds no certificate with its private key ({_MAKE_ONE})"
        ) from error
    _check_dates(path, accepting)
    return Credentials(certificate=certificate, accepting=accepting, dialling=dialling)


def _der(text: str) -> bytes:
    """The first certificate of a PEM text. Raises ValueError."""
    begin = text.index(ssl.PEM_HEADER)
    return ssl.PEM_cert_to_DER_cert(text[begin : text.index(ssl.PEM_FOOTER, begin) + len(ssl.PEM_FOOTER)])


def _context(protocol: int, path: str, certificate: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(path, password="")  # an encrypted key is refused, and nobody is asked for a password
    context.load_verify_locations(cadata=certificate)
    return context


def _check_dates(path: str, context: ssl.SSLContext) -> None:
    now = time.time()
    for found in context.get_ca_certs():
        begin, end = found["notBefore"], found["notAfter"]
        if not isinstance(begin, str) or not isinstance(end, str):
            break
        if ssl.cert_time_to_seconds(end) < now:
            raise CertError(f"cannot use certificate {path}: it expired on {end} ({_MAKE_ONE})")
        if ssl.cert_time_to_seconds(begin) > now:
            raise CertError(f"cannot use certificate {path}: it begins on {begin}; is this machine's clock right?")
        return
    raise CertError(f"cannot use certificate {path}: it is not a root of its own ({_MAKE_ONE})")


class TlsStream:
    """One connection's TLS: bytes of the network in, bytes for the network out, no I/O. Raises ProtocolError, in words.

    What is `outgoing` after any call, one that raises too, is to be sent.
    """

    __slots__ = ("_certificate", "_incoming", "_outgoing", "_tls")

    def __init__(self, credentials: Credentials, *, accepts: bool) -> None:
        self._certificate = credentials.certificate
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        context = credentials.accepting if accepts else credentials.dialling
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=accepts)

    def outgoing(self) -> bytes:
        """Take the bytes that are to be sent."""
        return self._outgoing.read()

    def shake(self, data: bytes = b"") -> bool:
        """Go on with the handshake, `data` being what the peer has sent; True when it is done at this end.

        A peer that accepts may still refuse us: that comes with `decrypt`.
        """
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise ProtocolError(words(error)) from error
        if self._tls.getpeercert(binary_form=True) != self._certificate:
            raise ProtocolError(_OTHER)
        return True

    def encrypt(self, data: bytes) -> bytes:
        """What to send for `data`."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]  # a record at a time
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """What the peer has said by `data`; empty where that is only part of a record."""
        self._incoming.write(data)
        said = []
        try:
            while more := self._tls.read(READ_SIZE):
                said.append(more)
        except ssl.SSLWantReadError:
            pass  # that was all
        except ssl.SSLZeroReturnError:
            pass  # the end of the connection follows
        except ssl.SSLError as error:
            raise ProtocolError(words(error)) from error
        return b"".join(said)


def words(error: ssl.SSLError) -> str:
    """What a TLS error says about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate has expired" if error.verify_code == _EXPIRED else _OTHER
    return _WORDS.get(error.reason or "", f"TLS failed: {error.reason or error}")
