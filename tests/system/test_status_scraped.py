"""`/metrics` of real brokers over HTTP: jobs are counted, what a SIGKILL breaks off is found again, panics are told."""

from __future__ import annotations

import urllib.request
from typing import Final

from conftest import MakeInstance, MakeTree
from kit import Instance, eventually, wait_status
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from fluxres.status.catalog import CATALOG

TIMEOUT: Final = 30.0
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"
PARENT: Final = "fluxres_overlay_parent_connected"
"""Rank 0 has none."""
REFUSED: Final = "fluxres_status_refused_total"
"""There is none before something is refused."""

Found = dict[str, dict[tuple[str, ...], float]]


def uri_of(instance: Instance) -> str:
    """Where the instance's rank 0 serves its status."""
    return instance.fluxres("getattr", "status.uri").stdout.decode().strip()


def fetch(uri: str, accept: str = "") -> tuple[str, str]:
    """The metrics and their content type."""
    request = urllib.request.Request(f"{uri}metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return response.read().decode(), response.headers["Content-Type"]


def scrape(uri: str) -> Found:
    """By the name of a sample, the value of each by its labels' values in order of the labels' names."""
    found: Found = {}
    for family in parse_text(fetch(uri)[0]):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value(uri: str, name: str, *labels: str) -> float:
    """One value of now; 0 where there is none."""
    return scrape(uri).get(name, {}).get(labels, 0.0)


def test_jobs_are_counted(instance: Instance) -> None:
    uri = uri_of(instance)
    before = scrape(uri)
    assert before["fluxres_jobs_submitted_total"] == {(): 0}
    assert before["fluxres_nodes"][("up",)] == 1
    assert before["fluxres_cores"][("free",)] == 4
    assert before["fluxres_broker_state"][("run",)] == 1
    jobs = [instance.submit(instance.job(f"sys.exit({code})")) for code in (0, 0, 3)]
    instance.wait_inactive(*jobs)
    assert [instance.status(jobid) for jobid in jobs] == [0, 0, wait_status(3)]
    running = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_event(running, "start")
    after = scrape(uri)
    assert after["fluxres_jobs_submitted_total"] == {(): 4}
    assert after["fluxres_jobs_finished_total"][("completed",)] == 2
    assert after["fluxres_jobs_finished_total"][("failed",)] == 1
    assert after["fluxres_jobs"][("run",)] == 1
    assert after["fluxres_cores"][("used",)] == 1
    assert after["fluxres_shells"][("attached",)] == 1
    assert after["fluxres_job_scheduling_seconds_count"] == {(): 4}
    assert after["fluxres_kvs_commit_seconds_count"][()] > before["fluxres_kvs_commit_seconds_count"][()]
    assert after["fluxres_kvs_store_bytes"][("used",)] > 0
    assert after["process_resident_memory_bytes"][()] > 1e6
    instance.cancel(running)
    instance.wait_inactive(running)
    assert value(uri, "fluxres_jobs_finished_total", "canceled") == 1


def test_both_formats(instance: Instance) -> None:
    uri = uri_of(instance)
    text, content_type = fetch(uri)
    assert content_type.startswith("text/plain; version=0.0.4")
    ours = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE fluxres_")}
    assert ours <= CATALOG.keys()
    assert CATALOG.keys() - ours <= {PARENT, REFUSED}
    text, content_type = fetch(uri, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families: list[Metric] = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    assert sum(family.name.startswith("fluxres_") for family in families) == len(ours)


def test_rank_0_is_killed_with_a_job_running(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    uri = uri_of(instance)
    running = instance.submit(instance.job("time.sleep(600)"))
    instance.wait_event(running, "start")
    first = scrape(uri)
    instance.restart()
    assert uri_of(instance) == uri  # the port is kept
    eventually(lambda: value(uri, "fluxres_recovered_jobs_total", "rediscovered") == 1, what="the end of the recovery")
    second = scrape(uri)
    assert second["fluxres_incarnations_total"][()] == first["fluxres_incarnations_total"][()] + 1
    assert second["fluxres_jobs_submitted_total"] == {(): 0}  # of this process, as Prometheus expects
    assert second["process_start_time_seconds"][()] >= first["process_start_time_seconds"][()]
    assert second["fluxres_jobs"][("run",)] == 1
    assert second["fluxres_shells"] == {("attached",): 1, ("detached",): 0}
    assert second["fluxres_shells_reattached_total"][("attached",)] == 1
    assert second["fluxres_shell_detached_seconds_count"] == {(): 1}
    assert second["fluxres_recovery_seconds_count"] == {(): 1}
    assert second["fluxres_recovery_age_seconds"] == {(): 0}
    instance.cancel(running)
    instance.wait_inactive(running)


def test_a_subtree_panic_is_counted_where_it_happens(make_tree: MakeTree) -> None:
    tree = make_tree(size=3, fanout=2, settings={"status": {"ranks": "0-2"}})
    tree.start_all()
    uris = [tree.attribute(rank, "status.uri") for rank in range(3)]
    assert len(set(uris)) == 3
    before = [scrape(uri) for uri in uris]
    assert before[1][PARENT] == {(): 1}
    assert PARENT not in before[0]
    assert "fluxres_jobs" not in before[1]
    assert before[0]["fluxres_overlay_peers"][("full",)] == 2
    uuids = tree.uuids()
    tree.kill_rank(0)
    tree.spawn(0)
    tree.wait_renewed(uuids)
    for uri in uris[1:]:
        eventually(lambda uri=uri: value(uri, PARENT) == 1, what="the parent")  # type: ignore[misc]
        after = scrape(uri)
        assert after["fluxres_panics_total"] == {("parent-lost",): 1, ("error",): 0}
        assert after["fluxres_incarnations_total"] == {(): 2}
    sent = [each["fluxres_overlay_messages_total"][("sent", "parent")] for each in (before[1], scrape(uris[1]))]
    assert sent[1] > sent[0]  # what the incarnation before has sent is counted as well
