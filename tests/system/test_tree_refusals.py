"""Who may not join the tree, and is told so: a reason in its parent's log, and one at its own end.

What a person has to mend ends the broker that is refused, with exit status 1; what may pass, such as another broker of
the same rank, or another machine's certificate, it says and tries again. The tree itself goes on as if nothing were.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeInstance, MakeNetwork
from kit import PATIENCE, check_invariants, eventually
from netkit import Network, Stray, births, check_alive, loopback_hosts, start_on, wait_log, waited

from fluxres.overlay.control import HELLO, REFUSED, reason_of
from fluxres.overlay.hello import PROTOCOL, Hello
from fluxres.overlay.sockets import PREFACE, WELCOME
from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import Message, control, request

SIZE = 3
LAST = 2
"""The rank that is not running, for others to try to be it."""
PORT = 8050
NOT_THE_SAME = "bootstrap.cert is not the same file at both ends"
HANDSHAKE = "2s"
LEFT = "it closed the connection in the handshake; its log says why"
"""What a dialler says that got no word from the acceptor: one end speaks TLS, and the other does not."""


@pytest.fixture
def network(make_network: MakeNetwork) -> Network:
    """Ranks 0 and 1 of three, on Unix sockets."""
    made = make_network(size=SIZE, settings={"tbon": {"connect_timeout": HANDSHAKE}})
    made.spawn(0, 1)
    made.wait_online([0, 1])
    return made


@pytest.fixture
def encrypted(make_network: MakeNetwork, tmp_path: Path) -> Network:
    """Ranks 0 and 1 of three, on loopback addresses with a certificate."""
    made = make_network(
        size=SIZE,
        hosts=loopback_hosts(SIZE),
        cert=tmp_path / "instance.cert",
        settings={"tbon": {"connect_timeout": HANDSHAKE}},
    )
    made.spawn(0, 1)
    made.wait_online([0, 1])
    return made


def check_refused(network: Network, stray: Stray, why: str) -> None:
    """A broker of the last rank was refused for good, and both ends have said why; the right one may still join."""
    assert stray.died() == 1
    assert f"fluxres-broker: cannot join rank 0: refused: rank {LAST} {why}" in stray.log
    assert "Traceback" not in stray.log
    assert f"refusing rank {LAST} at unix:pid {stray.process.pid}: rank {LAST} {why}" in network.log_of(0)
    check_well(network)


def check_well(network: Network) -> None:
    """The tree has noticed nothing, and the broker that it lacks may join."""
    uuids = network.uuids([0, 1])
    network.spawn(LAST)
    network.wait_online()
    assert network.uuids([0, 1]) == uuids


# --- brokers that are not quite right


def test_another_protocol_version(network: Network) -> None:
    patch = "import fluxres.broker.incarnation as incarnation\nincarnation.PROTOCOL = 99"
    check_refused(network, network.stray(LAST, before=patch), "speaks version 99 of the overlay protocol (")
    assert f"its parent version {PROTOCOL} (" in network.log_of(0)


def test_another_size(network: Network) -> None:
    config = network.variant("size", (f"size = {SIZE}", "size = 4"))
    check_refused(network, network.stray(LAST, config), f"has the size 4, its parent {SIZE}")


def test_another_topology(network: Network) -> None:
    config = network.variant("fanout", ("fanout = 2", "fanout = 7"))
    check_refused(network, network.stray(LAST, config), "has the topology ")


def test_a_statedir_of_another_instance(network: Network, make_instance: MakeInstance) -> None:
    other = make_instance("other")
    other.start()
    other.stop()
    shutil.copytree(other.statedir, network.path / "foreign" / str(LAST))
    config = network.variant("foreign", (f'statedir = "{network.base}"', f'statedir = "{network.path}/foreign"'))
    check_refused(network, network.stray(LAST, config), "belongs to the instance ")


def test_a_rank_that_the_instance_has_not(network: Network) -> None:
    stray = network.stray(SIZE)
    assert stray.died() == 1
    assert stray.log == f"fluxres-broker: cannot be rank {SIZE}: the instance has {SIZE} ranks\n"


def test_a_second_broker_on_the_same_statedir(network: Network) -> None:
    stray = network.stray(1)
    assert stray.died() == 1
    holder = network.brokers[1].pid
    statedir = network.rank_statedir(1)
    assert stray.log == (
        f"fluxres-broker: cannot use statedir {statedir}: another broker (pid {holder}) is running on it\n"
    )
    check_well(network)


def test_a_second_broker_of_the_same_rank_with_another_statedir(network: Network) -> None:
    """It is refused while the first one is online, and takes its place when that is gone."""
    config = network.variant("second", (f'statedir = "{network.base}"', f'statedir = "{network.path}/second"'))
    before = network.uuids([0, 1])
    stray = network.stray(1, config)
    stray.wait_log("cannot join rank 0: refused: rank 1 is online already, from the statedir ")
    wait_log(network, 0, f"refusing rank 1 at unix:pid {stray.process.pid}: rank 1 is online already")
    assert stray.process.poll() is None
    assert network.uuids([0, 1]) == before
    network.kill_rank(1)
    eventually(lambda: network.attribute(1, "uuid") != before[1], what="the second broker")
    assert network.attribute(1, "broker.pid") == str(stray.process.pid)
    network.wait_online([0, 1])


# --- whatever else comes to the socket


class Talker:
    """A stranger at the socket of rank 0, who may know how to begin."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder()
        self._sock.settimeout(PATIENCE)

    def say(self, data: bytes) -> None:
        """Send bytes."""
        self._sock.sendall(data)

    def shake(self) -> None:
        """Do the handshake of brokers."""
        self.say(PREFACE)
        assert self._sock.recv(1) == WELCOME

    def hear(self) -> Message | None:
        """The next message; None at the end of the connection."""
        while data := self._read():
            for body in self._decoder.feed(data):
                return decode(body)
        return None

    def _read(self) -> bytes:
        try:
            return self._sock.recv(4096)
        except ConnectionResetError:
            return b""


