"""The status feed of a whole instance in memory: what a reader sees while jobs run and brokers die."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import jsonschema
import pytest
import trio

from fluxres.base.errors import RpcError
from fluxres.base.jobid import JobId, f58
from fluxres.base.json import JsonObject
from fluxres.status.board import LINGER
from fluxres.status.feed import FLUSH, IDLE
from fluxres.status.picture import Picture
from fluxres.status.view import TOPICS
from fluxres.testing.instance import Instance
from fluxres.testing.simulate import simulated
from fluxres.wire.payload import WireMap

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "status.schema.json").read_text())
DOCUMENTS = jsonschema.Draft202012Validator({**SCHEMA, "oneOf": [{"$ref": "#/$defs/documents"}]})
RESPONSE = jsonschema.Draft202012Validator({**SCHEMA, "oneOf": [{"$ref": "#/$defs/watchResponse"}]})
PATIENCE = 120.0
RETRY = 0.2


class Reader:
    """Reads `status.watch` over deaths of brokers, as a page does. `told` are all responses."""

    def __init__(self, instance: Instance, rank: int = 0, **ask: object) -> None:
        self.picture = Picture()
        self.told: list[WireMap] = []
        self._instance = instance
        self._rank = rank
        self._ask: WireMap = {"topics": [*TOPICS], **ask}  # type: ignore[dict-item]
        self._news = trio.Event()

    async def run(self) -> None:
        while True:
            position: WireMap = {} if self.picture.position is None else {"position": [*self.picture.position]}
            try:
                async with (
                    self._instance.client(self._rank) as client,
                    client.stream("status.watch", {**self._ask, **position}, nodeid=0) as responses,
                ):
                    async for response in responses:
                        RESPONSE.validate(response)
                        self.told.append(response)
                        self.picture.apply(response)
                        self._news.set()
                        self._news = trio.Event()
            except RpcError:
                await trio.sleep(RETRY)

    async def until(self, check: Callable[[], bool]) -> None:
        """Wait until the picture is so."""
        with trio.fail_after(PATIENCE):
            while not check():
                await self._news.wait()

    def get(self, topic: str, key: object) -> Mapping[str, object]:
        return self.picture.topic(topic).get(str(key), {})

    def job(self, jobid: JobId) -> Mapping[str, object]:
        return self.get("jobs", int(jobid))

    def statuses(self) -> dict[str, object]:
        return {key: document["status"] for key, document in self.picture.topic("overlay").items()}

    def ghosts(self) -> set[str]:
        return {key for key, document in self.picture.topic("overlay").items() if document.get("ghost")}

    def events(self) -> list[JsonObject]:
        documents = self.picture.topic("events")
        return [documents[key] for key in sorted(documents, key=lambda key: [*map(int, key.split("."))])]


@asynccontextmanager
async def reading(instance: Instance, rank: int = 0, **ask: object) -> AsyncIterator[Reader]:
    reader = Reader(instance, rank, **ask)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await reader.until(lambda: reader.picture.position is not None)
        yield reader
        nursery.cancel_scope.cancel()


@simulated
async def test_the_life_of_a_job_appears() -> None:
    async with Instance(8, fanout=2) as instance:
        await instance.start()
        early = await instance.jobs.submit("echo", "hello")
        await instance.jobs.wait(early)
        async with reading(instance) as reader:
            assert reader.get("instance", "about")["size"] == 8
            assert reader.job(early)["result"] == "COMPLETED"
            totals = reader.get("instance", "resources")
            assert (totals["nodes"], totals["online"], totals["cores"], totals["cores_used"]) == (8, 8, 32, 0)
            assert reader.statuses() == {str(rank): "full" for rank in range(8)}
            assert {event["name"] for event in reader.events()} >= {"restart", "resource-define", "online"}
            assert reader.picture.topic("log")
            jobid = await instance.jobs.submit("sleep", "5", nodes=2)
            await reader.until(lambda: reader.job(jobid).get("state") == "RUN")
            shown = reader.job(jobid)
            assert (shown["id"], shown["dec"], shown["nnodes"]) == (f58(jobid), str(int(jobid)), 2)
            await reader.until(lambda: reader.get("instance", "resources")["cores_used"] == shown["ncores"])
            assert sum(bool(node["cores_used"]) for node in reader.picture.topic("resources").values()) == 2
            assert reader.get("instance", "jobs")["run"] == 1
            await reader.until(lambda: reader.job(jobid).get("state") == "INACTIVE")
            assert (reader.job(jobid)["result"], reader.job(jobid)["returncode"]) == ("COMPLETED", 0)
            await reader.until(lambda: reader.get("instance", "resources")["cores_used"] == 0)
            await reader.until(lambda: reader.get("instance", "jobs").get("inactive") == 2)
            assert reader.get("instance", "jobs")["completed"] == 2
            DOCUMENTS.validate(reader.picture.documents)


@simulated
async def test_a_router_is_killed_and_comes_back() -> None:
    async with Instance(8, fanout=2) as instance:
        await instance.start()
        async with reading(instance, rank=2) as reader:
            since = {key: document["since"] for key, document in reader.picture.topic("overlay").items()}
            instance.kill(1)
            await reader.until(lambda: reader.statuses()["1"] == "lost" and reader.statuses()["7"] == "lost")
            assert reader.statuses()["0"] == "degraded"
            assert reader.ghosts() == {"3", "4", "7"}
            assert reader.get("overlay", 7)["since"] == reader.get("overlay", 1)["since"]
            await reader.until(lambda: reader.get("instance", "resources")["online"] == 4)
            DOCUMENTS.validate(reader.picture.documents)
            await instance.restart(1)
            await reader.until(lambda: set(reader.statuses().values()) == {"full"} and not reader.ghosts())
            for key, document in reader.picture.topic("overlay").items():
                assert (document["since"] == since[key]) == (key in "256"), key  # the others were not touched
            await reader.until(lambda: reader.get("instance", "resources")["online"] == 8)
            await reader.until(lambda: reader.events()[-1]["name"] == "recovery")
            assert not reader.get("instance", "recovery")
            assert "offline" in [event["name"] for event in reader.events()]


@simulated
async def test_rank_0_is_killed_and_a_new_epoch_begins() -> None:
    async with Instance(8, fanout=2) as instance:
        await instance.start()
        jobid = await instance.jobs.submit("sleep", "20", nodes=8)
        waiting = await instance.jobs.submit("sleep", "1", nodes=8, cores=4)
        async with reading(instance) as reader:
            await reader.until(lambda: reader.job(jobid).get("state") == "RUN")
            assert reader.picture.position is not None
            before = reader.picture.position
            instance.kill(0)
            await instance.restart(0)
            await reader.until(lambda: reader.picture.position is not None and reader.picture.position[0] != before[0])
            assert reader.picture.why == "restarted"
            assert reader.picture.position[0] == instance.uuids()[0]
            assert reader.job(jobid)["state"] == "RUN"
            await reader.until(lambda: reader.job(jobid).get("restarts") == 1 and "detached" not in reader.job(jobid))
            assert reader.job(waiting)["state"] == "SCHED"
            await reader.until(lambda: set(reader.statuses().values()) == {"full"})
            await reader.until(lambda: "recovery" in [event["name"] for event in reader.events()])
            await reader.until(lambda: reader.job(waiting).get("state") == "INACTIVE")
            assert reader.get("instance", "about")["incarnations"] == 2
            DOCUMENTS.validate(reader.picture.documents)


@simulated
async def test_a_reader_resumes_and_nothing_is_collected_when_nobody_looks() -> None:
    async with Instance(3) as instance:
        await instance.start()

        def is_collecting() -> bool:
            incarnation = instance.processes[0].loop.incarnation
            assert incarnation is not None
            assert incarnation._leader is not None
            return incarnation._leader.feed.collecting

        async with reading(instance, topics=["jobs"]) as reader:
            assert is_collecting()
            first = await instance.jobs.submit("echo", "one")
            await reader.until(lambda: reader.job(first).get("state") == "INACTIVE")
            picture, last = reader.picture, reader.told[-1]
        second = await instance.jobs.submit("echo", "two")
        await instance.jobs.wait(second)
        again = Reader(instance, topics=["jobs"])
        again.picture = picture
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.run)
            await again.until(lambda: again.job(second).get("state") == "INACTIVE")
            assert {told["type"] for told in again.told} == {"delta"}
            assert again.told[0]["prev"] == last["position"][1]  # type: ignore[index]
            nursery.cancel_scope.cancel()
        await trio.sleep(LINGER + 1)
        assert not is_collecting()
        await instance.jobs.wait(await instance.jobs.submit("echo", "three"))
        late = Reader(instance, topics=["jobs"])
        late.picture = again.picture
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.run)
            await late.until(lambda: len(late.picture.topic("jobs")) == 3)
            assert late.picture.why == "behind"
            nursery.cancel_scope.cancel()


@simulated
async def test_a_filter_and_an_idle_reader() -> None:
    async with Instance(2) as instance:
        await instance.start()
        constraint = {"states": ["active"]}
        async with reading(instance, topics=["jobs"], jobs=constraint) as reader:
            jobid = await instance.jobs.submit("sleep", "3")
            await reader.until(lambda: reader.job(jobid).get("state") == "RUN")
            await reader.until(lambda: not reader.picture.topic("jobs"))
            count = len(reader.told)
            await instance.jobs.wait(await instance.jobs.submit("echo", "x"))
            await trio.sleep(2 * IDLE + 1)
            assert len(reader.told) > count
            assert not reader.picture.topic("jobs")


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        ({"topics": []}, "cannot watch nothing"),
        ({"topics": ["nothing"]}, "cannot watch 'nothing'"),
        ({"topics": ["jobs"], "jobs": {"states": ["odd"]}}, "odd"),
        ({"topics": "jobs"}, "status.watch"),
    ],
)
@simulated
async def test_a_request_that_makes_no_sense_is_refused(ask: WireMap, text: str) -> None:
    async with Instance(1) as instance:
        await instance.start()
        async with instance.client() as client, client.stream("status.watch", ask) as responses:
            with pytest.raises(RpcError, match=text):
                await responses.__anext__()


@simulated
async def test_a_large_tree() -> None:
    async with Instance(200, fanout=5) as instance:
        await instance.start()
        async with reading(instance, topics=["overlay", "resources", "instance"]) as reader:
            assert len(reader.picture.topic("overlay")) == 200
            assert set(reader.statuses().values()) == {"full"}
            assert not reader.ghosts()
            instance.kill(2)
            below = {str(rank) for rank in instance.topology.subtree(2)}
            await reader.until(lambda: {k for k, status in reader.statuses().items() if status == "lost"} == below)
            await instance.restart(2)
            await reader.until(lambda: set(reader.statuses().values()) == {"full"})
            await trio.sleep(2 * FLUSH)
            assert set(reader.statuses().values()) == {"full"}


@simulated
async def test_drains_and_declarations_are_shown_as_they_are_made() -> None:
    async with Instance(3) as instance:
        await instance.start()
        async with reading(instance, topics=["resources", "instance", "overlay"]) as reader:
            await instance.call("resource.drain", {"targets": "1", "reason": "bad disk"})
            await reader.until(lambda: reader.get("resources", 1).get("drained") == "bad disk")
            await instance.call("resource.drain", {"targets": "1", "reason": "worse", "mode": "overwrite"})
            await reader.until(lambda: reader.get("resources", 1).get("drained") == "worse")
            assert reader.get("instance", "resources")["cores_down"] == 4
            await instance.call("resource.undrain", {"targets": "1"})
            await reader.until(lambda: "drained" not in reader.get("resources", 1))
            instance.kill(2)
            await reader.until(lambda: reader.get("resources", 2)["online"] is False)
            await instance.call("resource.declare-lost", {"ranks": "2", "reason": "stolen"})
            await reader.until(lambda: reader.get("resources", 2).get("lost") == "stolen")
            await instance.restart(2)
            await reader.until(lambda: reader.get("resources", 2)["online"] is True)
            await reader.until(lambda: "lost" not in reader.get("resources", 2))
            await reader.until(lambda: reader.get("instance", "resources")["cores_down"] == 0)
