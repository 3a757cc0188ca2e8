"""`/metrics` of a simulated instance: what is in it, that Prometheus can read it, and that counters never go back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import trio
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from fluxres.base.idset import IdSet
from fluxres.base.json import JsonObject
from fluxres.base.meter import OUTAGES, QUICK, Histogram
from fluxres.exec.attachments import Attachments
from fluxres.exec.ranks import Presence, Ranks
from fluxres.job.stats import JobStats
from fluxres.sched.pool import Allocation, Inventory, Pool, Share
from fluxres.status.catalog import CATALOG, Kind
from fluxres.status.census import census
from fluxres.status.facts import BrokerFacts, LeaderFacts, ProcessFacts
from fluxres.status.metrics import Metrics
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulated

TEXT = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
PROCESS = re.compile(r"process_\w+")
MAX_SERIES = 600
"""Series of an instance, whatever its size: a bound for whoever stores them."""


@dataclass
class Endpoint:
    """An endpoint that somebody reads."""

    connections: int = 3
    readers: int = 2
    follows: int = 1
    refused: Mapping[str, int] = field(default_factory=lambda: {"401": 4})


@dataclass
class Recovered:
    """The second recovery is under way."""

    rediscovered: int = 3
    finished: int = 1
    lost: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(OUTAGES))

    def current(self) -> JsonObject | None:
        return {"began": 1000.0}


def metrics(panics: Callable[[], Mapping[str, int]] = lambda: {"parent-lost": 0, "error": 1}) -> Metrics:
    made = Metrics(ProcessFacts(version="1.2", panics=panics), reuse=0)
    made.serve(Endpoint())
    return made


def broker_facts(instance: Instance, rank: int) -> BrokerFacts:
    """The facts of a broker, as its incarnation knows them."""
    incarnation = instance.processes[rank].loop.incarnation
    assert incarnation is not None
    return BrokerFacts(
        router=incarnation.router,
        handle=incarnation.handle,
        overlay=incarnation.overlay,
        services=incarnation._services,
        stalls=incarnation._stalls.late,
        state=lambda: "run",
        instance=lambda: "f00d",
        incarnations=7,
        started=1234.5,
    )


def leader_facts(instance: Instance, stats: JobStats) -> LeaderFacts:
    """The facts of rank 0, whose jobs are counted from now on."""
    incarnation = instance.processes[0].loop.incarnation
    assert incarnation is not None
    assert incarnation._leader is not None
    manager = incarnation._leader.manager
    manager.listen(stats.changed)
    return LeaderFacts(
        size=instance.size,
        kvs=manager.records._kvs,
        stats=stats,
        scheduler=manager.scheduler,
        ranks=incarnation._leader.ranks,
        quarantined=0,
        attachments=Attachments(trio.current_time),
        recoveries=Recovered(),
        now=lambda: 1001.5,
    )


Found = dict[str, dict[tuple[str, ...], float]]


def read(metrics: Metrics) -> Found:
    """What a scrape has: by the name of a sample, the value of each by its labels' values, in order of their names."""
    body, _ = metrics.expose(TEXT)
    found: Found = {}
    for family in parse_text(body.decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name}{labels} is there twice"
            found[sample.name][labels] = sample.value
    return found


@simulated
async def test_all_there_is() -> None:
    async with Instance(7, fanout=2) as instance:
        await instance.start()
        shown = metrics()
        with shown.attached(broker_facts(instance, 0)):
            shown.lead(leader_facts(instance, JobStats()))
            for accept, parse in ((TEXT, parse_text), (OPENMETRICS, parse_openmetrics)):
                body, content_type = shown.expose(accept)
                assert content_type.startswith(accept.partition(";")[0])
                families = list(parse(body.decode()))
                names = {base(family.name, family.type) for family in families}
                ours = {name for name in names if not PROCESS.fullmatch(name)}
                # rank 0 has no parent
                assert ours == CATALOG.keys() - {"fluxres_overlay_parent_connected"}
                assert {family.name: family.documentation for family in families if not family.documentation} == {}
                assert "process_resident_memory_bytes" in names
                assert sum(len(family.samples) for family in families) < MAX_SERIES


def test_whatever_is_accepted_and_how_often() -> None:
    shown = Metrics(ProcessFacts(version="1.2", panics=dict), reuse=1e9)
    kinds = {shown.expose(accept)[1] for accept in ("", "*/*", "text/plain;version=1.0.0", "nonsense;;,=")}
    assert kinds == {CONTENT_TYPE_PLAIN_0_0_4}
    for version in ("1.0.0", "9.9.9", "x", ""):
        body, kind = shown.expose(f"Application/OpenMetrics-Text; version={version};q=0.5, text/plain")
        assert kind.startswith("application/openmetrics-text; version=1.0.0;")
    assert shown.expose(OPENMETRICS)[0] is body, "it was made a moment ago"


