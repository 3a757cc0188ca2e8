"""What to do about a shell, given the facts about its directory. Pure; the heart of rediscovery.

Facts are gathered in a fixed order by `exec.attendant`: liveness first (the lock on the claim), the journal only after
death is established, so that an exit record that is seen is really the last word. Silence is never death: a shell that
lives and does not answer is UNKNOWN, and is asked again for as long as it lives.

| claim                | facts                             | decision                                               |
|----------------------|-----------------------------------|--------------------------------------------------------|
| another nonce        |                                   | FOREIGN: not this job; report it, touch nothing         |
| locked               | answers                           | ATTACH                                                 |
| locked               | no answer                         | WAIT: ask it to bind again, keep trying                |
| free                 | exit record (any boot)            | READ_OUT: the journal says everything                  |
| free                 | no exit record, other boot        | LOST: the node was rebooted                            |
| free                 | no exit record, this boot         | LOST: the shell was killed; clean up its tasks         |
| void                 |                                   | VOID: nothing ran, nothing will                        |
| none, but a spec     | may start                         | START                                                  |
| none, but a spec     | may not start                     | VOID_IT: link a void claim, then look again            |
| none, no spec        |                                   | NOTHING: ENOENT to rank 0, which knows whether to start |
| none, or void        | rank 0 has records of its shell   | LOST: it began, and its directory is not what it was    |
| unreadable           | locked                            | WAIT                                                   |
| unreadable           | free                              | LOST: with the reason                                  |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from fluxres_shell.find import Kind


class Decision(Enum):
    """What to do next about one shell."""

    ATTACH = "attach"
    WAIT = "wait"
    READ_OUT = "read-out"
    LOST = "lost"
    VOID = "void"
    START = "start"
    VOID_IT = "void-it"
    NOTHING = "nothing"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about one shell's directory, each False where it was not looked at.

    `may_start` and `begun` come from rank 0: whether a start is wanted still, and whether it has records of the shell.
    """

    kind: Kind
    nonce_matches: bool = True
    answers: bool = False
    locked: bool = False
    exit_record: bool = False
    rebooted: bool = False
    reason: str = ""
    may_start: bool = False
    begun: bool = False

    @property
    def dead(self) -> bool:
        """Whether there was a shell, and it is dead: the journal may be looked at."""
        return self.kind in (Kind.DEAD, Kind.CORRUPT) and not self.locked


NODE_REBOOTED: Final = "the node was rebooted while the job was running"
SHELL_DIED: Final = "the job shell was killed"
CLAIM_GONE: Final = "the job shell's claim is gone, although it had begun"


def decide(facts: Facts) -> tuple[Decision, str]:
    """The decision and, for LOST and FOREIGN, its reason for people."""
    if not facts.nonce_matches:
        return Decision.FOREIGN, "the claim is of another job: its nonce differs"
    match facts.kind:
        case Kind.VOID | Kind.UNCLAIMED | Kind.NOTHING if facts.begun:
            return Decision.LOST, CLAIM_GONE
        case Kind.ALIVE:
            return (Decision.ATTACH if facts.answers else Decision.WAIT), ""
        case Kind.VOID:
            return Decision.VOID, facts.reason
        case Kind.UNCLAIMED:
            return (Decision.START if facts.may_start else Decision.VOID_IT), ""
        case Kind.NOTHING:
            return Decision.NOTHING, ""
        case Kind.CORRUPT if facts.locked:
            return Decision.WAIT, facts.reason
    if facts.exit_record:
        return Decision.READ_OUT, ""
    if facts.kind is Kind.CORRUPT:
        return Decision.LOST, facts.reason
    return Decision.LOST, NODE_REBOOTED if facts.rebooted else SHELL_DIED
