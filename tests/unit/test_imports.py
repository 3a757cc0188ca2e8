"""Imports go downward only (DESIGN §3), pure modules are pure, and what must start fast imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("base", "wire", "rpc", "overlay", "kvs", "exec", "sched", "job", "status", "broker", "cli", "testing")
"""Lowest first. A room imports from itself and from lower ones."""
TOP = {"fluxres": 1, "fluxres.client": 3, "fluxres.session": 3}
"""Modules outside of rooms: how many of the lowest rooms each may import."""
PURE = (
    *("fluxres.base", "fluxres.wire"),
    *("fluxres.rpc.tracker", "fluxres.rpc.calls"),
    *("fluxres.exec.barriers", "fluxres.exec.backoff", "fluxres.exec.host", "fluxres.overlay.address"),
    *("fluxres.exec.reattach", "fluxres.exec.progress", "fluxres.exec.execution", "fluxres.exec.translate"),
    *(
        "fluxres.exec.spec",
        "fluxres.sched.policy",
        "fluxres.sched.pool",
        "fluxres.sched.request",
        "fluxres.sched.constraint",
    ),
    *("fluxres.job.state", "fluxres.job.value", "fluxres.job.result", "fluxres.job.select", "fluxres.job.view"),
    *("fluxres.job.jobspec", "fluxres.job.resources", "fluxres.job.build", "fluxres.job.changes"),
    *("fluxres.job.stats", "fluxres.kvs.meters", "fluxres.overlay.traffic", "fluxres.status.catalog"),
    *("fluxres.exec.attachments", "fluxres.exec.episode", "fluxres.exec.recall", "fluxres.exec.recovery"),
    *("fluxres.job.keys", "fluxres.job.options", "fluxres.job.requires"),
    *("fluxres.overlay.topology", "fluxres.overlay.control", "fluxres.overlay.hello", "fluxres.overlay.health"),
    *("fluxres.overlay.liveness", "fluxres.overlay.window", "fluxres.overlay.errors", "fluxres.overlay.settings"),
    *("fluxres.overlay.transport", "fluxres.overlay.report", "fluxres_shell.state", "fluxres_shell.records"),
    *("fluxres.status.view", "fluxres.status.picture", "fluxres.status.select"),
    *("fluxres.status.messages", "fluxres.status.asks", "fluxres.status.access", "fluxres.status.http"),
    *("fluxres.status.pace",),
)
IMPURE = frozenset({"trio", "asyncio", "threading", "socket", "select", "subprocess", "sqlite3", "random", "time"})
"""What no pure module imports: input and output, clocks, chance, other tasks."""
EXEMPT = frozenset({"fluxres.base.failpoint"})
"""A switch for tests that kills the process: not pure by nature."""
NO_TRIO = ("fluxres.base", "fluxres.wire", "fluxres.cli", "fluxres.client", "fluxres.session", "fluxres_shell")
NO_MSGSPEC = ("fluxres.base", "fluxres.wire", "fluxres.cli", "fluxres_shell")


class Import(NamedTuple):
    """One imported module, and whether importing the importer imports it."""

    name: str
    eager: bool
    line: int


def _sources() -> dict[str, Path]:
    found = {}
    for top in (ROOT / "fluxres", ROOT / "shell" / "fluxres_shell"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(node: ast.AST, eager: bool) -> Iterator[Import]:
    """All imports below `node`; those for the type checker only are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, eager, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            assert child.module
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield Import(name if name in SOURCES else child.module, eager, child.lineno)
        elif not _is_typing(child):
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, eager and not deferred)


SOURCES = _sources()
IMPORTS = {name: tuple(_walk(ast.parse(path.read_text(), str(path)), True)) for name, path in sorted(SOURCES.items())}


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the modules beside the rooms, and what is not fluxres."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fluxres" and len(parts) > 1 and parts[1] in ROOMS else None


