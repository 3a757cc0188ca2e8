"""Bad input of every kind: a clear error for that one, nothing else affected, nothing lost.

Each test has a bystander, a job that runs all the while and must not notice, and ends with a job that runs as if
nothing had happened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from conftest import MakeInstance
from kit import Expect, Instance, birth, check_invariants, check_job, eventually, process_gone, submission, wait_status

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject
from fluxres.wire.codec import encode
from fluxres.wire.framing import frame
from fluxres.wire.messages import MessageType, request
from fluxres.wire.payload import WireMap, pack, unpack_map

GIGABYTE = 1 << 30
UNTIL = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('undisturbed'); sys.exit(6)"


class Bystander:
    """A job that runs while things go wrong around it."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._end = instance.path / "bystander-end"
        self.jobid = instance.submit(instance.job(UNTIL, str(self._end)))
        instance.wait_marked(self.jobid)
        self._shell = birth(instance.shell_pid(self.jobid))
        self._broker = instance.pid

    def check(self, *, same_broker: bool = True) -> None:
        """End it: it and a job after it are all right."""
        instance = self.instance
        assert birth(self._shell[0]) == self._shell
        assert not same_broker or instance.pid == self._broker
        self._end.touch()
        after = instance.submit(instance.job("print('after')"))
        instance.wait_inactive(self.jobid, after)
        expect = Expect(status=wait_status(6), output=b"undisturbed\n")
        expected = {self.jobid: expect, after: Expect(output=b"after\n")}
        check_invariants(instance, expected, exact=False)


@pytest.fixture
def bystander(instance: Instance) -> Bystander:
    return Bystander(instance)


def one_line(error: bytes, *words: str) -> None:
    """What a command says of an error is one line, has these words, and is no traceback."""
    text = error.decode()
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    assert all(word in text for word in words), text


# --- commands


