"""The bucket ladder: what it refuses, its order, and a bucket's capacity against packing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.fke.buckets import capacity, make_ladder
from flame_jax.packing import Bucket, Extent, Layout, fits
from flame_jax.schema import FeatureSchema

ALIGN = 8
LAYOUT = Layout(align=ALIGN, max_requests=4)
SCHEMA = FeatureSchema(block_length=20)

PAIRS = st.lists(
    st.integers(1, 12).flatmap(lambda t: st.tuples(st.just(t * ALIGN), st.integers(1, t).map(lambda c: c * ALIGN))),
    max_size=6,
)


@settings(max_examples=200)
@given(PAIRS)
def test_a_ladder_is_its_distinct_buckets_cheapest_first(pairs: list[tuple[int, int]]) -> None:
    top = (128, 96)  # holds the longest history, and at least as much as any of the others
    ladder = make_ladder([*pairs, top, top], SCHEMA, LAYOUT)
    assert set(ladder) == {*pairs, top}
    assert len(ladder) == len(set(ladder))
    assert all(before < after for before, after in pairwise(ladder))
    assert ladder[-1] == top


@settings(max_examples=200)
@given(PAIRS.filter(bool), st.integers(0, SCHEMA.block_length))
def test_the_largest_bucket_of_a_ladder_takes_any_history_of_the_schema(
    pairs: list[tuple[int, int]], history: int
) -> None:
    try:
        ladder = make_ladder(pairs, SCHEMA, LAYOUT)
    except ValueError:
        return
    assert fits([Extent(history, 1)], ladder[-1], LAYOUT)
    assert capacity(ladder[-1], history, LAYOUT) > 0


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "export.buckets is empty"),
        ([(64, 0)], "t64_c0"),
        ([(64, -8)], "t64_c-8"),
        ([(0, 0)], "t0_c0"),
        ([(64, 72)], "t64_c72"),
        ([(60, 8)], "layout.align = 8"),
        ([(64, 12)], "layout.align = 8"),
        ([(64, 32), (128, 1)], "t128_c1"),
        ([(24, 8)], "schema.block_length = 20"),
        ([(16, 8), (24, 16)], "t24_c16"),
    ],
    ids=str,
)
def test_a_ladder_that_cannot_serve_is_refused_with_its_setting(pairs: list[tuple[int, int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_ladder(pairs, SCHEMA, LAYOUT)


def test_a_ladder_may_hold_the_longest_history_and_one_aligned_candidate_exactly() -> None:
    assert make_ladder([[32, 8]], SCHEMA, LAYOUT) == (Bucket(32, 8),)


def test_a_ladder_whose_last_bucket_takes_fewer_candidates_than_another_is_refused() -> None:
    # The last bucket decides how a request is split: 512 candidates that t1024_c512 holds whole would go in eight.
    with pytest.raises(ValueError, match="t2048_c64"):
        make_ladder([(1024, 512), (2048, 64)], SCHEMA, LAYOUT)


@settings(max_examples=200)
@given(
    st.builds(Layout, align=st.sampled_from([1, 2, 4, 8]), max_requests=st.integers(1, 3)),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 100),
)
def test_capacity_is_the_most_candidates_that_fit_beside_a_history(
    layout: Layout, tokens: int, candidates: int, history: int
) -> None:
    bucket = Bucket(tokens * layout.align, min(tokens, candidates) * layout.align)
    fitting = [c for c in range(1, bucket.tokens + 2) if fits([Extent(history, c)], bucket, layout)]
    assert capacity(bucket, history, layout) == max(fitting, default=0)
