"""How many lanes there are, and what batches take on them, measured before the first call."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
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
"""Of everything that is measured: the median counts."""
BATCHES = 8
"""On each lane, one behind the other, when numbers of lanes are compared."""
WORTH = 1.05
"""How many times as fast more lanes must be to be taken."""

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
    engines = [lane.engine for lane in _of(lanes, devices[0])]
    measured = calibrate(engines)
    if config.lanes == "auto":
        compared = rates(engines, measured, config.executors)
        count = best_count(compared)
        told = ", ".join(f"{rate:.2f} with {number}" for number, rate in compared.items())
        log.info("%d lanes a device: batches a second beside one lane are %s", count, told)
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


def rates(engines: Sequence[Engine], measured: Measured, depth: int) -> dict[int, float]:
    """By the number of lanes, how many times as many batches a second they run as one, each with `depth` under way.

    In the bucket in which a batch costs one lane the least per token row. What more lanes gain on others counts for
    nothing: where there is enough to do, batches are of that one.
    """
    bucket = min(measured, key=lambda bucket: measured[bucket][0] / bucket.tokens)
    words = _golden_words(engines[0], bucket)
    counts = [count for count in AUTO_LANES if count <= len(engines)]
    seconds = {count: _seconds(engines[:count], bucket, words, batches=BATCHES, depth=depth) for count in counts}
    return {count: count * seconds[1] / taken for count, taken in seconds.items()}


def best_count(rates: Mapping[int, float]) -> int:
    """The fewest lanes that no other number clearly beats."""
    return min(count for count, rate in rates.items() if WORTH * rate >= max(rates.values()))


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


def _seconds(
    engines: Sequence[Engine], bucket: Bucket, words: np.ndarray, *, batches: int = 1, depth: int = 1
) -> float:
    """Until each lane has run so many batches, `depth` of them under way."""
    together = threading.Barrier(len(engines))

    def run(engine: Engine) -> list[float]:
        """Seconds until all lanes were done, round by round."""
        taken = []
        try:
            for _ in range(RUNS):
                together.wait()
                begun = time.monotonic()
                _run(engine, bucket, words, batches, depth)
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


def _run(engine: Engine, bucket: Bucket, words: np.ndarray, batches: int, depth: int) -> None:
    under_way: deque[jax.Array] = deque()
    for _ in range(batches):
        if len(under_way) == depth:
            np.asarray(under_way.popleft())
        under_way.append(engine.launch(bucket, words))
    for scores in under_way:
        np.asarray(scores)