def test_unknown_command(instance: Instance) -> None:
    done = instance.fluxres("no-such-command", check=False)
    assert done.returncode in (1, 2)
    assert b"no-such-command" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("no-such-program",), 127, ("no-such-program",)),
        (("./not-there",), 127, ("./not-there",)),
        (("./not-executable",), 126, ("./not-executable",)),
        (("/",), 126, ("/",)),
    ],
)
def test_no_program(command: tuple[str, ...], code: int, words: tuple[str, ...], bystander: Bystander) -> None:
    instance = bystander.instance
    (instance.path / "not-executable").write_text("#!/bin/sh\n", encoding="utf-8")
    done = instance.fluxres("run", "--cwd", str(instance.path), *command, check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert all(word in done.stderr.decode() for word in words), done.stderr
    bystander.check()


@pytest.mark.parametrize("cwd", ["/no/such/directory", "/dev/null", "relative/path"])
def test_bad_cwd(cwd: str, bystander: Bystander) -> None:
    instance = bystander.instance
    done = instance.fluxres("run", "--cwd", cwd, "true", check=False)
    assert done.returncode != 0
    assert cwd in done.stderr.decode()
    bystander.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that its own task cannot enter")
def test_output_into_nowhere(bystander: Bystander) -> None:
    instance = bystander.instance
    done = instance.fluxres("run", "--output", "/no/such/directory/out", "true", check=False)
    assert done.returncode != 0
    assert "/no/such/directory/out" in done.stderr.decode()
    bystander.check()


# --- jobspecs


BAD_JOBSPECS: dict[str, Callable[[dict[str, object]], object]] = {
    "a list": lambda spec: [spec],
    "text": lambda spec: "jobspec",
    "nothing": lambda spec: None,
    "no version": lambda spec: {key: value for key, value in spec.items() if key != "version"},
    "version 99": lambda spec: {**spec, "version": 99},
    "version text": lambda spec: {**spec, "version": "1"},
    "no resources": lambda spec: {**spec, "resources": []},
    "resources a map": lambda spec: {**spec, "resources": {"type": "core"}},
    "negative count": lambda spec: {**spec, "resources": [{"type": "slot", "count": -1, "label": "task"}]},
    "no tasks": lambda spec: {**spec, "tasks": []},
    "command is text": lambda spec: {**spec, "tasks": [{"command": "ls", "slot": "task", "count": {"per_slot": 1}}]},
    "command of numbers": lambda spec: {**spec, "tasks": [{"command": [1], "slot": "task", "count": {"per_slot": 1}}]},
    "empty command": lambda spec: {**spec, "tasks": [{"command": [], "slot": "task", "count": {"per_slot": 1}}]},
    "attributes a list": lambda spec: {**spec, "attributes": []},
    "unknown key": lambda spec: {**spec, "surprise": 1},
    "duration text": lambda spec: {**spec, "attributes": {"system": {"duration": "1h"}}},
    "duration negative": lambda spec: {**spec, "attributes": {"system": {"duration": -1}}},
    "cwd a number": lambda spec: {**spec, "attributes": {"system": {"duration": 0, "cwd": 7}}},
    "environment of numbers": lambda spec: {
        **spec,
        "attributes": {"system": {"duration": 0, "cwd": "/", "environment": {"A": 1}}},
    },
    "environment with =": lambda spec: {
        **spec,
        "attributes": {"system": {"duration": 0, "cwd": "/", "environment": {"A=B": "1"}}},
    },
    "a NUL in the command": lambda spec: {
        **spec,
        "tasks": [{"command": ["a\0b"], "slot": "task", "count": {"per_slot": 1}}],
    },
    "shell options text": lambda spec: {
        **spec,
        "attributes": {"system": {"duration": 0, "shell": {"options": "verbose"}}},
    },
}


def test_bad_jobspecs(bystander: Bystander) -> None:
    """Each is refused with a reason, and no jobid is given."""
    instance = bystander.instance
    for name, spoil in BAD_JOBSPECS.items():
        spec = cast("JsonObject", spoil(dict(instance.job())))
        with pytest.raises(RpcError) as caught:
            instance.rpc("job-ingest.submit", submission(spec))
        assert caught.value.errnum in (errno.EINVAL, errno.EPROTO), name
        assert caught.value.text.startswith("cannot "), f"{name}: {caught.value.text}"
    assert set(instance.jobs()) == {bystander.jobid}
    bystander.check()


def test_bad_requests(bystander: Bystander) -> None:
    """Requests that make no sense to their service are answered so."""
    instance = bystander.instance
    bad: list[tuple[str, WireMap, int]] = [
        ("no-such-service.x", {}, errno.ENOSYS),
        ("job-manager.no-such-method", {}, errno.ENOSYS),
        ("job-ingest.submit", {"jobspec": cast("WireMap", instance.job())}, errno.EPROTO),
        ("job-ingest.submit", {**submission(instance.job()), "urgency": "high"}, errno.EPROTO),
        ("job-ingest.submit", {**submission(instance.job()), "key": "k" * 1000}, errno.EPROTO),
        ("job-manager.raise", {"id": "x"}, errno.EPROTO),
        ("job-manager.raise", {"id": 12345, "type": "cancel", "severity": 0, "note": ""}, errno.ENOENT),
        ("job-manager.raise", {"id": -1, "type": "cancel", "severity": 0, "note": ""}, 0),
        ("job-manager.raise", {"id": 1 << 70, "type": "cancel", "severity": 0, "note": ""}, 0),
        ("job-manager.kill", {"id": int(bystander.jobid), "signum": 4096}, errno.EPROTO),
        ("job-manager.kill", {"id": int(bystander.jobid), "signum": -9}, errno.EPROTO),
        ("job-info.lookup", {"id": 12345, "keys": ["eventlog"], "flags": 0}, errno.ENOENT),
        ("job-info.lookup", {"id": int(bystander.jobid), "keys": ["../x"], "flags": 0}, errno.EINVAL),
        ("job-info.lookup", {"id": int(bystander.jobid), "keys": ["guest.."], "flags": 0}, 0),
        ("job-info.lookup", {"id": -1, "keys": ["eventlog"], "flags": 0}, 0),
        ("job-list.list-id", {"id": 12345, "attrs": ["all"]}, errno.ENOENT),
        ("job-list.list-id", {"id": -5, "attrs": ["all"]}, 0),
        ("job-list.list-id", {"id": int(bystander.jobid), "attrs": ["no-such"]}, errno.EINVAL),
        ("job-exec.stdin", {"id": int(bystander.jobid), "data": "*", "encoding": "base64"}, errno.EINVAL),
        ("job-exec.stdin", {"id": int(bystander.jobid), "data": "x", "offset": 1000}, errno.EINVAL),
        ("job-exec.stdin", {"id": -1, "data": "x"}, errno.EPROTO),
        ("kvs.lookup", {"key": "..", "namespace": "primary", "flags": 0}, 0),
        ("kvs.lookup", {"key": "a", "namespace": "no-such", "flags": 0}, 0),
        ("kvs.commit", {"ops": 7}, 0),
        ("attr.get", {"name": 7}, errno.EPROTO),
        ("attr.get", {"name": "no-such"}, errno.ENOENT),
        ("exec.reattach", {"id": -1, "nonce": "", "statedir": "", "cursor": 0}, 0),
    ]
    for topic, payload, errnum in bad:
        with pytest.raises(RpcError) as caught:
            instance.rpc(topic, payload)
        assert errnum in (0, caught.value.errnum), f"{topic} {payload}: {caught.value!r}"
        assert caught.value.text, f"{topic} {payload}: no text"
        assert instance.broker is not None
        assert instance.broker.poll() is None
    bystander.check()


# --- garbage on the broker's socket


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A raw connection to a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))  # blocking: a full backlog is waited for, unix(7)
        sock.settimeout(30)
        yield sock


