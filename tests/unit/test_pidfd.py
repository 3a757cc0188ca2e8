"""fluxres_shell.pidfd: every start twice, with clone3(2) and with the fallback; real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxres_shell import pidfd as pidfds
from fluxres_shell.pidfd import Child, SpawnError, Stage, spawn

BOUND = 20.0
"""Seconds after which something that must happen counts as never happening."""
OUTPUT_MAX = 65536
KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
ENV = {"PATH": "/usr/bin:/bin"}

both = pytest.mark.parametrize("force_fallback", [False, True], ids=["clone3", "fallback"])
needs_exit_info = pytest.mark.skipif(KERNEL < (6, 15), reason="PIDFD_INFO_EXIT needs Linux 6.15")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the uid needs root")


def wait(child: Child) -> int:
    """Reap a child and give its return code, negative for a signal."""
    assert pidfds.wait_dead(child.pidfd, BOUND)
    os.close(child.pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def read_all(fd: int) -> str:
    with open(fd, encoding="utf-8") as file:
        return file.read(OUTPUT_MAX)


def start(
    argv: list[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: dict[str, str] = ENV,
    cwd: str | None = None,
    extra_fds: dict[int, int] | None = None,
    cgroup_fd: int | None = None,
    new_session: bool = False,
    user: tuple[int, int, list[int]] | None = None,
    force_fallback: bool = False,
) -> Child:
    """`spawn`, with /dev/null for what is not given; `user` is uid, gid, groups."""
    uid, gid, groups = user or (None, None, None)
    with open(os.devnull, "r+b", buffering=0) as file:
        null = file.fileno()
        return spawn(
            argv,
            env=env,
            cwd=cwd,
            stdin=null if stdin is None else stdin,
            stdout=null if stdout is None else stdout,
            stderr=null if stderr is None else stderr,
            extra_fds=extra_fds,
            uid=uid,
            gid=gid,
            groups=groups,
            cgroup_fd=cgroup_fd,
            new_session=new_session,
            force_fallback=force_fallback,
        )


def run(argv: list[str], *, force_fallback: bool, env: dict[str, str] = ENV, cwd: str | None = None) -> str:
    """Run a program to its end, which must be good, and give what it wrote."""
    read_end, write_end = os.pipe()
    child = start(argv, env=env, cwd=cwd, stdout=write_end, force_fallback=force_fallback)
    os.close(write_end)
    output = read_all(read_end)
    assert wait(child) == 0
    return output


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@both
def test_arguments_environment_directory(force_fallback: bool, tmp_path: Path) -> None:
    script = 'printf "%s|" "$0" "$@" "$GREETING" "$(pwd)" "$(env | grep -c ^HOME=)"'
    output = run(
        ["sh", "-c", script, "name", "two words", ""],
        env={**ENV, "GREETING": "grüß\ndich"},
        cwd=str(tmp_path),
        force_fallback=force_fallback,
    )
    assert output == f"name|two words||grüß\ndich|{tmp_path}|0|"


@both
def test_status(force_fallback: bool) -> None:
    for script, code in (("exit 7", 7), ("kill -9 $$", -9)):
        child = start(["sh", "-c", script], force_fallback=force_fallback)
        assert pidfds.pid_of(child.pidfd) == child.pid
        assert not os.get_inheritable(child.pidfd)
        assert wait(child) == code


def make_file(path: Path, mode: int, text: str = "") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@both
@pytest.mark.parametrize(
    ("program", "cwd", "stage", "errnum"),
    [
        ("no-such-program", None, Stage.EXEC, errno.ENOENT),
        ("/no/such/program", None, Stage.EXEC, errno.ENOENT),
        ("", None, Stage.EXEC, errno.ENOENT),
        ("{tmp}/plain", None, Stage.EXEC, errno.EACCES),
        ("{tmp}", None, Stage.EXEC, errno.EACCES),
        ("denied-then-missing", None, Stage.EXEC, errno.EACCES),
        ("{tmp}/plain/below", None, Stage.EXEC, errno.ENOTDIR),
        ("true", "/no/such/directory", Stage.CHDIR, errno.ENOENT),
        ("true", "{tmp}/plain", Stage.CHDIR, errno.ENOTDIR),
    ],
)
def test_errors(force_fallback: bool, tmp_path: Path, program: str, cwd: str | None, stage: Stage, errnum: int) -> None:
    make_file(tmp_path / "plain", 0o644)
    make_file(tmp_path / "bin" / "denied-then-missing", 0o644)
    before = open_fds()
    with pytest.raises(SpawnError) as caught:
        start(
            [program.format(tmp=tmp_path)],
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
            cwd=cwd and cwd.format(tmp=tmp_path),
            force_fallback=force_fallback,
        )
    error = caught.value
    assert (error.stage, error.errno) == (stage, errnum)
    assert str(error).startswith("cannot start ")
    assert str(error).endswith(os.strerror(errnum))
    assert ("working directory" in str(error)) == (stage is Stage.CHDIR)
    assert open_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@both
@pytest.mark.parametrize(
    ("extra_fds", "cgroup", "stage"),
    [({5: 9999}, None, Stage.DUP), ({}, "/", Stage.CGROUP), ({}, "/dev/null", Stage.CGROUP)],
)
def test_errors_of_descriptors(
    force_fallback: bool, extra_fds: dict[int, int], cgroup: str | None, stage: Stage
) -> None:
    cgroup_fd = os.open(cgroup, os.O_RDONLY) if cgroup else None
    with pytest.raises(SpawnError) as caught:
        start(["true"], extra_fds=extra_fds, cgroup_fd=cgroup_fd, force_fallback=force_fallback)
    assert caught.value.stage == stage
    if cgroup_fd is not None:
        os.close(cgroup_fd)


@pytest.mark.parametrize(
    ("argv", "env", "cwd", "why"),
    [
        ([], {}, None, "no program"),
        (["a\0b"], {}, None, "NUL"),
        (["a"], {"B": "\0"}, None, "NUL"),
        (["a"], {}, "/tmp\0/x", "NUL"),
        (["a"], {"B=C": ""}, None, "'B=C' is not the name"),
        (["a"], {"": ""}, None, "'' is not the name"),
    ],
)
def test_refused_arguments(argv: list[str], env: dict[str, str], cwd: str | None, why: str) -> None:
    with pytest.raises(ValueError, match="cannot start") as caught:
        start(argv, env=env, cwd=cwd)
    assert why in str(caught.value)


def test_refused_uid_with_our_groups() -> None:
    with pytest.raises(ValueError, match="gid and groups would stay"):
        spawn(["true"], env=ENV, cwd=None, stdin=0, stdout=1, stderr=2, uid=1)


@pytest.mark.parametrize("extra_fds", [{-1: 0}, dict.fromkeys(range(pidfds.MAX_FDS + 1), 0)])
def test_refused_descriptors(extra_fds: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot pass descriptors"):
        start(["true"], extra_fds=extra_fds)


def test_worker_thread_is_refused() -> None:
    caught: list[ValueError] = []

    def start_there() -> None:
        try:
            start(["true"])
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=start_there)
    thread.start()
    thread.join(BOUND)
    assert "main thread" in str(caught[0])


@both
def test_path_is_the_childs(force_fallback: bool, tmp_path: Path) -> None:
    make_file(tmp_path / "bin" / "here", 0o755, "#!/bin/sh\necho found\n")
    for path, cwd in (
        (f"/nowhere:{tmp_path}/bin", "/"),
        ("", str(tmp_path / "bin")),
        (":/x", f"{tmp_path}/bin"),
    ):
        assert run(["here"], env={"PATH": path}, cwd=cwd, force_fallback=force_fallback) == "found\n"
    assert run(["true"], env={}, force_fallback=force_fallback) == ""  # the default path


@both
def test_script_without_interpreter_line(force_fallback: bool, tmp_path: Path) -> None:
    script = make_file(tmp_path / "script", 0o755, 'echo "$0 $1"\n')
    assert run([script, "arg"], force_fallback=force_fallback) == f"{script} arg\n"


@both
def test_descriptors_do_not_leak(force_fallback: bool) -> None:
    inheritable = os.dup(2)
    os.set_inheritable(inheritable, True)
    try:
        listed = run(["ls", "/proc/self/fd"], force_fallback=force_fallback)
    finally:
        os.close(inheritable)
    assert sorted(listed.split(), key=int) == ["0", "1", "2", "3"]  # 3 is ls reading the directory


@both
def test_descriptors_overlap(force_fallback: bool) -> None:
    """Sources that are targets of others: each pipe must end where it was said to."""
    pipes = [os.pipe() for _ in range(4)]
    a, b, c, d = (write_end for _, write_end in pipes)
    child = start(
        ["sh", "-c", f"echo 1; echo 2 >&2; echo {a} >/proc/self/fd/{a}; echo {b} >/proc/self/fd/{b}"],
        stdin=pipes[0][0],
        stdout=b,
        stderr=a,
        extra_fds={a: c, b: d},
        force_fallback=force_fallback,
    )
    for write_end in (a, b, c, d):
        os.close(write_end)
    assert wait(child) == 0
    assert [read_all(read_end) for read_end, _ in pipes] == ["2\n", "1\n", f"{a}\n", f"{b}\n"]


@both
def test_signals_are_default(force_fallback: bool) -> None:
    """Python ignores SIGPIPE; blocked and ignored signals would pass through exec."""
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        status = run(["cat", "/proc/self/status"], force_fallback=force_fallback)
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR2, previous)
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert [int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


@both
@pytest.mark.parametrize("new_session", [False, True])
def test_session(force_fallback: bool, new_session: bool) -> None:
    child = start(["sleep", "100"], new_session=new_session, force_fallback=force_fallback)
    assert os.getsid(child.pid) == (child.pid if new_session else os.getsid(0))
    assert pidfds.send_signal(child.pidfd, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL


@both
@needs_root
def test_credentials(force_fallback: bool) -> None:
    read_end, write_end = os.pipe()
    child = start(
        ["sh", "-c", "id -u; id -g; id -G"],
        cwd="/",
        stdout=write_end,
        user=(65534, 65533, [65533, 1234]),
        force_fallback=force_fallback,
    )
    os.close(write_end)
    assert read_all(read_end).splitlines() == ["65534", "65533", "65533 1234"]
    assert wait(child) == 0


PDEATHSIG_SCRIPT = "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"
"""Prints PR_GET_PDEATHSIG."""


@both
@needs_root
def test_guard_survives_credentials(force_fallback: bool) -> None:
    if not Path("/usr/bin/python3").exists():
        pytest.skip("needs a Python that another user may run")
    read_end, write_end = os.pipe()
    child = start(
        ["/usr/bin/python3", "-I", "-c", PDEATHSIG_SCRIPT],
        env={},
        cwd="/",
        stdout=write_end,
        user=(65534, 65534, []),
        force_fallback=force_fallback,
    )
    os.close(write_end)
    assert read_all(read_end) == f"{int(signal.SIGKILL)}\n"
    assert wait(child) == 0


@both
@pytest.mark.skipif(os.geteuid() == 0, reason="root may change its uid")
def test_credentials_denied(force_fallback: bool) -> None:
    with pytest.raises(SpawnError) as caught:
        start(["true"], user=(0, 0, []), force_fallback=force_fallback)
    assert caught.value.errno == errno.EPERM
    assert caught.value.stage in (Stage.GROUPS, Stage.SETGID, Stage.SETUID)


def python(script: str, *args: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A Python process, with pipes on its standard input and output."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(script), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> int:
    """Close its pipes and reap it."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    return process.wait(BOUND)


