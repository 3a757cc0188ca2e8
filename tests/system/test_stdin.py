"""Standard input through the deaths of brokers: nothing lost, nothing repeated, and its end comes."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import random
import subprocess
import threading
from functools import partial
from typing import Final

import pytest
from kit import PATIENCE, PYTHON, Expect, Instance, check_job, eventually, stopped, wait_status

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId
from fluxres.exec.progress import guest_namespace
from fluxres.session import Session
from fluxres.wire.payload import WireMap

MEGABYTE: Final = 1024 * 1024
DEATHS: Final = 3
SEED: Final = 20
COPY: Final = """
import sys
while data := sys.stdin.buffer.read1(): sys.stdout.buffer.write(data); sys.stdout.buffer.flush()
sys.exit(3)
"""
UNTIL: Final = "while not os.path.exists(sys.argv[1]): time.sleep(0.02)"
DIGEST: Final = """
import hashlib, sys, time
digest, size = hashlib.sha256(), 0
while data := sys.stdin.buffer.read1(4096): digest.update(data); size += len(data)
print(size, digest.hexdigest())
"""


class Writer(threading.Thread):
    """Writes to a pipe as fast as its reader takes it, and closes it."""

    def __init__(self, fd: int, data: bytes) -> None:
        super().__init__()
        self._fd = fd
        self._data = memoryview(data)
        self.written = 0

    def run(self) -> None:
        """Write."""
        with contextlib.suppress(BrokenPipeError):  # its reader has all that it wants
            while self.written < len(self._data):
                self.written += os.write(self._fd, self._data[self.written : self.written + 8192])
        os.close(self._fd)


def has_written(writer: Writer, goal: int) -> bool:
    """Whether so many bytes have been written."""
    return writer.written >= goal


def wait_output(instance: Instance, jobid: JobId, want: bytes) -> None:
    """Wait until exactly this is stored of the job's output."""
    eventually(lambda: instance.output(jobid) == want, what=f"{want[-20:]!r}")


def fed(instance: Instance, data: bytes, *args: str) -> tuple[subprocess.Popen[bytes], Writer]:
    """Start a command with `data` on its standard input."""
    ours, theirs = os.pipe()
    process = instance.popen(*args, stdin=ours)
    os.close(ours)
    writer = Writer(theirs, data)
    writer.start()
    return process, writer


def test_input_over_deaths(instance: Instance) -> None:
    data = random.Random(SEED).randbytes(2 * MEGABYTE)
    process, writer = fed(instance, data, "run", *PYTHON, DIGEST)
    for death in range(DEATHS):
        goal = (death + 1) * len(data) // (DEATHS + 2)
        eventually(partial(has_written, writer, goal), what="input")
        instance.restart()
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert output.decode().split() == [str(len(data)), hashlib.sha256(data).hexdigest()]


def test_what_is_typed_while_the_broker_is_away(instance: Instance) -> None:
    """A person types on; the job gets it all as soon as there is a broker, and the answers come back in order."""
    ours, theirs = os.pipe()
    process = instance.popen("run", *PYTHON, COPY, stdin=ours)
    os.close(ours)
    (jobid,) = eventually(lambda: list(instance.jobs()), what="the job")
    instance.wait_event(jobid, "start")
    typed = b""
    for n in range(4):
        before, after = b"before %d\n" % n, b"after %d \xff\x00\n" % n
        os.write(theirs, before)
        wait_output(instance, jobid, typed + before)
        instance.kill()
        os.write(theirs, after)
        instance.start()
        typed += before + after
        wait_output(instance, jobid, typed)
    instance.kill()
    os.close(theirs)
    instance.start()
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (3, typed), errors
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(status=wait_status(3), output=typed, tasks=0))