def until_closed(sock: socket.socket) -> bytes:
    """All that the other end says until it closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def nested(depth: int) -> bytes:
    """CBOR arrays in arrays."""
    return b"\x81" * depth + b"\x00"


def test_garbage_on_the_brokers_socket(bystander: Bystander) -> None:
    instance = bystander.instance
    path = instance.rundir / "local-0"
    rng = random.Random(2)
    response = encode(request("attr.get", pack({"name": "size"}), matchtag=1)._replace(type=MessageType.RESPONSE))
    pieces = [
        struct.pack(">I", GIGABYTE) + b"x" * 1000,
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 0),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        frame(b""),
        frame(b"\x00"),
        frame(nested(100_000)),
        frame(pack({"topic": "attr.get"})),
        frame(response),
        *(frame(rng.randbytes(rng.randrange(1, 200))) for _ in range(30)),
        *(rng.randbytes(rng.randrange(8, 200)) for _ in range(10)),
    ]
    with instance.client() as neighbour:
        for piece in pieces:
            with connected(path) as sock:
                assert sock.recv(1) == b"\0"
                with contextlib.suppress(ConnectionError):
                    sock.sendall(piece)
                    sock.shutdown(socket.SHUT_WR)
                until_closed(sock)
            assert neighbour.call("attr.get", {"name": "size"})["value"] == "1", piece[:40]
    assert str(GIGABYTE) in instance.log, "a frame of 1 GB is refused with a reason"
    bystander.check()


def test_a_client_that_stops_in_the_middle(bystander: Bystander) -> None:
    """Half a frame, and a stream that nobody reads: others are served all the while."""
    instance = bystander.instance
    path = instance.rundir / "local-0"
    whole = frame(encode(request("attr.get", pack({"name": "size"}), matchtag=1)))
    with contextlib.ExitStack() as stack:
        for length in range(0, len(whole), 5):
            sock = stack.enter_context(connected(path))
            sock.sendall(whole[:length])
        assert instance.rpc("attr.get", {"name": "rank"})["value"] == "0"
    with connected(path) as sock:
        assert sock.recv(1) == b"\0"
        for byte in whole:
            sock.sendall(bytes([byte]))
        assert sock.recv(4), "byte by byte is as good as at once"
    bystander.check()


# --- garbage on a shell's socket


def test_garbage_on_a_shells_socket(bystander: Bystander) -> None:
    instance = bystander.instance
    jobdir = instance.jobdir(bystander.jobid)
    eventually((jobdir / "sock").exists, what="the socket")
    rng = random.Random(3)
    short = Path(f"/proc/self/fd/{os.open(jobdir, os.O_RDONLY)}/sock")
    pieces = [
        struct.pack(">I", GIGABYTE) + b"x" * 1000,
        frame(b""),
        frame(pack({"type": "attach", "nonce": "guessed", "from": 1})),
        frame(pack({"type": "attach"})),
        frame(pack({"type": "release"})),
        frame(pack({"type": "kill", "signum": 9})),
        frame(pack({"type": "stdin", "task": 0, "offset": 0, "data": b"x", "eof": True})),
        frame(nested(50_000)),
        *(frame(rng.randbytes(rng.randrange(1, 200))) for _ in range(20)),
        *(rng.randbytes(rng.randrange(8, 200)) for _ in range(10)),
    ]
    for piece in pieces:
        with connected(short) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)
            until_closed(sock)
    with contextlib.ExitStack() as stack:  # and connections that say nothing
        for _ in range(40):
            stack.enter_context(connected(short))
        instance.restart()
        bystander.check(same_broker=False)
    os.close(int(short.parent.name))


def test_a_wrong_nonce_is_refused_with_a_reason(bystander: Bystander) -> None:
    instance = bystander.instance
    dirfd = os.open(instance.jobdir(bystander.jobid), os.O_RDONLY)
    with connected(Path(f"/proc/self/fd/{dirfd}/sock")) as sock:
        sock.sendall(frame(pack({"type": "attach", "nonce": "guessed", "from": 1})))
        answer = unpack_map(until_closed(sock)[4:])
    os.close(dirfd)
    assert answer["type"] == "error"
    assert answer["errnum"] == errno.EPERM
    assert "nonce" in cast("str", answer["text"])
    bystander.check()


# --- journals of dead shells

COUNT = """
for i in range(2000): print("line", i)
sys.stdout.flush()
mark("counted")
time.sleep(float(sys.argv[1]))
"""
COUNTED = b"".join(b"line %d\n" % i for i in range(2000))
SPREAD = """
for i in range(40): os.write(1, b"%02d" % i + b"x" * 20000); time.sleep(0.002)
"""
SPREAD_OUT = b"".join(b"%02d" % i + b"x" * 20000 for i in range(40))


def segments(instance: Instance, jobid: JobId) -> list[Path]:
    """The journal's files, in order."""
    return sorted(instance.jobdir(jobid).glob("journal.*"))


