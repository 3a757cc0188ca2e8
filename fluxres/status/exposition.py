"""How `status.metrics` is shown: as families of prometheus_client, whose writers make the text of them.

Imported at the first scrape. The registry is our own, so that nothing else of this process is ever in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from fluxres.status.catalog import CATALOG, Family, Kind
from fluxres.status.samples import (
    Buckets,
    Sample,
    count_broker,
    count_leader,
    count_process,
    gauge_broker,
    gauge_leader,
    gauge_process,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from fluxres.status.metrics import Metrics

OPENMETRICS: Final = "application/openmetrics-text"
"""What is told to those who ask for it; others get the text format of Prometheus."""

Series = tuple[Family, tuple[str, ...]]
Grown = dict[Series, float | Buckets]
"""What counters have come to."""


class Exposition:
    """Shows the metrics of one process, and keeps what incarnations have counted that are over."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._past: Grown = {}
        self._told: dict[str, tuple[float, bytes]] = {}
        """What was told last, and until when it serves, by its content type, of which there are two."""
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The body as the `Accept` header wants it, and its content type."""
        encode, content_type = choose_encoder(_format(accept))
        began = time.monotonic()
        until, body = self._told.get(content_type, (-math.inf, b""))
        if began >= until:
            body = encode(self._registry)
            made = time.monotonic()
            self._told[content_type] = (made + self._metrics.reuse * (made - began), body)
        return body, content_type

    def keep(self) -> None:
        """The incarnation that is attached is over: keep its counts."""
        for sample in self._counted():
            _add(self._past, sample)

    def collect(self) -> Iterator[Metric]:
        """All families, in the order of the catalog (the registry calls this)."""
        found: dict[Family, list[Sample]] = {}
        for sample in self._samples():
            found.setdefault(sample.family, []).append(sample)
        for family in CATALOG.values():
            if family in found:
                yield _metric(family, found[family])

    def _samples(self) -> Iterator[Sample]:
        """Every series there is now."""
        counted = dict(self._past)
        for sample in self._counted():
            _add(counted, sample)
        for (family, labels), value in counted.items():
            yield Sample(family, value, labels)
        its = self._metrics
        yield from chain(count_process(its.process), gauge_process(its.process))
        if its.broker is not None:
            yield from gauge_broker(its.broker)
        if its.leader is not None:
            yield from gauge_leader(its.leader)

    def _counted(self) -> Iterator[Sample]:
        """What the incarnation that is attached has counted."""
        its = self._metrics
        if its.broker is not None:
            yield from count_broker(its.broker)
        if its.leader is not None:
            yield from count_leader(its.leader)


def _format(accept: str) -> str:
    """An `Accept` header as we pass it on: prometheus_client fails on versions that are no numbers, and says in its
    content type whatever other version it was asked for.
    """
    asked = {each.partition(";")[0].strip() for each in accept.lower().split(",")}
    return f"{OPENMETRICS};version=1.0.0" if OPENMETRICS in asked else ""


def _add(grown: Grown, sample: Sample) -> None:
    """Add what a counter has come to, to what it had come to before."""
    series = (sample.family, sample.labels)
    value, before = sample.value, grown.get(series)
    if isinstance(value, Buckets) and isinstance(before, Buckets):
        counts = tuple(a + b for a, b in zip(before.counts, value.counts, strict=True))
        grown[series] = Buckets(value.bounds, counts, before.total + value.total)
    elif isinstance(value, Buckets) or before is None or isinstance(before, Buckets):
        grown[series] = value
    else:
        grown[series] = before + value


def _metric(family: Family, samples: Iterable[Sample]) -> Metric:
    """A metric as prometheus_client has it."""
    name, meaning, labels = family.name, family.meaning, family.labels
    match family.kind:
        case Kind.INFO:
            info = InfoMetricFamily(name.removesuffix("_info"), meaning)
            for sample in samples:
                info.add_metric((), dict(zip(labels, sample.labels, strict=True)))
            return info
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(name, meaning, labels=labels)
            for sample in samples:
                if isinstance(sample.value, Buckets):
                    histogram.add_metric(sample.labels, _buckets(sample.value), sample.value.total)
            return histogram
    made = (CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily)(name, meaning, labels=labels)
    for sample in samples:
        if not isinstance(sample.value, Buckets):
            made.add_metric(sample.labels, sample.value)
    return made


def _buckets(value: Buckets) -> list[tuple[str, float]]:
    """The cumulative counts with their bounds as text; a bound of 1 is `1.0`, as everywhere in Prometheus."""
    bounds = [*map(repr, value.bounds), "+Inf"]
    return list(zip(bounds, map(float, value.counts), strict=True))
