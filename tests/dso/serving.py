"""Lanes behind a dispatcher, against one engine that runs everything alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flame_jax.config import DispatchConfig
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor
from flame_jax.dso.lanes import Lane
from flame_jax.dso.start import make_scheduler
from flame_jax.dso.work import Done, Status
from flame_jax.fke.engine import Engine
from flame_jax.packing import Extent
from flame_jax.pda.page_lock import PageLock
from flame_jax.record import Piece, RecordLayout
from tests import tiny

RECORDS = RecordLayout(tiny.SCHEMA)


def bits(engine: Engine) -> list[bytes]:
    """Scores of one random batch per bucket; each must come from the engine's own device."""
    found = []
    for bucket in tiny.BUCKETS:
        result = engine.launch(bucket, tiny.packed_slot(bucket, [Extent(8, 5), Extent(0, 1)], seed=6)[0])
        assert result.devices() == {engine.device}
        found.append(np.asarray(result).tobytes())
    return found


def served(lanes: Sequence[Lane], requests: int = 60) -> Counter[jax.Device]:
    """Rank through all lanes; how many batches each device ran. Scores must be those of the first lane alone."""
    ran: Counter[jax.Device] = Counter()
    executors = []
    for lane in lanes:
        executor = Executor(counting(lane.engine, ran), tiny.BUCKETS[0], RECORDS, tiny.LAYOUT, PageLock(lane.device))
        executors.append(executor)
    random = np.random.default_rng(1)
    records = [tiny.record(RECORDS, random, 8, 5) for _ in range(requests)]
    right = [scored(lanes[0].engine, record) for record in records]
    done: dict[int, Done] = {}
    finished = threading.Event()

    def on_done(some: list[Done]) -> None:
        done.update({each.ticket: each for each in some})
        if len(done) == requests:
            finished.set()

    config = DispatchConfig(executors=1, max_queue=requests, target_wait_ms=1e6)
    costs = {tiny.BUCKETS[0]: [1e-3] * len(lanes)}
    scheduler = make_scheduler(config, tiny.LAYOUT, costs, shares=[1.0], lanes=len(lanes))
    dispatcher = Dispatcher(
        [[executor] for executor in executors], scheduler, RECORDS, on_done=on_done, on_fatal=finished.set
    )
    for ticket, record in enumerate(records):
        dispatcher.submit(ticket, record, time.monotonic_ns() + 10**11)
    assert finished.wait(60)
    assert dispatcher.stop(20)
    for ticket, expected in enumerate(right):
        assert done[ticket].status is Status.OK
        scores = done[ticket].scores
        assert scores is not None
        assert scores.tobytes() == expected.tobytes()
    return ran


def scored(engine: Engine, record: np.ndarray) -> np.ndarray:
    """One request alone."""
    executor = Executor(engine, tiny.BUCKETS[0], RECORDS, tiny.LAYOUT, PageLock(engine.device))
    executor.fill([Piece(record, 0, RECORDS.extent(record).candidates)])
    executor.launch()
    return executor.scores()[0].values


def counting(engine: Engine, ran: Counter[jax.Device]) -> Any:
    """The engine, with a count of the devices that its results are on."""

    class Counting:
        slots, device = engine.slots, engine.device

        def launch(self, *given: Any) -> jax.Array:
            result = engine.launch(*given)
            ran.update(result.devices())
            return result

    return Counting()
