"""The documents say what is: their links lead somewhere, and the commands, rooms, keys and places they name exist."""

from __future__ import annotations

import ast
import errno
import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from fluxres.base.failpoint import FAILPOINTS
from fluxres.base.jobid import JobId
from fluxres.broker import loop
from fluxres.broker.changes import EVENTLOG_KEY
from fluxres.broker.config import Config
from fluxres.broker.drain import DRAIN_KEY
from fluxres.broker.inventory import rank_key
from fluxres.cli.job import SUBCOMMANDS
from fluxres.cli.main import COMMANDS, find
from fluxres.exec.barriers import Barrier
from fluxres.exec.job_run import RELEASE_AFTER
from fluxres.exec.progress import progress_key
from fluxres.exec.reattach import Decision
from fluxres.job import keys
from fluxres.overlay import control, hello, upstream, window
from fluxres.overlay.health import Health
from fluxres_shell.protocol import START_BARRIER

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ARCHITECTURE = ROOT / "docs" / "architecture.md"
RESILIENCY = ROOT / "docs" / "resiliency.md"
SHELL = "shell/fluxres_shell"
PLACE = re.compile(r"(?<![\w/])(?:fluxres|shell|csrc|tests|examples|docs)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\bfluxres (job )?([a-z][a-z-]+)((?: +(?:--?[\w-]+(?:=\S+)?|[^\s`|$()]+))*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def code_of(document: Path) -> str:
    """Only what is set as code: indented blocks, and spans in backticks, one a line."""
    blocks = [line for line in text_of(document).splitlines() if line.startswith("    ")]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text_of(document))])


