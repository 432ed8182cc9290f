"""FLAME's Table 3 as an ablation: what the cache and the way to the device are worth, at a fixed load of the CPU.

A real Valkey holds a million items with a dozen features and users with some 700 events, a round trip away. Calls ask
for 128 items by Zipf's law; the cache has room for a tenth of all. Each row is offered calls at random moments, at the
rate at which the serving process is busy for `SHARE` of a core's time.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import redis
import uvloop

from bench.artifacts import untrained
from bench.pda.bars import Panel, svg
from bench.pda.outside import MOMENT, Callers, callers, far
from bench.pda.pipeline import Pipeline, Runs, Trivial
from bench.pda.servers import Server, running
from bench.settled import settled
from bench.synthetic import write_store
from flame_jax.config import Config
from flame_jax.feature_config import CacheConfig, StoreConfig
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.build import Builder, build
from flame_jax.fke.engine import Engine
from flame_jax.models.serving import served_slot
from flame_jax.packing import Bucket
from flame_jax.pda.cache import ItemCache
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.redis_store import RedisStore
from flame_jax.schema import Feature
from flame_jax.vocabulary import Vocabularies, Vocabulary

FEATURES = (
    *(Feature(f"category_{n}", "categorical", 1000) for n in range(8)),
    *(Feature(f"number_{n}", "numeric") for n in range(4)),
)
ROUND_TRIPS_MS = (0.5, 0.1, 2.0)
SHARE = 0.6
CANDIDATES = 128
DRAWN = 8192
CACHED = 0.1
PROBES = (0.2, 0.2, 0.2, 0.5)
"""Runs that the rate is found by, as parts of the run that counts."""


class Size(NamedTuple):
    """How much there is, and how long it is measured."""

    items: int = 1_000_000
    users: int = 5000
    events: int = 900
    seconds: float = 10.0


class Row(NamedTuple):
    """One way to serve."""

    name: str
    cache: Literal["off", "sync", "async"]
    tuned: bool
    settled: bool


ROWS = (
    Row("neither cache nor memory optimisation", "off", False, False),
    Row("cache (sync)", "sync", False, False),
    Row("cache (async)", "async", False, False),
    Row("memory optimisation", "off", True, False),
    Row("cache (sync), memory optimisation", "sync", True, False),
    Row("cache (async), memory optimisation", "async", True, False),
    Row("the same, Python settled as in a server", "async", True, True),
)


class Served(NamedTuple):
    """What all rows have in common."""

    config: Config
    vocabularies: Vocabularies
    engine: Runs
    device: jax.Device
    candidates: np.ndarray
    users: int


class Offered(NamedTuple):
    """What came of calls at one rate."""

    rate: float
    share: float
    milliseconds: np.ndarray
    degraded: float


def served(config: Config, size: Size, folder: Path, device: jax.Device) -> Served:
    """The model with random weights, or on the CPU, where it would be nearly all of the time, a trivial program."""
    config = replace(
        config,
        schema=replace(config.schema, item_features=FEATURES),
        export=replace(config.export, artifact=str(folder / "artifact"), buckets=((384, 128), (3072, 1024))),
    )
    random = np.random.default_rng(0)
    if device.platform == "cpu":
        vocabularies = Vocabularies(Vocabulary(np.arange(size.items, dtype=np.int64)), {})
        buckets = [Bucket(*bucket) for bucket in config.export.buckets]
        slots = {b: served_slot(config.model, config.schema, config.layout, b) for b in buckets}
        engine: Runs = Trivial(slots, len(config.schema.tasks))
    else:
        checkpoint = untrained(config, size.items)
        vocabularies = checkpoint.vocabularies
        build(config, checkpoint, Builder(device))
        engine = loaded = Engine(Artifact(folder / "artifact"), device)
        loaded.warm()
    return Served(config, vocabularies, engine, device, drawn(random, size.items, DRAWN), size.users)


def drawn(random: np.random.Generator, items: int, calls: int) -> np.ndarray:
    """int64[calls, CANDIDATES]: distinct items of each call, by Zipf's law (exponent 1), any item being the first."""
    shares = np.cumsum(1.0 / np.arange(1, items + 1))
    ranks = np.searchsorted(shares, random.random((calls, 3 * CANDIDATES)) * shares[-1])
    names = random.permutation(items)
    rows = np.empty((calls, CANDIDATES), np.int64)
    for row, found in zip(rows, ranks, strict=True):
        _, first = np.unique(found, return_index=True)
        row[:] = names[found[np.sort(first)[:CANDIDATES]]]
    return rows


class _Load:
    """Offers calls to a pipeline."""

    def __init__(self, pipeline: Pipeline, served: Served, calling: Callers) -> None:
        self._pipeline, self._served, self._calling = pipeline, served, calling
        self._number = 0

    async def offer(self, rate: float, seconds: float) -> Offered:
        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        milliseconds, degraded = list[float](), 0
        everyone_called = loop.create_future()
        end, rest = self._calling.end, b""

        async def call(number: int, due: float) -> None:
            nonlocal degraded
            wanted = self._served.candidates[number % len(self._served.candidates)]
            degraded += await self._pipeline.rank(f"u{number * 7919 % self._served.users}", wanted)
            milliseconds.append((time.monotonic() - due) * 1e3)

        def called() -> None:
            nonlocal rest
            data = rest + end.recv(65536)
            whole = len(data) - len(data) % MOMENT.size
            rest = data[whole:]
            for (due,) in MOMENT.iter_unpack(data[:whole]):
                tasks.append(loop.create_task(call(self._number, due)))
                self._number += 1
            if len(tasks) == count:
                everyone_called.set_result(None)

        busy, begun = time.process_time(), time.monotonic()
        count = self._calling.call(rate, seconds)
        loop.add_reader(end, called)
        await asyncio.wait_for(everyone_called, seconds * 3 + 30)
        loop.remove_reader(end)
        await asyncio.gather(*tasks)
        share = (time.process_time() - busy) / (time.monotonic() - begun)
        return Offered(rate, share, np.array(milliseconds), degraded / count)

    async def rate_of(self, share: float, seconds: float) -> float:
        """Calls a second that take this share of a core."""
        rate = 100.0
        for part in PROBES:
            rate *= min(share / (await self.offer(rate, seconds * part)).share, 8.0)
        return rate