@pytest.fixture
def talker(network: Network) -> Iterator[Talker]:
    """Connected to rank 0."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(f"{network.rundir}/tbon-0")
        yield Talker(sock)


def hello(network: Network, rank: int, *, protocol: int = PROTOCOL) -> bytes:
    """The frame of a hello that is right, but for what is given."""
    mine = Hello(
        rank=rank,
        uuid="11111111-1111-4111-8111-111111111111",
        protocol=protocol,
        software="0.0",
        instance=network.attribute(0, "instance-id"),
        statedir="22222222-2222-4222-8222-222222222222",
        incarnation=1,
        boot_id="",
        host="nowhere",
        size=SIZE,
        topo="kary:2",
        owner=os.getuid(),
    )
    return frame(encode(control(HELLO, payload=mine.encode())))


@pytest.mark.parametrize(
    ("rank", "protocol", "errnum", "why"),
    [
        (LAST, PROTOCOL + 1, errno.EPROTO, f"speaks version {PROTOCOL + 1} of the overlay protocol"),
        (0, PROTOCOL, errno.EINVAL, "is not a child of rank 0 in kary:2 of size 3"),
        (7, PROTOCOL, errno.EINVAL, "is not a child of rank 0 in kary:2 of size 3"),
        (1, PROTOCOL, errno.EADDRINUSE, "is online already, from the statedir "),
    ],
    ids=["version", "our own rank", "no such rank", "rank in use"],
)
def test_a_hello_that_is_refused(
    network: Network, talker: Talker, rank: int, protocol: int, errnum: int, why: str
) -> None:
    talker.shake()
    talker.say(hello(network, rank, protocol=protocol))
    answer = talker.hear()
    assert answer is not None
    assert (answer.control, answer.matchtag) == (REFUSED, errnum)
    assert f"rank {rank} {why}" in reason_of(answer)
    wait_log(network, 0, f"rank {rank} {why}")
    check_well(network)


@pytest.mark.parametrize(
    ("said", "shakes", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", False, "it is no broker: it began with b'GET / HT'"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", False, "it speaks TLS"),
        (b"\xff" * 4096, True, "cannot read a frame of 4294967295 bytes"),
        (frame(b"\x00\x01\x02"), True, "cannot decode"),
        (frame(encode(request("broker.ping", matchtag=1))), True, "a request message came before the hello"),
        (frame(encode(control(HELLO, payload=b"\xa0"))), True, "cannot read a hello"),
        (b"", False, "no hello within 2s"),
        (b"", True, "no hello within 2s"),
    ],
    ids=["http", "tls", "long frame", "no cbor", "request first", "empty hello", "silence", "silence after welcome"],
)
def test_what_is_no_broker(network: Network, talker: Talker, said: bytes, shakes: bool, why: str) -> None:
    if shakes:
        talker.shake()
    talker.say(said)
    assert talker.hear() is None
    wait_log(network, 0, why)
    assert "refusing unix:pid" in network.log_of(0)
    check_well(network)


# --- TCP and TLS


def address(network: Network, rank: int) -> tuple[str, int]:
    """Where a broker with an address listens."""
    return network.attribute(rank, "hostname"), PORT


def test_brokers_over_tls_run_jobs(encrypted: Network) -> None:
    encrypted.spawn(LAST)
    encrypted.wait_online()
    jobs = {start_on(encrypted, 0, 1, LAST): waited(3), start_on(encrypted, LAST): waited()}
    tasks = births(encrypted)
    before = encrypted.uuids()
    encrypted.kill_rank(0)
    encrypted.spawn(0)
    eventually(lambda: not set(encrypted.uuids().values()) & set(before.values()), what="new incarnations")
    encrypted.wait_online()
    check_alive(tasks)
    (encrypted.path / "end").touch()
    check_invariants(encrypted, jobs)


def test_a_strangers_certificate(encrypted: Network) -> None:
    cert = encrypted.path.parent / "stranger.cert"
    encrypted.fluxres("keygen", str(cert))
    stray = encrypted.stray(LAST, encrypted.variant("stranger", ("instance.cert", "stranger.cert")))
    stray.wait_log(f"cannot join rank 0: it shows a certificate that is not this instance's: {NOT_THE_SAME}")
    wait_log(encrypted, 0, f"it does not take our certificate: {NOT_THE_SAME}")
    assert stray.process.poll() is None, "it is to try again: the other end may be the one that is wrong"
    stray.process.kill()
    check_well(encrypted)


def test_a_client_with_a_strangers_certificate_that_takes_ours(encrypted: Network) -> None:
    cert = encrypted.path / "stranger.cert"
    encrypted.fluxres("keygen", str(cert))
    with pytest.raises(ssl.SSLError):
        talk_tls(encrypted, cert)
    wait_log(encrypted, 0, "it shows a certificate that is not this instance's")
    check_well(encrypted)


def test_a_client_without_a_certificate(encrypted: Network) -> None:
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        talk_tls(encrypted, None)
    wait_log(encrypted, 0, "it shows no certificate")
    check_well(encrypted)


def talk_tls(network: Network, cert: Path | None) -> None:
    """Speak TLS to rank 0, whose certificate is not looked at, with this one or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if cert is not None:
        context.load_cert_chain(cert)
    with socket.create_connection(address(network, 0), PATIENCE) as plain, context.wrap_socket(plain) as tls:
        tls.sendall(PREFACE)
        tls.recv(1)


