"""How many lanes there are, and what batches take on them, measured before the first call."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from flame_jax.config import AUTO_LANES, DispatchConfig
from flame_jax.dso.lanes import Lane, make_lanes
from flame_jax.fke.engine import Engine
from flame_jax.fke.golden import whole
from flame_jax.packing import Bucket
from flame_jax.pjrt import same_hardware

RUNS = 5
"""Batches of each bucket on each lane: the median counts."""
WORTH = 1.1
"""How many times as fast more lanes must be to be taken: each takes memory, and its threads turns of Python's lock."""

log = logging.getLogger(__name__)

Measured = dict[Bucket, list[float]]
"""Per bucket, seconds of a batch with 1, 2, ... lanes busy."""


def start_lanes(engine: Engine, config: DispatchConfig, devices: Sequence[jax.Device]) -> tuple[list[Lane], Measured]:
    """The lanes of a version, warm, and what batches take on them.

    Devices are taken to be alike: the first is measured.

    Raises:
        ArtifactError, jax.errors.JaxRuntimeError: see `make_lanes`.
    """
    lanes = make_lanes(engine, config.most_lanes, devices, memory=config.lane_memory)
    measured = calibrate([lane.engine for lane in lanes if same_hardware(lane.device, devices[0])])
    if config.lanes == "auto":
        count = best_count(measured)
        log.info("%d lanes a device: rates beside one lane are %s", count, rates(measured))
        lanes = [lane for device in devices for lane in _of(lanes, device)[:count]]
        lanes = [Lane(lane.engine, index, lane.device) for index, lane in enumerate(lanes)]
        measured = {bucket: seconds[:count] for bucket, seconds in measured.items()}
    # Batches of other devices do not slow each other down.
    spread = {
        bucket: [seconds[min(-(-busy // len(devices)), len(seconds)) - 1] for busy in range(1, len(lanes) + 1)]
        for bucket, seconds in measured.items()
    }
    return lanes, spread


def _of(lanes: Sequence[Lane], device: jax.Device) -> list[Lane]:
    return [lane for lane in lanes if same_hardware(lane.device, device)]


def rates(measured: Mapping[Bucket, Sequence[float]]) -> dict[int, float]:
    """By the number of lanes, how many times as many tokens a second they run as one, each in the bucket of which it
    runs the most.

    What more lanes gain on small buckets counts for nothing: where there is enough to do, batches are large.
    """
    counts = [count for count in AUTO_LANES if count <= min(len(seconds) for seconds in measured.values())]
    most = {count: max(count * b.tokens / s[count - 1] for b, s in measured.items()) for count in counts}
    return {count: round(rate / most[1], 2) for count, rate in most.items()}


def best_count(measured: Mapping[Bucket, Sequence[float]]) -> int:
    """The fewest lanes that are not clearly slower than more of them."""
    best, fastest = 1, 1.0
    for count, rate in rates(measured).items():
        if rate > WORTH * fastest:
            best, fastest = count, rate
    return best


def calibrate(engines: Sequence[Engine]) -> Measured:
    """Run every bucket on 1, 2, ... lanes at once; the engines are warm and have their hot rows."""
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
    together = threading.Barrier(len(engines))

    def run(engine: Engine) -> list[float]:
        """Seconds until all lanes were done, round by round."""
        taken = []
        try:
            for _ in range(RUNS):
                together.wait()
                begun = time.monotonic()
                engine.run(bucket, words)
                together.wait()
                taken.append(time.monotonic() - begun)
                if engine.beside:
                    time.sleep(taken[-1])
        except threading.BrokenBarrierError:  # another lane has failed, and says why
            pass
        except BaseException:
            together.abort()
            raise
        return taken

    with ThreadPoolExecutor(len(engines)) as pool:
        first, *_ = list(pool.map(run, engines))
        return statistics.median(first)
