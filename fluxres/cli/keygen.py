"""`fluxres keygen [FILE]`: make the key that the brokers of an instance know each other by (flux-keygen(1)).

FILE gets one EC key and a certificate signed by that key itself, as PEM. All brokers of the instance use the same one;
whoever can read it can be a broker. So it is for its owner only, and a file that exists is never overwritten.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import UTC, datetime, timedelta
from typing import Final

from fluxres.base.errors import FluxresError
from fluxres.cli.common import parser

DEFAULT: Final = "fluxres.cert"
VALID: Final = timedelta(days=100 * 365.25)
SKEW: Final = timedelta(days=1)
"""How far the clocks of the brokers may be behind ours."""
NAME: Final = "fluxres instance"


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("keygen", "Make the key and certificate of an instance", connects=False)
    made.add_argument("file", nargs="?", default=DEFAULT, metavar="FILE", help=f"where to write it ({DEFAULT})")
    args = made.parse_args(argv)
    write(args.file, generate(datetime.now(UTC)))
    print(
        f"fluxres-keygen: {args.file} is for the owner of the instance only; copy it to every host, "
        "and name it in bootstrap.cert",
        file=sys.stderr,
    )
    return 0


def generate(now: datetime, valid: timedelta = VALID) -> bytes:
    """A new key and its certificate, as PEM; good from `now` on."""
    from cryptography import x509  # late: it takes longer to import than --help should
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def write(path: str, text: bytes) -> None:
    """Write a new file of mode 0600. Raises FluxresError, also where the file exists; nothing has changed then."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise FluxresError(
            f"cannot write {path}: it exists; brokers may be using it (remove it first if none does)"
        ) from error
    except OSError as error:
        raise FluxresError(f"cannot write {path}: {error.strerror}") from error
    try:
        with open(made, "wb") as file:
            os.fchmod(made, 0o600)  # whatever the umask
            file.write(text)
            file.flush()
            os.fsync(made)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise FluxresError(f"cannot write {path}: {error.strerror}") from error
