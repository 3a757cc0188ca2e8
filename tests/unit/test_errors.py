"""fluxres.base.errors: what people read, and that errors survive copying."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from fluxres.base.errors import FluxresError, IllegalTransition, RpcError


def test_rpc_error_text_defaults_to_the_systems() -> None:
    assert str(RpcError(errno.ENOENT)) == "No such file or directory"
    assert str(RpcError(errno.ENOENT, "no such job")) == "no such job"
    assert repr(RpcError(errno.ENOENT, "no such job")) == "RpcError(2, 'no such job')"


def test_illegal_transition_shows_the_latest_events() -> None:
    assert str(IllegalTransition("job ƒ1", "RUN", "submit", ["submit", "alloc"])) == (
        "cannot apply submit to job ƒ1: not allowed in state RUN (events so far: submit, alloc)"
    )
    assert "so far: none)" in str(IllegalTransition("job ƒ1", "NEW", "clean", []))
    long = str(IllegalTransition("job ƒ1", "RUN", "x", [f"e{number}" for number in range(100)]))
    assert "so far: …, e84, e85" in long


@pytest.mark.parametrize("error", [RpcError(113, "lost"), IllegalTransition("job", "RUN", "x", ["a"])])
def test_errors_can_be_copied(error: FluxresError) -> None:
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert vars(again) == vars(error)
        assert str(again) == str(error)