PARENT = """
    import os, sys
    from fluxres_shell.pidfd import spawn
    null = os.open(os.devnull, os.O_RDWR)
    child = spawn(["sleep", "1000"], env=dict(os.environ), cwd=None, stdin=null, stdout=null, stderr=null,
                  new_session=True, force_fallback=sys.argv[1] == "True")
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


@both
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_dies_with_its_parent(force_fallback: bool, how: str) -> None:
    parent = python(PARENT, str(force_fallback))
    child_pidfd = os.pidfd_open(int(read_line(parent)))
    assert not pidfds.wait_dead(child_pidfd, 0)
    if how == "kill":
        parent.kill()
    finish(parent)
    assert pidfds.wait_dead(child_pidfd, BOUND)
    os.close(child_pidfd)


@both
@needs_root
def test_parent_in_another_pid_namespace(force_fallback: bool) -> None:
    """getppid() is 0 there: the start must work, and the child must still die with its parent."""
    unshare = ("unshare", "--pid")
    if subprocess.run([*unshare, "true"], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no pid namespaces here")
    parent = python(PARENT, str(force_fallback), prefix=unshare)
    child_pid = int(read_line(parent))
    child_pidfd = os.pidfd_open(child_pid)
    parent.kill()
    finish(parent)
    assert pidfds.wait_dead(child_pidfd, BOUND)
    os.close(child_pidfd)


FILTERED = """
    import ctypes, os, struct, sys
    from fluxres_shell.pidfd import spawn
    # seccomp(2): load the number of the call; if it is clone3's (435), fail with the errno; else allow.
    fail, allow = 0x50000 | int(sys.argv[1]), 0x7FFF0000
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 435), (0x06, 0, 0, fail), (0x06, 0, 0, allow)]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    filter = struct.pack("HP", len(code), ctypes.cast(program, ctypes.c_void_p).value)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
    child = spawn(["echo", "started"], env=dict(os.environ), cwd=None, stdin=0, stdout=1, stderr=2)
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
"""


@pytest.mark.parametrize("errnum", [errno.ENOSYS, errno.EPERM, errno.E2BIG, errno.EINVAL])
def test_falls_back_by_itself(errnum: int) -> None:
    process = python(FILTERED, str(errnum))
    assert read_line(process) == "started"
    assert finish(process) == 0


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new cgroup v2 directory."""
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        roots = [line.split()[1] for line in mounts if line.split()[2] == "cgroup2"]
    for root in roots:
        path = Path(root, f"fluxres-test-{os.getpid()}")
        with contextlib.suppress(OSError):  # not writable: perhaps another one is
            path.mkdir()
            break
    else:
        pytest.skip("no writable cgroup v2 here")
    yield path
    path.rmdir()


