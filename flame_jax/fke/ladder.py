"""The choice of a ladder: few buckets that waste little on given batches. Pure NumPy, deterministic.

A batch runs in the first bucket of the ladder that holds it. The search adds, swaps and removes single buckets while
that saves FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Bucket, Layout
from flame_jax.schema import FeatureSchema

TOKEN_LEVELS, CANDIDATE_LEVELS = 64, 24
"""Sizes that buckets of a search may have, of either kind: quantiles of what batches need."""

_GAIN = 1e-6
"""The least share of the FLOPs that a step must save, so that rounding does not walk in circles."""


class Demand(NamedTuple):
    """What batches need, each kind of batch once.

    Attributes:
        tokens: int64[n], aligned rows.
        candidates: int64[n], aligned candidate rows, at most `tokens`.
        weights: float64[n], how often.
    """

    tokens: np.ndarray
    candidates: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, candidates: np.ndarray, weights: np.ndarray) -> Self:
        """Merge equal batches."""
        kinds, which = np.unique(np.stack([tokens, candidates], axis=1), axis=0, return_inverse=True)
        return cls(kinds[:, 0], kinds[:, 1], np.bincount(which.reshape(-1), weights, len(kinds)))

    def places(self, ladder: Ladder) -> np.ndarray:
        """int64[n], the bucket by its place in the ladder that each batch runs in.

        Raises:
            ValueError: a batch fits none.
        """
        sizes = np.array(ladder)
        holds = (self.tokens <= sizes[:, :1]) & (self.candidates <= sizes[:, 1:])
        if not holds.any(axis=0).all():
            raise ValueError(f"no bucket of {', '.join(map(str, ladder))} holds every batch")
        return holds.argmax(axis=0)

    def shares(self, ladder: Ladder) -> np.ndarray:
        """float64[buckets], the share of batches that each bucket of a ladder takes."""
        taken = np.bincount(self.places(ladder), self.weights, len(ladder))
        shares: np.ndarray = taken / taken.sum()
        return shares

    def spent(self, ladder: Ladder, cost: Callable[[Bucket], int]) -> float:
        """Padded FLOPs on a ladder."""
        costs = np.array([cost(bucket) for bucket in ladder], np.float64)
        return float(costs[self.places(ladder)] @ self.weights)


class Budget(NamedTuple):
    """What the buckets of a ladder may take together.

    Attributes:
        of: what one bucket takes.
        limit: at most, summed over a ladder.
    """

    of: Callable[[Bucket], float]
    limit: float

    def holds(self, ladder: Sequence[Bucket]) -> bool:
        """Whether a ladder keeps it."""
        return sum(map(self.of, ladder)) <= self.limit


def smallest_largest(schema: FeatureSchema, layout: Layout) -> Bucket:
    """The smallest bucket that may be a ladder's largest: the longest history beside one tile of candidates."""
    return Bucket(layout.aligned(schema.history_rows) + layout.align, layout.align)


def largest_for(demand: Demand, schema: FeatureSchema, layout: Layout) -> Bucket:
    """The smallest bucket that holds every batch and may be a ladder's largest.

    Replayed with it instead of a larger one, requests make the same batches.
    """
    least = smallest_largest(schema, layout)
    return Bucket(max(int(demand.tokens.max()), least.tokens), max(int(demand.candidates.max()), least.candidates))


def choose_ladder(
    demand: Demand,
    largest: Bucket,
    cost: Callable[[Bucket], int],
    *,
    max_buckets: int,
    budgets: Sequence[Budget] = (),
    start: Ladder = (),
) -> Ladder:
    """A ladder that spends few FLOPs on batches; more buckets never make it spend more.

    Args:
        largest: its largest bucket; holds every batch.
        cost: FLOPs of a batch in a bucket.
        start: a ladder to better: the choice is no worse where this one, cut to `largest`, keeps to `max_buckets` and
            the budgets.

    Raises:
        ValueError: the largest bucket alone is over a budget.
    """
    if not all(budget.holds([largest]) for budget in budgets):
        raise ValueError(f"bucket {largest} alone is over the budget")
    given = [_cut(bucket, largest) for bucket in start]
    search = _Search(demand, largest, [*given, largest], cost, budgets)
    starts = [search.numbers([largest])]
    if start and len(known := search.numbers([*given, largest])) <= max_buckets and search.affords(known):
        starts.append(known)
    found = []
    for chosen in starts:
        for size in range(len(chosen), max_buckets + 1):
            chosen = search.improve(chosen, size)
        found.append(chosen)
    best = min(found, key=search.spent)
    return tuple(search.buckets[number] for number in search.without_idle(best))


def _cut(bucket: Bucket, largest: Bucket) -> Bucket:
    """What is left of a bucket when no batch is larger than `largest`."""
    return Bucket(min(bucket.tokens, largest.tokens), min(bucket.candidates, largest.candidates))


def _rounded_up(demand: Demand, given: Sequence[Bucket]) -> Demand:
    """Batches whose needs are rounded up to few levels, those of the given buckets among them.

    No bucket whose sizes are levels can tell the difference.
    """
    work = demand.weights * demand.tokens

    def rounded(values: np.ndarray, most: int, sizes: list[int]) -> np.ndarray:
        levels = np.union1d(_levels(values, work, most), sizes)
        up: np.ndarray = levels[np.searchsorted(levels, values)]
        return up

    return Demand.of(
        rounded(demand.tokens, TOKEN_LEVELS, [bucket.tokens for bucket in given]),
        rounded(demand.candidates, CANDIDATE_LEVELS, [bucket.candidates for bucket in given]),
        demand.weights,
    )


