"""The choice of a ladder against exhaustive search, and what every choice keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.fke.ladder import (
    CANDIDATE_LEVELS,
    TOKEN_LEVELS,
    Budget,
    Demand,
    choose_ladder,
    largest_for,
    smallest_largest,
)
from flame_jax.packing import Bucket, Layout
from flame_jax.schema import FeatureSchema

ALIGN = 8
LAYOUT = Layout(align=ALIGN, max_requests=4)
SCHEMA = FeatureSchema(block_length=20)

Batches = list[tuple[int, int, float]]
"""Tokens and candidates in tiles, and a weight."""


def cost(bucket: Bucket) -> int:
    """Grows with both sizes, as FLOPs do; the last layer computes candidates only."""
    return 5 * bucket.tokens + 3 * bucket.candidates


BATCHES = st.lists(
    st.integers(1, 20).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t), st.floats(0.1, 10))),
    min_size=1,
    max_size=40,
)
LADDERS = st.lists(
    st.integers(1, 30).flatmap(lambda t: st.tuples(st.just(t * ALIGN), st.integers(1, t).map(lambda c: c * ALIGN))),
    max_size=5,
).map(lambda pairs: make_ladder([*pairs, (31 * ALIGN, 30 * ALIGN)], SCHEMA, LAYOUT))


def demand_of(batches: Batches) -> Demand:
    tokens, candidates, weights = (np.array(column) for column in zip(*batches, strict=True))
    return Demand.of(tokens * ALIGN, candidates * ALIGN, weights)


def spent(batches: Batches, ladder: Sequence[Bucket]) -> float:
    """What batches cost on a ladder, each in the first bucket that holds it."""
    return sum(
        weight * cost(next(b for b in sorted(ladder) if b.tokens >= t * ALIGN and b.candidates >= c * ALIGN))
        for t, c, weight in batches
    )


def choose(batches: Batches, most: int, budgets: Sequence[Budget] = (), start: Ladder = ()) -> Ladder:
    demand = demand_of(batches)
    return choose_ladder(
        demand, largest_for(demand, SCHEMA, LAYOUT), cost, max_buckets=most, budgets=budgets, start=start
    )


@settings(max_examples=150)
@given(BATCHES, LADDERS, st.integers(1, 6))
def test_a_choice_is_a_ladder_that_holds_every_batch(batches: Batches, start: Ladder, most: int) -> None:
    ladder = choose(batches, most, start=start)
    assert make_ladder(ladder, SCHEMA, LAYOUT) == ladder
    assert len(ladder) <= most
    demand = demand_of(batches)
    for tokens, candidates in zip(demand.tokens, demand.candidates, strict=True):
        assert any(tokens <= bucket.tokens and candidates <= bucket.candidates for bucket in ladder)
    assert demand.shares(ladder).sum() == pytest.approx(1)
    assert demand.spent(ladder, cost) == pytest.approx(spent(batches, ladder))


@settings(max_examples=150)
@given(BATCHES, LADDERS)
def test_a_choice_is_no_worse_than_the_ladder_it_started_from(batches: Batches, start: Ladder) -> None:
    ladder = choose(batches, len(start), start=start)
    assert spent(batches, ladder) <= spent(batches, start) * (1 + 1e-9)


@settings(max_examples=100)
@given(BATCHES, LADDERS)
def test_more_buckets_never_cost_more(batches: Batches, start: Ladder) -> None:
    costs = [spent(batches, choose(batches, most, start=start)) for most in range(1, 9)]
    assert all(fewer >= more * (1 - 1e-9) for fewer, more in pairwise(costs))


def test_as_many_buckets_as_kinds_of_batches_waste_nothing() -> None:
    batches: Batches = [(4, 1, 1.0), (5, 3, 1.0), (9, 2, 1.0), (12, 6, 1.0)]
    assert choose(batches, 4) == (Bucket(32, 8), Bucket(40, 24), Bucket(72, 16), Bucket(96, 48))


def best_by_trying_all(batches: Batches, most: int) -> float:
    """The least that any legal ladder costs whose buckets have the sizes of batches."""
    demand = demand_of(batches)
    largest = largest_for(demand, SCHEMA, LAYOUT)
    tokens, candidates = {t for t, _, _ in batches}, {c for _, c, _ in batches}
    others = {Bucket(t * ALIGN, c * ALIGN) for t in tokens for c in candidates if c <= t} - {largest}
    costs = []
    for count in range(most):
        for chosen in combinations(sorted(others), count):
            ladder = (*chosen, largest)
            costs.append(demand.spent(ladder, cost))
    return min(costs)


def test_the_search_is_within_two_percent_of_the_best_ladder_and_mostly_finds_it() -> None:
    random, ratios = np.random.default_rng(0), []
    for _ in range(40):
        tokens = random.integers(1, 40, 7)
        candidates = random.integers(1, tokens + 1)
        weights = random.exponential(size=7)
        batches = list(zip(tokens.tolist(), candidates.tolist(), weights.tolist(), strict=True))
        for most in (2, 3, 4):
            best = best_by_trying_all(batches, most)
            ratios.append(spent(batches, choose(batches, most)) / best)
    assert min(ratios) >= 1 - 1e-9, "better than every ladder there is"
    assert max(ratios) <= 1.02
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.9


def test_with_more_sizes_than_levels_quantiles_lose_little() -> None:
    """Against twelve buckets found by dynamic programming where candidates don't matter: tokens alone are sorted."""
    random = np.random.default_rng(1)
    tokens = np.maximum(random.lognormal(4, 0.8, 3000).astype(int), 4)
    assert len(np.unique(tokens)) > 2 * TOKEN_LEVELS
    demand = Demand.of(tokens * ALIGN, np.full(3000, ALIGN), np.ones(3000))
    largest = largest_for(demand, SCHEMA, LAYOUT)
    ladder = choose_ladder(demand, largest, cost, max_buckets=12)

    kinds = demand.tokens.tolist()
    below = np.concatenate([[0], np.cumsum(demand.weights)])
    prices = np.array([cost(Bucket(kind, ALIGN)) for kind in kinds])
    best = np.concatenate([[0.0], np.full(len(kinds), np.inf)])
    for _ in range(12):
        best = np.array([0.0] + [min(best[:i] + prices[i - 1] * (below[i] - below[:i])) for i in range(1, len(best))])
    assert best[-1] <= demand.spent(ladder, cost) <= 1.01 * best[-1]


