"""The decision table of rediscovery, whole: every combination of facts has the decision that DESIGN §9 wants."""

from __future__ import annotations

import itertools

import pytest

from fluxres.exec.reattach import CLAIM_GONE, NODE_REBOOTED, SHELL_DIED, Decision, Facts, decide
from fluxres_shell.find import Kind

D = Decision
TABLE: list[tuple[str, Facts, Decision, str]] = [
    ("alive and answers", Facts(kind=Kind.ALIVE, answers=True, locked=True), D.ATTACH, ""),
    ("alive and silent", Facts(kind=Kind.ALIVE, locked=True), D.WAIT, ""),
    ("alive, silent, of another boot", Facts(kind=Kind.ALIVE, locked=True, rebooted=True), D.WAIT, ""),
    ("exit record", Facts(kind=Kind.DEAD, exit_record=True), D.READ_OUT, ""),
    ("exit record of another boot", Facts(kind=Kind.DEAD, exit_record=True, rebooted=True), D.READ_OUT, ""),
    ("dead", Facts(kind=Kind.DEAD), D.LOST, SHELL_DIED),
    ("dead by reboot", Facts(kind=Kind.DEAD, rebooted=True), D.LOST, NODE_REBOOTED),
    ("void", Facts(kind=Kind.VOID, reason="cancelled"), D.VOID, "cancelled"),
    ("void of another boot", Facts(kind=Kind.VOID, reason="cancelled", rebooted=True), D.VOID, "cancelled"),
    ("spec, may start", Facts(kind=Kind.UNCLAIMED, may_start=True), D.START, ""),
    ("spec, may not start", Facts(kind=Kind.UNCLAIMED), D.VOID_IT, ""),
    ("nothing", Facts(kind=Kind.NOTHING), D.NOTHING, ""),
    ("nothing, may start", Facts(kind=Kind.NOTHING, may_start=True), D.NOTHING, ""),
    ("void, begun", Facts(kind=Kind.VOID, reason="cancelled", begun=True), D.LOST, CLAIM_GONE),
    ("spec, begun", Facts(kind=Kind.UNCLAIMED, begun=True, may_start=True), D.LOST, CLAIM_GONE),
    ("nothing, begun", Facts(kind=Kind.NOTHING, begun=True), D.LOST, CLAIM_GONE),
    ("alive, begun", Facts(kind=Kind.ALIVE, answers=True, locked=True, begun=True), D.ATTACH, ""),
    ("exit record, begun", Facts(kind=Kind.DEAD, exit_record=True, begun=True), D.READ_OUT, ""),
    ("unreadable, held", Facts(kind=Kind.CORRUPT, locked=True, reason="torn"), D.WAIT, "torn"),
    ("unreadable, free", Facts(kind=Kind.CORRUPT, reason="torn"), D.LOST, "torn"),
    ("unreadable, exit record", Facts(kind=Kind.CORRUPT, reason="torn", exit_record=True), D.READ_OUT, ""),
]


@pytest.mark.parametrize(("facts", "decision", "why"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table(facts: Facts, decision: Decision, why: str) -> None:
    assert decide(facts) == (decision, why)


def combinations() -> list[Facts]:
    """All facts that there can be, those that never occur together included."""
    return [
        Facts(
            kind=kind,
            nonce_matches=nonce,
            answers=answers,
            locked=locked,
            exit_record=exit_record,
            rebooted=rebooted,
            reason="reason",
            may_start=may_start,
            begun=begun,
        )
        for kind in Kind
        for nonce, answers, locked, exit_record, rebooted, may_start, begun in itertools.product(
            [False, True], repeat=7
        )
    ]


ALL = combinations()


def chosen(*decisions: Decision) -> list[Facts]:
    return [facts for facts in ALL if decide(facts)[0] in decisions]


def test_every_combination_has_a_decision_and_every_decision_occurs() -> None:
    assert {decide(facts)[0] for facts in ALL} == set(Decision)


def test_another_job_is_left_alone() -> None:
    foreign = chosen(D.FOREIGN)
    assert foreign == [facts for facts in ALL if not facts.nonce_matches]
    assert all("nonce" in decide(facts)[1] for facts in foreign)


def test_silence_is_never_death() -> None:
    for facts in chosen(D.LOST, D.READ_OUT, D.VOID, D.START, D.VOID_IT, D.NOTHING):
        assert facts.kind is not Kind.ALIVE
        assert not (facts.kind is Kind.CORRUPT and facts.locked)


def test_an_exit_record_wins_over_all_else_of_the_dead() -> None:
    """Where there is no claim, nobody reads a journal."""
    claimed = (Kind.DEAD, Kind.CORRUPT)
    assert all(not facts.exit_record for facts in chosen(D.LOST) if facts.kind in claimed)


def test_a_shell_is_started_only_where_none_was_claimed() -> None:
    """And never again where rank 0 knows that it ran (I2)."""
    for facts in chosen(D.START):
        assert facts.kind is Kind.UNCLAIMED
        assert facts.may_start
        assert not facts.begun


def test_what_has_begun_is_never_said_not_to_have_run() -> None:
    assert not any(facts.begun for facts in chosen(D.VOID, D.VOID_IT, D.NOTHING))


def test_a_loss_has_a_reason() -> None:
    assert all(decide(facts)[1] for facts in chosen(D.LOST, D.FOREIGN, D.VOID))
