"""`[status]`: what it may say, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tlskit import make_cert

from fluxres.base.idset import IdSet
from fluxres.broker.config import Config, ConfigError, Status, load, parse
from fluxres.cli.main import main
from fluxres.status.portfile import keep_port, kept_port
from fluxres.status.settings import (
    StatusFileError,
    StatusSettings,
    check_files,
    make_settings,
    read_context,
    read_token,
    url_of,
)

TOKEN = "0123456789abcdef"


def private(path: Path, text: str = TOKEN + "\n", mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_nothing_said_is_rank_0_on_the_loopback() -> None:
    settings = Config().status_settings()
    assert settings == StatusSettings() == make_settings()
    assert (settings.address, settings.local, settings.serves(0), settings.serves(1)) == (
        "127.0.0.1:0",
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("bind", "host", "port", "local"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("localhost:0", "127.0.0.1", 0, True),
        ("127.0.0.2:1", "127.0.0.2", 1, True),
        ("[::1]:8080", "::1", 8080, True),
        ("[0:0:0:0:0:0:0:1]:8080", "::1", 8080, True),
        ("10.0.0.1:65535", "10.0.0.1", 65535, False),
        ("*:8080", "*", 8080, False),
        ("0.0.0.0:8080", "0.0.0.0", 8080, False),
        ("[::]:8080", "::", 8080, False),
    ],
)
def test_where_it_listens(bind: str, host: str, port: int, local: bool) -> None:
    settings = make_settings(bind=bind, token_file="/t", cert="/c")
    assert (settings.host, settings.port, settings.local) == (host, port, local)


def test_off() -> None:
    assert not make_settings(bind="off").serves(0)


def test_ranks_and_origins() -> None:
    settings = make_settings(ranks="0,2-3", origins=("HTTPS://Flux.example.org:443", "http://[::1]:8080"))
    assert settings.ranks == IdSet([0, 2, 3])
    assert settings.origins == {"https://flux.example.org", "http://[::1]:8080"}


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"bind": "8080"}, "status.bind: '8080' is no address"),
        ({"bind": ""}, "status.bind: '' is no address"),
        ({"bind": "::1:8080"}, "status.bind: '::1:8080' is no address"),
        ({"bind": "127.0.0.1:65536"}, "status.bind: '127.0.0.1:65536' is no address: a port is at most 65535"),
        ({"bind": "n1:8080"}, "status.bind: 'n1' is neither a number"),
        ({"bind": "[1.2.3]:8080"}, "status.bind: '1.2.3' is neither a number"),
        ({"bind": 8080}, "status.bind: Expected `str`, got `int`"),
        ({"ranks": "all"}, "status.ranks: "),
        (
            {"bind": "10.0.0.1:80"},
            "status.token-file: it must be set where status.bind, 10.0.0.1:80, is not a loopback",
        ),
        ({"bind": "*:80", "cert": "/c"}, "status.token-file: it must be set"),
        ({"bind": "*:80", "token-file": "/t"}, "status.cert: it must be set"),
        ({"bind": "*:80", "token-file": "/t", "cert": ""}, "status.cert: it must be set"),
        ({"origins": ["flux.example.org"]}, "status.origins: 'flux.example.org' is no origin"),
        ({"origins": ["https://flux.example.org/"]}, "status.origins: 'https://flux.example.org/' is no origin"),
        ({"origins": ["*"]}, "status.origins: '*' is no origin"),
        ({"origins": ["https://a"] * 65}, "status.origins: there are 65, 64 are allowed"),
        ({"origins": "https://a"}, "status.origins: Expected `array`, got `str`"),
        ({"tokenfile": "/t"}, "status: Object contains unknown field `tokenfile`"),
    ],
)
def test_what_is_refused(table: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"status": table}, "x")  # type: ignore[dict-item]
    assert str(caught.value).startswith(f"cannot use configuration x: {why}")


def test_the_url() -> None:
    assert url_of("::1", 8080, tls=False) == "http://[::1]:8080/"
    assert url_of("n1", 8443, tls=True) == "https://n1:8443/"


# -- files


def test_a_token_is_the_one_line_of_a_private_file(tmp_path: Path) -> None:
    assert read_token(private(tmp_path / "t")) == TOKEN.encode()


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("short\n", 0o600, "a token is 16 to 1024 characters"),
        ("a" * 1025, 0o600, "a token is 16 to 1024 characters"),
        ("0123456789 abcdef\n", 0o600, "without spaces"),
        ("0123456789\nabcdef0\n", 0o600, "without spaces"),
        ("0123456789abcdeé\n", 0o600, "of ASCII"),
        (TOKEN, 0o640, "others can read it, mode 0640"),
        (TOKEN, 0o604, "others can read it, mode 0604"),
    ],
)
def test_tokens_that_are_refused(tmp_path: Path, text: str, mode: int, why: str) -> None:
    path = private(tmp_path / "t", text, mode)
    with pytest.raises(StatusFileError) as caught:
        read_token(path)
    assert str(caught.value).startswith(f"status.token-file: cannot use {path}: ")
    assert why in str(caught.value)


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StatusFileError, match=r"status\.token-file: cannot read .*: No such file"):
        read_token(str(tmp_path / "none"))


def test_a_certificate(tmp_path: Path) -> None:
    path = make_cert(tmp_path / "c")
    assert read_context(path).minimum_version.name == "TLSv1_2"
    Path(path).chmod(0o644)
    with pytest.raises(StatusFileError, match=r"status\.cert: cannot use .*: others can read it"):
        read_context(path)
    with pytest.raises(StatusFileError, match=r"status\.cert: cannot use .*: it holds no certificate"):
        read_context(private(tmp_path / "d", "nonsense"))


def test_both_are_looked_at(tmp_path: Path) -> None:
    token, cert = private(tmp_path / "t"), make_cert(tmp_path / "c")
    check_files(make_settings(token_file=token, cert=cert))
    with pytest.raises(StatusFileError, match=r"status\.cert"):
        check_files(make_settings(token_file=token, cert=str(tmp_path)))


def test_loading_looks_at_the_files_where_this_host_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.toml"
    status = f'[status]\ntoken-file = "{tmp_path}/none"\nranks = "1"\n'
    path.write_text(status)
    with pytest.raises(ConfigError, match=r"x\.toml: status\.token-file: cannot read"):
        load(str(path))
    hosts = 'cert = "{cert}"\nhosts = [{{host = "head"}}, {{host = "n1"}}]\n'.format(cert=make_cert(tmp_path / "c"))
    path.write_text(f"{status}[bootstrap]\n{hosts}")
    monkeypatch.setattr("socket.gethostname", lambda: "head")
    assert load(str(path)).status == Status(token_file=f"{tmp_path}/none", ranks="1")
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    with pytest.raises(ConfigError, match=r"status\.token-file"):
        load(str(path))
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    load(str(path))


def test_config_check_sees_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[status]\nbind = "10.0.0.1:80"\n')
    assert main(["config", "check", str(path)]) == 1
    assert "status.token-file: it must be set" in capsys.readouterr().err


# -- the port that is kept


def test_a_port_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "port"
    assert kept_port(path) == 0
    keep_port(path, 4711)
    keep_port(path, 4712)
    assert kept_port(path) == 4712
    assert [entry.name for entry in tmp_path.iterdir()] == ["port"]


@pytest.mark.parametrize("text", ["", "-1", "65536", "1e3", "99999999", "é", "8080 x"])
def test_a_port_file_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    path = tmp_path / "port"
    path.write_text(text, encoding="utf-8")
    assert kept_port(path) == 0