def base(name: str, kind: str) -> str:
    """The name of a family as the catalog has it: parsers leave out what the kind says."""
    for suffix, kinds in (("_total", ("counter",)), ("_info", ("info",))):
        if kind in kinds and not name.endswith(suffix):
            return name + suffix
    return name


@simulated
async def test_jobs_and_commits_are_counted() -> None:
    async with Instance(3, fanout=2) as instance:
        await instance.start()
        shown = metrics()
        with shown.attached(broker_facts(instance, 0)):
            shown.lead(leader_facts(instance, JobStats()))
            before = read(shown)
            assert before["fluxres_jobs_submitted_total"] == {(): 0}
            done = await instance.jobs.submit("sleep", "10", nodes=2)
            running = await instance.jobs.submit("sleep", "10000", nodes=3, tasks=3, cores=2)
            await instance.jobs.wait(done)
            await instance.jobs.wait(running, "start")
            after = read(shown)
    assert after["fluxres_jobs_submitted_total"] == {(): 2}
    assert after["fluxres_jobs_finished_total"][("completed",)] == 1
    assert after["fluxres_jobs_finished_total"][("failed",)] == 0
    assert after["fluxres_jobs"][("run",)] == 1
    assert after["fluxres_job_scheduling_seconds_count"] == {(): 2}
    assert after["fluxres_job_launch_seconds_bucket"][("+Inf",)] == 2
    assert after["fluxres_kvs_commit_seconds_count"][()] > before["fluxres_kvs_commit_seconds_count"][()]
    assert after["fluxres_kvs_transaction_seconds_count"][()] > 0
    assert after["fluxres_kvs_store_bytes"][("used",)] > 0
    assert after["fluxres_cores"] == {("used",): 6, ("free",): 6, ("down",): 0}
    assert after["fluxres_nodes"][("up",)] == 3
    assert after["fluxres_rpc_requests_total"][("job-ingest",)] == 2
    assert after["fluxres_rpc_in_flight"][("resource",)] >= 3  # a presence of each rank
    assert after["fluxres_overlay_messages_total"][("received", "child")] > 0
    assert after["fluxres_event_loop_stall_seconds_count"][()] > 0
    assert after["fluxres_recovery_age_seconds"] == {(): 1.5}
    assert after["fluxres_recovered_jobs_total"] == {("rediscovered",): 3, ("finished",): 1, ("lost",): 0}


@simulated
async def test_a_broker_that_is_not_rank_0() -> None:
    async with Instance(7, fanout=2) as instance:
        await instance.start()
        shown = metrics()
        with shown.attached(broker_facts(instance, 1)):
            found = read(shown)
    assert found["fluxres_overlay_parent_connected"] == {(): 1}
    assert found["fluxres_overlay_peers"][("full",)] == 2
    assert found["fluxres_rpc_tracked"][("parent",)] >= 1  # its presence
    assert [labels[1:] for labels in found["fluxres_broker_info"]] == [("f00d", "1", "7")]
    assert found["fluxres_broker_state"] == {("join",): 0, ("init",): 0, ("run",): 1, ("shutdown",): 0}
    assert "fluxres_jobs" not in found


@simulated
async def test_a_lost_child_is_counted_and_its_traffic_kept() -> None:
    async with Instance(3, fanout=2) as instance:
        await instance.start()
        shown = metrics()
        with shown.attached(broker_facts(instance, 0)):
            before = read(shown)
            instance.kill(2)
            await instance.restart(2)
            await instance.online()
            after = read(shown)
    assert after["fluxres_overlay_peers_lost_total"] == {(): 1}
    for name in ("fluxres_overlay_messages_total", "fluxres_overlay_bytes_total"):
        assert all(after[name][labels] >= value for labels, value in before[name].items())


