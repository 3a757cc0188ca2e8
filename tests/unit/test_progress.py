"""The durable record of one rank: it only moves forward, ends once, and comes back from its bytes as it was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import IllegalTransition
from fluxres.base.jobid import JobId
from fluxres.exec.progress import ENDED, Problem, Progress, RankState, decode, guest_namespace, progress_key

S = RankState
ALLOWED = {
    (S.WAITING, S.RUNNING),
    (S.WAITING, S.EXITED),
    (S.WAITING, S.LOST),
    (S.WAITING, S.VOID),
    (S.RUNNING, S.RUNNING),
    (S.RUNNING, S.EXITED),
    (S.RUNNING, S.LOST),
}
PROBLEMS = st.lists(st.builds(Problem, type=st.text(), severity=st.integers(0, 7), note=st.text()), max_size=3).map(
    tuple
)
RECORDS = st.builds(
    Progress,
    statedir=st.text(),
    state=st.sampled_from(RankState),
    cursor=st.integers(0, 2**62),
    status=st.integers(0, 0xFFFF),
    problems=PROBLEMS,
)


@pytest.mark.parametrize("before", RankState)
@pytest.mark.parametrize("after", RankState)
def test_the_moves_that_are_allowed(before: RankState, after: RankState) -> None:
    progress = Progress(statedir="s", state=before, cursor=5)
    if (before, after) in ALLOWED:
        assert progress.moved(after, cursor=6, status=3) == Progress(statedir="s", state=after, cursor=6, status=3)
    else:
        with pytest.raises(IllegalTransition, match=rf"{after.value}@6 .* in state {before.value}@5"):
            progress.moved(after, cursor=6)


@pytest.mark.parametrize("state", RankState)
def test_what_has_ended(state: RankState) -> None:
    assert Progress(statedir="s", state=state).ended is (state in {S.EXITED, S.LOST, S.VOID})
    assert (state in ENDED) is (state in {S.EXITED, S.LOST, S.VOID})


def test_a_cursor_never_goes_back() -> None:
    progress = Progress(statedir="s").moved(S.RUNNING, cursor=4)
    assert progress.moved(S.RUNNING, cursor=4).cursor == 4
    with pytest.raises(IllegalTransition, match=r"running@3 .* in state running@4"):
        progress.moved(S.RUNNING, cursor=3)


def test_problems_add_up() -> None:
    first, second = (Problem(type="exec", severity=severity, note="n") for severity in (0, 1))
    progress = Progress(statedir="s").moved(S.RUNNING, cursor=1, problems=(first,))
    assert progress.moved(S.LOST, cursor=1, status=9, problems=(second,)).problems == (first, second)


@given(RECORDS)
def test_a_record_survives_its_bytes(progress: Progress) -> None:
    assert decode(progress.encode()) == progress
    assert isinstance(json.loads(progress.encode()), dict)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"statedir":1}', b'{"statedir":"s","state":"flying"}', b'{"statedir":"s"', b"\xff"]
)
def test_a_bad_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_where_it_lies() -> None:
    assert progress_key(JobId(0x1234)) == "job.0000.0000.0000.1234.exec"
    assert progress_key(JobId(0x1234), 7) == "job.0000.0000.0000.1234.exec.7"
    assert guest_namespace(JobId(0x1234)) == "job-0000.0000.0000.1234"
