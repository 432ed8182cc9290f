"""How long batches take, on their lane and before: measured before the first call, refined by every batch since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flame_jax.packing import Bucket

WEIGHT = 0.05
"""Of one batch in an estimate that has seen many; the first ones count more."""
OUTLIER = 2.0
"""A batch counts as so many times the estimate at most, and as such a part of it at least: one that was held up, or
that was told of late, says little of the next."""
MEASURED = 5
"""Batches that a measurement before the first call counts for."""
STALE = 1000
"""Batches of others after which an estimate is not taken for granted."""
LOOK = 100
"""Batches between two looks for such estimates."""


class Lead:
    """Seconds from a decision until its first batch goes to its lane: their mean of late, and how far from it they lie.

    Args:
        seconds: where nothing has been seen yet; 0 if that is not known.

    Attributes:
        mean: of late.
    """

    def __init__(self, seconds: float) -> None:
        self.mean, self._apart = seconds, 0.0

    @property
    def seconds(self) -> float:
        """That mostly are enough."""
        return self.mean + self._apart

    def observe(self, seconds: float) -> None:
        """It took so long this time."""
        if not self.mean:
            self.mean = seconds
        apart = min(seconds, OUTLIER * self.seconds) - self.mean
        self.mean += WEIGHT * apart
        self._apart += WEIGHT * (abs(apart) - self._apart)


class _Place(NamedTuple):
    """Of an estimate in the table."""

    bucket: Bucket
    lanes: int


class CostModel:
    """Seconds of a batch by its bucket and by how many lanes run one meanwhile. One thread at a time observes.

    What is believed to be dear is not chosen, and so not measured again: an estimate that no batch has refined for
    long is cut to what the others leave possible, and the next batch there replaces it.

    Args:
        measured: per bucket, seconds with 1, 2, ... lanes busy.
    """

    def __init__(self, measured: Mapping[Bucket, Sequence[float]]) -> None:
        self._seconds = {bucket: list(by_busy) for bucket, by_busy in sorted(measured.items())}
        if not self._seconds or any(not s > 0 for by_busy in self._seconds.values() for s in (*by_busy, len(by_busy))):
            raise ValueError("every bucket needs measured seconds")
        places = [_Place(bucket, at) for bucket, by_busy in self._seconds.items() for at in range(len(by_busy))]
        self._seen = dict.fromkeys(places, MEASURED)
        self._last = dict.fromkeys(places, 0)
        self._observed = 0

    def seconds(self, bucket: Bucket, busy: int) -> float:
        """From the start of a batch to its scores while `busy` lanes run one, its own among them."""
        by_busy = self._seconds[bucket]
        return by_busy[min(max(busy, 1), len(by_busy)) - 1]

    def observe(self, bucket: Bucket, busy: int, seconds: float) -> None:
        """A batch took so long."""
        by_busy = self._seconds[bucket]
        at = min(max(busy, 1), len(by_busy)) - 1
        place = _Place(bucket, at)
        seen = self._seen[place] = self._seen[place] + 1
        limited = min(seconds, OUTLIER * by_busy[at])
        by_busy[at] += max(WEIGHT, 1 / seen) * (limited - by_busy[at])
        self._observed += 1
        self._last[place] = self._observed
        if self._observed % LOOK == 0:
            self._doubt()

    def _doubt(self) -> None:
        """Cut what has not been seen for long."""
        for place, last in self._last.items():
            if self._observed - last > STALE:
                self._last[place], self._seen[place] = self._observed, 0
                by_busy = self._seconds[place.bucket]
                by_busy[place.lanes] = min(by_busy[place.lanes], self._possible(place))

    def _possible(self, place: _Place) -> float:
        """Seconds that it can take at most, if a larger bucket costs no more per token than a smaller one, company does
        not make a batch faster, and lanes do not slow each other down beyond taking turns."""
        bucket, at = place
        by_busy = self._seconds[bucket]
        smaller = [
            seconds[min(at, len(seconds) - 1)] * bucket.tokens / other.tokens
            for other, seconds in self._seconds.items()
            if other.tokens < bucket.tokens
        ]
        fewer = [by_busy[less] * (at + 1) / (less + 1) for less in range(at)]
        return min((*smaller, *fewer, *by_busy[at + 1 :]), default=by_busy[at])

    def table(self) -> dict[Bucket, list[float]]:
        """All estimates, as `measured`."""
        return {bucket: list(by_busy) for bucket, by_busy in self._seconds.items()}