def _is_tight(bucket: Bucket, needed: Demand) -> bool:
    """Whether some batch that a bucket holds would miss a smaller number of tokens, and some of candidates."""
    held = (needed.tokens <= bucket.tokens) & (needed.candidates <= bucket.candidates)
    return bool(
        (held & (needed.tokens == bucket.tokens)).any() and (held & (needed.candidates == bucket.candidates)).any()
    )


def _levels(values: np.ndarray, weights: np.ndarray, most: int) -> np.ndarray:
    """Sorted int64: every distinct value, or about `most` weighted quantiles with the largest value."""
    distinct: np.ndarray
    distinct, which = np.unique(values, return_inverse=True)
    if len(distinct) > most:
        cumulative = np.cumsum(np.bincount(which, weights))
        at = np.searchsorted(cumulative, np.linspace(0, cumulative[-1], most + 1)[1:-1])
        distinct = distinct[np.unique([*at, len(distinct) - 1])]
    return distinct


class _Search:
    """Buckets by number, in a ladder's order, and the batches that each holds. A choice is a sorted list of numbers."""

    def __init__(
        self,
        demand: Demand,
        largest: Bucket,
        given: Sequence[Bucket],
        cost: Callable[[Bucket], int],
        budgets: Sequence[Budget],
    ) -> None:
        needed = _rounded_up(demand, given)
        grid = {Bucket(t, c) for t in set(needed.tokens.tolist()) for c in set(needed.candidates.tolist()) if c <= t}
        self.buckets = sorted({*given, *(bucket for bucket in grid if _is_tight(bucket, needed))})
        sizes = np.array(self.buckets)
        self._weights = needed.weights
        self._holds = (needed.tokens <= sizes[:, :1]) & (needed.candidates <= sizes[:, 1:])
        self._cost = np.array([cost(bucket) for bucket in self.buckets], np.float64)
        takes = [[budget.of(bucket) for bucket in self.buckets] for budget in budgets]
        self._takes = np.array(takes, np.float64).reshape(len(budgets), len(self.buckets))
        self._limits = np.array([budget.limit for budget in budgets])
        self._largest = self.buckets.index(largest)

    def numbers(self, buckets: Sequence[Bucket]) -> list[int]:
        return sorted({self.buckets.index(bucket) for bucket in buckets})

    def affords(self, chosen: list[int]) -> bool:
        return bool((self._takes[:, chosen].sum(axis=1) <= self._limits).all())

    def spent(self, chosen: list[int]) -> float:
        return float(self._cost[self._places(chosen)] @ self._weights)

    def improve(self, chosen: list[int], size: int) -> list[int]:
        """Step to the best neighbour of at most `size` buckets until none is better."""
        best = self.spent(chosen)
        while True:
            spent, step = min(self._neighbours(chosen, size), default=(best, chosen))
            if spent >= best * (1 - _GAIN):
                return chosen
            best, chosen = spent, step

    def _neighbours(self, chosen: list[int], size: int) -> Iterator[tuple[float, list[int]]]:
        """Choices with one bucket less, with the best one in its place, and with the best one besides; what they spend.

        A bucket that goes changes the places of its own batches only, so only those are looked at again.
        """
        places = self._places(chosen)
        saved = {number: self._saved(places == number, places) for number in chosen}
        in_all = np.sum(list(saved.values()), axis=0)
        if len(chosen) < size:
            yield self._with_best(chosen, self.spent(chosen), in_all)
        for gone in chosen:
            if gone != self._largest:
                base = [number for number in chosen if number != gone]
                spent = self.spent(base)
                yield spent, base
                again = self._saved(places == gone, self._places(base))
                yield self._with_best(base, spent, in_all - saved[gone] + again)

    def _saved(self, batches: np.ndarray, places: np.ndarray) -> np.ndarray:
        """float64[buckets], what some batches would save if one bucket came to those at whose places they are."""
        places, weights = places[batches], self._weights[batches]
        # A batch moves to the new bucket when that one holds it and comes before its own.
        moves = (self._holds.T[batches] & (np.arange(len(self.buckets)) < places[:, None])).astype(np.float64)
        saved: np.ndarray = (self._cost[places] * weights) @ moves - self._cost * (weights @ moves)
        return saved

    def _with_best(self, base: list[int], spent: float, saved: np.ndarray) -> tuple[float, list[int]]:
        """The choice with the affordable bucket besides that saves most; `base` itself where none saves."""
        left = self._limits - self._takes[:, base].sum(axis=1)
        saved = np.where((self._takes <= left[:, None]).all(axis=0), saved, -np.inf)
        number = int(saved.argmax())
        if saved[number] <= 0 or number in base:
            return spent, base
        return spent - float(saved[number]), sorted([*base, number])

    def without_idle(self, chosen: list[int]) -> list[int]:
        """The largest bucket and those that batches run in."""
        used = set(self._places(chosen).tolist())
        return [number for number in chosen if number in used or number == self._largest]

    def _places(self, chosen: list[int]) -> np.ndarray:
        """int64[n], the bucket that each batch runs in."""
        return np.array(chosen)[self._holds[chosen].argmax(axis=0)]
