"""The documents of the metrics are whole: the table in docs/metrics.md, its alerts, and the Grafana dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import cast

import pytest

from fluxres.base.json import JsonObject
from fluxres.job.result import JobResult
from fluxres.job.stats import JobStats
from fluxres.overlay.health import Health
from fluxres.status.catalog import CATALOG, Kind
from fluxres.status.census import NODE_STATES, PART_STATES
from fluxres.status.samples import STATES

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = ROOT / "examples" / "grafana" / "fluxres.json"
ROW = re.compile(r"^\| `(fluxres_\w+)` \| (\w+) \|(.*?)\| (.+) \|$", re.MULTILINE)
NAME = re.compile(r"\bfluxres_\w+")
WIDTH = 24
"""Columns of a Grafana dashboard."""


def labels_of(cell: str) -> dict[str, list[str]]:
    """The labels in a cell, each with its values where they are told."""
    found = {}
    for part in cell.split("; ") if cell.strip() else ():
        head, _, values = part.partition(": ")
        for name in re.findall(r"`(\w+)`", head):
            found[name] = re.findall(r"`([\w-]+)`", values)
    return found


def test_the_table_is_the_catalog() -> None:
    rows = ROW.findall(DOCUMENT)
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for name, *_ in rows)), "a metric is told twice"
    told = {name: (kind, tuple(labels_of(cell))) for name, kind, cell, _ in rows}
    assert told == {family.name: (family.kind.value, family.labels) for family in CATALOG.values()}


def test_values_of_labels_are_told() -> None:
    told = {name: labels_of(cell) for name, _, cell, _ in ROW.findall(DOCUMENT)}
    assert told["fluxres_jobs"]["state"] == [state.name.lower() for state in JobStats().active]
    assert told["fluxres_jobs_finished_total"]["result"] == [result.name.lower() for result in JobResult]
    assert told["fluxres_nodes"]["state"] == list(NODE_STATES)
    assert told["fluxres_cores"] == told["fluxres_gpus"] == {"state": list(PART_STATES)}
    assert told["fluxres_broker_state"]["state"] == list(STATES)
    assert told["fluxres_overlay_peers"]["state"] == [health.word for health in Health]


def known(name: str) -> bool:
    """Whether a name in a query is of a metric, or of one of the series of a histogram."""
    family = CATALOG.get(re.sub(r"_(bucket|sum|count)$", "", name))
    return name in CATALOG or (family is not None and family.kind is Kind.HISTOGRAM)


def test_the_text_names_what_there_is() -> None:
    assert [name for name in NAME.findall(DOCUMENT) if not known(name)] == []


def test_alerts_use_what_there_is() -> None:
    """Every rule has an expression with a metric of ours, or Prometheus' own `up`, and says what is wrong."""
    rules = re.findall(r"- alert: (\w+)\n +expr: (.+)\n(?: +for: .+\n)? +annotations: \{summary: \".+\"\}", DOCUMENT)
    assert len(rules) == DOCUMENT.count("- alert:") > 5
    for name, expression in rules:
        assert NAME.search(expression) or "up{" in expression, name


# --- the dashboard


@pytest.fixture(scope="module")
def dashboard() -> JsonObject:
    return cast("JsonObject", json.loads(DASHBOARD.read_text(encoding="utf-8")))


def panels_of(dashboard: JsonObject) -> list[JsonObject]:
    return cast("list[JsonObject]", dashboard["panels"])


def expressions(dashboard: JsonObject) -> Iterator[str]:
    """All queries."""
    for panel in panels_of(dashboard):
        for target in cast("list[JsonObject]", panel.get("targets", [])):
            yield cast("str", target["expr"])


def test_the_dashboard_can_be_imported(dashboard: JsonObject) -> None:
    assert cast("int", dashboard["schemaVersion"]) >= 39
    assert (dashboard["id"], dashboard["title"]) == (None, "fluxres")
    variables = cast("list[JsonObject]", cast("JsonObject", dashboard["templating"])["list"])
    assert [(each["name"], each["type"]) for each in variables] == [
        ("datasource", "datasource"),
        ("job", "query"),
        ("instance", "query"),
    ]
    ids = [panel["id"] for panel in panels_of(dashboard)]
    assert len(set(map(str, ids))) == len(ids)
    for panel in panels_of(dashboard):
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]


def test_the_dashboard_uses_every_metric_and_no_other(dashboard: JsonObject) -> None:
    used = {name for expression in expressions(dashboard) for name in NAME.findall(expression)}
    assert [name for name in used if not known(name)] == []
    shown = {name if name in CATALOG else re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert CATALOG.keys() - shown == set()


def test_labels_in_queries_exist(dashboard: JsonObject) -> None:
    for expression in expressions(dashboard):
        for name, selector in re.findall(r"(fluxres_\w+)\{([^}]*)\}", expression):
            family = CATALOG.get(name) or CATALOG[re.sub(r"_(bucket|sum|count)$", "", name)]
            used = set(re.findall(r"(\w+)=", selector)) - {"job", "instance"}
            assert used <= set(family.labels), expression


def test_parentheses_match(dashboard: JsonObject) -> None:
    for expression in expressions(dashboard):
        bare = re.sub(r'"[^"]*"', "", expression)
        for opening, closing in ("()", "{}", "[]"):
            assert bare.count(opening) == bare.count(closing), expression


def test_panels_do_not_overlap(dashboard: JsonObject) -> None:
    places = []
    for panel in panels_of(dashboard):
        grid = cast("dict[str, int]", panel["gridPos"])
        x, y = grid["x"], grid["y"]
        assert x >= 0
        assert x + grid["w"] <= WIDTH
        places.append((x, y, x + grid["w"], y + grid["h"], str(panel["title"])))
    for one, other in combinations(places, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{one} overlaps {other}"