def test_input_for_several_tasks(instance: Instance) -> None:
    """Every task gets all of it, each at its own speed."""
    data = random.Random(SEED).randbytes(MEGABYTE // 2)
    pause = "; time.sleep(0.001 * int(os.environ['FLUX_TASK_RANK']))"
    slow = "import os" + DIGEST.replace("size += len(data)", "size += len(data)" + pause)
    process, writer = fed(instance, data, "run", "-n", "3", *PYTHON, slow)
    eventually(lambda: writer.written > len(data) // 3, what="input")
    instance.restart()
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    want = f"{len(data)} {hashlib.sha256(data).hexdigest()}"
    assert output.decode().splitlines() == [want] * 3


def test_a_reader_that_ends_early(instance: Instance) -> None:
    """A task that takes only a part of its input: the rest does no harm, nor does a death of the broker."""
    process, writer = fed(instance, b"x" * MEGABYTE, "run", "head", "-c", "10")
    instance.restart()
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (0, b"x" * 10), errors
    writer.join(PATIENCE)


def store_input(instance: Instance, jobid: JobId, data: bytes, piece: int) -> None:
    """Give a job input in small pieces, and then its end, asking again over every death."""
    with Session(instance.uri) as session:
        for offset in range(0, len(data), piece):
            part = base64.b64encode(data[offset : offset + piece]).decode()
            payload: WireMap = {"id": int(jobid), "data": part, "encoding": "base64", "offset": offset}
            session.call("job-exec.stdin", payload, idempotent=True)
        session.call("job-exec.stdin", {"id": int(jobid), "offset": len(data), "eof": True}, idempotent=True)


def test_many_small_pieces_while_the_shell_does_not_read(instance: Instance) -> None:
    """More pieces than any queue on the way holds: a shell that was stopped gets them all."""
    data = random.Random(SEED).randbytes(3000)
    jobid = instance.submit(instance.job("import hashlib\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"))
    instance.wait_marked(jobid)
    with stopped(instance.shell_pid(jobid)):
        store_input(instance, jobid, data, 2)
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(output=hashlib.sha256(data).hexdigest().encode() + b"\n"))


def test_input_is_taken_once(instance: Instance) -> None:
    """A piece that is sent again, whole or in part, and one behind the end change nothing."""
    jobid = instance.submit(instance.jobspec(*PYTHON, COPY))
    instance.wait_event(jobid, "start")
    pieces = [("abc", 0), ("abc", 0), ("bcde", 1), ("", -1), ("abcdef", 0), ("g", 6)]
    for data, offset in pieces:
        eof = data == "abcdef"
        payload: WireMap = {"id": int(jobid), "data": data, "offset": offset, "eof": eof}
        answer = instance.rpc("job-exec.stdin", payload)
        assert answer["offset"] in (3, 5, 6)
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(status=wait_status(3), output=b"abcdef", tasks=0))


def test_data_that_is_no_base64_is_refused(instance: Instance) -> None:
    jobid = instance.submit(instance.job(COPY))
    for data in ("é", "a", "*"):
        with pytest.raises(RpcError) as refusal:
            instance.rpc("job-exec.stdin", {"id": int(jobid), "data": data, "encoding": "base64"})
        assert refusal.value.errnum == errno.EINVAL
    instance.rpc("job-exec.stdin", {"id": int(jobid), "data": "text", "eof": True})
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect(status=wait_status(3), output=b"text"))


def test_input_that_was_spoilt_in_the_store_harms_nobody(instance: Instance) -> None:
    """Its owner may write to a job's namespace; the job goes on without more input, and so does the instance."""
    end = instance.path / "end"
    jobid = instance.submit(instance.job(UNTIL, str(end)))
    instance.wait_marked(jobid)
    instance.fluxres("kvs", "put", "-N", guest_namespace(jobid), "input=nonsense")
    for _ in range(2):
        with pytest.raises(RpcError) as refusal:
            instance.rpc("job-exec.stdin", {"id": int(jobid), "data": "more"})
        assert refusal.value.errnum == errno.EIO
        instance.restart()
        instance.wait_event(jobid, "flux-restart")
    other = instance.submit(instance.job())
    instance.wait_inactive(other)
    end.touch()
    instance.wait_inactive(jobid)
    check_job(instance, jobid, Expect())


def test_a_job_that_ends_before_it_begins_takes_no_input(instance: Instance) -> None:
    """Whoever waits for it to begin learns that it will not."""
    instance.rpc("job-manager.queue-start", {"start": False})
    jobid = instance.submit(instance.job(COPY))
    with instance.client() as client:
        tag = client.open("job-exec.stdin", {"id": int(jobid), "data": "x"}, streaming=False)
        instance.cancel(jobid)
        reply = client.receive_for(tag, PATIENCE)
    assert reply is not None
    assert reply.error is not None
    assert reply.error.errnum == errno.ENOENT
