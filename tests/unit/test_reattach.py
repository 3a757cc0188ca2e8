"""The decision table of rediscovery, whole: every combination of facts has the decision that DESIGN §9 wants."""

from __future__ import annotations

import itertools

import pytest

from fluxres.exec.reattach import NODE_REBOOTED, SHELL_DIED, Decision, Facts, decide
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
        )
        for kind in Kind
        for nonce, answers, locked, exit_record, rebooted, may_start in itertools.product([False, True], repeat=6)
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
    assert all(not facts.exit_record for facts in chosen(D.LOST))


def test_a_shell_is_started_only_where_none_was_claimed() -> None:
    assert all(facts.kind is Kind.UNCLAIMED and facts.may_start for facts in chosen(D.START))


def test_a_loss_has_a_reason() -> None:
    assert all(decide(facts)[1] for facts in chosen(D.LOST, D.FOREIGN, D.VOID))
