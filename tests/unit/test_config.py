"""The configuration: what it may say, and that all else is refused by name before anything starts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from tlskit import make_cert

from fluxres.base.json import JsonObject, JsonValue
from fluxres.broker.config import Access, Broker, Config, ConfigError, Exec, Resource, Tbon, find_rank, load, parse
from fluxres.broker.hosts import Bootstrap, HostEntry
from fluxres.overlay.address import TcpAddress, UnixAddress, is_loopback, parse_tcp
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.tls import CertError

ROOT = Path(__file__).parents[2]
FULL = """
[bootstrap]
size = 4
fanout = 2
default_port = 9000
default_bind = "tcp://eth0:%p"
default_connect = "tcp://e%h:%p"
cert = "{cert}"
hosts = [
    {{ host = "head", bind = "tcp://*:9001", connect = "tcp://10.0.0.1:9001" }},
    {{ host = "n[1-2]" }},
    {{ host = "n7", parent = "n1" }},
]
[tbon]
heartbeat = "500ms"
torpid_min = "2s"
timeout = "1m"
connect_timeout = "3s"
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
    cert = make_cert(tmp_path / "cert")
    assert load(write(tmp_path / "x.toml", FULL.format(cert=cert))) == Config(
        bootstrap=Bootstrap(
            size=4,
            fanout=2,
            hosts=(
                HostEntry(host="head", bind="tcp://*:9001", connect="tcp://10.0.0.1:9001"),
                HostEntry(host="n[1-2]"),
                HostEntry(host="n7", parent="n1"),
            ),
            default_port=9000,
            default_bind="tcp://eth0:%p",
            default_connect="tcp://e%h:%p",
            cert=cert,
        ),
        tbon=Tbon(heartbeat="500ms", torpid_min="2s", timeout="1m", connect_timeout="3s"),
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
        ("[bgp]\n", "", "unknown field `bgp`"),
        ("[tbon]\ntorpid-min = '5s'\n", "tbon", "unknown field `torpid-min`"),
        ("[tbon]\nheartbeat = 1\n", "tbon.heartbeat", "Expected `str`, got `int`"),
        ("[tbon]\nheartbeat = 'often'\n", "tbon.heartbeat", "'often'"),
        ("[tbon]\nheartbeat = '0'\n", "tbon.heartbeat", "0 is not more than 0s"),
        ("[tbon]\nheartbeat = '5ms'\n", "tbon.heartbeat", "5ms is less than 10ms"),
        ("[tbon]\nheartbeat = '5s'\n", "tbon.torpid_min", "5s is not more than tbon.heartbeat, 5s"),
        ("[tbon]\ntorpid_min = '30s'\n", "tbon.timeout", "20s is not more than tbon.torpid_min, 30s"),
        ("[tbon]\ntimeout = 'infinity'\n", "tbon.timeout", "it must be finite"),
        ("[tbon]\nconnect_timeout = '0s'\n", "tbon.connect_timeout", "0s is not more than 0s"),
        ("[tbon]\ntopo = 'binomial'\n", "tbon.topo", "'binomial'"),
        ("[tbon]\ntopo = 'kary:0'\n", "tbon.topo", "fanout 0"),
        ("[exec]\nkill-timeout = 'inf'\n", "exec.kill-timeout", "it must be finite"),
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


# -- the tree and its times


def test_the_tree_is_kary_unless_something_else_is_said() -> None:
    assert str(parse({"bootstrap": {"size": 9}}, "x").topology()) == "kary:32"
    config = parse({"bootstrap": {"size": 9, "fanout": 4}, "tbon": {"topo": "kary:2"}}, "x")
    assert str(config.topology()) == "kary:2"
    assert config.topology().size == config.size == 9


def test_the_times_are_seconds() -> None:
    assert Config().tbon_settings() == TbonSettings()
    assert parse({"tbon": {"heartbeat": "20ms", "timeout": "1m"}}, "x").tbon_settings() == TbonSettings(
        heartbeat=0.02, torpid_min=5.0, timeout=60.0, connect_timeout=5.0
    )


# -- hosts

CLUSTER: JsonObject = {"cert": "/c", "hosts": [{"host": "head"}, {"host": "n[1-3]"}]}


def test_an_instance_of_one_machine() -> None:
    config = parse({"bootstrap": {"size": 3}, "broker": {"rundir": "/r"}}, "x")
    assert (config.size, str(config.hostlist("me")), config.host_of(2), config.rank_of("me")) == (
        3,
        "me,me,me",
        None,
        None,
    )
    addresses = config.addresses()
    assert addresses.bind(2) == addresses.connect(2) == UnixAddress("/r/tbon-2")
    assert addresses.cert is None
    assert find_rank(Config(), "me") == 0
    with pytest.raises(ConfigError, match=r"bootstrap\.hosts is not set, so say it with --rank"):
        find_rank(config, "me")


def test_an_instance_of_many_hosts() -> None:
    config = parse({"bootstrap": CLUSTER}, "x")
    assert (config.size, str(config.hostlist("me")), config.host_of(2)) == (4, "head,n[1-3]", "n2")
    assert [config.rank_of(host) for host in ("head", "n3", "n3.cluster.example", "n4")] == [0, 3, 3, None]
    addresses = config.addresses()
    assert addresses.bind(0) == TcpAddress("*", 8050)
    assert addresses.connect(3) == TcpAddress("n3", 8050)
    assert addresses.cert == "/c"
    assert str(config.topology()) == "kary:32"
    with pytest.raises(ConfigError, match=r"host n9 is not in bootstrap\.hosts \(head,n\[1-3\]\); add it there"):
        find_rank(config, "n9")


def test_addresses_of_hosts_and_their_tokens() -> None:
    bootstrap: JsonObject = {
        "cert": "/c",
        "default_port": 9000,
        "default_bind": "tcp://eth0:%p",
        "default_connect": "tcp://e%h:%p",
        "hosts": [
            {"host": "head", "bind": "tcp://[fe80::1%%eth1]:9001", "connect": "tcp://10.0.0.1:1%p"},
            {"host": "n[1-2]"},
        ],
    }
    addresses = parse({"bootstrap": bootstrap}, "x").addresses()
    assert addresses.bind(0) == TcpAddress("fe80::1%eth1", 9001)
    assert addresses.connect(0) == TcpAddress("10.0.0.1", 19000)
    assert addresses.bind(2) == TcpAddress("eth0", 9000)
    assert addresses.connect(2) == TcpAddress("en2", 9000)


def test_parents_make_the_tree() -> None:
    hosts: JsonValue = [
        {"host": "head"},
        {"host": "rack[1-2]"},
        {"host": "a[1-2]", "parent": "rack1"},
        {"host": "b", "parent": "rack2"},
    ]
    topology = parse({"bootstrap": {"cert": "/c", "hosts": hosts}}, "x").topology()
    assert [topology.parent(rank) for rank in range(topology.size)] == [None, 0, 0, 1, 1, 2]
    assert str(topology) == "custom"


def test_loopback_addresses_need_no_certificate() -> None:
    hosts: JsonValue = [
        {"host": name, "bind": f"tcp://{at}:{port}", "connect": f"tcp://{at}:{port}"}
        for name, at, port in (("a", "127.0.0.1", 9001), ("b", "[::1]", 9002), ("c", "localhost", 9003))
    ]
    assert parse({"bootstrap": {"hosts": hosts}}, "x").size == 3
    assert parse({"bootstrap": {"hosts": [{"host": "lonely"}]}}, "x").size == 1


@pytest.mark.parametrize(
    ("bootstrap", "key", "why"),
    [
        (
            {"hosts": [{"host": "a"}, {"host": "b"}]},
            "cert",
            "it is needed, for tcp://*:8050 of a is not a loopback address",
        ),
        ({"hosts": [{"bind": "a"}]}, "hosts[0]", "missing required field `host`"),
        ({"hosts": [{"host": "a", "port": 3}]}, "hosts[0]", "unknown field `port`"),
        ({"hosts": "n[1-3]"}, "hosts", "Expected `array`, got `str`"),
        ({**CLUSTER, "size": 3}, "size", "it is 3, and bootstrap.hosts names 4 hosts"),
        ({**CLUSTER, "default_port": 0}, "default_port", ">= 1"),
        ({**CLUSTER, "default_bind": "eth0:%p"}, "default_bind", "'eth0:8050' is no address: write tcp://HOST:PORT"),
        ({**CLUSTER, "default_bind": "tcp://eth0:%x"}, "default_bind", "'tcp://eth0:%x' is no address"),
        ({**CLUSTER, "default_connect": "tcp://%h:99999"}, "default_connect", "a port is 1 to 65535"),
        ({**CLUSTER, "default_connect": "tcp://*:%p"}, "default_connect", "an address to bind, none to connect to"),
        ({**CLUSTER, "default_connect": "tcp://x:%p"}, "hosts", "head and n1 have the same address, tcp://x:8050"),
        ({"cert": "/c", "hosts": [{"host": "a[1-"}]}, "hosts[0].host", "a[1-"),
        ({"cert": "/c", "hosts": [{"host": "a"}, {"host": ""}]}, "hosts[1].host", "'' names no host"),
        ({"cert": "/c", "hosts": [{"host": "a[1-3]"}, {"host": "a2"}]}, "hosts", "a2 is in it twice"),
        ({"cert": "/c", "hosts": [{"host": "a[1-65537]"}]}, "hosts", "more than 65536 hosts"),
        ({"cert": "/c", "hosts": [{"host": "a", "bind": "tcp://::1:80"}]}, "hosts[0].bind", "square brackets"),
        ({"cert": "/c", "hosts": [{"host": "a"}, {"host": "b", "parent": "c"}]}, "hosts[1].parent", "'c' is not among"),
        ({"cert": "/c", "hosts": [{"host": "a", "parent": "b"}, {"host": "b"}]}, "hosts[0].parent", "the root"),
    ],
)
def test_hosts_that_are_refused(bootstrap: JsonObject, key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"bootstrap": bootstrap}, "x")
    assert str(caught.value).startswith(f"cannot use configuration x: bootstrap.{key}: ")
    assert why in str(caught.value)


