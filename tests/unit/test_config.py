"""The configuration: what it may say, and that all else is refused by name before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxres.broker.config import Access, Bootstrap, Broker, Config, ConfigError, Exec, Resource, load, parse

FULL = """
[bootstrap]
size = 4
fanout = 2
[broker]
statedir = "/s"
rundir = "/r"
temporary = true
[exec]
kill-timeout = "1.5m"
journal-limit = 1048576
segment-size = 262144
tmpdir = "/scratch"
cgroup = "/sys/fs/cgroup/x"
[resource]
cores = 8
gpus = 2
[access]
allow-guest-user = true
allow-root-owner = true
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_nothing_said_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path / "x.toml", "")) == Config() == parse({}, "x")


def test_everything_said(tmp_path: Path) -> None:
    assert load(write(tmp_path / "x.toml", FULL)) == Config(
        bootstrap=Bootstrap(size=4, fanout=2),
        broker=Broker(statedir="/s", rundir="/r", temporary=True),
        exec=Exec(
            kill_timeout="1.5m",
            journal_limit=1 << 20,
            segment_size=1 << 18,
            tmpdir="/scratch",
            cgroup="/sys/fs/cgroup/x",
        ),
        resource=Resource(cores=8, gpus=2),
        access=Access(allow_guest_user=True, allow_root_owner=True),
    )


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("[tbon]\n", "", "unknown field `tbon`"),
        ("size = 3\n", "", "unknown field `size`"),
        ("[bootstrap]\nsized = 3\n", "bootstrap", "unknown field `sized`"),
        ("[exec]\nkill_timeout = '5s'\n", "exec", "unknown field `kill_timeout`"),
        ("[bootstrap]\nsize = 0\n", "bootstrap.size", ">= 1"),
        ("[bootstrap]\nsize = 65537\n", "bootstrap.size", "<= 65536"),
        ("[bootstrap]\nsize = '3'\n", "bootstrap.size", "Expected `int`, got `str`"),
        ("[bootstrap]\nsize = true\n", "bootstrap.size", "Expected `int`, got `bool`"),
        ("[bootstrap]\nsize = 1.5\n", "bootstrap.size", "Expected `int`, got `float`"),
        ("[bootstrap]\nfanout = 0\n", "bootstrap.fanout", ">= 1"),
        ("[exec]\njournal-limit = 1000\n", "exec.journal-limit", ">= 262144"),
        ("[exec]\nkill-timeout = 5\n", "exec.kill-timeout", "Expected `str`, got `int`"),
        ("[exec]\nkill-timeout = '5 parsecs'\n", "exec.kill-timeout", "'5 parsecs'"),
        ("[exec]\nkill-timeout = '-5s'\n", "exec.kill-timeout", "'-5s'"),
        ("[resource]\ncores = 0\n", "resource.cores", ">= 1"),
        ("[resource]\ngpus = -1\n", "resource.gpus", ">= 0"),
        ("[broker]\ntemporary = 'yes'\n", "broker.temporary", "Expected `bool`, got `str`"),
        ("exec = 3\n", "exec", "Expected `object`, got `int`"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, key: str, why: str) -> None:
    path = write(tmp_path / "x.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"cannot use configuration {path}: {key}{': ' if key else ''}")
    assert why in str(caught.value)


@pytest.mark.parametrize("text", [b"[bootstrap\n", b"x = \xff\n", b"[a]\n[a]\n"])
def test_what_is_no_toml(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=f"cannot read configuration {path}: "):
        load(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "none.toml"))


def test_a_directory_is_read_file_by_file(tmp_path: Path) -> None:
    write(tmp_path / "b.toml", "[bootstrap]\nfanout = 3\n[resource]\ncores = 2\n")
    write(tmp_path / "a.toml", "[bootstrap]\nsize = 9\n")
    write(tmp_path / "ignored.conf", "[nonsense]\n")
    config = load(str(tmp_path))
    assert config.bootstrap == Bootstrap(size=9, fanout=3)
    assert config.resource.cores == 2


@pytest.mark.parametrize("second", ["[bootstrap]\nsize = 3\n", "[bootstrap]\nsize = 4\n"])
def test_no_key_is_set_twice(tmp_path: Path, second: str) -> None:
    write(tmp_path / "a.toml", "[bootstrap]\nsize = 3\n")
    path = write(tmp_path / "b.toml", second)
    with pytest.raises(ConfigError, match=rf"{path}: bootstrap\.size is set in an earlier file too"):
        load(str(tmp_path))


def test_a_table_and_a_value_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "exec = 3\n")
    write(tmp_path / "b.toml", "[exec]\ntmpdir = '/x'\n")
    with pytest.raises(ConfigError, match="exec is set in an earlier file too"):
        load(str(tmp_path))


def test_an_empty_directory_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no \*\.toml file in it"):
        load(str(tmp_path))