@pytest.fixture(params=DOCUMENTS, ids=lambda document: document.name)
def document(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def anchors(document: Path) -> set[str]:
    """The places in a document that a link may name: its headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
    return {"", *(re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings)}


def test_links_lead_to_files(document: Path) -> None:
    for target in LINK.findall(text_of(document)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = document.parent / path if path else document
            assert found.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{document.name}: {target}"


def test_places_exist(document: Path) -> None:
    for place in PLACE.findall(code_of(document)):
        assert (ROOT / place).exists(), f"{document.name}: {place}"


def test_make_targets_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z]+)", code_of(document)):
        assert target in targets, f"{document.name}: make {target}"


def help_of(capsys: pytest.CaptureFixture[str], job: bool, *words: str) -> str:
    """What `--help` says of a command, or of a command of it."""
    with pytest.raises(SystemExit):
        find("job" if job else words[0])([*(words if job else words[1:]), "--help"])
    return capsys.readouterr().out


def test_commands_and_their_options_exist(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job, name, rest in COMMAND.findall(code_of(document)):
        known = SUBCOMMANDS if job else COMMANDS
        assert name in known, f"{document.name}: fluxres {job}{name}"
        words = rest.partition(" # ")[0].split()
        offered = help_of(capsys, bool(job), name)
        if "COMMAND ..." in offered and words and not words[0].startswith("-"):
            assert re.search(rf"^    {words[0]}\b", offered, re.MULTILINE), (
                f"{document.name}: fluxres {name} {words[0]}"
            )
            offered = help_of(capsys, bool(job), name, words[0])
        options = OPTION.findall(rest.partition(" # ")[0])
        assert set(options) <= {*OPTION.findall(offered), "--help"}, f"{document.name}: fluxres {job}{name}{rest}"


def test_configuration_keys_exist(document: Path) -> None:
    for table, key in re.findall(r"`([a-z]+)\.([a-z]+-[a-z-]+)`", text_of(document)):
        if table in Config.__struct_fields__:
            fields = msgspec.structs.fields(type(getattr(Config(), table)))
            assert key in {field.encode_name for field in fields}, f"{document.name}: {table}.{key}"


def test_failpoints_exist(document: Path) -> None:
    for name in re.findall(r"FLUXRES_FAILPOINT=([a-z.-]+)", text_of(document)):
        assert name in FAILPOINTS


def rooms() -> set[str]:
    """Every package of the sources, as a path."""
    found = {f"fluxres/{path.parent.name}" for path in (ROOT / "fluxres").glob("*/__init__.py")}
    return found | {SHELL}


def room_of(module: str) -> str:
    """The room that an imported module is in, "" where it is not ours."""
    first, _, rest = module.partition(".")
    if first == "fluxres_shell":
        return SHELL
    second = rest.partition(".")[0]
    return f"fluxres/{second}" if first == "fluxres" and f"fluxres/{second}" in rooms() else ""


def imports_of(room: str) -> set[str]:
    """The other rooms that a room imports, as its sources say."""
    found = set()
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.add(room_of(node.module))
            elif isinstance(node, ast.Import):
                found |= {room_of(alias.name) for alias in node.names}
    return found - {"", room}


def test_rooms_are_those_of_the_map() -> None:
    block = re.findall(r"^    ((?:fluxres|shell)/\w+)\s{2,}", text_of(ARCHITECTURE), re.MULTILINE)
    assert set(block) == rooms()


def test_rooms_import_downward_in_the_order_of_the_map() -> None:
    order = re.findall(r"^    ((?:fluxres|shell)/\w+)\s{2,}", text_of(ARCHITECTURE), re.MULTILINE)
    for above, room in enumerate(order):
        assert imports_of(room) <= set(order[above + 1 :]), f"{room} imports what is not below it"


def test_table_of_imports() -> None:
    rows = re.findall(r"^\| `((?:fluxres|shell)/\w+)` \| (.*) \|$", text_of(ARCHITECTURE), re.MULTILINE)
    for room, cell in rows:
        named = {f"fluxres/{word}" for word in re.findall(r"\w+", cell)} & rooms()
        named |= {SHELL} if "fluxres_shell" in cell else set()
        if room != "fluxres/cli":  # everything below
            assert imports_of(room) <= named, room


def test_kvs_keys_are_where_the_table_says() -> None:
    jobid, text = JobId(1), text_of(ARCHITECTURE)
    places = [keys.eventlog_key, keys.jobspec_key, keys.r_key, keys.nonce_key, keys.guest_key]
    indexes = [keys.active_key, keys.all_key, keys.quarantine_key]
    named = [place(jobid).replace("0000.0000.0000.0001", "<id>") for place in places]
    named += [index(jobid).replace(keys.index_name(jobid), "<id>") for index in indexes]
    named.append(progress_key(jobid, 0).replace("0000.0000.0000.0001", "<id>").replace(".0", ".<rank>"))
    named += [rank_key(0).replace(".0", ".<rank>"), DRAIN_KEY, EVENTLOG_KEY, Barrier("<name>", 0).key[:-1] + "<seq>"]
    assert [key for key in named if f"`{key}`" not in text] == []


def test_the_decision_table_is_whole() -> None:
    text = text_of(RESILIENCY).lower()
    words = {Decision.READ_OUT: "read out", Decision.VOID_IT: "**void** claim", Decision.NOTHING: "enoent"}
    words[Decision.FOREIGN] = "leave it alone"
    assert [d for d in Decision if words.get(d, d.value) not in text] == []


def test_the_table_of_controls_is_whole() -> None:
    """All kinds of `overlay.control`, and who sends them."""
    kinds = re.findall(r"^    ([A-Z]+) +\d+ ", control.__doc__ or "", re.MULTILINE)
    rows = re.findall(r"^\| ([A-Z, ]+) \| (?:child|parent|both|receiver) \|", text_of(ARCHITECTURE), re.MULTILINE)
    assert len(kinds) == 9
    assert sorted(", ".join(rows).split(", ")) == sorted(kinds)


def test_the_table_of_refusals_is_whole() -> None:
    """Every errnum with which a hello is refused, and after which of them a child tries again."""
    source = Path(hello.__file__).read_text(encoding="utf-8")
    refused = {getattr(errno, name) for name in re.findall(r"Refuse\(\s*errno\.(E\w+)", source)}
    table = text_of(RESILIENCY).partition("| refused | errnum |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\|.*\| (E[A-Z]+) \| (.*) \|$", table, re.MULTILINE)
    assert {getattr(errno, name) for name, _ in rows} == refused
    assert {getattr(errno, name) for name, then in rows if then.startswith("it tries again")} == hello.RETRYABLE


def test_words_of_health_are_told() -> None:
    assert [health for health in Health if f"`{health.word}`" not in text_of(RESILIENCY)] == []


def test_numbers_are_those_of_the_code() -> None:
    architecture, resiliency = text_of(ARCHITECTURE), text_of(RESILIENCY)
    assert f"{window.WINDOW // 1024} KiB of one stream" in architecture
    assert f"{window.STEP // 1024} KiB at a time" in architecture
    assert f"exec.barrier.{START_BARRIER}.0" in architecture
    assert RELEASE_AFTER == 1.0
    assert "others have not for a second" in architecture
    assert f"after {upstream.BACKOFF_MIN * 1000:g} ms, doubled to {upstream.BACKOFF_MAX:g} s" in resiliency
    assert resiliency.count(f"{loop.BACKOFF_LOST:g} s") == 1
    assert f"pauses of up to {loop.BACKOFF_MAX:g} s" in resiliency


def test_examples_are_well_formed() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for path in (ROOT / "examples").glob("*.sh"):
        subprocess.run(["sh", "-n", path], check=True)
