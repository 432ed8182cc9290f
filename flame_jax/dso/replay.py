"""A trace of requests replayed through `next_batch`: which batches it makes under a largest bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from flame_jax.dso.batching import SCAN, next_batch
from flame_jax.fke.ladder import Demand
from flame_jax.packing import Bucket, Extent, Layout

SAMPLE = 50_000
"""Requests of a level that are replayed at most: more say little more and take longer."""


@dataclass(frozen=True)
class Level:
    """One way in which requests wait for each other.

    Attributes:
        queues: int64[q, 2], requests [start, stop) that wait together.
    """

    queues: np.ndarray

    @property
    def requests(self) -> int:
        """Requests in the queues."""
        return int((self.queues[:, 1] - self.queues[:, 0]).sum())

    @property
    def members(self) -> np.ndarray:
        """int64[requests], the requests of every queue."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.queues.tolist()])


def together(requests: int, size: int) -> Level:
    """Queues of `size` consecutive requests; the last one may be shorter."""
    starts = np.arange(0, requests, size)
    return _sample(np.stack([starts, np.minimum(starts + size, requests)], axis=1))


def arriving_within(time: np.ndarray, seconds: float) -> Level:
    """A queue opens with a request and takes those that come within `seconds` of it.

    Args:
        time: float64[n], ascending.
    """
    times = time.tolist()
    starts, start = [], 0
    while start < len(times):
        starts.append(start)
        start = bisect_left(times, times[start] + seconds, lo=start + 1)
    return _sample(np.stack([starts, [*starts[1:], len(times)]], axis=1))


def _sample(queues: np.ndarray) -> Level:
    """Some of the queues, the same at every call, that hold `SAMPLE` requests or little more; long ones are cut."""
    queues = np.stack([queues[:, 0], np.minimum(queues[:, 1], queues[:, 0] + SAMPLE)], axis=1)
    order = np.random.default_rng(0).permutation(len(queues))
    ends = np.cumsum(queues[order, 1] - queues[order, 0])
    taken = int(np.searchsorted(ends, SAMPLE)) + 1
    return Level(queues[np.sort(order[:taken])])


def replay(
    history: np.ndarray, candidates: np.ndarray, levels: Sequence[Level], largest: Bucket, layout: Layout
) -> Demand:
    """What the batches of all levels need, per request; levels weigh the same.

    Only the largest bucket of a ladder decides which requests share a batch; the others decide in which bucket.

    Args:
        history: int64[n], history rows of each request.
        candidates: int64[n].

    Raises:
        ValueError: `largest` does not hold a request's history beside one candidate.
    """
    rows: list[Extent] = []
    weights: list[np.ndarray] = []
    for level in levels:
        before = len(rows)
        for start, stop in level.queues.tolist():
            queue = map(Extent, history[start:stop].tolist(), candidates[start:stop].tolist())
            rows += drain(queue, largest, layout)
        weights.append(np.full(len(rows) - before, 1 / (len(levels) * level.requests)))
    needed = np.array(rows, np.int64)
    return Demand.of(needed.sum(axis=1), needed[:, 1], np.concatenate(weights))


def drain(queue: Iterable[Extent], largest: Bucket, layout: Layout) -> Iterator[Extent]:
    """The aligned rows of each batch until nothing waits."""
    behind = iter(queue)
    waiting = list(islice(behind, SCAN))
    while waiting:
        rows = np.zeros(2, int)
        for position, count in next_batch(waiting, (largest,), layout).shares:
            history, candidates = waiting[position]
            rows += layout.aligned_extent(Extent(history, count))
            waiting[position] = Extent(history, candidates - count)
        yield Extent(*rows.tolist())
        waiting = [extent for extent in waiting if extent.candidates]
        waiting += islice(behind, SCAN - len(waiting))
