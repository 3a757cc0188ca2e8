"""The status endpoint of a real broker: what it answers, who may ask, and what readers see when it is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import pytest
from conftest import MakeInstance, MakeTree
from kit import Instance, eventually, stopped
from statuskit import STATUS, Answer, Closed, Picture, Reader, Refused, address_of, ask, uri_of

from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject, JsonValue
from fluxres.cli.keygen import generate, write

TOKEN: Final = "tell-nobody-this-token"
TOPICS: Final = ("instance", "overlay", "resources", "jobs", "events")
HELD: Final = """
sys.stdout.write('begun ')
sys.stdout.flush()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
print('done')
"""
GUEST: Final = 12_345


def subscribed(
    uri: str, *, position: list[JsonValue] | None = None, jobs: JsonObject | None = None
) -> tuple[Reader, Picture]:
    """A reader of everything but the log, and what it knows."""
    reader, picture = Reader(uri), Picture()
    reader.hear_type("hello")
    asked: JsonObject = {"type": "subscribe", "id": 1, "topics": list(TOPICS)}
    if position is not None:
        asked["position"] = position
    if jobs is not None:
        asked["jobs"] = jobs
    reader.say(**asked)
    return reader, picture


def dec(jobid: JobId) -> str:
    return str(int(jobid))


def test_what_is_answered(instance: Instance) -> None:
    uri = uri_of(instance)
    assert (ask(uri, "/healthz").body, ask(uri, "/readyz").body) == (b"ok\n", b"ok\n")
    assert ask(uri, "/api/access").json == {"access": "ok"}
    page = ask(uri, "/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert ask(uri, "/", method="HEAD").headers["Content-Length"] == str(len(page.body))
    assert ask(uri, "/", headers={"If-None-Match": page.headers["ETag"]}).status == 304
    assert ask(uri, "/metrics").headers["Content-Type"].startswith("text/plain; version=")
    assert ask(uri, "/nothing").status == 404
    jobid = instance.submit(instance.job())
    instance.wait_inactive(jobid)

    def whole() -> JsonObject | None:
        status = ask(uri, "/api/status").json
        STATUS.validate(status)
        documents = cast("dict[str, dict[str, JsonObject]]", status["docs"])
        assert set(documents) == {*TOPICS, "log"}
        job = documents["jobs"].get(dec(jobid), {})
        return job if job.get("state") == "INACTIVE" else None

    assert eventually(whole, what="the job")["id"] == f58(jobid)


def test_the_life_of_a_job(instance: Instance, tmp_path: Path) -> None:
    """Its document changes with it; followed, it tells its events and its output, and that it has ended."""
    gate = tmp_path / "gate"
    reader, picture = subscribed(uri_of(instance))
    with reader:
        jobid = instance.submit(instance.job(HELD, str(gate)))
        picture.follow(reader, "jobs", dec(jobid), "state", "RUN")
        reader.say(type="follow", id=2, job=f58(jobid))
        logs: dict[str, list[JsonObject]] = {}
        while b"".join(_data(logs)) != b"begun ":
            _take(reader.hear_type("delta", "job", "snapshot"), picture, logs)
        gate.touch()
        picture.follow(_Both(reader, picture, logs), "jobs", dec(jobid), "state", "INACTIVE")
        while (message := reader.hear_type("delta", "job", "ended"))["type"] != "ended":
            _take(message, picture, logs)
    assert message["id"] == 2
    assert b"".join(_data(logs)) == b"begun done\n"
    assert [event["name"] for event in logs["eventlog"]] == instance.events(jobid)
    assert [event["name"] for event in logs["guest.exec.eventlog"]] == instance.events(jobid, "guest.exec.eventlog")
    assert picture.documents["jobs"][dec(jobid)]["result"] == "COMPLETED"


class _Both:
    """A reader whose messages about a job go to `logs`."""

    def __init__(self, reader: Reader, picture: Picture, logs: dict[str, list[JsonObject]]) -> None:
        self._reader, self._picture, self._logs = reader, picture, logs

    def hear(self) -> JsonObject:
        """The next message about documents."""
        while (message := self._reader.hear())["type"] == "job":
            _take(message, self._picture, self._logs)
        return message


def _take(message: JsonObject, picture: Picture, logs: dict[str, list[JsonObject]]) -> None:
    if message["type"] == "job":
        logs.setdefault(cast("str", message["path"]), []).extend(cast("list[JsonObject]", message["events"]))
    else:
        picture.take(message)


def _data(logs: dict[str, list[JsonObject]]) -> Iterator[bytes]:
    for event in logs.get("guest.output", ()):
        context = cast("dict[str, str]", event.get("context", {}))
        if event["name"] == "data" and context["stream"] == "stdout":
            yield context.get("data", "").encode()


def test_a_job_is_followed_on_from_a_position(instance: Instance) -> None:
    jobid = instance.submit(instance.job("print(1)"))
    instance.wait_inactive(jobid)

    def read(position: JsonObject | None) -> dict[str, list[tuple[str, list[int]]]]:
        """Path -> names of events, with the position after each message."""
        found: dict[str, list[tuple[str, list[int]]]] = {}
        with Reader(uri_of(instance)) as reader:
            reader.hear_type("hello")
            reader.say(type="follow", id=7, job=dec(jobid), **({} if position is None else {"position": position}))
            while (message := reader.hear_type("job", "ended"))["type"] != "ended":
                names = [cast("str", event["name"]) for event in cast("list[JsonObject]", message["events"])]
                at = cast("list[int]", message["position"])
                found.setdefault(cast("str", message["path"]), []).append((",".join(names), at))
        return found

    whole = read(None)
    rest = read({path: [*parts[0][1]] for path, parts in whole.items()})
    for path, parts in whole.items():
        names = ",".join(part[0] for part in parts[1:])
        assert ",".join(part[0] for part in rest.get(path, [])) == names, path


def test_a_filter(instance: Instance, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    reader, picture = subscribed(uri_of(instance), jobs={"states": ["running"]})
    with reader:
        first = instance.submit(instance.job(HELD, str(gate)))
        picture.follow(reader, "jobs", dec(first))
        gate.touch()
        while dec(first) in picture.documents["jobs"]:
            picture.take(reader.hear())


def test_a_reader_resumes(instance: Instance) -> None:
    """It is told what it missed, by one delta from the position that it had."""
    uri = uri_of(instance)
    reader, picture = subscribed(uri)
    with reader:
        picture.take(reader.hear_type("snapshot"))
    jobid = instance.submit(instance.job())
    instance.wait_inactive(jobid)
    reader, _ = subscribed(uri, position=picture.position)
    with reader:
        message = reader.hear_type("delta")
        assert message["prev"] == cast("list[int]", picture.position)[1]
        picture.take(message)
        picture.follow(reader, "jobs", dec(jobid), "state", "INACTIVE")


def test_kill_9(instance: Instance, tmp_path: Path) -> None:
    """Same address, and a new snapshot that says why; the job that ran is there, and goes on."""
    uri, gate = uri_of(instance), tmp_path / "gate"
    reader, picture = subscribed(uri)
    with reader:
        jobid = instance.submit(instance.job(HELD, str(gate)))
        picture.follow(reader, "jobs", dec(jobid), "state", "RUN")
        instance.kill()
        with pytest.raises(Closed) as closed:
            while True:
                reader.hear()
        assert closed.value.code == 1006
    instance.start()
    assert uri_of(instance) == uri
    reader, again = subscribed(uri, position=picture.position)
    with reader:
        again.take(reader.hear_type("snapshot"))
        assert again.why == "restarted"
        again.follow(reader, "jobs", dec(jobid), "restarts", 1)
        gate.touch()
        again.follow(reader, "jobs", dec(jobid), "result", "COMPLETED")
    assert instance.output(jobid) == b"begun done\n"


def test_a_clean_stop_says_so(instance: Instance) -> None:
    with Reader(uri_of(instance)) as reader:
        reader.hear_type("hello")
        assert instance.stop() == 0
        with pytest.raises(Closed) as closed:
            reader.hear()
    assert closed.value.code == 1001


def test_another_rank_shows_the_same(make_tree: MakeTree) -> None:
    """It says so when it loses its parent (1012); its process lives on, is not ready, and then shows it again."""
    tree = make_tree(size=2, settings={"status": {"ranks": "0-1"}})
    tree.start_all()
    uri = tree.attribute(1, "status.uri")
    assert uri != uri_of(tree)
    reader, picture = subscribed(uri)
    with reader:
        jobid = tree.submit(tree.job())
        picture.follow(reader, "jobs", dec(jobid), "state", "INACTIVE")
        tree.kill_rank(0)
        with pytest.raises(Closed) as closed:
            while True:
                reader.hear()
    assert closed.value.code == 1012
    assert ask(uri, "/healthz").status == 200
    assert (ask(uri, "/readyz").status, ask(uri, "/api/status").status) == (503, 503)
    with pytest.raises(Refused, match="503"):
        Reader(uri)
    tree.spawn(0)
    eventually(lambda: ask(uri, "/readyz").status == 200, what="readiness")
    reader, again = subscribed(uri, position=picture.position)
    with reader:
        again.take(reader.hear_type("snapshot"))
    assert again.why == "restarted"


def test_a_broker_that_stands_still(instance: Instance) -> None:
    """Readers wait, and are told what happened when it goes on."""
    reader, picture = subscribed(uri_of(instance))
    with reader:
        picture.take(reader.hear_type("snapshot"))
        with stopped(instance.pid):
            reader.say(type="follow", id=3, job="1")
        while reader.hear()["type"] != "error":
            pass


# -- where it listens, and who may ask


@contextmanager
def other_user(uri: str, path: str) -> Iterator[Callable[[], tuple[int, bytes]]]:
    """A client of another uid; asks when called."""
    program = (
        "import os, sys, http.client, encodings.idna\n"
        f"os.setgroups([]); os.setuid({GUEST})\n"
        "host, port, path = sys.argv[1:]\n"
        "asking = http.client.HTTPConnection(host, int(port)); asking.request('GET', path)\n"
        "answer = asking.getresponse(); print(answer.status, answer.read().decode())\n"
    )
    host, port = address_of(uri)

    def run() -> tuple[int, bytes]:
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", program, host, str(port), path], capture_output=True, check=True
        )
        status, _, body = done.stdout.partition(b" ")
        return int(status), body

    yield run


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_other_users_of_this_machine(instance: Instance) -> None:
    uri = uri_of(instance)
    expected = {"/api/status": 403, "/api/access": 403, "/ws": 403, "/": 200, "/metrics": 200, "/readyz": 200}
    for path, status in expected.items():
        with other_user(uri, path) as asked:
            got, body = asked()
            assert got == status, (path, body)
            if status == 403:
                assert f"you are uid {GUEST}".encode() in body


def test_a_port_that_is_given(make_instance: MakeInstance) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.3", 0))
        port = sock.getsockname()[1]
        instance = make_instance(settings={"status": {"bind": f"127.0.0.3:{port}"}})
        sock.listen()
        instance.start()  # although the port is taken
        assert instance.rpc("attr.get", {"name": "status.uri"})["value"] == ""
        assert "cannot serve status on 127.0.0.3" in instance.log
    assert uri_of(instance) == f"http://127.0.0.3:{port}/"
    assert ask(uri_of(instance), "/api/access").status == 200


def test_a_kept_port_that_somebody_else_has_now(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    uri = uri_of(instance)
    instance.stop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address_of(uri))
        sock.listen()
        instance.start()
        assert uri_of(instance) != uri
    assert "which another program has now" in instance.log


def test_off(make_instance: MakeInstance) -> None:
    instance = make_instance(settings={"status": {"bind": "off"}})
    instance.start()
    assert instance.rpc("attr.get", {"name": "status.uri"})["value"] == ""
    assert "status is served" not in instance.log


def test_tls_and_a_token(make_instance: MakeInstance, tmp_path: Path) -> None:
    """As it is served to other hosts: here on all addresses, asked under one that is not the loopback's, where there is
    one."""
    from datetime import UTC, datetime

    cert, token = tmp_path / "cert", tmp_path / "token"
    write(str(cert), generate(datetime.now(UTC)))
    token.write_text(TOKEN)
    token.chmod(0o600)
    settings = {"bind": "*:0", "cert": str(cert), "token-file": str(token)}
    instance = make_instance(settings={"status": settings})
    instance.start()
    _, port = address_of(uri_of(instance))

    def get(path: str, **headers: str) -> Answer:
        return ask(f"https://127.0.0.1:{port}/", path, headers=headers, cert=str(cert))

    assert get("/healthz").status == get("/").status == 200
    assert [get(path).status for path in ("/metrics", "/api/status", "/api/access", "/ws")] == [401] * 4
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert [get(path, **right).status for path in ("/metrics", "/api/status", "/api/access")] == [200] * 3
    with socket.create_connection(("127.0.0.1", port)) as sock:  # plain HTTP gets nothing
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" not in sock.recv(100)
    assert get("/healthz").status == 200


def test_what_is_not_safe_does_not_start(make_instance: MakeInstance) -> None:
    instance = make_instance(settings={"status": {"bind": "0.0.0.0:0"}})
    instance.start(wait=False)
    assert instance.died() == 1
    assert "status.token-file: it must be set where status.bind, 0.0.0.0:0, is not a loopback address" in instance.log