def test_plain_tcp_to_a_tls_port(encrypted: Network) -> None:
    config = encrypted.variant("plain", (f'cert = "{encrypted.path.parent}/instance.cert"', ""))
    stray = encrypted.stray(LAST, config)
    stray.wait_log(f"cannot join rank 0: {LEFT}")
    wait_log(encrypted, 0, "it does not speak TLS: bootstrap.cert is set here and not there, or it is no broker")
    stray.process.kill()
    check_well(encrypted)


def test_garbage_to_a_tls_port(encrypted: Network) -> None:
    with socket.create_connection(address(encrypted, 0), PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        talker = Talker(sock)
        assert talker.hear() is None
    wait_log(encrypted, 0, "it does not speak TLS: it is no broker")
    check_well(encrypted)


def test_tls_to_a_plain_port(make_network: MakeNetwork, tmp_path: Path) -> None:
    network = make_network(size=SIZE, hosts=loopback_hosts(SIZE))
    network.spawn(0, 1)
    network.wait_online([0, 1])
    network.fluxres("keygen", str(tmp_path / "c.cert"))
    stray = network.stray(LAST, network.variant("tls", ("[tbon]", f'cert = "{tmp_path}/c.cert"\n[tbon]')))
    stray.wait_log(f"cannot join rank 0: {LEFT}")
    wait_log(network, 0, "it speaks TLS: bootstrap.cert is set there and not here")
    stray.process.kill()
    check_well(network)


def test_the_wrong_address_of_a_parent(make_network: MakeNetwork) -> None:
    """Rank 3's configuration takes rank 0's address for that of its parent, rank 1."""
    network = make_network(size=4, hosts=loopback_hosts(4))
    network.spawn(0, 1, 2)
    network.wait_online([0, 1, 2])
    base = network.attribute(0, "hostname").rpartition(".")[0]
    swapped = f'host = "{base}.2"\n[[bootstrap.hosts]]\nhost = "{base}.1"\n[[bootstrap.hosts]]\nhost = "{base}.[3-4]"'
    stray = network.stray(3, network.variant("swapped", (f'host = "{base}.[1-4]"', swapped)))
    assert stray.died() == 1
    why = "rank 3 is not a child of rank 0 in kary:2 of size 4: check the hosts in its configuration"
    assert f"cannot join rank 1: refused: {why}" in stray.log
    assert why in network.log_of(0)
    network.spawn(3)
    network.wait_online()