@both
def test_into_cgroup(force_fallback: bool, cgroup: Path) -> None:
    cgroup_fd = os.open(cgroup, os.O_RDONLY)
    read_end, write_end = os.pipe()
    child = start(["cat", "/proc/self/cgroup"], stdout=write_end, cgroup_fd=cgroup_fd, force_fallback=force_fallback)
    os.close(write_end)
    os.close(cgroup_fd)
    lines = read_all(read_end).splitlines()
    assert [line for line in lines if line.startswith("0::") and line.endswith(cgroup.name)]
    assert pidfds.wait_dead(child.pidfd, BOUND)
    os.waitpid(child.pid, 0)
    info = pidfds.exit_info(child.pidfd)
    os.close(child.pidfd)
    if KERNEL >= (6, 15):
        assert info is not None
        assert info.cgroup_id == cgroup.stat().st_ino


@needs_exit_info
def test_exit_info_of_a_child() -> None:
    child = start(["sleep", "1000"])
    assert pidfds.exit_info(child.pidfd) is None
    assert pidfds.send_signal(child.pidfd, signal.SIGTERM)
    assert pidfds.wait_dead(child.pidfd, BOUND)
    assert pidfds.exit_info(child.pidfd) is None  # a zombie
    assert pidfds.send_signal(child.pidfd, 0)  # which can be signalled, to no effect
    os.waitpid(child.pid, 0)
    info = pidfds.exit_info(child.pidfd)
    assert info is not None
    assert (info.exit_code, info.signum) == (None, signal.SIGTERM)
    assert not pidfds.send_signal(child.pidfd, signal.SIGTERM)
    os.close(child.pidfd)


