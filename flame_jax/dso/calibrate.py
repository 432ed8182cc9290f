"""What batches take on this machine, measured before the first call."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from flame_jax.fke.engine import Engine
from flame_jax.fke.golden import whole
from flame_jax.packing import Bucket

RUNS = 3
"""Batches of each bucket on each lane: the median counts."""


def calibrate(engines: Sequence[Engine]) -> dict[Bucket, list[float]]:
    """Per bucket, seconds of a batch with 1, 2, ... lanes busy: as many of these, warm, run it at once."""
    found = {}
    for bucket in engines[0].slots:
        words = _golden_words(engines[0], bucket)
        found[bucket] = [_seconds(engines[:busy], bucket, words) for busy in range(1, len(engines) + 1)]
    return found


def _golden_words(engine: Engine, bucket: Bucket) -> np.ndarray:
    """A slot with golden requests: `warm` has seen that there is one."""
    numbers = engine.packer.batches(engine.golden, bucket)[0]
    return engine.packer.pack([whole(engine.golden.records[n], engine.packer.records) for n in numbers], bucket)[0]


def _seconds(engines: Sequence[Engine], bucket: Bucket, words: np.ndarray) -> float:
    taken: list[float] = []
    together = threading.Barrier(len(engines))

    def run(engine: Engine) -> None:
        for _ in range(RUNS):
            together.wait()
            begun = time.monotonic()
            engine.run(bucket, words)
            taken.append(time.monotonic() - begun)

    others = [threading.Thread(target=run, args=(engine,), daemon=True) for engine in engines[1:]]
    for thread in others:
        thread.start()
    run(engines[0])
    for thread in others:
        thread.join()
    return statistics.median(taken)
