"""How long batches take: measured before the first call, refined by every batch since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flame_jax.packing import Bucket

WEIGHT = 0.05
"""Of one batch in an estimate."""
OUTLIER = 4.0
"""A batch counts as so many times the estimate at most: one that was held up says little of the next."""


class CostModel:
    """Seconds of a batch by its bucket and by how many lanes run one meanwhile. One thread observes, all may read.

    Args:
        measured: per bucket, seconds with 1, 2, ... lanes busy.
    """

    def __init__(self, measured: Mapping[Bucket, Sequence[float]]) -> None:
        self._seconds = {bucket: list(by_busy) for bucket, by_busy in measured.items()}
        if not self._seconds or any(not s > 0 for by_busy in self._seconds.values() for s in (*by_busy, len(by_busy))):
            raise ValueError("every bucket needs measured seconds")

    def seconds(self, bucket: Bucket, busy: int) -> float:
        """From the start of a batch to its scores while `busy` lanes run one, its own among them."""
        by_busy = self._seconds[bucket]
        return by_busy[min(max(busy, 1), len(by_busy)) - 1]

    def observe(self, bucket: Bucket, busy: int, seconds: float) -> None:
        """A batch took so long."""
        by_busy = self._seconds[bucket]
        at = min(max(busy, 1), len(by_busy)) - 1
        by_busy[at] += WEIGHT * (min(seconds, OUTLIER * by_busy[at]) - by_busy[at])

    def table(self) -> dict[Bucket, list[float]]:
        """All estimates, as `measured`."""
        return {bucket: list(by_busy) for bucket, by_busy in self._seconds.items()}
