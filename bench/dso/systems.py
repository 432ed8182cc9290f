"""Ways to serve one model: implicit shapes, one padded bucket, the paper's policy, ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.artifacts import untrained
from flame_jax.config import Config
from flame_jax.dso.calibrate import calibrate
from flame_jax.dso.costs import CostModel
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor
from flame_jax.dso.start import make_scheduler
from flame_jax.dso.work import Done
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.build import Builder, build
from flame_jax.fke.engine import Engine
from flame_jax.models.serving import served_slot
from flame_jax.packing import Bucket, Extent
from flame_jax.pda.page_lock import PageLock
from flame_jax.record import BlockEvents, RecordLayout

DEPTH = 2
"""Batches that may be on a lane."""


def built(config: Config, buckets: Sequence[tuple[int, int]], builder: Builder, path: Path) -> Artifact:
    """An untrained model, compiled for these buckets, at `path` unless it is there."""
    if not path.exists():
        export = replace(config.export, artifact=str(path), buckets=tuple(buckets), platform="", device_kind="")
        config = replace(config, export=export)
        build(config, untrained(config), builder)
    artifact = Artifact(path)
    made, wanted = artifact.manifest, {Bucket(*bucket) for bucket in buckets}
    same_model = (made.model, made.schema, made.layout) == (config.model, config.schema, config.layout)
    if not same_model or set(made.buckets) != wanted:
        raise ValueError(f"{path} is of another model, or of other buckets")
    return artifact


def engine_of(config: Config, buckets: Sequence[tuple[int, int]], device: jax.Device, path: Path) -> Engine:
    """What `built` makes, loaded and warm; further lanes load it from there."""
    engine = Engine(built(config, buckets, Builder(device, progress=False), path), device)
    engine.warm()
    return engine


class Emulated:
    """In an engine's place on one lane: takes as long as it is told, and computes nothing."""

    def __init__(self, config: Config, measured: Mapping[Bucket, Sequence[float]], lanes: int) -> None:
        self.slots = {b: served_slot(config.model, config.schema, config.layout, b) for b in measured}
        self._tasks, self._costs, self._lanes = len(config.schema.tasks), CostModel(measured), lanes
        self._free_at = 0.0

    def launch(self, bucket: Bucket, words: np.ndarray, hot: Any = None) -> Any:
        """See `Engine.launch`."""
        seconds = self._costs.seconds(bucket, self._lanes)
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        return _Later(self._free_at, np.zeros((bucket.candidates, self._tasks), np.float32))


class _Later:
    """An array that is ready at a time."""

    def __init__(self, time: float, values: np.ndarray) -> None:
        self._time, self._values = time, values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if (left := self._time - time.monotonic()) > 0:
            time.sleep(left)
        return self._values


class System:
    """A model behind a dispatcher, in process.

    Args:
        lanes: per lane, what runs on it and the device whose memory its slots are copied to.
        measured: see `CostModel`.
    """

    def __init__(
        self, config: Config, lanes: Sequence[tuple[Any, jax.Device]], measured: Mapping[Bucket, Sequence[float]]
    ) -> None:
        self.records, self.lanes, ladder = RecordLayout(config.schema), len(lanes), tuple(sorted(measured))
        self.scheduler = make_scheduler(config.dispatch, config.layout, measured, shares=[1.0], lanes=len(lanes))
        self.answered: Callable[[list[Done]], None] = lambda done: None
        executors = []
        for runs, device in lanes:
            lock, every = PageLock(device), [bucket for bucket in ladder for _ in range(config.dispatch.executors)]
            executors.append([Executor(runs, bucket, self.records, config.layout, lock) for bucket in every])
        self.dispatcher = Dispatcher(
            executors, self.scheduler, self.records, on_done=lambda done: self.answered(done), on_fatal=_fatal
        )

    def submit(self, ticket: int, record: np.ndarray, deadline_ns: int) -> None:
        """See `Dispatcher.submit`."""
        self.dispatcher.submit(ticket, record, deadline_ns)

    def costs(self) -> Mapping[Bucket, Sequence[float]]:
        """Seconds of batches, as estimated now; see `CostModel.table`."""
        return self.scheduler.costs.table()

    def books(self) -> dict[str, float]:
        """Totals of the scheduler, and the processor time of the dispatcher's threads."""
        return vars(self.scheduler.totals) | {"thread_seconds": self.dispatcher.thread_seconds}

    def stop(self) -> None:
        """End its threads."""
        assert self.dispatcher.stop(30.0), "a batch hangs"


def _fatal() -> None:
    raise RuntimeError("the dispatcher died")


def batching(config: Config, engines: Sequence[Engine], policy: str) -> System:
    """Rows (c) and (d): buckets of a ladder, as many lanes as engines."""
    lanes = [(engine, engine.device) for engine in engines]
    return System(_dispatch(config, policy=policy), lanes, calibrate(engines))


def emulated(config: Config, measured: Mapping[Bucket, Sequence[float]], lanes: int, device: jax.Device) -> System:
    """Our policy over lanes that take `measured` seconds a batch, all of them busy, and compute nothing."""
    every = [Emulated(config, measured, lanes) for _ in range(lanes)]
    return System(_dispatch(config, policy="deadline_cost"), [(one, device) for one in every], measured)


def _dispatch(config: Config, **changes: Any) -> Config:
    """Nobody is refused: open loops measure how long requests wait."""
    unlimited: dict[str, Any] = {"max_queue": 1_000_000, "target_wait_ms": 3_600_000.0, "executors": DEPTH}
    return replace(config, dispatch=replace(config.dispatch, **unlimited, **changes))


def random_record(records: RecordLayout, extent: Extent, items: int, random: np.random.Generator) -> np.ndarray:
    """A request of this size with random events; its schema has no features that travel."""
    now = 2_000_000_000

    def block() -> BlockEvents:
        n = extent.history
        times = np.sort(random.integers(now - 10**7, now, n)).astype(np.int32)
        return BlockEvents(random.integers(1, items, n).astype(np.int32), np.zeros(n, np.int32), times)

    return records.encode(
        scenario=0,
        request_time=now,
        request_words=np.zeros(0, np.int32),
        blocks=[block() for _ in range(records.blocks)],
        candidates=random.integers(1, items, extent.candidates).astype(np.int32),
        item_columns=[],
    )