async def _measure(row: Row, served: Served, server: Server, port: int, calling: Callers, size: Size) -> dict[str, Any]:
    url = f"redis://127.0.0.1:{port}/0"
    store = await RedisStore.open(StoreConfig(url=url, timeout_ms=5000.0, connections=64))
    room_mib = size.items * CACHED * ItemCache(served.config.schema, CacheConfig(), entries=1).entry_bytes // 2**20
    query = FeatureQuery(store, CacheConfig(row.cache, mib=max(1, int(room_mib)), ttl_seconds=86400.0))
    pipeline = Pipeline(served.config, served.vocabularies, query, served.engine, served.device, tuned=row.tuned)
    if query.cache is not None:
        for some in np.array_split(served.candidates, len(served.candidates) // 8):
            ids = np.unique(some)
            found = await store.fetch(None, ids, patient=True)
            query.cache.put(ids, found.items, found.found)
    load = _Load(pipeline, served, calling)
    gc.collect()
    try:
        with settled() if row.settled else nullcontext(), closing(redis.Redis.from_url(server.url)) as client:
            rate = await load.rate_of(SHARE, size.seconds)
            bytes_before, counts = _sent(client), query.cache.counts if query.cache else None
            offered = await load.offer(rate, size.seconds)
            sent = _sent(client) - bytes_before
    finally:
        await query.aclose()
        pipeline.stop()
    hits = None
    if query.cache is not None and counts is not None:
        now = query.cache.counts
        hits = (now.hits - counts.hits) / (len(offered.milliseconds) * CANDIDATES)
    return {
        "row": row.name,
        "calls_per_second": rate,
        "pairs_per_second": rate * CANDIDATES,
        "mean_ms": float(offered.milliseconds.mean()),
        "p50_ms": float(np.percentile(offered.milliseconds, 50)),
        "p99_ms": float(np.percentile(offered.milliseconds, 99)),
        "core_share": offered.share,
        "store_mb_per_second": sent / len(offered.milliseconds) * rate / 1e6,
        "cache_hits": hits,
        "degraded": offered.degraded,
        "memory": pipeline.memory,
    }


def _sent(client: redis.Redis) -> int:
    info: Any = client.info("stats")
    return int(info["total_net_output_bytes"])


def ablation(
    config: Config,
    progress: Callable[[str], None],
    size: Size = Size(),  # noqa: B008
    round_trips: Sequence[float] = ROUND_TRIPS_MS,
    rows: Sequence[Row] = ROWS,
) -> dict[str, Any]:
    """A row per round trip and way to serve."""
    found = []
    device = jax.devices()[0]
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as server, callers() as calling:
        folder = Path(name)
        ready = served(config, size, folder, device)
        write_store(folder / "store", ready.config.schema, np.arange(size.items), size.users, size.events)
        server.fill(folder / "store")
        progress("the store is filled")
        for milliseconds in round_trips:
            with far(server.port, milliseconds / 1e3) as port:
                for row in rows:
                    measured = uvloop.run(_measure(row, ready, server, port, calling, size))
                    found.append({"round_trip_ms": milliseconds} | measured)
                    progress(json.dumps(found[-1]))
    return {"program": type(ready.engine).__name__, "size": size._asdict(), "share": SHARE, "table": found}


def plot(result: dict[str, Any]) -> str:
    """SVG."""
    rows = result["table"]
    quantities = {"pairs a second": "pairs_per_second", "mean ms": "mean_ms", "P99 ms": "p99_ms"}
    groups = {f"round trip {ms:g} ms": [r for r in rows if r["round_trip_ms"] == ms] for ms in _round_trips(rows)}
    return svg(
        [
            Panel(title, {group: {r["row"]: r[name] for r in some} for group, some in groups.items()})
            for title, name in quantities.items()
        ]
    )


def _round_trips(rows: Sequence[dict[str, Any]]) -> list[float]:
    return list(dict.fromkeys(row["round_trip_ms"] for row in rows))


def table(result: dict[str, Any]) -> str:
    """Markdown; ratios are to the first row of the same round trip."""
    rows: Sequence[dict[str, Any]] = result["table"]
    lines = ["| round trip ms | | pairs/s | mean ms | P99 ms | from the store MB/s | hits |", "|" + "---|" * 7]
    first: dict[float, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(row["round_trip_ms"], row)
        hits = "" if row["cache_hits"] is None else f"{row['cache_hits']:.0%}"
        lines.append(
            f"| {row['round_trip_ms']:g} | {row['row']} "
            f"| {row['pairs_per_second']:,.0f} ({row['pairs_per_second'] / base['pairs_per_second']:.2f}x) "
            f"| {row['mean_ms']:.2f} ({base['mean_ms'] / row['mean_ms']:.2f}x) | {row['p99_ms']:.1f} "
            f"| {row['store_mb_per_second']:.1f} | {hits} |"
        )
    return "\n".join(lines)