@needs_exit_info
def test_exit_info_of_a_stranger() -> None:
    """Not a child of ours, and reaped by its own parent: known, as the pidfd was there before."""
    parent = python(
        """
        import subprocess, sys
        child = subprocess.Popen(["sh", "-c", "read line; exit 42"], stdin=subprocess.PIPE)
        print(child.pid, flush=True)
        sys.stdin.readline()
        child.communicate()
        print("reaped", flush=True)
        """
    )
    pidfd = os.pidfd_open(int(read_line(parent)))
    assert pidfds.exit_info(pidfd) is None
    assert parent.stdin is not None
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert read_line(parent) == "reaped"
    assert pidfds.wait_dead(pidfd, 0)
    info = pidfds.exit_info(pidfd)
    assert info is not None
    assert (info.exit_code, info.signum) == (42, None)
    os.close(pidfd)
    finish(parent)


def test_exit_info_needs_a_pidfd(tmp_path: Path) -> None:
    plain = os.open(tmp_path, os.O_RDONLY)
    assert pidfds.exit_info(plain) is None
    with pytest.raises(OSError, match="Bad file"):
        pidfds.exit_info(-1)
    with pytest.raises(OSError, match="not a pidfd"):
        pidfds.pid_of(plain)
    os.close(plain)


@both
def test_same_process(force_fallback: bool) -> None:
    child = start(["sleep", "1000"])
    me, again, other = os.pidfd_open(os.getpid()), os.pidfd_open(os.getpid()), os.pidfd_open(child.pid)
    assert pidfds.same_process(me, again, force_fallback=force_fallback)
    assert pidfds.same_process(child.pidfd, other, force_fallback=force_fallback)
    assert not pidfds.same_process(me, other, force_fallback=force_fallback)
    pidfds.send_signal(child.pidfd, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    known = not force_fallback and KERNEL >= (6, 9)
    assert pidfds.same_process(child.pidfd, other, force_fallback=force_fallback) == known
    assert not pidfds.same_process(me, other, force_fallback=force_fallback)
    for fd in (me, again, other, child.pidfd):
        os.close(fd)


@both
def test_peer_pidfd(force_fallback: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    peer = python(
        """
        import socket, sys
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(sys.argv[1])
        sys.stdin.readline()
        """,
        path,
    )
    sock, _ = listener.accept()
    expected, found = os.pidfd_open(peer.pid), pidfds.peer_pidfd(sock, force_fallback=force_fallback)
    assert pidfds.same_process(expected, found, force_fallback=force_fallback)
    assert not os.get_inheritable(found)
    peer.kill()
    assert pidfds.wait_dead(found, BOUND)
    if force_fallback:
        with pytest.raises(ProcessLookupError):
            pidfds.peer_pidfd(sock, force_fallback=True)
    finish(peer)
    for fd in (expected, found):
        os.close(fd)
    sock.close()
    listener.close()
