"""What requests come: the paper's mix and a heavy-tailed one, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flame_jax.dso.simulator import Arrival
from flame_jax.packing import Bucket, Extent, Layout

SHAPES = 16
"""Distinct sizes of the heavy-tailed mix: as many programs serve implicit shapes."""


@dataclass(frozen=True)
class Mix:
    """Sizes of requests, equally likely.

    Attributes:
        history: rows of each block.
    """

    name: str
    shapes: tuple[Extent, ...]

    @property
    def longest(self) -> Extent:
        """The longest history, and the most candidates."""
        return Extent(max(shape.history for shape in self.shapes), max(shape.candidates for shape in self.shapes))

    def exact(self, layout: Layout) -> list[Bucket]:
        """A bucket for each size, no larger than it must be, and, as ladders end with it, one for all of them."""
        sizes = {layout.aligned_extent(shape) for shape in (*self.shapes, self.longest)}
        return sorted({Bucket(sum(size), size.candidates) for size in sizes})

    @property
    def mean_candidates(self) -> float:
        """Pairs of a request."""
        return sum(shape.candidates for shape in self.shapes) / len(self.shapes)

    def arrivals(self, rate: float, seconds: float, *, patience: float = 1e9, seed: int = 0) -> Iterator[Arrival]:
        """Poisson arrivals, so many per second."""
        random = np.random.default_rng(seed)
        count = max(1, int(rate * seconds))
        times = np.cumsum(random.exponential(1 / rate, count))
        for time, shape in zip(times.tolist(), random.integers(0, len(self.shapes), count).tolist(), strict=True):
            yield Arrival(time, self.shapes[shape], patience)


def paper(blocks: int, scale: int = 1) -> Mix:
    """FLAME's Table 5: 1,024 events over the blocks, 128 to 1,024 candidates; both `scale` times smaller."""
    history = 1024 // blocks // scale
    return Mix("paper", tuple(Extent(history, candidates // scale) for candidates in (128, 256, 512, 1024)))


def heavy(blocks: int, scale: int = 1, seed: int = 3) -> Mix:
    """History log-normal between 64 and 4,096 events, candidates between 16 and 2,048; both `scale` times smaller."""
    random = np.random.default_rng(seed)
    events = np.clip(np.exp(random.normal(np.log(512), 1.0, SHAPES)), 64, 4096) / blocks / scale
    candidates = np.clip(np.exp(random.normal(np.log(192), 1.1, SHAPES)), 16, 2048) / scale
    return Mix("heavy", tuple(Extent(int(e), max(1, int(c))) for e, c in zip(events, candidates, strict=True)))
