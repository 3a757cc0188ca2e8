"""The shell's pure small parts: messages, standard input, the spec, the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shellkit import make_spec

from fluxres.base.errors import ProtocolError
from fluxres.wire.framing import FrameDecoder
from fluxres.wire.payload import WireMap, pack, unpack_map
from fluxres_shell import protocol
from fluxres_shell.environment import render, task_env
from fluxres_shell.spec import ShellSpec, SpecError, parse_spec
from fluxres_shell.stdin import ALL_TASKS, STDIN_BUFFER, StdinStream

HERE = Path("/shell/dir")


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ({"type": "attach", "nonce": "n", "from": 1}, protocol.Attach(nonce="n", from_seq=1)),
        ({"type": "ack", "seq": 4}, protocol.Ack(seq=4)),
        ({"type": "kill", "signum": 15}, protocol.Kill(signum=15)),
        (
            {"type": "stdin", "task": -1, "offset": 0, "data": b"x", "eof": True},
            protocol.Stdin(task=-1, offset=0, data=b"x", eof=True),
        ),
        ({"type": "release", "extra": 1}, protocol.Release()),
        ({"type": "barrier-done", "name": "start", "seq": 0}, protocol.BarrierDone(name="start", seq=0)),
    ],
)
def test_requests(message: WireMap, request_: protocol.Request) -> None:
    assert protocol.parse_request(pack(message)) == request_


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xff",
        pack([1]),
        *map(
            pack,
            [
                {},
                {"type": "attach", "nonce": "n", "from": 0},
                {"type": "attach", "nonce": 1, "from": 1},
                {"type": "kill", "signum": 0},
                {"type": "kill", "signum": 65},
                {"type": "ack", "seq": -1},
                {"type": "attach", "nonce": "n" * 300, "from": 1},
                {"type": "stdin", "task": -2, "offset": 0, "data": b"", "eof": False},
                {"type": "stdin", "task": 0, "offset": 0, "data": "text", "eof": False},
                {"type": "barrier-done", "name": "start"},
                {"type": "barrier-done", "name": "start", "seq": -1},
                {"type": "barrier-done", "name": b"start", "seq": 0},
                {"type": "barrier-done", "name": "n" * 300, "seq": 0},
                {"type": "barrier", "name": "start", "seq": 0},
                {"type": "fly"},
            ],
        ),
    ],
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.parse_request(body)


def test_the_barrier_frame() -> None:
    (body,) = FrameDecoder().feed(protocol.barrier("start", 0))
    assert unpack_map(body) == {"type": "barrier", "name": "start", "seq": 0}


class TestStdin:
    def drain(self, stream: StdinStream, task: int) -> bytes:
        """What the task is given now; stops at a close."""
        given_ = b""
        while piece := stream.next_piece(task):
            stream.written(task, len(piece))
            given_ += piece
        return given_

    def test_all_tasks_get_it_and_the_slowest_counts(self) -> None:
        stream = StdinStream([0, 1])
        assert stream.feed(ALL_TASKS, 0, b"hello", False) == [0, 1]
        assert self.drain(stream, 0) == b"hello"
        assert (stream.received, stream.consumed) == (5, 0)
        stream.written(1, 2)
        assert stream.consumed == 2
        assert self.drain(stream, 1) == b"llo"
        assert stream.consumed == 5

    def test_one_task_only(self) -> None:
        stream = StdinStream([3, 4])
        assert stream.feed(4, 0, b"four", False) == [4]
        assert stream.feed(3, 4, b"three", True) == [3]
        assert stream.next_piece(3) == b"three"
        assert self.drain(stream, 3) == b"three"
        assert stream.next_piece(3) == b""
        assert not stream.eof
        assert stream.consumed == 0
        assert self.drain(stream, 4) == b"four"

    def test_a_closed_task_takes_everything(self) -> None:
        stream = StdinStream([0])
        stream.feed(0, 0, b"x" * 10, False)
        stream.close(0)
        assert stream.consumed == 10
        stream.feed(0, 10, b"y" * STDIN_BUFFER, False)
        assert stream.consumed == 10 + STDIN_BUFFER
        assert stream.next_piece(0) is None

    def test_gaps_and_floods_are_refused(self) -> None:
        stream = StdinStream([0])
        with pytest.raises(ProtocolError, match="from offset 1"):
            stream.feed(0, 1, b"x", False)
        stream.feed(0, 0, b"x" * STDIN_BUFFER, False)
        with pytest.raises(ProtocolError, match="unacknowledged"):
            stream.feed(0, STDIN_BUFFER, b"x", False)

    @given(
        data=st.binary(max_size=200),
        cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=30),
    )
    def test_resent_pieces_never_repeat_a_byte(self, data: bytes, cuts: list[tuple[int, int]]) -> None:
        stream = StdinStream([0])
        given_ = b""
        for start, length in [*cuts, (0, len(data))]:
            offset = min(start, stream.received)
            stream.feed(0, offset, data[offset : offset + length], False)
            given_ += self.drain(stream, 0)
        assert given_ == data


def spec(*command: str, **changes: object) -> ShellSpec:
    return parse_spec(json.dumps(make_spec(HERE, *command, **changes)).encode())


class TestSpec:
    def test_it_is_parsed(self) -> None:
        parsed = spec("/bin/echo", "hi", ranks=[2, 5], rank=5, nnodes=2, ntasks_total=3,
                      tasks=[{"rank": 2, "local": 0}], time_limit=1.5)  # fmt: skip
        assert parsed.command == ("/bin/echo", "hi")
        assert parsed.name == "echo"
        assert parsed.time_limit == 1.5
        assert not parsed.leader
        assert [(task.rank, task.local) for task in parsed.tasks] == [(2, 0)]

    @pytest.mark.parametrize(
        ("given_", "ranks"),
        [([2, 5], (2, 5)), ([7, 0], (7, 0)), ("0-3,7", (0, 1, 2, 3, 7)), ("[1-2]", (1, 2)), ("4", (4,))],
    )
    def test_ranks(self, given_: str | list[int], ranks: tuple[int, ...]) -> None:
        parsed = spec(ranks=given_, rank=ranks[-1], nnodes=len(ranks))
        assert parsed.ranks == ranks
        assert task_env(parsed, parsed.tasks[0], "")["FLUX_JOB_NNODES"] == str(len(ranks))
        assert render("{{node.id}}", parsed, parsed.tasks[0], "") == str(len(ranks) - 1)

    @pytest.mark.parametrize(
        ("options", "stdout", "stderr", "truncate"),
        [
            ({}, None, None, True),
            ({"output": {"stdout": {"type": "file", "path": "o"}}}, "o", "o", True),
            ({"output": {"stdout": {"type": "file", "path": "o"}, "mode": "append"}}, "o", "o", False),
            (
                {"output": {"stdout": {"type": "file", "path": "o"}, "stderr": {"type": "kvs"}}},
                "o", None, True,
            ),
            ({"output": {"stderr": {"type": "file", "path": "e"}}}, None, "e", True),
        ],
    )  # fmt: skip
    def test_output(self, options: dict[str, object], stdout: str | None, stderr: str | None, truncate: bool) -> None:
        stdio = spec(options=options).stdio
        assert (stdio.stdout_path, stdio.stderr_path, stdio.truncate) == (stdout, stderr, truncate)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"version": 2}, "version 2"), ({"rank": "0"}, "'rank' must be int"), ({"rank": True}, "'rank'"),
            ({"ranks": "0-"}, "'ranks'"), ({"ranks": "1-2", "nnodes": 2}, "rank 0"), ({"ranks": 0}, "'ranks'"),
            ({"ranks": ""}, "rank 0"), ({"ranks": "0-1"}, "'nnodes'"),
            ({"rank": 1}, "rank 1"), ({"tasks": []}, "0 tasks"), ({"tasks": [{"rank": 0}]}, "'local'"),
            ({"jobspec": {"tasks": []}}, "no command"),
            ({"jobspec": {"tasks": [{"command": [""]}]}}, "no command"),
            ({"env": {"A": 1}}, "'A'=1"), ({"env": {"A=": "x"}}, "'A='"),
            ({"time_limit": -1}, "'time_limit'"),
            ({"journal_limit": 10}, "'journal_limit' 10"), ({"cgroup_parent": 3}, "'cgroup_parent'"),
            ({"options": {"output": {"stdout": {"type": "file"}}}}, "options.output.stdout.path"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(self, changes: dict[str, object], said: str) -> None:
        with pytest.raises(SpecError, match="cannot read the spec") as caught:
            spec(**changes)
        assert said in str(caught.value)

    @pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff"])
    def test_no_json_object(self, text: bytes) -> None:
        with pytest.raises(SpecError, match="cannot read the spec"):
            parse_spec(text)


class TestEnvironment:
    def test_the_variables(self) -> None:
        parsed = spec(env={"FLUX_JOB_ID": "of the submitter", "A": "b"})
        env = task_env(parsed, parsed.tasks[0], "/tmp/x")
        assert env["A"] == "b"
        assert env["FLUX_JOB_ID"] == "fBukQL"
        assert env["FLUX_JOB_TMPDIR"] == "/tmp/x"
        assert {name for name in env if name.startswith("FLUX")} == {
            "FLUX_JOB_ID", "FLUX_JOB_SIZE", "FLUX_JOB_NNODES", "FLUX_JOB_TMPDIR", "FLUX_TASK_RANK",
            "FLUX_TASK_LOCAL_ID", "FLUX_KVS_NAMESPACE", "FLUXRES_URI", "FLUXRES_JOB_NONCE",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("template", "rendered"),
        [
            ("plain", "plain"), ("{{id}}.out", "fBukQL.out"), ("{{ taskid }}-{{name}}", "0-true"),
            ("{{id.dec}}", "123456789"), ("{{id.hex}}", "0x75bcd15"), ("{{nope}} {{id", "{{nope}} {{id"),
            ("{{id.f58}}", "ƒBukQL"), ("{{tmpdir}}/{{size}}", "/t/1"), ("{{node.id}}", "0"),
        ],
    )  # fmt: skip
    def test_templates(self, template: str, rendered: str) -> None:
        parsed = spec()
        assert render(template, parsed, parsed.tasks[0], "/t") == rendered
