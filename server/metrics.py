"""What the server exports to Prometheus, on a port of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STAGES = ("decode", "features", "queue", "assemble", "compute", "encode", "total")


class _Counts(Collector):
    """A counter whose values are read from elsewhere."""

    def __init__(self, name: str, text: str, labels: list[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self.reads: list[tuple[list[str], Callable[[], float]]] = []

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by the registry on every scrape."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, read in self.reads:
            family.add_metric(labels, read())
        yield family


class Metrics:
    """Counters and histograms of one server. Every accepted call ends in exactly one outcome."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accepted = Counter("flame_accepted", "Calls that reached the handler", registry=self.registry)
        self._finished = Counter(
            "flame_finished", "Calls by how they ended", ["outcome", "code"], registry=self.registry
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
        self._info = Info("flame_model", "What is served, and by which kernels", registry=self.registry)
        self._counts: dict[str, _Counts] = {}
        self._children = {stage: self._stages.labels(stage) for stage in STAGES}

    def accepted(self) -> None:
        """A call has reached the handler."""
        self._accepted.inc()

    def finished(self, outcome: str, code: str = "OK") -> None:
        """A call has ended."""
        self._finished.labels(outcome, code).inc()

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

    def model(self, info: dict[str, str]) -> None:
        """Name, version, device and kernel implementations of what is served."""
        self._info.info(info)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export a number that is read when scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def counter(self, name: str, text: str, read: Callable[[], float], **labels: str) -> None:
        """Export a count that somebody else keeps, read when scraped; one name may be given with several labels."""
        if name not in self._counts:
            self._counts[name] = _Counts(name, text, list(labels))
            self.registry.register(self._counts[name])
        self._counts[name].reads.append((list(labels.values()), read))

    def listen(self, host: str, port: int) -> int:
        """Serve /metrics from a thread and return the port. Raises OSError when it is taken."""
        server, _ = start_http_server(port, host, self.registry)
        return int(server.server_port)