def away(instance: Instance, jobid: JobId) -> None:
    """Kill the broker as soon as the job's task has started."""
    instance.wait_marked(jobid)
    instance.kill()


@pytest.mark.parametrize("cut", [1, 3, 7, 40])
def test_torn_journal_of_a_killed_shell(cut: int, bystander: Bystander) -> None:
    """The tail of a journal is gone: what is before it counts, and the job says why it has no status."""
    instance = bystander.instance
    jobid = instance.submit(instance.job("time.sleep(0.3)" + COUNT, "600"))
    away(instance, jobid)
    eventually(lambda: instance.marked(jobid, "counted"), what="the output")
    shell = instance.shell_pid(jobid)
    eventually(lambda: sum(path.stat().st_size for path in segments(instance, jobid)) > len(COUNTED), what="it all")
    os.kill(shell, signal.SIGKILL)
    eventually(lambda: not instance.processes(FLUX_JOB_ID=f58(jobid, ascii=True)), what="the end of the task")
    last = segments(instance, jobid)[-1]
    os.truncate(last, last.stat().st_size - cut)
    instance.start()
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(status=None, exception="exec"))
    assert COUNTED.startswith(instance.output(jobid))
    bystander.check(same_broker=False)


def test_torn_exit_record(bystander: Bystander) -> None:
    instance = bystander.instance
    jobid = instance.submit(instance.job("time.sleep(0.3)" + COUNT, "0"))
    away(instance, jobid)
    shell = instance.shell_pid(jobid)
    eventually(lambda: process_gone(shell), what="the shell's end")
    last = segments(instance, jobid)[-1]
    os.truncate(last, last.stat().st_size - 2)
    instance.start()
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(status=None, exception="exec", output=COUNTED))
    bystander.check(same_broker=False)


@pytest.mark.parametrize("damage", ["flip", "hole"])
def test_damage_in_the_middle_of_a_journal(damage: str, make_instance: MakeInstance) -> None:
    """Records are damaged or missing, the exit record is not: the job ends, and says that output may be missing."""
    instance = make_instance(settings={"exec": {"segment-size": 256 * 1024, "journal-limit": 1024 * 1024}})
    instance.start()
    bystander = Bystander(instance)
    jobid = instance.submit(instance.job("time.sleep(0.3)" + SPREAD))
    away(instance, jobid)
    shell = instance.shell_pid(jobid)
    eventually(lambda: process_gone(shell), what="the shell's end")
    files = segments(instance, jobid)
    assert len(files) > 2, files
    if damage == "flip":
        with files[1].open("r+b") as file:
            file.seek(100_000)
            file.write(b"damaged")
    else:
        files[1].unlink()
    instance.start()
    instance.wait_inactive(jobid)
    events = instance.eventlog(jobid)
    assert any(event.name == "exception" for event in events), events
    got = instance.output(jobid)
    assert got != SPREAD_OUT
    pieces = [got[i : i + 20002] for i in range(0, len(got), 20002)]
    assert all(piece in SPREAD_OUT for piece in pieces), "what is there is what the task wrote"
    check_job(instance, jobid, Expect(status=None, exception=(instance.exception(jobid) or {}).get("type")))  # type: ignore[arg-type]
    bystander.check(same_broker=False)
