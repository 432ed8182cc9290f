"""What the server exports to Prometheus, on a port of its own."""

from __future__ import annotations

from collections import Counter as _Totals
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from flame_jax.fke.manifest import Manifest
from flame_jax.packing import Bucket

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LOAD_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
STAGES = ("decode", "features", "queue", "assemble", "compute", "encode", "total")


Row = tuple[Sequence[str], float]
"""Label values and a number."""


class _Read(Collector):
    """A metric whose rows are read when it is scraped."""

    def __init__(self, make: Callable[[], CounterMetricFamily | GaugeMetricFamily], read: Callable[[], Iterable[Row]]):
        self._make, self._read = make, read

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Called by the registry on every scrape, from the thread that serves it."""
        family = self._make()
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family


class Metrics:
    """Counters and histograms of one server. Every accepted call ends in exactly one outcome."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accepted = Counter("flame_accepted", "Calls that reached the handler", registry=self.registry)
        self._finished = Counter(
            "flame_finished",
            "Calls by how they ended, and by the version that they were routed to",
            ["outcome", "code", "version"],
            registry=self.registry,
        )
        self._stages = Histogram(
            "flame_stage_seconds",
            "Time per stage of an answered call",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._pairs = Counter("flame_pairs", "User-item pairs scored", registry=self.registry)
        self._truncated = Counter("flame_truncated_histories", "Calls whose history was cut", registry=self.registry)
        self._unknown_users = Counter("flame_unknown_users", "Calls of users not in the store", registry=self.registry)
        self._unknown_items = Counter("flame_unknown_items", "Candidates out of vocabulary", registry=self.registry)
        self._info = Info("flame_model", "What is served, by which kernels and memory", registry=self.registry)
        self._reloads = Counter("flame_reloads", "Versions loaded after the start", ["result"], registry=self.registry)
        self._rollbacks = Counter("flame_rollbacks", "Returns to a version before", ["reason"], registry=self.registry)
        self._bad = Counter("flame_bad_versions", "Versions that could not be loaded or failed", registry=self.registry)
        self._loads = Histogram(
            "flame_model_load_seconds",
            "Time to load and warm a version",
            buckets=_LOAD_SECONDS,
            registry=self.registry,
        )
        # A counter that is there before it first counts: a rate over it sees the first time, too.
        for counter, values in (
            (self._reloads, ("ok", "failed")),
            (self._rollbacks, ("command", "failing", "died")),
        ):
            for value in values:
                counter.labels(value)
        self._launched: list[tuple[str, Mapping[Bucket, int]]] = []
        self.counters("flame_batches", "Batches launched", ["version", "bucket"], self._batches)
        self._children = {stage: self._stages.labels(stage) for stage in STAGES}

    def accepted(self) -> None:
        """A call has reached the handler."""
        self._accepted.inc()

    def finished(self, outcome: str, code: str, version: str) -> None:
        """A call has ended; `version` is empty when it was not routed."""
        self._finished.labels(outcome, code, version).inc()

    def answered(self, pairs: int, *, truncated: bool, unknown_user: bool, unknown_items: int) -> None:
        """What a good answer was made of."""
        self._pairs.inc(pairs)
        self._truncated.inc(truncated)
        self._unknown_users.inc(unknown_user)
        self._unknown_items.inc(unknown_items)

    def stages(self, nanoseconds: Mapping[str, int]) -> None:
        """Time per stage of one answered call."""
        for stage, value in nanoseconds.items():
            self._children[stage].observe(value / 1e9)

    def model(self, manifest: Manifest, memory: Mapping[str, str], lanes: int) -> None:
        """Name, version, device, lanes, kernel implementations and kinds of memory of what is active."""
        self._info.info(
            {
                "name": manifest.model.name,
                "version": manifest.version,
                "platform": manifest.target.platform,
                "device_kind": manifest.target.device_kind,
                "lanes": str(lanes),
                **{f"kernel_{op}": implementation for op, implementation in manifest.kernels.items()},
                **{f"memory_{what}": kind for what, kind in memory.items()},
            }
        )

    def loaded(self, version: str, launched: Mapping[Bucket, int], seconds: float) -> None:
        """A version is loaded; `launched` counts its batches by bucket from now on."""
        self._loads.observe(seconds)
        self._launched.append((version, launched))

    def reload(self, result: str) -> None:
        """A load after the start has ended, `ok` or `failed`."""
        self._reloads.labels(result).inc()

    def rollback(self, reason: str) -> None:
        """The version before is active again: on `command`, or because this one was `failing` or had `died`."""
        self._rollbacks.labels(reason).inc()

    def bad_version(self) -> None:
        """A version could not be loaded or failed."""
        self._bad.inc()

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export a number that is read when scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def gauges(self, name: str, text: str, labels: list[str], read: Callable[[], Iterable[Row]]) -> None:
        """Export labelled numbers that are read when scraped."""
        self.registry.register(_Read(partial(GaugeMetricFamily, name, text, labels=labels), read))

    def counters(self, name: str, text: str, labels: list[str], read: Callable[[], Iterable[Row]]) -> None:
        """Export labelled counts that somebody else keeps, read when scraped."""
        self.registry.register(_Read(partial(CounterMetricFamily, name, text, labels=labels), read))

    def _batches(self) -> Iterable[Row]:
        # A version may have been loaded more than once: a metric has one row per labels.
        totals: _Totals[tuple[str, str]] = _Totals()
        for version, launched in self._launched:
            totals.update({(version, str(bucket)): count for bucket, count in launched.items()})
        return totals.items()

    def listen(self, host: str, port: int) -> int:
        """Serve /metrics from a thread and return the port. Raises OSError when it is taken."""
        server, _ = start_http_server(port, host, self.registry)
        return int(server.server_port)
