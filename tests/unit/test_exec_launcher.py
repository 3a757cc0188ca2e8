"""The broker's side of the launcher, against a launcher that the test plays."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import trio

from fluxres.base.jobid import JobId
from fluxres.exec.launcher import Launcher
from fluxres.wire.payload import pack

MANY = 1000
"""Answers, of which a socket does not hold as many unread."""
PATIENCE = 60


async def refuse_all(sock: socket.socket) -> None:
    """Be a launcher that cannot fork. It must not find its answers unread: it would wait for ever."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        _packet, fds, _flags, _address = socket.recv_fds(sock, 64 * 1024, 2)
        for fd in fds:
            os.close(fd)
        sock.send(pack({"id": 7, "rank": 0, "errnum": errno.EAGAIN, "text": "cannot fork: no process to be had"}))


async def test_refusals_are_read_and_logged(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    launcher = Launcher()
    monkeypatch.setattr(launcher, "_socket", ours)
    with theirs, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse_all, theirs)
            await nursery.start(launcher.run)
            for _ in range(MANY):
                await launcher.launch(os.fspath(tmp_path), JobId(7), 0)
            nursery.cancel_scope.cancel()
    assert "cannot fork: no process to be had" in caplog.text


async def test_modules_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Brokers of `fluxres start` run where their user is, who may have anything there."""
    (tmp_path / "cbor2.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    launcher = Launcher()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(launcher.run)
            for _ in range(2):
                await launcher.launch(os.fspath(tmp_path), JobId(7), 0)
            nursery.cancel_scope.cancel()
    assert "the launcher is gone" not in caplog.text