def within(module: str, names: tuple[str, ...]) -> bool:
    """Whether `module` is one of `names`, or inside one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def where(module: str, found: Import) -> str:
    return f"{SOURCES[module].relative_to(ROOT)}:{found.line} imports {found.name}"


def test_all_modules_are_in_a_room() -> None:
    strangers = [
        name
        for name in SOURCES
        if name.startswith("fluxres.") and room_of(name) is None and not within(name, (*TOP,)[1:])
    ]
    assert strangers == []


def _goes_up(module: str, target: str) -> bool:
    below, above = room_of(module), room_of(target)
    if below is not None:
        if above is None:  # only commands are above fluxres.client
            return target.startswith("fluxres.") and ROOMS.index(below) < ROOMS.index("status")
        return ROOMS.index(above) > ROOMS.index(below)
    return above is not None and module in TOP and ROOMS.index(above) >= TOP[module]


def test_imports_go_downward() -> None:
    wrong = [
        where(module, found)
        for module, imports in IMPORTS.items()
        for found in imports
        if found.name.startswith("fluxres.") and _goes_up(module, found.name)
    ]
    assert wrong == []


def test_the_shell_imports_wire_and_base_only() -> None:
    wrong = [
        where(module, found)
        for module, imports in IMPORTS.items()
        if within(module, ("fluxres_shell",))
        for found in imports
        if found.name.startswith("fluxres.") and room_of(found.name) not in ("wire", "base")
    ]
    assert wrong == []


def test_nothing_needs_the_simulations() -> None:
    users = [
        where(module, found)
        for module, imports in IMPORTS.items()
        if room_of(module) != "testing"
        for found in imports
        if room_of(found.name) == "testing"
    ]
    assert users == []


def test_who_needs_the_shell() -> None:
    """Only the room that starts and finds shells."""
    users = {room_of(m) for m, imports in IMPORTS.items() for i in imports if within(i.name, ("fluxres_shell",))}
    assert users - {None} <= {"exec", "broker", "testing"}


def reached(module: str, *, eager: bool) -> dict[str, str]:
    """All that is imported by importing `module`, and by whom; with `eager` false also what its functions import."""
    todo, seen = [module], {}
    while todo:
        current = todo.pop()
        for found in IMPORTS.get(current, ()):
            if (found.eager or not eager) and found.name not in seen:
                seen[found.name] = where(current, found)
                todo.append(found.name)
    return seen


def _offences(modules: tuple[str, ...], forbidden: frozenset[str], *, eager: bool = True) -> set[str]:
    return {
        by
        for module in SOURCES
        if within(module, modules) and module not in EXEMPT
        for name, by in reached(module, eager=eager).items()
        if name.partition(".")[0] in forbidden
    }


def test_pure_modules_are_pure() -> None:
    """They import no clock, socket or file of their own, and no Trio, thread or process even through others."""
    own = [
        where(module, found)
        for module, imports in IMPORTS.items()
        if within(module, PURE) and module not in EXEMPT
        for found in imports
        if found.name.partition(".")[0] in IMPURE
    ]
    assert own == []
    assert _offences(PURE, IMPURE - {"socket", "select", "time"}) == set()


def test_the_names_of_the_pure_modules_are_right() -> None:
    assert set(PURE) <= SOURCES.keys()
    assert SOURCES.keys() >= EXEMPT


def test_commands_and_the_shell_do_without_trio() -> None:
    assert _offences(NO_TRIO, frozenset({"trio", "asyncio"})) == set()


def test_no_function_of_a_command_imports_trio_either() -> None:
    own = [
        where(module, found)
        for module, imports in IMPORTS.items()
        if within(module, NO_TRIO)
        for found in imports
        if found.name.partition(".")[0] in ("trio", "asyncio")
    ]
    assert own == []


def test_what_starts_fast_does_without_msgspec() -> None:
    assert _offences(NO_MSGSPEC, frozenset({"msgspec"})) == set()


@pytest.mark.parametrize("module", ["fluxres.cli.main", "fluxres_shell.main", "fluxres.client", "fluxres.session"])
def test_what_is_really_loaded(module: str) -> None:
    """The same of a real interpreter, for what the syntax does not show."""
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    ).stdout.split()
    assert not {"trio", "msgspec", "asyncio", "sqlite3", "hypothesis"} & set(loaded)


def test_imports_make_no_cycle() -> None:
    cycles = [module for module in SOURCES if module in reached(module, eager=True)]
    assert cycles == []