def test_candidates_of_many_sizes_are_cut_to_levels_that_hold_them() -> None:
    sizes = np.arange(1, 4 * CANDIDATE_LEVELS)
    demand = Demand.of((sizes + 10) * ALIGN, sizes * ALIGN, np.ones(len(sizes)))
    ladder = choose_ladder(demand, largest_for(demand, SCHEMA, LAYOUT), cost, max_buckets=8)
    assert len(ladder) == 8
    assert demand.shares(ladder).min() > 0.02


@settings(max_examples=100)
@given(BATCHES, LADDERS, st.integers(400, 4000))
def test_budgets_are_kept(batches: Batches, start: Ladder, limit: int) -> None:
    def of(bucket: Bucket) -> float:
        return float(bucket.tokens + 40)

    budgets = [Budget(of, limit), Budget(lambda bucket: 1.0, 3)]
    ladder = choose(batches, 9, budgets, start)
    assert sum(map(of, ladder)) <= limit
    assert len(ladder) <= 3


def test_a_largest_bucket_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="t160_c160"):
        choose([(20, 20, 1.0)], 3, [Budget(lambda bucket: bucket.tokens, 159)])


def test_the_smallest_largest_bucket_is_a_ladder_and_nothing_smaller_is() -> None:
    least = smallest_largest(SCHEMA, LAYOUT)
    assert make_ladder([least], SCHEMA, LAYOUT) == (least,)
    with pytest.raises(ValueError, match="block_length"):
        make_ladder([(least.tokens - ALIGN, least.candidates)], SCHEMA, LAYOUT)


def test_a_batch_that_no_bucket_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="t64_c8"):
        demand_of([(4, 2, 1.0)]).places((Bucket(64, 8),))
