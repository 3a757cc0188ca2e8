"""The instance's certificate, and TLS without I/O: who is let in, and in which words the others are not."""

from __future__ import annotations

import os
import ssl
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tlskit import make_cert, make_credentials, with_dialler

from fluxres.base.errors import ProtocolError
from fluxres.cli.keygen import SKEW, VALID, generate, write
from fluxres.overlay.tls import CertError, Credentials, TlsStream, load_credentials

NOW = datetime.now(UTC)
OTHER = "it shows a certificate that is not this instance's: bootstrap.cert is not the same file at both ends"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("tls") / "theirs")


class Pair:
    """A dialler and an acceptor, and what each of them says of the other."""

    def __init__(self, dialler: Credentials, acceptor: Credentials) -> None:
        self.dialler = TlsStream(dialler, accepts=False)
        self.acceptor = TlsStream(acceptor, accepts=True)
        self.words = {self.dialler: "", self.acceptor: ""}
        self.done = {self.dialler: False, self.acceptor: False}

    def shake(self) -> tuple[str, str]:
        """The handshake, to the dialler's first look for the welcome; what the dialler and the acceptor say."""
        data = b""
        for _ in range(4):
            for stream in (self.dialler, self.acceptor):
                data = self._step(stream, data)
        return self.words[self.dialler], self.words[self.acceptor]

    def _step(self, stream: TlsStream, data: bytes) -> bytes:
        if not self.words[stream]:
            try:
                if self.done[stream]:
                    assert stream.decrypt(data) == b""
                else:
                    self.done[stream] = stream.shake(data)
            except ProtocolError as error:
                self.words[stream] = str(error)
        return stream.outgoing()


def test_two_brokers_of_an_instance_talk(ours: Credentials) -> None:
    pair = Pair(ours, ours)
    assert pair.shake() == ("", "")
    for one, other in ((pair.dialler, pair.acceptor), (pair.acceptor, pair.dialler)):
        said = os.urandom(100_000)
        sent = one.encrypt(said)
        assert said[:64] not in sent
        assert other.decrypt(sent) == said


@settings(max_examples=25, deadline=None)
@given(said=st.lists(st.binary(max_size=40_000), max_size=4), cuts=st.lists(st.integers(1, 30_000), max_size=6))
def test_the_network_may_cut_anywhere(ours: Credentials, said: list[bytes], cuts: list[int]) -> None:
    pair = Pair(ours, ours)
    pair.shake()
    sent = b"".join(map(pair.dialler.encrypt, said))
    heard = b""
    for cut in cuts:
        heard += pair.acceptor.decrypt(sent[:cut])
        sent = sent[cut:]
    assert heard + pair.acceptor.decrypt(sent) == b"".join(said)


def test_a_byte_at_a_time(ours: Credentials) -> None:
    pair = Pair(ours, ours)
    data = b""
    for _ in range(3):
        for stream in (pair.dialler, pair.acceptor):
            for byte in data or b"\0":
                if not pair.done[stream]:
                    pair.done[stream] = stream.shake(bytes([byte]) if data else b"")
            data = stream.outgoing()
    assert all(pair.done.values())
    sent = pair.acceptor.encrypt(b"welcome")
    assert b"".join(pair.dialler.decrypt(bytes([byte])) for byte in sent) == b"welcome"


def test_who_is_of_another_instance_is_refused(ours: Credentials, theirs: Credentials) -> None:
    dialler, acceptor = Pair(theirs, ours).shake()
    assert dialler == OTHER
    assert acceptor.startswith("it does not take our certificate")


def test_a_dialler_that_trusts_us_is_refused_all_the_same(ours: Credentials, tmp_path: Path) -> None:
    """What counts is what it shows."""
    stranger = make_credentials(tmp_path / "stranger")
    stranger.dialling.verify_mode = ssl.CERT_NONE
    dialler, acceptor = Pair(replace(stranger, certificate=ours.certificate), ours).shake()
    assert acceptor == OTHER
    assert dialler.startswith("it does not take our certificate")


def test_who_shows_no_certificate_is_refused(ours: Credentials) -> None:
    assert Pair(with_dialler(ours, shows=False), ours).shake() == (
        "it wants a certificate, and was shown none",
        "it shows no certificate",
    )


def test_older_tls_is_refused(ours: Credentials) -> None:
    old = with_dialler(ours, shows=False, newest=False)
    assert Pair(old, ours).shake() == ("it does not speak TLS 1.3", "it does not speak TLS 1.3")


def test_a_certificate_that_ours_has_signed_is_not_ours(ours: Credentials) -> None:
    """The pin: no chain counts, only the very certificate."""
    dialler, acceptor = Pair(ours, replace(ours, certificate=b"another")).shake()
    assert (dialler, acceptor) == ("", OTHER)


@pytest.mark.parametrize(
    "said", [b"fluxres\n", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\5hello", b"SSH-2.0-x\r\n", b"\xff" * 64]
)
def test_who_does_not_speak_tls_is_refused(ours: Credentials, said: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^(it does not speak TLS|TLS failed)"):
        TlsStream(ours, accepts=True).shake(said)


def test_what_was_changed_on_the_way_is_refused(ours: Credentials) -> None:
    pair = Pair(ours, ours)
    pair.shake()
    sent = bytearray(pair.dialler.encrypt(b"run this"))
    sent[-1] ^= 1
    with pytest.raises(ProtocolError, match="TLS failed"):
        pair.acceptor.decrypt(bytes(sent))


# -- the file


@pytest.mark.parametrize(
    ("begins", "valid", "why"),
    [
        (NOW - timedelta(days=2), timedelta(days=1), "it expired on"),
        (NOW + SKEW + timedelta(days=1), VALID, "is this machine's clock right"),
    ],
)
def test_a_certificate_out_of_its_time(tmp_path: Path, begins: datetime, valid: timedelta, why: str) -> None:
    path = str(tmp_path / "x")
    write(path, generate(begins, valid))
    with pytest.raises(CertError, match=f"^cannot use certificate {path}: .*{why}"):
        load_credentials(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_read(tmp_path: Path, mode: int) -> None:
    path = make_cert(tmp_path / "x")
    os.chmod(path, mode)
    with pytest.raises(CertError, match=f"others can read it, mode {mode:04o}"):
        load_credentials(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CertError, match=r"^cannot read certificate .*/x: No such file or directory"):
        load_credentials(str(tmp_path / "x"))


def test_a_file_that_lacks_something(tmp_path: Path) -> None:
    whole = generate(NOW)
    key, begin, certificate = whole.partition(b"-----BEGIN CERTIFICATE")
    other_key = generate(NOW).partition(b"-----BEGIN CERTIFICATE")[0]
    for number, text in enumerate(
        (b"", b"hello\n", b"\xff\xfe", key, begin + certificate, other_key + begin + certificate, whole[:-100])
    ):
        path = str(tmp_path / str(number))
        write(path, text)
        with pytest.raises(CertError, match=f"^cannot use certificate {path}: "):
            load_credentials(path)


def test_an_encrypted_key_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    path = make_cert(tmp_path / "x")
    key = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", path, "-passout", "pass:secret"], capture_output=True, check=True
    ).stdout
    certificate = Path(path).read_bytes().partition(b"-----BEGIN CERTIFICATE")
    write(f"{path}.2", key + certificate[1] + certificate[2])
    with pytest.raises(CertError, match="no certificate with its private key"):
        load_credentials(f"{path}.2")
