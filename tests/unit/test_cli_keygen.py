"""`fluxres keygen`: one key and certificate, for its owner only, and never in place of another."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fluxres.cli.keygen import DEFAULT
from fluxres.cli.main import main
from fluxres.overlay.tls import load_credentials


def test_a_key_that_brokers_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.cert"
    assert main(["keygen", str(path)]) == 0
    assert capsys.readouterr().err.startswith(f"fluxres-keygen: {path} is for the owner of the instance only")
    credentials = load_credentials(str(path))
    certificate = x509.load_der_x509_certificate(credentials.certificate)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert key.public_key() == certificate.public_key()
    assert certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=99 * 365)
    certificate.verify_directly_issued_by(certificate)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_it_is_for_its_owner_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["keygen", str(tmp_path / "x")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_no_file_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    assert main(["keygen", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"fluxres-keygen: cannot write {path}: it exists; brokers may be using it (remove it first if none does)\n"
    )
    assert path.read_text() == "precious"


def test_every_key_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keygen"]) == main(["keygen", "other"]) == 0
    assert load_credentials(DEFAULT).certificate != load_credentials("other").certificate


def test_a_directory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "none" / "x")]) == 1
    assert capsys.readouterr().err == f"fluxres-keygen: cannot write {tmp_path}/none/x: No such file or directory\n"


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["keygen", str(tmp_path / "x")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_configuration_is_checked_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.toml"
    config.write_text(f"[bootstrap]\ncert = '{tmp_path}/cert'\nhosts = [{{ host = 'n[1-3]' }}]\n")
    assert main(["config", "check", str(config)]) == 1
    assert "cannot read certificate" in capsys.readouterr().err
    assert main(["keygen", str(tmp_path / "cert")]) == 0
    capsys.readouterr()
    assert main(["config", "check", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: no errors\n"