@simulated
async def test_counters_outlive_incarnations() -> None:
    async with Instance(1) as instance:
        await instance.start()
        shown = metrics()
        stats = JobStats()
        with shown.attached(broker_facts(instance, 0)):
            shown.lead(leader_facts(instance, stats))
            await instance.jobs.wait(await instance.jobs.submit("true"))
            first = read(shown)
        between = read(shown)
        instance.kill(0)
        await instance.restart(0)
        await instance.online()
        with shown.attached(broker_facts(instance, 0)):
            shown.lead(leader_facts(instance, JobStats()))
            second = read(shown)
            await instance.jobs.wait(await instance.jobs.submit("true"))
            third = read(shown)
    assert "fluxres_jobs" not in between
    for name in ("fluxres_jobs_submitted_total", "fluxres_job_scheduling_seconds_count"):
        assert [each[name][()] for each in (first, between, second, third)] == [1, 1, 1, 2]
    buckets = "fluxres_kvs_commit_seconds_bucket"
    assert all(third[buckets][labels] > value for labels, value in first[buckets].items())
    assert third["fluxres_incarnations_total"] == {(): 7}  # the statedir's count, and no sum


def test_a_process_that_has_no_broker_yet() -> None:
    found = read(metrics())
    assert found["fluxres_panics_total"] == {("parent-lost",): 0, ("error",): 1}
    assert found["fluxres_status_readers"] == {(): 2}
    assert [version for _, version in found["fluxres_build_info"]] == ["1.2"]
    assert "fluxres_broker_state" not in found


@simulated
async def test_a_store_that_is_closed_spoils_nothing() -> None:
    async with Instance(1) as instance:
        await instance.start()
        shown = metrics()
        with shown.attached(broker_facts(instance, 0)):
            shown.lead(leader_facts(instance, JobStats()))
            instance.kill(0)
            await instance.processes[0].ended.wait()
            found = read(shown)
    assert "fluxres_kvs_store_bytes" not in found
    assert found["fluxres_kvs_commit_seconds_count"][()] > 0


@pytest.mark.parametrize("name", list(CATALOG))
def test_names_follow_the_conventions(name: str) -> None:
    family = CATALOG[name]
    assert re.fullmatch(r"fluxres_[a-z]+(_[a-z]+)*", name)
    assert name.endswith("_total") == (family.kind is Kind.COUNTER)
    assert name.endswith("_info") == (family.kind is Kind.INFO)
    assert not name.endswith(("_count", "_sum", "_bucket", "_created"))
    assert not re.search(r"_(milliseconds|ms|minutes|kilobytes|kib|percent)", name)
    assert family.kind is not Kind.HISTOGRAM or name.endswith("_seconds")
    assert all(re.fullmatch(r"[a-z_]+", label) and label not in ("le", "quantile") for label in family.labels)
    assert family.meaning
    assert not family.meaning.endswith(".")


def presence(rank: int) -> Presence:
    return Presence(rank=rank, uuid=f"u{rank}", host="h", statedir="s", incarnation=1, boot_id="b", cores="0-3")


def test_each_node_and_core_is_in_one_state() -> None:
    ranks, pool = Ranks(), Pool(size=8)
    for rank in range(6):  # 6 and 7 never came
        pool.add(Inventory(rank=rank, host="h", cores=IdSet(range(4)), gpus=IdSet([0])))
        if rank != 5:
            ranks.joined(presence(rank))
            pool.set_up(IdSet([rank]))
    ranks.declare(5, "gone")
    pool.drain(IdSet([1, 2, 5]))
    pool.set_torpid(IdSet([2, 3]))
    pool.claim(Allocation(shares=(Share(rank=1, cores=IdSet([0, 1])), Share(rank=4, cores=IdSet([0]))), nslots=3))
    nodes, cores, gpus = census(pool, ranks, 8)
    assert nodes == {"up": 2, "torpid": 1, "drained": 2, "offline": 2, "lost": 1}
    assert cores == {"used": 3, "free": 4 + 3, "down": 2 + 4 + 4 + 4}
    assert gpus == {"used": 0, "free": 2, "down": 4}
    assert (sum(nodes.values()), sum(cores.values())) == (8, 24)


def test_cores_that_a_node_has_no_longer() -> None:
    ranks, pool = Ranks(), Pool([Inventory(rank=0, host="h", cores=IdSet(range(4)))], size=1)
    ranks.joined(presence(0))
    pool.set_up(IdSet([0]))
    pool.claim(Allocation(shares=(Share(rank=0, cores=IdSet(range(4))),), nslots=4))
    pool.replace(Inventory(rank=0, host="h", cores=IdSet(range(2))))
    assert census(pool, ranks, 1).cores == {"used": 4, "free": 0, "down": 0}


def test_what_is_measured_where() -> None:
    """Bounds are chosen by what is measured; a change of them has to be meant."""
    assert (JobStats().scheduling.bounds[-1], QUICK[0], OUTAGES[0]) == (604_800.0, 0.0001, 0.1)
