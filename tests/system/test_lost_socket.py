"""A lost socket path: the shell is found by its claim, asked through its pidfd to bind it again, and attached."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import MakeInstance
from kit import Expect, Instance, birth, check_invariants, eventually, process_gone, wait_status

SUN_PATH_SIZE = 108
SOCK = "sock"
WAITS = """
print("begun", flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
print("ended")
sys.exit(6)
"""
EXPECT = Expect(status=wait_status(6), output=b"begun\nended\n")


def test_a_deleted_socket_is_bound_again(instance: Instance) -> None:
    jobid = instance.submit(instance.job(WAITS))
    task = instance.wait_marked(jobid).pid
    eventually(lambda: (instance.jobdir(jobid) / SOCK).exists(), what="the socket")
    shell = birth(instance.shell_pid(jobid))
    instance.kill()
    (instance.jobdir(jobid) / SOCK).unlink()
    instance.start()
    instance.wait_event(jobid, "reattach", "guest.exec.eventlog")
    eventually(lambda: (instance.jobdir(jobid) / SOCK).exists(), what="the socket")
    assert birth(shell[0]) == shell
    assert not process_gone(task)
    (instance.path / "go").touch()
    check_invariants(instance, {jobid: EXPECT})


def test_a_socket_that_became_something_else(instance: Instance) -> None:
    """A plain file, or a dangling link, in its place is no answer, and is replaced."""
    jobs = instance.submit_many([instance.job(WAITS) for _ in range(3)])
    for jobid in jobs:
        instance.wait_marked(jobid)
        instance.shell_pid(jobid)
    instance.kill()
    file, link, stranger = (instance.jobdir(jobid) / SOCK for jobid in jobs)
    for path in (file, link, stranger):
        path.unlink()
    file.write_bytes(b"no socket")
    link.symlink_to("nowhere")
    stranger.mkdir()
    instance.start()
    (instance.path / "go").touch()
    check_invariants(instance, dict.fromkeys(jobs, EXPECT))


def test_a_statedir_path_that_no_socket_address_holds(make_instance: MakeInstance, tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 20) / ("deeper" * 20)
    instance = make_instance(state=deep)
    instance.start()
    jobid = instance.submit(instance.job(WAITS))
    task = instance.wait_marked(jobid).pid
    shell = birth(instance.shell_pid(jobid))
    assert len(os.fsencode(instance.jobdir(jobid) / SOCK)) > SUN_PATH_SIZE
    instance.kill()
    (instance.jobdir(jobid) / SOCK).unlink()
    instance.start()
    instance.wait_event(jobid, "reattach", "guest.exec.eventlog")
    assert birth(shell[0]) == shell
    assert not process_gone(task)
    (instance.path / "go").touch()
    check_invariants(instance, {jobid: EXPECT})


def test_a_rundir_path_that_no_socket_address_holds(make_instance: MakeInstance) -> None:
    instance = make_instance("long" * 30)
    assert len(instance.uri) > SUN_PATH_SIZE
    instance.start()
    done = instance.fluxres("run", "echo", "through")
    assert done.stdout == b"through\n"
    instance.restart()
    assert instance.fluxres("run", "echo", "again").stdout == b"again\n"