def test_a_tree_that_is_none() -> None:
    hosts: JsonValue = [{"host": "a"}, {"host": "b", "parent": "c"}, {"host": "c", "parent": "b"}]
    with pytest.raises(ConfigError, match=r"^cannot use configuration x: bootstrap\.hosts: cannot build the tree"):
        parse({"bootstrap": {"cert": "/c", "hosts": hosts}}, "x")
    with pytest.raises(ConfigError, match=r"tbon\.topo: the parents in bootstrap\.hosts make the tree"):
        parse({"bootstrap": {"cert": "/c", "hosts": hosts}, "tbon": {"topo": "kary:2"}}, "x")


def test_the_certificate_is_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "x.toml", f"[bootstrap]\ncert = '{tmp_path}/cert'\n")
    with pytest.raises(CertError, match="No such file"):
        load(path)
    make_cert(tmp_path / "cert")
    load(path)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *[(host, True) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")],
        *[
            (host, False)
            for host in ("*", "0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost.example")
        ],
    ],
)
def test_what_is_a_loopback_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    "text", ["tcp://a:1", "tcp://*:8050", "tcp://10.0.0.1:65535", "tcp://[::1]:80", "tcp://[fe80::1%eth0]:9"]
)
def test_an_address_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_tcp(text)) == text


def test_the_example_is_a_configuration() -> None:
    tables = tomllib.loads((ROOT / "examples" / "systemd" / "fluxres.toml").read_text())
    config = parse(tables, "the example")
    assert (config.size, config.topology().maxlevel) == (129, 2)
    assert config.tbon_settings() == TbonSettings()
